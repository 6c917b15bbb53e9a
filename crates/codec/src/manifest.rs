//! `manifest.toml`: what a trained bottleneck is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::tables::LatentShape;

/// Version of the manifest's own form.
pub const FORMAT: u32 = 1;

/// The manifest of a bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Form of this file, [`FORMAT`].
    pub format: u32,
    /// Name of the bundle.
    pub name: String,
    /// Version of the bundle.
    pub version: String,
    /// SHA-256 (hexadecimal) of every other file in the bundle that is used at run time.
    pub files: BTreeMap<String, String>,
    /// Geometry and preprocessing of the input.
    pub input: Input,
    /// Shape of the latent.
    pub latent: LatentShape,
    /// The device's network.
    pub encoder: EncoderEntry,
    /// File of the entropy tables.
    pub tables: String,
    /// File of the refinements of level 1, if its bitstreams can be progressive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refinements: Option<String>,
    /// One decoder per backbone.
    pub decoders: Vec<DecoderEntry>,
    /// Quality levels, level 1 first.
    pub quality: Vec<QualityEntry>,
    /// How it was trained.
    pub training: Training,
    /// A known input and what must come of it.
    pub golden: Golden,
}

/// Input geometry and preprocessing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Side of the square input in pixels.
    pub size: u32,
    /// How a photo becomes that square.
    pub resize: Resize,
    /// Subtracted from each 8-bit value.
    pub mean: f32,
    /// Then divided by.
    pub scale: f32,
}

/// Known preprocessing rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// Centre crop of `size / (size + 32)` of the shorter side, bicubic (a = -0.5, antialiased).
    CenterBicubic,
}

/// The encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderEntry {
    /// Architecture.
    pub kind: String,
    /// Graph for the edge engine (ONNX).
    pub graph: String,
    /// Weights (safetensors).
    pub weights: String,
    /// Trainable parameters.
    pub parameters: u64,
    /// Multiply-accumulates per photo.
    pub macs: u64,
}

/// A decoder blueprint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderEntry {
    /// Backbone that it feeds.
    pub backbone: String,
    /// SHA-256 of the backbone's safetensors file.
    pub backbone_sha256: String,
    /// Shape of the decoder, if it is not the residual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// It rebuilds the output of this block of the backbone, or the backbone's input if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split_block: Option<usize>,
    /// The backbone's blocks behind that, up to this one, are tuned with the decoder: `weights` has its own; absent if it uses the backbone's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned_to: Option<usize>,
    /// Channels of the residual trunk.
    pub width: i64,
    /// Channels inside a residual block.
    pub hidden: i64,
    /// Residual blocks.
    pub blocks: i64,
    /// Positions of the rebuilt layer per position of the latent, each way.
    pub upsample: i64,
    /// Shape (C, H, W) of the rebuilt layer.
    pub features: [i64; 3],
    /// Weights (safetensors).
    pub weights: String,
    /// Trainable parameters.
    pub parameters: u64,
    /// Multiply-accumulates per photo, without the backbone's tail.
    pub macs: u64,
}

/// A quality level as measured on the held-out photos when the bundle was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualityEntry {
    /// Rate weight it was trained with.
    pub lambda: f64,
    /// Mean container bytes.
    pub bytes: f64,
    /// Share of held-out crops whose top-1 equals the uncompressed teacher's (not accuracy).
    pub agreement: f64,
    /// Mean KL (nats) to the teacher.
    pub kl: f64,
}

/// Origin of the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// The teacher.
    pub teacher: String,
    /// SHA-256 of the list of photos (names, hashes, sets).
    pub photos_sha256: String,
    /// Photos trained on.
    pub photos: usize,
    /// Crops seen.
    pub crops: u64,
    /// Held-out crops evaluated.
    pub held_out_crops: usize,
    /// The command that made it.
    pub command: String,
    /// SHA-256 of the manifest of the bundle that a fleet, or somebody by themselves, fitted to their photos; absent if this one began with fresh weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapted_from: Option<String>,
}

/// Golden test of a bundle; see [`crate::golden`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// SHA-256 of the golden input's 8-bit pixels.
    pub input_sha256: String,
    /// Container of the golden input at the middle quality level.
    pub container: String,
    /// SHA-256 of its symbols (i32, little-endian).
    pub symbols_sha256: String,
    /// SHA-256 of the decoder's input (f32, little-endian).
    pub latent_sha256: String,
    /// First logits that the golden container must give, one list per decoder.
    pub logits: Vec<Vec<f32>>,
}
