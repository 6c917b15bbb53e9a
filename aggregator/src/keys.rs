//! Keys in files: a party's and an operator's; those of authorities and clients are [`isthmus_federate::identity`]'s.
//!
//! Secret files can be read by their owner only. A party's public description goes to the other parties.

use std::path::Path;

pub use isthmus_federate::identity::{from_hex, make_signer, open_identity, open_signer, write_credential};
use isthmus_federate::identity::{random, read, write_secret};
use isthmus_secagg::report::{EnvelopeKey, KEY_BYTES, hash};
use rand::SeedableRng;
use rand::rngs::{OsRng, StdRng};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::AggregatorError;

const CERTIFICATE: &str = "identity.pem";
const TLS_KEY: &str = "identity.key";
const ENVELOPE_KEY: &str = "envelope.key";
/// The other parties' file in a key folder.
pub const PUBLIC: &str = "public.toml";

/// What a party tells the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublicParty {
    /// 0, 1 or 2.
    pub party: u8,
    /// Where its listener for parties is.
    pub url: String,
    /// Public key of its envelopes, in hexadecimal digits.
    pub envelope_key: String,
    /// Its TLS certificate.
    pub certificate: String,
}

/// What a party keeps for itself.
pub struct SecretParty {
    /// Certificate of both listeners.
    pub certificate: String,
    /// Its key.
    pub tls_key: Zeroizing<String>,
    /// Opens envelopes.
    pub envelope: EnvelopeKey,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> AggregatorError + '_ {
    move |cause| AggregatorError::Io { path: path.into(), cause }
}

fn config(why: impl std::fmt::Display) -> AggregatorError {
    AggregatorError::Config(why.to_string())
}

/// Name that a party's certificate is checked for.
pub fn tls_name(party: u8) -> String {
    format!("party-{party}.isthmus.internal")
}

/// Makes a party's keys in `folder`, for a party that others reach at `url` under the names `hosts`.
///
/// # Errors
/// If there are keys already, or the folder cannot be written.
pub fn make_party(folder: &Path, party: u8, url: &str, hosts: &[String]) -> Result<PublicParty, AggregatorError> {
    let host =
        url.parse::<tonic::transport::Uri>().ok().filter(|u| u.scheme_str() == Some("https")).and_then(|u| u.host().map(str::to_owned));
    if host.is_none_or(|h| h.is_empty()) {
        return Err(config(format!("url {url:?}: an address such as https://agg1.example.org:50071 is wanted")));
    }
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let names: Vec<String> = hosts.iter().cloned().chain([tls_name(party)]).collect();
    let made = rcgen::generate_simple_self_signed(names).map_err(config)?;
    write_secret(&folder.join(TLS_KEY), &Zeroizing::new(made.signing_key.serialize_pem()))?;
    let secret = random()?;
    write_secret(&folder.join(ENVELOPE_KEY), &Zeroizing::new(hex::encode(*secret)))?;
    let path = folder.join(CERTIFICATE);
    std::fs::write(&path, made.cert.pem()).map_err(io(&path))?;
    let envelope_key = hex::encode(EnvelopeKey::from_bytes(&secret)?.public());
    let public = PublicParty { party, url: url.into(), envelope_key, certificate: made.cert.pem() };
    let path = folder.join(PUBLIC);
    std::fs::write(&path, toml::to_string(&public).map_err(config)?).map_err(io(&path))?;
    Ok(public)
}

impl SecretParty {
    /// Reads a party's keys.
    ///
    /// # Errors
    /// If a file is missing or holds something else.
    pub fn open(folder: &Path) -> Result<Self, AggregatorError> {
        if !folder.join(CERTIFICATE).exists() {
            return Err(config(format!("{} holds no keys of a party: `aggregator keys party --out {0}` makes them", folder.display())));
        }
        let certificate = read(&folder.join(CERTIFICATE))?.to_string();
        let secret = Zeroizing::new(from_hex(ENVELOPE_KEY, &read(&folder.join(ENVELOPE_KEY))?)?);
        Ok(Self { certificate, tls_key: read(&folder.join(TLS_KEY))?, envelope: EnvelopeKey::from_bytes(&secret)? })
    }
}

impl PublicParty {
    /// Reads a party's description.
    ///
    /// # Errors
    /// If the file is missing or holds something else.
    pub fn open(path: &Path) -> Result<Self, AggregatorError> {
        let text = read(path)?;
        let public: Self = toml::from_str(&text).map_err(|e| config(format!("{}: {e}", path.display())))?;
        public.key()?;
        public.certificate_der()?;
        Ok(public)
    }

    /// Its certificate as presented in a handshake.
    ///
    /// # Errors
    /// If the text holds none.
    pub fn certificate_der(&self) -> Result<Vec<u8>, AggregatorError> {
        let der = CertificateDer::from_pem_slice(self.certificate.as_bytes());
        der.map(|d| d.as_ref().to_vec()).map_err(|e| config(format!("certificate of party {}: {e}", self.party)))
    }

    /// The public key of its envelopes.
    ///
    /// # Errors
    /// If it is none.
    pub fn key(&self) -> Result<[u8; KEY_BYTES], AggregatorError> {
        Ok(from_hex("envelope_key", &self.envelope_key)?)
    }
}

/// Makes an operator's token; its SHA-256, which party 0 is told.
///
/// # Errors
/// If the file exists.
pub fn make_token(path: &Path) -> Result<String, AggregatorError> {
    let token = Zeroizing::new(hex::encode(*random()?));
    write_secret(path, &token)?;
    Ok(hex::encode(hash(&[token.as_bytes()])))
}

/// Random bytes from the system.
///
/// # Errors
/// If the system has none.
pub fn random_seed() -> Result<[u8; 32], AggregatorError> {
    Ok(*random()?)
}

/// A cryptographic generator seeded by the system: asking the system itself for each bit of a vector takes a second.
///
/// # Errors
/// If the system gives no seed.
pub fn system_rng() -> Result<impl rand::CryptoRng, AggregatorError> {
    StdRng::try_from_rng(&mut OsRng).map_err(|e| AggregatorError::Config(e.to_string()))
}
