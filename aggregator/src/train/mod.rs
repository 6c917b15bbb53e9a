//! Federated training: a loop of rounds over a fleet, part of which may be simulated here.
//!
//! [`config`] says what, [`fleet`] trains simulated clients and sends their reports over gRPC like any others, [`run`] is the loop:
//! publish the model, open a round, seal it, add the mean to the model, score it, write a checkpoint.

pub mod config;
pub mod fleet;
pub mod run;

pub use config::TrainConfig;
pub use run::{Progress, run};
