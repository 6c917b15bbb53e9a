//! Decoder blueprints: de-quantised latent to the features of one backbone at its split point.
//!
//! Restoration (residual blocks at the latent's resolution), then a projection to the channels of the layer
//! to rebuild and, where that layer is finer than the latent, a sub-pixel rearrangement. The layer may be
//! any of the backbone's, down to its input: the later it is, the more the decoder must learn by itself of what
//! the backbone's frozen blocks know already. The output is produced per-channel normalised and scaled back
//! with statistics of the teacher.

use isthmus_codec::LatentShape;
use isthmus_codec::manifest::DecoderEntry;
use serde::{Deserialize, Serialize};
use tch::{Tensor, nn};

use crate::encoder::{LATENT_CHANNELS, conv2d};
use crate::profile::LayerCost;

/// What a decoder looks like; stored in the bundle's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecoderSpec {
    /// Channels of the residual trunk.
    pub width: i64,
    /// Channels inside a residual block.
    pub hidden: i64,
    /// Residual blocks.
    pub blocks: i64,
    /// Channels of the layer to rebuild.
    pub output: i64,
    /// Positions of that layer per position of the latent, each way.
    pub upsample: i64,
    /// Side to which the rebuilt layer is resized (bilinear), where the backbone wants another than the latent's times `upsample`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<i64>,
}

impl DecoderSpec {
    /// The decoder that a manifest describes, for its latent.
    pub fn from_entry(entry: &DecoderEntry, latent: LatentShape) -> Self {
        let [output, side, _] = entry.features;
        let resize = (i64::from(latent.height) * entry.upsample != side).then_some(side);
        Self { width: entry.width, hidden: entry.hidden, blocks: entry.blocks, output, upsample: entry.upsample, resize }
    }

    /// Trainable parameters.
    pub fn parameters(&self) -> u64 {
        let conv = |i: i64, o: i64, k: i64| o * (i * k * k + 1);
        let block = conv(self.width, self.hidden, 1) + conv(self.hidden, self.hidden, 3) + conv(self.hidden, self.width, 1);
        (conv(LATENT_CHANNELS, self.width, 3) + self.blocks * block + conv(self.width, self.output * self.upsample * self.upsample, 3))
            as u64
    }

    /// Multiply-accumulates for a latent of `h` x `w`.
    pub fn macs(&self, h: i64, w: i64) -> u64 {
        let block = 2 * self.width * self.hidden + 9 * self.hidden * self.hidden;
        ((9 * LATENT_CHANNELS * self.width + self.blocks * block + 9 * self.width * self.output * self.upsample * self.upsample) * h * w)
            as u64
    }
}

impl DecoderSpec {
    /// Cost of each layer for a latent of `h` x `w`, which is square.
    pub fn layers(&self, h: i64, w: i64) -> Vec<LayerCost> {
        let side = h.max(w);
        let conv = |name: String, i: i64, o: i64, k: i64| LayerCost::conv(name, (i, side), (o, side), i * k * k);
        let mut layers = vec![conv("decoder input".into(), LATENT_CHANNELS, self.width, 3)];
        for b in 0..self.blocks {
            layers.push(conv(format!("decoder block {b} reduce"), self.width, self.hidden, 1));
            layers.push(conv(format!("decoder block {b} mix"), self.hidden, self.hidden, 3));
            layers.push(conv(format!("decoder block {b} expand"), self.hidden, self.width, 1));
        }
        layers.push(conv("decoder output".into(), self.width, self.output * self.upsample * self.upsample, 3));
        layers
    }
}

struct Residual {
    reduce: nn::Conv2D,
    mix: nn::Conv2D,
    expand: nn::Conv2D,
}

/// A decoder with weights in a `VarStore`.
pub struct Decoder {
    input: nn::Conv2D,
    blocks: Vec<Residual>,
    output: nn::Conv2D,
    upsample: i64,
    resize: Option<i64>,
    mean: Tensor,
    std: Tensor,
}

fn leaky(x: Tensor) -> Tensor {
    x.leaky_relu() // slope 0.01
}

impl Decoder {
    /// Creates the variables under `path`.
    pub fn new(path: &nn::Path, spec: &DecoderSpec) -> Self {
        let conv = |name: &str, i: i64, o: i64, k: i64| conv2d(&(path / name), i, o, k, 1, k / 2);
        let blocks = (0..spec.blocks)
            .map(|b| Residual {
                reduce: conv(&format!("block{b}_reduce"), spec.width, spec.hidden, 1),
                mix: conv(&format!("block{b}_mix"), spec.hidden, spec.hidden, 3),
                expand: conv(&format!("block{b}_expand"), spec.hidden, spec.width, 1),
            })
            .collect();
        Self {
            input: conv("input", LATENT_CHANNELS, spec.width, 3),
            blocks,
            output: conv("output", spec.width, spec.output * spec.upsample * spec.upsample, 3),
            upsample: spec.upsample,
            resize: spec.resize,
            mean: path.zeros_no_train("feature_mean", &[spec.output]),
            std: path.ones_no_train("feature_std", &[spec.output]),
        }
    }

    /// Sets the statistics of the teacher's features, per channel.
    pub fn set_statistics(&mut self, mean: &Tensor, std: &Tensor) {
        tch::no_grad(|| {
            self.mean.copy_(mean);
            self.std.copy_(std);
        });
    }

    /// Normalises features (N, C, H, W) with the stored statistics.
    pub fn normalise(&self, features: &Tensor) -> Tensor {
        (features - self.mean.view([1, -1, 1, 1])) / self.std.view([1, -1, 1, 1])
    }

    /// Scales normalised features back.
    pub fn denormalise(&self, features: &Tensor) -> Tensor {
        features * self.std.view([1, -1, 1, 1]) + self.mean.view([1, -1, 1, 1])
    }

    /// Positions of the rebuilt layer per position of the latent, each way.
    pub fn upsample(&self) -> i64 {
        self.upsample
    }

    /// De-quantised, gain-corrected latent (N, 48, h, w) to the rebuilt layer (N, C, H, W), normalised.
    pub fn forward_normalised(&self, latent: &Tensor) -> Tensor {
        let mut x = leaky(latent.apply(&self.input));
        for b in &self.blocks {
            let y = leaky(x.apply(&b.reduce));
            let y = leaky(y.apply(&b.mix));
            // out of place: the gradient of the convolutions needs x as it was
            x = &x + y.apply(&b.expand);
        }
        let out = leaky(x).apply(&self.output);
        let out = if self.upsample == 1 { out } else { out.pixel_shuffle(self.upsample) };
        self.resize.map_or(out.shallow_clone(), |side| out.upsample_bilinear2d([side, side], false, None, None))
    }

    /// De-quantised, gain-corrected latent (N, 48, h, w) to the rebuilt layer of the backbone.
    pub fn forward(&self, latent: &Tensor) -> Tensor {
        self.denormalise(&self.forward_normalised(latent))
    }
}
