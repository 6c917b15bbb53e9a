//! Signed bundles: Ed25519 over the manifest, which holds the hash of every other file.

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use sha2::{Digest, Sha256};

use crate::CodecError;
use crate::bundle::hex;

/// Name of the signature in a bundle folder: 128 hexadecimal digits.
pub const SIGNATURE: &str = "manifest.sig";
const DOMAIN: &[u8] = b"isthmus/v1/bundle";

/// Whose bundles are used.
#[derive(Debug, Clone, Default)]
pub struct Trust(Vec<VerifyingKey>);

fn message(manifest: &[u8]) -> Vec<u8> {
    [DOMAIN, &Sha256::digest(manifest)].concat()
}

fn digits<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.trim();
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok();
    let mut bytes = [0; N];
    for (i, b) in bytes.iter_mut().enumerate() {
        *b = byte(i)?;
    }
    Some(bytes)
}

/// The content of the signature file for a manifest.
pub fn sign(manifest: &[u8], key: &[u8; 32]) -> String {
    hex(&SigningKey::from_bytes(key).sign(&message(manifest)).to_bytes()) + "\n"
}

impl Trust {
    /// Everybody's bundles, signed or not.
    pub fn all() -> Self {
        Self::default()
    }

    /// Bundles that the owner of one of these public keys (64 hexadecimal digits) has signed; with no keys, all.
    ///
    /// # Errors
    /// [`CodecError::BadBundle`] names the key that is none.
    pub fn keys<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Self, CodecError> {
        let key = |text: &str| {
            let key = digits(text).and_then(|b| VerifyingKey::from_bytes(&b).ok());
            key.ok_or_else(|| CodecError::bundle(format!("trusted key {text:?} is no Ed25519 public key of 64 hexadecimal digits")))
        };
        Ok(Self(keys.into_iter().map(key).collect::<Result<_, _>>()?))
    }

    /// Checks a manifest against the signature that `read` gives.
    ///
    /// # Errors
    /// [`CodecError::BadBundle`] if keys are demanded and the signature is missing or of another key.
    pub(crate) fn check(&self, manifest: &[u8], read: impl FnOnce() -> std::io::Result<Vec<u8>>) -> Result<(), CodecError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let text = read().map_err(|e| CodecError::bundle(format!("{SIGNATURE}: {e}; only signed bundles are trusted here")))?;
        let bytes = std::str::from_utf8(&text).ok().and_then(digits::<64>);
        let signature = Signature::from_bytes(&bytes.ok_or_else(|| CodecError::bundle(format!("{SIGNATURE} is no signature")))?);
        let message = message(manifest);
        if self.0.iter().any(|key| key.verify_strict(&message, &signature).is_ok()) {
            return Ok(());
        }
        Err(CodecError::bundle(format!("{SIGNATURE} is not of a trusted key, or the manifest was changed")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threat_forged_bundles_only_the_signed_manifest_of_a_trusted_key_passes() {
        let (key, other) = ([1; 32], [2; 32]);
        let public = hex(SigningKey::from_bytes(&key).verifying_key().as_bytes());
        let trust = Trust::keys([public.as_str()]).unwrap();
        let file = |text: String| move || Ok(text.into_bytes());
        trust.check(b"manifest", file(sign(b"manifest", &key))).unwrap();
        for wrong in [sign(b"manifest", &other), sign(b"other", &key), String::new(), "zz".repeat(64)] {
            assert!(trust.check(b"manifest", file(wrong)).is_err());
        }
        let missing = || Err(std::io::ErrorKind::NotFound.into());
        assert!(trust.check(b"manifest", missing).unwrap_err().to_string().contains("only signed bundles"));
        Trust::all().check(b"manifest", missing).unwrap();
        assert!(Trust::keys(["12"]).is_err() && Trust::keys(["g".repeat(64).as_str()]).is_err());
    }
}
