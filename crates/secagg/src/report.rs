//! What ties a report to its client, its round and its parties: credentials, signatures, sealed envelopes.
//!
//! A fleet's authority signs each client's key ([`Credential`]); every party checks that by itself, so that no party can invent
//! clients. Seeds travel in one HPKE envelope for each party (RFC 9180: X25519, HKDF-SHA256, ChaCha20-Poly1305) whose associated
//! data name configuration, round, client, report, body and party: an envelope cannot be moved anywhere else.

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
use rand::CryptoRng;
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::error::SecAggError;
use crate::prg::Seed;

/// Bytes of a public key, of either kind.
pub const KEY_BYTES: usize = 32;
/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;
/// What sealing adds to a message.
pub const SEAL_BYTES: usize = KEY_BYTES + 16;

const INFO: &[u8] = b"isthmus/v1/hpke";

/// SHA-256 of the parts, one after the other.
pub fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    parts.iter().for_each(|p| hasher.update(p));
    hasher.finalize().into()
}

/// An Ed25519 key: a client's, or an authority's. Wiped when dropped, never printed.
pub struct SignKey(SigningKey);

impl SignKey {
    /// A new one.
    pub fn random(rng: &mut impl CryptoRng) -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        rng.fill_bytes(&mut *bytes);
        Self(SigningKey::from_bytes(&bytes))
    }

    /// From its secret bytes.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(bytes))
    }

    /// The secret bytes, to be stored.
    pub fn expose(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The public key.
    pub fn public(&self) -> [u8; KEY_BYTES] {
        self.0.verifying_key().to_bytes()
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        self.0.sign(message).to_bytes()
    }
}

impl std::fmt::Debug for SignKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SignKey(..)")
    }
}

fn verify(key: &[u8; KEY_BYTES], message: &[u8], signature: &[u8; SIGNATURE_BYTES], what: &'static str) -> Result<(), SecAggError> {
    let key = VerifyingKey::from_bytes(key).map_err(|_| SecAggError::Authentication(what))?;
    key.verify_strict(message, &Signature::from_bytes(signature)).map_err(|_| SecAggError::Authentication(what))
}

/// An authority's word that a key belongs to a client of its fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// The client: its public key.
    pub client: [u8; KEY_BYTES],
    /// Valid until then, in seconds since 1970.
    pub expires: u64,
    /// The authority's signature.
    pub signature: [u8; SIGNATURE_BYTES],
}

impl Credential {
    /// Issues one.
    pub fn issue(authority: &SignKey, client: [u8; KEY_BYTES], expires: u64) -> Self {
        Self { client, expires, signature: authority.sign(&Self::message(&client, expires)) }
    }

    fn message(client: &[u8; KEY_BYTES], expires: u64) -> Vec<u8> {
        [b"isthmus/v1/credential", &client[..], &expires.to_le_bytes()].concat()
    }

    /// Checks that one of the authorities issued it and that it is still valid at `now`.
    ///
    /// # Errors
    /// If not.
    pub fn check(&self, authorities: &[[u8; KEY_BYTES]], now: u64) -> Result<(), SecAggError> {
        let message = Self::message(&self.client, self.expires);
        if !authorities.iter().any(|a| verify(a, &message, &self.signature, "").is_ok()) {
            return Err(SecAggError::Authentication("the client's credential is not signed by an authority of this task"));
        }
        if self.expires <= now {
            return Err(SecAggError::Authentication("the client's credential has expired"));
        }
        Ok(())
    }
}

/// Where a report belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportId {
    /// Hash of the round's configuration.
    pub config: [u8; 32],
    /// The round.
    pub round: u64,
    /// The client's public key.
    pub client: [u8; KEY_BYTES],
    /// Drawn by the client for this report.
    pub report: [u8; 16],
    /// Hash of the body.
    pub body: [u8; 32],
}

impl ReportId {
    fn bytes(&self) -> Vec<u8> {
        [&self.config[..], &self.round.to_le_bytes(), &self.client, &self.report, &self.body].concat()
    }

    fn associated(&self, party: u8) -> Vec<u8> {
        [b"isthmus/v1/envelope", &self.bytes()[..], &[party]].concat()
    }

    fn signed(&self, envelopes: &[Vec<u8>]) -> Vec<u8> {
        let hashes: Vec<u8> = envelopes.iter().flat_map(|e| hash(&[e])).collect();
        [b"isthmus/v1/report", &self.bytes()[..], &hashes].concat()
    }

    /// The client's signature over itself and the sealed envelopes.
    pub fn sign(&self, key: &SignKey, envelopes: &[Vec<u8>]) -> [u8; SIGNATURE_BYTES] {
        key.sign(&self.signed(envelopes))
    }

    /// Checks the client's signature.
    ///
    /// # Errors
    /// If it is not the client's, or of something else.
    pub fn check(&self, envelopes: &[Vec<u8>], signature: &[u8; SIGNATURE_BYTES]) -> Result<(), SecAggError> {
        verify(&self.client, &self.signed(envelopes), signature, "the report's signature is not its client's")
    }

    /// Seals seeds for a party.
    ///
    /// # Errors
    /// If the party's key is none.
    pub fn seal(&self, party: u8, key: &[u8; KEY_BYTES], seeds: &[&Seed], rng: &mut impl CryptoRng) -> Result<Vec<u8>, SecAggError> {
        const BAD: SecAggError = SecAggError::Authentication("a party's public key is unusable");
        let key = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(key).map_err(|_| BAD)?;
        let plain = Zeroizing::new(seeds.iter().flat_map(|s| *s.expose()).collect::<Vec<u8>>());
        let (shared, sealed) = hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256, _>(
            &OpModeS::Base,
            &key,
            INFO,
            &plain,
            &self.associated(party),
            rng,
        )
        .map_err(|_| BAD)?;
        Ok([&shared.to_bytes()[..], &sealed].concat())
    }
}

