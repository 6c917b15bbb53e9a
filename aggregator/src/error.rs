//! Errors of a party, and the one place where they become gRPC status codes.

use std::path::PathBuf;

use isthmus_federate::FederateError;
use isthmus_secagg::SecAggError;
use tonic::{Code, Status};

/// Why a party did not start, or a call failed.
#[derive(Debug, thiserror::Error)]
pub enum AggregatorError {
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(String),
    /// A file could not be used.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause (not a `source`: its text is in this error's already).
        cause: std::io::Error,
    },
    /// The listener or transport failed.
    #[error("transport: {0}")]
    Transport(String),
    /// The store failed.
    #[error("store: {0}")]
    Store(String),
    /// Input that can never succeed.
    #[error("{0}")]
    Invalid(String),
    /// The caller is not who it must be.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// No such round, report or model.
    #[error("{0}")]
    NotFound(String),
    /// The round is in another state.
    #[error("{0}")]
    State(String),
    /// A second, different report.
    #[error("{0}")]
    Conflict(&'static str),
    /// A limit.
    #[error("{0}; try again later")]
    Busy(&'static str),
    /// Another party cannot be reached or refused.
    #[error("party {party}: {} ({:?})", status.message(), status.code())]
    Peer {
        /// Which.
        party: u8,
        /// Its answer (not a `source`: its text is in this error's already).
        status: Box<Status>,
    },
    /// A time limit passed.
    #[error("{0} took too long")]
    Deadline(&'static str),
    /// A round's configuration or a report.
    #[error(transparent)]
    Federate(#[from] FederateError),
}

impl From<SecAggError> for AggregatorError {
    fn from(error: SecAggError) -> Self {
        Self::Federate(error.into())
    }
}

impl AggregatorError {
    /// Short, bounded name for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config(_) | Self::Io { .. } | Self::Transport(_) => "setup",
            Self::Store(_) => "store",
            Self::Unauthenticated(_) | Self::Federate(FederateError::SecAgg(SecAggError::Authentication(_))) => "authentication",
            Self::NotFound(_) => "not_found",
            Self::Federate(FederateError::OtherConfig(_)) => "other_config",
            Self::State(_) => "state",
            Self::Conflict(_) => "conflict",
            Self::Busy(_) => "busy",
            Self::Peer { .. } => "peer",
            Self::Deadline(_) => "deadline",
            Self::Invalid(_) | Self::Federate(_) => "invalid",
        }
    }

    /// The gRPC code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::Unauthenticated(_) | Self::Federate(FederateError::SecAgg(SecAggError::Authentication(_))) => Code::Unauthenticated,
            Self::NotFound(_) => Code::NotFound,
            Self::State(_) | Self::Federate(FederateError::OtherConfig(_)) => Code::FailedPrecondition,
            Self::Conflict(_) => Code::AlreadyExists,
            Self::Busy(_) => Code::ResourceExhausted,
            Self::Deadline(_) => Code::DeadlineExceeded,
            Self::Peer { .. } => Code::Unavailable,
            Self::Invalid(_) | Self::Federate(FederateError::Invalid(_) | FederateError::SecAgg(_)) => Code::InvalidArgument,
            Self::Config(_) | Self::Io { .. } | Self::Transport(_) | Self::Store(_) | Self::Federate(_) => Code::Internal,
        }
    }
}

impl From<AggregatorError> for Status {
    fn from(error: AggregatorError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
