//! The protocols of the server, over one [`crate::pipeline`].

pub mod inference;
pub mod offload;
mod progressive;
mod stream;
