//! Errors of the client.

use std::path::PathBuf;

/// Why a photo was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A file could not be read or written.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause (not a `source`: its text is in this error's already).
        cause: std::io::Error,
    },
    /// The photo is unusable.
    #[error(transparent)]
    Pixels(#[from] isthmus_pixels::PixelError),
    /// The bundle or a container is unusable.
    #[error(transparent)]
    Codec(#[from] isthmus_codec::CodecError),
    /// The edge engine failed.
    #[error("encoder: {0}")]
    Engine(String),
    /// An option is wrong.
    #[error("{0}")]
    Usage(String),
    /// The server cannot be reached.
    #[error("cannot reach {url}: {why}")]
    Connect {
        /// Where.
        url: String,
        /// What failed.
        why: String,
    },
    /// The server answered with an error.
    #[error("server: {} ({:?})", .0.message(), .0.code())]
    Server(#[from] Box<tonic::Status>),
    /// Nothing came back in time.
    #[error("no answer within {0:?}")]
    Deadline(std::time::Duration),
}

impl From<tonic::Status> for ClientError {
    fn from(status: tonic::Status) -> Self {
        Self::Server(Box::new(status))
    }
}

/// The causes of an error in one line (transport errors hide theirs).
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
