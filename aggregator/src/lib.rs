//! A party of federated rounds with secure aggregation.
//!
//! Clients upload to party 0 ([`client_service`]), which passes reports on ([`peer`]); when a round is sealed, the parties agree on the
//! set and count its bits under shares ([`compute`]), and only then open the counts. [`round`] holds the states and what is written
//! before what is done; [`coordinator`] drives rounds at party 0. docs/secure-aggregation.md holds the protocol.

#![forbid(unsafe_code)]

pub mod client_service;
pub mod compute;
pub mod config;
pub mod coordinator;
pub mod error;
pub mod keys;
pub mod local;
pub mod party;
pub mod peer;
pub mod round;
pub mod round_service;
pub mod serve;
pub mod status;
pub mod store;
pub mod telemetry;
#[cfg(feature = "train")]
pub mod train;

pub use config::Config;
pub use error::AggregatorError;
pub use serve::{Running, start};
