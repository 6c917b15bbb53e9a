//! Client side of Isthmus: photo to bitstream on the device, bitstream to answer over gRPC.
//!
//! No libtorch here: the encoder runs on a small inference engine ([`engine`]).
//!
//! ```no_run
//! # async fn example() -> Result<(), edge_client::ClientError> {
//! use edge_client::{Client, Encoder, Endpoint, InferOptions, Payload};
//! let bundle = edge_client::open_bundle("bundles/lite0-patch-stem".as_ref())?;
//! let mut encoder = Encoder::new(bundle, 1)?;
//! let photo = std::fs::read("photo.jpg").expect("a photo");
//! let encoded = encoder.encode(&photo, 4)?;
//! let mut client = Client::connect(&Endpoint::new("http://127.0.0.1:50051")?).await?;
//! let answer = client.infer(Payload::Bitstream(encoded.container.into()), &InferOptions::default()).await?;
//! println!("{:?}", answer.labels);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod auto;
mod balance;
pub mod client;
pub mod doctor;
pub mod encoder;
pub mod engine;
pub mod error;
pub mod images;
pub mod local;
pub mod policy;
pub mod stream;

pub use auto::{AutoAnswer, AutoClient};
pub use client::{Client, Endpoint, InferOptions, Payload};
pub use encoder::{Budget, EncodeTiming, Encoded, Encoder, bundle_versions, open_bundle, open_version};
pub use error::ClientError;
