//! End-to-end latency over emulated links: real client, real server, every strategy over the same link in turn.

pub mod config;
pub mod emulation;
pub mod measure;
pub mod page;
pub mod strategy;
pub mod tables;

pub use config::RunConfig;
pub use measure::{Results, run};
