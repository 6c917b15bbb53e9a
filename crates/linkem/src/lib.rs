//! Emulated links.
//!
//! The core is a state machine without clock and I/O: [`Direction`] takes packets ([`Direction::offer`]), gives back
//! those that have arrived ([`Direction::poll`]) and says when it next has something to do
//! ([`Direction::next_deadline`]). Time is a [`std::time::Duration`] since the start of the run. The same seed and the
//! same offers give the same schedule. Drivers feed it real packets or byte streams.
//!
//! A packet's way: loss, queue (bytes or packets, tail drop or CoDel), serialiser (constant rate, steps, or delivery
//! opportunities of a trace; nothing during outages), propagation delay with jitter.

#![forbid(unsafe_code)]

pub mod catalogue;
pub mod codel;
pub mod config;
pub mod direction;
pub mod driver;
pub mod error;
pub mod jitter;
pub mod lateness;
pub mod loss;
pub mod rate;
pub mod trace;

pub use config::{DirectionConfig, LinkConfig};
pub use direction::{Direction, Drop, Stats};
pub use error::LinkError;
pub use lateness::{Lateness, LatenessSummary};
