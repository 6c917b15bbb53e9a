//! Measures what the other crates claim, through a real server: rate against agreement ([`compare`]), latency over emulated links
//! ([`run`]), load ([`load`]), and the emulator itself.

#![forbid(unsafe_code)]

pub mod bd;
pub mod codecs;
pub mod compare;
pub mod error;
pub mod load;
pub mod photos;
pub mod plot;
pub mod remote;
pub mod report;
pub mod run;
pub mod stats;
pub mod timing;
pub mod validate;
