//! Errors of the trainer.

use std::path::{Path, PathBuf};

/// What can go wrong while fetching, training, evaluating or exporting.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file could not be read or written.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause (not a `source`: its text is in this error's already).
        cause: std::io::Error,
    },
    /// Some input is not what it should be.
    #[error("{what}: {why}")]
    Data {
        /// Which file or option.
        what: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// Networks.
    #[error(transparent)]
    Net(#[from] isthmus_nets::NetError),
    /// libtorch.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// Codec.
    #[error(transparent)]
    Codec(#[from] isthmus_codec::CodecError),
    /// Federated models and keys.
    #[error(transparent)]
    Federate(#[from] isthmus_federate::FederateError),
    /// The edge client's encoder.
    #[error(transparent)]
    Client(#[from] edge_client::ClientError),
    /// Comparison and plots.
    #[error(transparent)]
    Harness(#[from] bench_harness::error::HarnessError),
    /// Pixels.
    #[error(transparent)]
    Pixels(#[from] isthmus_pixels::PixelError),
}

impl TrainError {
    /// A [`TrainError::Data`].
    pub fn data(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Data { what: what.into(), why: why.into() }
    }

    /// A [`TrainError::Io`].
    pub fn io(path: &Path, cause: std::io::Error) -> Self {
        Self::Io { path: path.into(), cause }
    }
}
