//! Subcommands.

pub mod keys;
pub mod local;
pub mod party;
pub mod round;
#[cfg(feature = "train")]
pub mod train;
