//! Networks of Isthmus on libtorch: pretrained backbones, the encoder that runs on the device,
//! decoders ("blueprints") that rebuild a backbone's shallow features, and the factorised prior.
//!
//! Tensors are NCHW, f32. Training code and the server share these definitions, so that what was
//! trained is what runs.

pub mod backbone;
pub mod bottleneck;
pub mod decoder;
pub mod device;
pub mod encoder;
pub mod error;
pub mod gdn;
mod layout;
pub mod prior;
pub mod process;
pub mod profile;
pub mod pth;
pub mod tuned;
pub mod weights;

pub use backbone::{Backbone, BackboneKind, Layer};
pub use bottleneck::Bottleneck;
pub use decoder::{Decoder, DecoderKind, DecoderSpec};
pub use encoder::{Encoder, EncoderKind};
pub use error::NetError;
pub use prior::FactorisedPrior;
pub use tuned::TunedSpec;
