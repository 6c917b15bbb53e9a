//! Measures what the other crates claim: rate against agreement, next to image codecs, through a real
//! server.

#![forbid(unsafe_code)]

pub mod codecs;
pub mod compare;
pub mod error;
pub mod photos;
pub mod plot;
pub mod remote;
pub mod report;
pub mod run;
pub mod stats;
pub mod timing;
