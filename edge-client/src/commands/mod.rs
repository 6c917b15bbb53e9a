//! The subcommands. Each returns whether everything went well.

use std::path::Path;

use std::time::Duration;

use edge_client::{Client, ClientError, Encoder, Endpoint, bundle_versions, open_version};
use isthmus_codec::Trust;

use crate::{EncodingArgs, ServerArgs};

pub mod auto;
pub mod classify;
pub mod doctor;
#[cfg(feature = "train")]
pub mod federate;
pub mod files;
pub mod output;
pub mod stream;

pub fn endpoint(args: &ServerArgs) -> Result<Endpoint, ClientError> {
    let mut endpoint = Endpoint::new(&args.server)?.allow_insecure(args.insecure);
    if let Some(path) = &args.ca {
        endpoint = endpoint.with_ca(read(path)?);
    }
    if let Some(path) = &args.token {
        let token = String::from_utf8(read(path)?).map_err(|_| ClientError::Usage(format!("{}: no text", path.display())))?;
        endpoint = endpoint.with_token(&token)?;
    }
    if let (Some(cert), Some(key)) = (&args.cert, &args.key) {
        endpoint = endpoint.with_identity(&read(cert)?, &read(key)?);
    }
    Ok(endpoint)
}

/// The encoder and the quality level to use, of the newest version.
pub fn encoder(args: &EncodingArgs) -> Result<(Encoder, u8), ClientError> {
    version(&bundle_versions(&args.bundle)?[0], args)
}

/// As [`encoder`], of the newest version that the server has.
pub async fn served(
    encoder: (Encoder, u8),
    client: &mut Client,
    args: &EncodingArgs,
    limit: Duration,
) -> Result<(Encoder, u8), ClientError> {
    let versions = bundle_versions(&args.bundle)?;
    if versions.len() > 1 {
        let described = client.describe(None, limit).await?;
        let has = |hash: &[u8]| described.models.iter().flat_map(|m| &m.bundles).any(|b| b.hash == hash);
        for folder in &versions {
            let older = version(folder, args)?;
            if has(&older.0.bundle().hash.0) {
                return Ok(older);
            }
        }
    }
    client.describe(Some(&encoder.0.bundle().hash), limit).await?;
    Ok(encoder)
}

fn version(folder: &Path, args: &EncodingArgs) -> Result<(Encoder, u8), ClientError> {
    let trust = Trust::keys(args.trust.iter().map(String::as_str))?;
    let encoder = Encoder::new(open_version(folder, &trust)?, args.threads.into())?;
    let quality = args.quality.unwrap_or_else(|| encoder.default_quality());
    encoder.bundle().tables.level(quality)?;
    Ok((encoder, quality))
}

/// Largest file read: more than any photo, container or certificate needs.
const LARGEST: u64 = 256 << 20;

/// A regular file of bounded size.
pub fn read(path: &Path) -> Result<Vec<u8>, ClientError> {
    let io = |cause| ClientError::Io { path: path.into(), cause };
    let about = std::fs::metadata(path).map_err(io)?;
    if about.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    if !about.is_file() {
        return Err(ClientError::Usage(format!("{}: is no regular file", path.display())));
    }
    if about.len() > LARGEST {
        return Err(ClientError::Usage(format!("{}: {} bytes; at most {LARGEST} are read", path.display(), about.len())));
    }
    std::fs::read(path).map_err(io)
}
