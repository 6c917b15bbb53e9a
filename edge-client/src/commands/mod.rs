//! The subcommands. Each returns whether everything went well.

use std::path::Path;

use edge_client::{ClientError, Encoder, Endpoint, open_bundle};

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
    Ok(endpoint)
}

/// The encoder and the quality level to use.
pub fn encoder(args: &EncodingArgs) -> Result<(Encoder, u8), ClientError> {
    let encoder = Encoder::new(open_bundle(&args.bundle)?, args.threads.into())?;
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
