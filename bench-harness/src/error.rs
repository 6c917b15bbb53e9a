//! Errors of the harness.

use std::path::PathBuf;

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A file could not be read or written.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause (not a `source`: its text is in this error's already).
        cause: std::io::Error,
    },
    /// Input is not what it should be.
    #[error("{what}: {why}")]
    Data {
        /// Which input.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The client failed.
    #[error(transparent)]
    Client(#[from] edge_client::ClientError),
    /// A bitstream could not be made.
    #[error(transparent)]
    Codec(#[from] isthmus_codec::CodecError),
    /// Whatever computes the answers failed.
    #[error("backend: {0}")]
    Backend(String),
}

impl HarnessError {
    pub(crate) fn data(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Data { what: what.into(), why: why.into() }
    }
}
