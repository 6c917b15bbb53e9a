//! Subcommands with options of their own.

pub mod load;
pub mod validate;
