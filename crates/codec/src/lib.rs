//! What goes over the wire and what a trained bottleneck consists of: the container of one coded
//! latent, integer entropy tables, the entropy coder, and the bundle's manifest.
//!
//! No I/O (but for [`folder`]), no async, no network code. Nothing here panics on any input; nothing is allocated beyond what
//! the registered tables allow. All tables are integers: what one machine encodes, every machine
//! decodes to the same symbols.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod coder;
pub mod container;
pub mod contexts;
pub mod distribution;
pub mod error;
pub mod estimator;
pub mod folder;
pub mod golden;
pub mod manifest;
pub mod pmf;
pub mod progressive;
pub mod quality;
pub mod refinement;
pub mod signature;
mod table_file;
pub mod tables;

pub use bundle::{Bundle, BundleHash};
pub use container::{Container, Header};
pub use contexts::Contexts;
pub use distribution::Distribution;
pub use error::CodecError;
pub use estimator::{Estimator, Input, Network, Predictor, Tap};
pub use manifest::Manifest;
pub use progressive::Progressive;
pub use quality::Quality;
pub use refinement::{Refinement, Refinements};
pub use signature::Trust;
pub use tables::{ChannelTable, LatentShape, Level, LevelTables, Tables};
