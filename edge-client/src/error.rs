//! Errors of the client.

use std::path::PathBuf;

/// Why a photo was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A file could not be read or written.
    #[error("{path}: {}", because(cause))]
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
    /// No quality level makes few enough bytes.
    #[error("{bytes} bytes even at the lowest quality level; at most {most} may be sent")]
    TooLong {
        /// Of the lowest level's container.
        bytes: usize,
        /// That were allowed.
        most: usize,
    },
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
    Server(Box<tonic::Status>), // not a `source`: its text is in this error's already
    /// Something else than an offload-server listens there.
    #[error("what listens there is no offload-server: {0} (is it the admin port?)")]
    NotOffload(String),
    /// Nothing came back in time.
    #[error("no answer within {0:?}")]
    Deadline(std::time::Duration),
}

impl From<tonic::Status> for ClientError {
    fn from(status: tonic::Status) -> Self {
        // tonic's words for an answer without a gRPC status; a server that dies in mid-call reads otherwise
        if status.message().contains("grpc-status header missing") {
            return Self::NotOffload(status.message().to_owned());
        }
        Self::Server(Box::new(status))
    }
}

impl ClientError {
    /// Whether the same may succeed a moment later, or at another server.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            // a broken connection has a source; a server's own word has none
            Self::Server(status) => {
                matches!(status.code(), tonic::Code::Unavailable | tonic::Code::ResourceExhausted)
                    || std::error::Error::source(&**status).is_some()
            }
            _ => false,
        }
    }
}

fn because(cause: &std::io::Error) -> String {
    match cause.kind() {
        std::io::ErrorKind::IsADirectory => "is a folder; name the files in it, or use `edge-client stream FOLDER`".into(),
        _ => cause.to_string(),
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
