//! What clients and parties of federated rounds have in common.
//!
//! [`round`] reads and checks a round's configuration, [`report`] makes and checks reports, [`participant`] takes part in rounds
//! over gRPC, [`operator`] creates and follows them. docs/secure-aggregation.md holds the protocol.

#![forbid(unsafe_code)]

pub mod error;
pub mod identity;
pub mod operator;
pub mod participant;
pub mod report;
pub mod round;
#[cfg(feature = "train")]
pub mod train;

pub use error::FederateError;
pub use operator::Operator;
pub use participant::Participant;
pub use round::RoundPlan;
