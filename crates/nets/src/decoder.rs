//! Decoder blueprints: de-quantised latent to the features of one backbone at its split point.
//!
//! Restoration (residual blocks at the latent's resolution), then a projection to the channels of the layer
//! to rebuild and, where that layer is finer than the latent, a sub-pixel rearrangement. The layer may be
//! any of the backbone's, down to its input: the later it is, the more the decoder must learn by itself of what
//! the backbone's frozen blocks know already. The output is produced per-channel normalised and scaled back
//! with statistics of the teacher. Copies of the first of those blocks may be tuned together with the decoder (`tuned`): what it rebuilds is
//! never quite what they were made for.
//!
//! For comparison there is the decoder of a rival, Entropic Student, too.

use isthmus_codec::LatentShape;
use isthmus_codec::manifest::DecoderEntry;
use serde::{Deserialize, Serialize};
use tch::{Tensor, nn};

use crate::encoder::conv2d;
use crate::gdn::Gdn;
use crate::layout::channels_last;
use crate::profile::LayerCost;
use crate::tuned::TunedBlocks;
use crate::{Backbone, BackboneKind, Layer, NetError, TunedSpec};

/// Shape of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecoderKind {
    /// Ours: a residual trunk and sub-pixel rearrangement.
    #[default]
    Residual,
    /// A rival's (Matsubara et al., arXiv 2108.09120): 2x2 convolutions to twice the wanted channels, once, and once, with inverse GDN
    /// between; without biases; its layer is one position wider and higher than the latent.
    EntropicStudent,
}

impl DecoderKind {
    /// Public name, as in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Residual => "residual",
            Self::EntropicStudent => "entropic-student",
        }
    }

    /// Whether it is ours.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a decoder looks like; stored in the bundle's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecoderSpec {
    /// Its shape; what follows but the channels at both ends is of the residual one.
    pub kind: DecoderKind,
    /// Channels of the latent.
    pub input: i64,
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
    /// Blocks of the backbone that are tuned with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned: Option<TunedSpec>,
}

/// A convolution of the rival's decoder: input and output channels, padding.
type Plain = (i64, i64, i64);

impl DecoderSpec {
    /// The decoder that a manifest describes, for its latent.
    ///
    /// # Errors
    /// [`NetError::Format`] if its kind or backbone is unknown, or it tunes blocks that the backbone does not have.
    pub fn from_entry(entry: &DecoderEntry, latent: LatentShape) -> Result<Self, NetError> {
        let [output, side, _] = entry.features;
        let kind = match entry.kind.as_deref() {
            None => DecoderKind::Residual,
            Some(name) if name == DecoderKind::EntropicStudent.name() => DecoderKind::EntropicStudent,
            Some(name) => return Err(NetError::format("decoder", format!("of a kind that this version does not know: {name:?}"))),
        };
        let resize = (kind == DecoderKind::Residual && i64::from(latent.height) * entry.upsample != side).then_some(side);
        let DecoderEntry { width, hidden, blocks, upsample, .. } = *entry;
        let tuned = match (entry.tuned_to, BackboneKind::from_name(&entry.backbone)) {
            (None, _) => None,
            (Some(last), Some(backbone)) => Some(TunedSpec::new(backbone, Layer::from_block(entry.split_block), last)?),
            (Some(_), None) => return Err(NetError::format("decoder", format!("for a backbone that is not known: {:?}", entry.backbone))),
        };
        Ok(Self { kind, input: latent.channels.into(), width, hidden, blocks, output, upsample, resize, tuned })
    }

    fn plain(&self) -> [Plain; 3] {
        let wide = 2 * self.output;
        [(self.input, wide, 1), (wide, self.output, 0), (self.output, self.output, 1)]
    }

    /// Trainable parameters, those of tuned blocks included.
    pub fn parameters(&self) -> u64 {
        let conv = |i: i64, o: i64, k: i64| o * (i * k * k + 1);
        let all = match self.kind {
            DecoderKind::Residual => {
                let block = conv(self.width, self.hidden, 1) + conv(self.hidden, self.hidden, 3) + conv(self.hidden, self.width, 1);
                let ends = conv(self.input, self.width, 3) + conv(self.width, self.output * self.upsample * self.upsample, 3);
                ends + self.blocks * block
            }
            DecoderKind::EntropicStudent => {
                let [a, b, c] = self.plain().map(|(i, o, _)| 4 * i * o);
                a + b + c + 2 * self.output * (2 * self.output + 1) + self.output * (self.output + 1)
            }
        };
        (all + self.tuned.map_or(0, |t| t.parameters())) as u64
    }

    /// Multiply-accumulates for a latent of `extent` x `extent`, without the backbone's blocks.
    pub fn macs(&self, extent: i64) -> u64 {
        self.layers(extent).iter().map(|l| l.macs).sum()
    }

    /// Cost of each layer for a latent of `extent` x `extent`.
    pub fn layers(&self, extent: i64) -> Vec<LayerCost> {
        let mut layers = Vec::new();
        match self.kind {
            DecoderKind::Residual => {
                let mut conv =
                    |name: String, i: i64, o: i64, k: i64| layers.push(LayerCost::conv(name, (i, extent), (o, extent), i * k * k));
                conv("decoder input".into(), self.input, self.width, 3);
                for b in 0..self.blocks {
                    conv(format!("decoder block {b} reduce"), self.width, self.hidden, 1);
                    conv(format!("decoder block {b} mix"), self.hidden, self.hidden, 3);
                    conv(format!("decoder block {b} expand"), self.hidden, self.width, 1);
                }
                conv("decoder output".into(), self.width, self.output * self.upsample * self.upsample, 3);
            }
            DecoderKind::EntropicStudent => {
                let mut side = extent;
                for (n, (i, o, padding)) in self.plain().into_iter().enumerate() {
                    let out = side + 2 * padding - 1;
                    layers.push(LayerCost::conv(format!("decoder convolution {n}"), (i, side), (o, out), 4 * i));
                    if n < 2 {
                        layers.push(LayerCost::conv(format!("decoder normalisation {n}"), (o, out), (o, out), o));
                    }
                    side = out;
                }
            }
        }
        layers
    }
}