/// A party's key for envelopes. Wiped when dropped, never printed.
pub struct EnvelopeKey {
    secret: <X25519HkdfSha256 as Kem>::PrivateKey,
    public: [u8; KEY_BYTES],
}

impl std::fmt::Debug for EnvelopeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EnvelopeKey(..)")
    }
}

impl EnvelopeKey {
    /// From 32 secret bytes, which may be random.
    ///
    /// # Errors
    /// If they are no key.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, SecAggError> {
        let bad = |_| SecAggError::Authentication("the envelope key is unusable");
        let secret = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(bytes).map_err(bad)?;
        let public = X25519HkdfSha256::sk_to_pk(&secret).to_bytes().into();
        Ok(Self { secret, public })
    }

    /// The public key.
    pub fn public(&self) -> [u8; KEY_BYTES] {
        self.public
    }

    /// Opens an envelope that holds `count` seeds.
    ///
    /// # Errors
    /// If it was sealed for somebody or something else, was changed, or holds another number of seeds.
    pub fn open(&self, id: &ReportId, party: u8, envelope: &[u8], count: usize) -> Result<Vec<Seed>, SecAggError> {
        const BAD: SecAggError = SecAggError::Authentication("the envelope was not sealed for this party, round, client and body");
        let (shared, sealed) = envelope.split_at_checked(KEY_BYTES).ok_or(BAD)?;
        let shared = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(shared).map_err(|_| BAD)?;
        let plain = hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.secret,
            &shared,
            INFO,
            sealed,
            &id.associated(party),
        );
        let plain = Zeroizing::new(plain.map_err(|_| BAD)?);
        if plain.len() != count * 32 {
            return Err(SecAggError::Size { what: "bytes of seeds", expected: count * 32, found: plain.len() });
        }
        let seed = |chunk: &[u8; 32]| {
            let mut bytes = *chunk;
            let seed = Seed::from_bytes(bytes);
            bytes.zeroize();
            seed
        };
        Ok(plain.as_chunks::<32>().0.iter().map(seed).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    fn id() -> ReportId {
        ReportId { config: [1; 32], round: 2, client: [3; 32], report: [4; 16], body: [5; 32] }
    }

    #[test]
    fn an_envelope_opens_only_where_it_belongs() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let key = EnvelopeKey::from_bytes(&[9; 32]).unwrap();
        let seeds = [Seed::from_bytes([7; 32]), Seed::from_bytes([8; 32])];
        let sealed = id().seal(1, &key.public(), &[&seeds[0], &seeds[1]], &mut rng).unwrap();
        assert_eq!(sealed.len(), 64 + SEAL_BYTES);
        assert_eq!(key.open(&id(), 1, &sealed, 2).unwrap(), seeds);
        let elsewhere: [fn(&mut ReportId); 5] =
            [|i| i.config[0] = 0, |i| i.round = 3, |i| i.client[0] = 0, |i| i.report[0] = 0, |i| i.body[0] = 0];
        for change in elsewhere {
            let mut other = id();
            change(&mut other);
            assert!(key.open(&other, 1, &sealed, 2).is_err());
        }
        assert!(key.open(&id(), 0, &sealed, 2).is_err(), "another party");
        assert!(key.open(&id(), 1, &sealed, 1).is_err(), "another number of seeds");
        assert!(EnvelopeKey::from_bytes(&[10; 32]).unwrap().open(&id(), 1, &sealed, 2).is_err(), "another key");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(key.open(&id(), 1, &changed, 2).is_err(), "byte {at}");
            assert!(key.open(&id(), 1, &sealed[..at], 2).is_err(), "{at} bytes");
        }
        assert!(!format!("{key:?}").contains('9'));
    }

    #[test]
    fn credentials_and_signatures_are_checked() {
        let mut rng = ChaCha20Rng::seed_from_u64(2);
        let (authority, other, client) = (SignKey::random(&mut rng), SignKey::random(&mut rng), SignKey::random(&mut rng));
        let credential = Credential::issue(&authority, client.public(), 100);
        assert!(credential.check(&[other.public(), authority.public()], 99).is_ok());
        assert!(credential.check(&[authority.public()], 100).is_err(), "expired");
        assert!(credential.check(&[other.public()], 99).is_err() && credential.check(&[], 99).is_err());
        assert!(Credential { expires: 200, ..credential.clone() }.check(&[authority.public()], 99).is_err());
        assert!(Credential { client: other.public(), ..credential }.check(&[authority.public()], 99).is_err());

        let id = ReportId { client: client.public(), ..id() };
        let envelopes = vec![vec![1, 2, 3], vec![4]];
        let signature = id.sign(&client, &envelopes);
        assert!(id.check(&envelopes, &signature).is_ok());
        assert!(id.check(&[vec![1, 2, 3], vec![5]], &signature).is_err());
        assert!(ReportId { round: 3, ..id.clone() }.check(&envelopes, &signature).is_err());
        assert!(id.check(&envelopes, &id.sign(&other, &envelopes)).is_err());
        assert_eq!(format!("{client:?}"), "SignKey(..)");
    }
}
