//! Keys and credentials of clients in files. Secret files can be read by their owner only.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use isthmus_secagg::report::{Credential, KEY_BYTES, SignKey};
use rand::TryRngCore;
use rand::rngs::OsRng;
use zeroize::Zeroizing;

use crate::error::FederateError;
use crate::report::Identity;
use crate::round::fixed;

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> FederateError + '_ {
    move |e| FederateError::Invalid(format!("{}: {e}", path.display()))
}

/// Writes a file that only its owner can read, and that does not exist yet.
///
/// # Errors
/// If it exists or cannot be written.
pub fn write_secret(path: &Path, text: &str) -> Result<(), FederateError> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io(path))?;
    file.write_all(text.as_bytes()).map_err(io(path))
}

/// Reads a text file that may be secret.
///
/// # Errors
/// If it cannot be read.
pub fn read(path: &Path) -> Result<Zeroizing<String>, FederateError> {
    Ok(Zeroizing::new(std::fs::read_to_string(path).map_err(io(path))?))
}

/// A number of bytes in hexadecimal digits.
///
/// # Errors
/// If it is something else.
pub fn from_hex<const N: usize>(what: &str, text: &str) -> Result<[u8; N], FederateError> {
    let wrong = |_| FederateError::Invalid(format!("{what}: {N} bytes in hexadecimal digits are wanted"));
    fixed(what, &Zeroizing::new(hex::decode(text.trim()).map_err(wrong)?))
}

/// 32 bytes from the system.
///
/// # Errors
/// If the system has none.
pub fn random() -> Result<Zeroizing<[u8; 32]>, FederateError> {
    let mut bytes = Zeroizing::new([0; 32]);
    OsRng.try_fill_bytes(&mut *bytes).map_err(|e| FederateError::Invalid(e.to_string()))?;
    Ok(bytes)
}

/// Makes a signing key, an authority's or a client's; its public half.
///
/// # Errors
/// If the file exists.
pub fn make_signer(path: &Path) -> Result<[u8; KEY_BYTES], FederateError> {
    let secret = random()?;
    write_secret(path, &Zeroizing::new(hex::encode(*secret)))?;
    Ok(SignKey::from_bytes(&secret).public())
}

/// Reads a signing key.
///
/// # Errors
/// If the file is missing or holds something else.
pub fn open_signer(path: &Path) -> Result<SignKey, FederateError> {
    let secret = Zeroizing::new(from_hex(&path.display().to_string(), &read(path)?)?);
    Ok(SignKey::from_bytes(&secret))
}

/// Writes a credential: `client`, `expires` and `signature`, a line each.
///
/// # Errors
/// If the file cannot be written.
pub fn write_credential(path: &Path, credential: &Credential) -> Result<(), FederateError> {
    let Credential { client, expires, signature } = credential;
    let text = format!("client = \"{}\"\nexpires = {expires}\nsignature = \"{}\"\n", hex::encode(client), hex::encode(signature));
    std::fs::write(path, text).map_err(io(path))
}

/// Reads a credential.
///
/// # Errors
/// If the file is missing or holds something else.
pub fn open_credential(path: &Path) -> Result<Credential, FederateError> {
    let text = read(path)?;
    let field = |key: &str| {
        let mut values = text.lines().filter_map(|l| l.split_once('=')).filter(|(k, _)| k.trim() == key);
        let value = values.next().map(|(_, v)| v.trim().trim_matches('"'));
        value.ok_or_else(|| FederateError::Invalid(format!("{}: {key} is missing", path.display())))
    };
    let expires = field("expires")?.parse().map_err(|_| FederateError::Invalid(format!("{}: expires is no number", path.display())))?;
    Ok(Credential { client: from_hex("client", field("client")?)?, expires, signature: from_hex("signature", field("signature")?)? })
}

/// A client's key with its credential.
///
/// # Errors
/// If a file is missing, or the credential is another key's.
pub fn open_identity(key: &Path, credential: &Path) -> Result<Identity, FederateError> {
    let identity = Identity { key: open_signer(key)?, credential: open_credential(credential)? };
    if identity.key.public() != identity.credential.client {
        return Err(FederateError::Invalid(format!("{} is a credential of another client than {}", credential.display(), key.display())));
    }
    Ok(identity)
}
