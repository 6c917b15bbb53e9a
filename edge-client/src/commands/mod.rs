//! The subcommands. Each returns whether everything went well.

use std::num::NonZeroUsize;
use std::path::Path;

use std::time::Duration;

use edge_client::{Budget, Client, ClientError, Encoder, Endpoint, bundle_versions, open_version};
use isthmus_codec::{Quality, Trust};

use crate::{EncodingArgs, ServerArgs};

pub mod auto;
pub mod classify;
pub mod doctor;
#[cfg(feature = "train")]
pub mod federate;
pub mod files;
pub mod output;
pub mod stream;

/// The servers that `args` name, each with its credentials.
pub fn endpoints(args: &ServerArgs) -> Result<Vec<Endpoint>, ClientError> {
    let ca = args.ca.as_deref().map(read).transpose()?;
    let token = args
        .token
        .as_deref()
        .map(|path| String::from_utf8(read(path)?).map_err(|_| ClientError::Usage(format!("{}: no text", path.display()))));
    let token = token.transpose()?;
    let identity = args.cert.as_deref().zip(args.key.as_deref()).map(|(cert, key)| Ok::<_, ClientError>((read(cert)?, read(key)?)));
    let identity = identity.transpose()?;
    let with_credentials = |url: &String| {
        let mut endpoint = Endpoint::new(url.trim())?.allow_insecure(args.insecure);
        if let Some(pem) = &ca {
            endpoint = endpoint.with_ca(pem.clone());
        }
        if let Some(token) = &token {
            endpoint = endpoint.with_token(token)?;
        }
        if let Some((certificate, key)) = &identity {
            endpoint = endpoint.with_identity(certificate, key);
        }
        Ok(endpoint)
    };
    args.server.iter().map(with_credentials).collect()
}

/// The encoder and the quality to use, of the newest version.
pub fn encoder(args: &EncodingArgs) -> Result<(Encoder, Quality), ClientError> {
    version(&bundle_versions(&args.bundle)?[0], args)
}

/// As [`encoder`], of the newest version that the server has.
pub async fn served(
    encoder: (Encoder, Quality),
    client: &mut Client,
    args: &EncodingArgs,
    limit: Duration,
) -> Result<(Encoder, Quality), ClientError> {
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

fn version(folder: &Path, args: &EncodingArgs) -> Result<(Encoder, Quality), ClientError> {
    let trust = Trust::keys(args.trust.iter().map(String::as_str))?;
    let unbounded = args.target_bytes.is_none() && args.max_bytes.is_none();
    let budget = Budget {
        target: args.target_bytes.map(NonZeroUsize::get),
        most: args.max_bytes.map(NonZeroUsize::get),
        times_usual: unbounded.then_some(TIMES_USUAL),
    };
    let encoder = Encoder::new(open_version(folder, &trust)?, args.threads.into())?.with_budget(budget);
    let best = args.target_bytes.map(|_| encoder.bundle().levels().into());
    let quality = args.quality.or(best).unwrap_or_else(|| encoder.default_quality().into());
    encoder.bundle().tables.level(quality)?;
    Ok((encoder, quality))
}

/// Without a budget of the user's, content that takes so many times the usual bytes falls to a lower quality.
const TIMES_USUAL: f64 = 2.0;

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
