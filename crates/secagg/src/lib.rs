//! Secure aggregation of one-bit vectors: no I/O, no clock, every random source passed in.
//!
//! A round: clients turn their updates into bits ([`quantise`]), split the bits into shares ([`boolean3`], or [`additive2`]), the
//! parties count set bits without seeing any, and the counts, which are exact integers, become the mean ([`Quantiser::mean`]).
//!
//! Inspired by ScionFL (arXiv 2210.07376): one bit per coordinate, linear quantisers, several servers. Counting by a Boolean adder
//! is our own design in that setting, not the paper's protocol; [`approximate`] follows its published code, for study.

#![forbid(unsafe_code)]

pub mod additive2;
pub mod approximate;
pub mod bits;
pub mod boolean3;
pub mod error;
pub mod prg;
pub mod quantise;
pub mod report;
pub mod simulate;

pub use bits::{Bits, le_bytes};
pub use error::SecAggError;
pub use prg::{LevelContext, ReportContext, Seed};
pub use quantise::{Quantiser, Scale, Transform};
