//! Errors of the server, and the one place where they become gRPC status codes.

use std::path::PathBuf;
use std::time::Duration;

use isthmus_codec::CodecError;
use isthmus_pixels::PixelError;
use tonic::{Code, Status};

/// When a client that was refused may try again, where nothing better is known: a batch or two later.
const RETRY_PUSHBACK: Duration = Duration::from_millis(100);

/// Why the server did not start, or a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(String),
    /// A file could not be read.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause (not a `source`: its text is in this error's already).
        cause: std::io::Error,
    },
    /// A network could not be loaded.
    #[error(transparent)]
    Net(#[from] isthmus_nets::NetError),
    /// The listener or transport failed.
    #[error("transport: {0}")]
    Transport(String),
    /// A container is malformed or does not fit.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// An image is unusable.
    #[error(transparent)]
    Pixels(#[from] PixelError),
    /// The request lacks something.
    #[error("{0}")]
    Invalid(String),
    /// The model is not loaded.
    #[error("model {0:?} is not loaded; Describe (or RepositoryIndex) lists the models")]
    UnknownModel(String),
    /// The client's bundle is not loaded.
    #[error("bundle {0} is not loaded on this server; use the same bundle on both sides")]
    UnknownBundle(String),
    /// A refinement of what is not kept on its stream.
    #[error("no bitstream of id {0} waits on this stream to be refined; send it whole, as bitstream")]
    NothingToRefine(u64),
    /// The queues are full.
    #[error("the server is busy ({why}); try again later")]
    Busy {
        /// What is used up.
        why: &'static str,
        /// When it may be better.
        retry: Duration,
    },
    /// Nobody that the configuration knows.
    #[error("who asks? Send the token of a tenant (authorization: Bearer TOKEN) or its client certificate")]
    Unauthenticated,
    /// Only operators may do this.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The deadline is shorter than the network.
    #[error("the network takes about {} ms, the deadline leaves {} ms", takes.as_millis(), left.as_millis())]
    Hopeless {
        /// By prediction.
        takes: Duration,
        /// Until the deadline.
        left: Duration,
    },
    /// The deadline has passed.
    #[error("the deadline passed while the request was {0}")]
    Deadline(&'static str),
    /// The server is going down.
    #[error("the server is shutting down")]
    Draining,
    /// A stream has lasted as long as a connection may.
    #[error("the stream is as old as a connection may be; open it again")]
    Aged,
    /// libtorch failed on a batch.
    #[error("the network failed: {0}")]
    Network(String),
}

impl ServerError {
    /// Refused for a reason that says nothing of how long it will last.
    pub(crate) fn busy(why: &'static str) -> Self {
        Self::Busy { why, retry: RETRY_PUSHBACK }
    }

    /// Short, bounded name for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config(_) | Self::Io { .. } | Self::Net(_) | Self::Transport(_) => "setup",
            Self::Codec(CodecError::WrongBundle { .. }) | Self::UnknownBundle(_) => "wrong_bundle",
            Self::Codec(_) | Self::NothingToRefine(_) => "bad_container",
            Self::Pixels(_) => "bad_image",
            Self::Invalid(_) => "bad_request",
            Self::UnknownModel(_) => "unknown_model",
            Self::Busy { .. } => "busy",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden(_) => "forbidden",
            Self::Deadline(_) | Self::Hopeless { .. } => "deadline",
            Self::Draining => "draining",
            Self::Aged => "aged",
            Self::Network(_) => "network",
        }
    }

    /// In milliseconds, when a client that was refused may ask again; 0 for other errors.
    pub fn retry_pushback_ms(&self) -> u32 {
        match self {
            Self::Busy { retry, .. } => u32::try_from(retry.as_millis()).unwrap_or(u32::MAX).max(1),
            _ => 0,
        }
    }

    /// The gRPC code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::Codec(CodecError::WrongBundle { .. }) | Self::UnknownBundle(_) | Self::NothingToRefine(_) => Code::FailedPrecondition,
            Self::Codec(CodecError::BadTables(_) | CodecError::BadBundle(_)) => Code::Internal,
            Self::Codec(_) | Self::Pixels(_) | Self::Invalid(_) => Code::InvalidArgument,
            Self::UnknownModel(_) => Code::NotFound,
            Self::Busy { .. } => Code::ResourceExhausted,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Forbidden(_) => Code::PermissionDenied,
            Self::Deadline(_) | Self::Hopeless { .. } => Code::DeadlineExceeded,
            Self::Draining | Self::Aged => Code::Unavailable,
            Self::Config(_) | Self::Io { .. } | Self::Net(_) | Self::Transport(_) | Self::Network(_) => Code::Internal,
        }
    }
}

impl From<ServerError> for Status {
    fn from(error: ServerError) -> Self {
        let mut status = Self::new(error.code(), error.to_string());
        let pause = error.retry_pushback_ms();
        if pause > 0 {
            // gRPC clients that retry wait so long first
            status.metadata_mut().insert("grpc-retry-pushback-ms", pause.into());
        }
        status
    }
}

/// What the transport says of a message that is too large (OUT_OF_RANGE, which in gRPC is for streams that end) as this server says what can
/// never succeed.
pub(crate) fn of_transport(status: Status) -> Status {
    if status.code() == Code::OutOfRange { Status::invalid_argument(status.message()) } else { status }
}

/// The same in a response that has headers alone.
pub(crate) fn of_transport_headers(headers: &mut http::HeaderMap) {
    const STATUS: &str = "grpc-status";
    if let Some(code) = headers.get_mut(STATUS).filter(|code| *code == (Code::OutOfRange as i32).to_string().as_str()) {
        *code = http::HeaderValue::from(Code::InvalidArgument as i32);
    }
}
