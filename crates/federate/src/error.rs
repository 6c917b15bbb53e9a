//! Errors of this crate.

use isthmus_secagg::SecAggError;

/// Why a round's configuration or a report was refused, or taking part failed.
#[derive(Debug, thiserror::Error)]
pub enum FederateError {
    /// A message lacks something or holds something senseless.
    #[error("{0}")]
    Invalid(String),
    /// The configuration is another than the round's.
    #[error("the report was made for another configuration of round {0}: fetch it again")]
    OtherConfig(u64),
    /// A vector, a signature, an envelope.
    #[error(transparent)]
    SecAgg(#[from] SecAggError),
    /// A bundle or its tables.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Codec(#[from] isthmus_codec::CodecError),
    /// The connection could not be set up.
    #[error("cannot connect to {url}: {why}")]
    Connect {
        /// Where to.
        url: String,
        /// What is in the way.
        why: String,
    },
    /// The coordinator refused.
    #[error("{what}: {} ({:?}){}", status.message(), status.code(), hint(status))]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Its answer (not a `source`: its text is in this error's already).
        status: Box<tonic::Status>,
    },
    /// A time limit passed.
    #[error("{what} took longer than {limit:?}")]
    Late {
        /// What.
        what: &'static str,
        /// The limit.
        limit: std::time::Duration,
    },
}

/// A server that speaks TLS hangs up on those who do not.
fn hint(status: &tonic::Status) -> &'static str {
    if status.message().contains("operation was canceled") {
        "; the other side hung up: does the address begin with https:// if it speaks TLS?"
    } else {
        ""
    }
}

impl FederateError {
    /// True if trying again later may help.
    pub fn is_transient(&self) -> bool {
        use tonic::Code;
        match self {
            Self::Connect { .. } | Self::Late { .. } => true,
            Self::Refused { status, .. } => {
                matches!(
                    status.code(),
                    Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
                )
            }
            _ => false,
        }
    }
}
