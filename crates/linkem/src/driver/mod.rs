//! Drivers: what feeds the core with real traffic.

pub mod namespace;
pub mod packet;
pub mod stream;
pub mod timer;