struct Residual {
    reduce: nn::Conv2D,
    mix: nn::Conv2D,
    expand: nn::Conv2D,
}

enum Trunk {
    Residual { input: nn::Conv2D, blocks: Vec<Residual>, output: nn::Conv2D },
    Plain([nn::Conv2D; 3], [Gdn; 2]),
}

/// A decoder with weights in a `VarStore`.
pub struct Decoder {
    trunk: Trunk,
    upsample: i64,
    resize: Option<i64>,
    mean: Tensor,
    std: Tensor,
    tuned: Option<TunedBlocks>,
}

/// A convolution of stride 1 that keeps the size, in the type of `x`.
fn convolve(x: &Tensor, conv: &nn::Conv2D) -> Tensor {
    let (weight, bias) = (conv.ws.to_kind(x.kind()), conv.bs.as_ref().map(|b| b.to_kind(x.kind())));
    let padding = weight.size()[2] / 2;
    x.conv2d(&weight, bias, [1, 1], [padding, padding], [1, 1], 1)
}

fn leaky(x: Tensor) -> Tensor {
    x.leaky_relu() // slope 0.01
}

impl Decoder {
    /// Creates the variables under `path`.
    pub fn new(path: &nn::Path, spec: &DecoderSpec) -> Self {
        let trunk = match spec.kind {
            DecoderKind::Residual => {
                let conv = |name: &str, i: i64, o: i64, k: i64| {
                    conv2d(&(path / name), i, o, k, nn::ConvConfig { padding: k / 2, ..Default::default() })
                };
                let blocks = (0..spec.blocks)
                    .map(|b| Residual {
                        reduce: conv(&format!("block{b}_reduce"), spec.width, spec.hidden, 1),
                        mix: conv(&format!("block{b}_mix"), spec.hidden, spec.hidden, 3),
                        expand: conv(&format!("block{b}_expand"), spec.hidden, spec.width, 1),
                    })
                    .collect();
                Trunk::Residual {
                    input: conv("input", spec.input, spec.width, 3),
                    blocks,
                    output: conv("output", spec.width, spec.output * spec.upsample * spec.upsample, 3),
                }
            }
            DecoderKind::EntropicStudent => {
                let mut n = 0;
                let convs = spec.plain().map(|(i, o, padding)| {
                    let name = format!("conv{n}");
                    n += 1;
                    conv2d(&(path / name), i, o, 2, nn::ConvConfig { padding, bias: false, ..Default::default() })
                });
                let igdn = |name: &str, channels| Gdn::new(&(path / name), channels, true);
                Trunk::Plain(convs, [igdn("igdn0", 2 * spec.output), igdn("igdn1", spec.output)])
            }
        };
        Self {
            trunk,
            upsample: spec.upsample,
            resize: spec.resize,
            mean: path.zeros_no_train("feature_mean", &[spec.output]),
            std: path.ones_no_train("feature_std", &[spec.output]),
            tuned: spec.tuned.map(|tuned| TunedBlocks::new(&(path / "tuned"), &tuned)),
        }
    }

    /// Starts the blocks that are tuned with it from the backbone's own.
    pub fn tune_from(&self, backbone: &Backbone) {
        if let Some(tuned) = &self.tuned {
            tuned.copy_from(backbone);
        }
    }

    /// The network that goes on from what this decoder rebuilds: `backbone`, with the tuned blocks in place of its own. Weights are shared.
    #[must_use]
    pub fn student(&self, backbone: &Backbone) -> Backbone {
        self.tuned.as_ref().map_or_else(|| backbone.share(), |tuned| tuned.within(backbone))
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

    /// De-quantised, gain-corrected latent (N, C, h, w) to the rebuilt layer (N, C, H, W), normalised. The residual decoder computes in the
    /// type of the latent, whatever that of its weights.
    pub fn forward_normalised(&self, latent: &Tensor) -> Tensor {
        let out = match &self.trunk {
            Trunk::Residual { input, blocks, output } => {
                let mut x = leaky(convolve(&channels_last(latent), input));
                for b in blocks {
                    let y = leaky(convolve(&x, &b.reduce));
                    let y = leaky(convolve(&y, &b.mix));
                    // out of place: the gradient of the convolutions needs x as it was
                    x = &x + convolve(&y, &b.expand);
                }
                convolve(&leaky(x), output)
            }
            Trunk::Plain([first, second, last], [wide, narrow]) => {
                let x = wide.forward(&channels_last(&latent.to_kind(first.ws.kind())).apply(first));
                narrow.forward(&x.apply(second)).apply(last)
            }
        };
        let out = if self.upsample == 1 { out } else { out.pixel_shuffle(self.upsample) };
        self.resize.map_or(out.shallow_clone(), |side| out.upsample_bilinear2d([side, side], false, None, None))
    }

    /// De-quantised, gain-corrected latent (N, C, h, w) to the rebuilt layer of the backbone.
    pub fn forward(&self, latent: &Tensor) -> Tensor {
        self.denormalise(&self.forward_normalised(latent))
    }
}
