//! The server's half of a split network: containers and images in, labels out.
//!
//! Path of a request: [`services`] (protocols) -> [`pipeline`] (limits, deadline) -> [`admission`] (is there time?) -> [`intake`] (entropy or image decoding on a bounded
//! pool) -> [`batcher`] (what waits together runs together) -> [`model`] (decoder and tail on libtorch).

#![forbid(unsafe_code)]

mod admission;
mod answering;
pub mod batcher;
pub mod config;
pub mod error;
pub mod features;
pub mod intake;
pub mod labels;
mod limits;
pub mod model;
pub mod pipeline;
pub mod placement;
pub mod profile;
pub mod receiving;
pub mod registry;
pub mod repository;
pub mod serve;
pub mod services;
pub mod statistics;
pub mod status;
pub mod telemetry;
pub mod tenants;

pub use config::Config;
pub use error::ServerError;
pub use serve::{Running, start};
