//! Encoders that run on the device: pixels (N, 3, H, W) to a latent, (N, 40 or 48, H/8, W/8) but for the rival's.

use serde::{Deserialize, Serialize};
use tch::{Tensor, nn};

use crate::backbone::{Operation, STEM_CHANNELS};
use crate::gdn::Gdn;
use crate::layout::channels_last;
use crate::{Backbone, BackboneKind, Layer as Place};

/// Sides of the square input are multiples of this.
pub const SIDE_MULTIPLE: i64 = 8;
/// Channels of the latent of encoders that start from nothing, but for the rival's.
const LATENT: i64 = 48;

/// Shape of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EncoderKind {
    /// Patch stem (4x4 stride 4, then 2x2 stride 2) and two bottleneck residual blocks; after the
    /// patch-stem encoder of Duan & Zhu (arXiv 2211.09897), narrowed. 149,232 parameters, 124 MMAC at 224x224.
    PatchStem,
    /// Stem and blocks 0 to 4 of EfficientNet-Lite0 (inverted residuals, Sandler et al., arXiv 1801.04381), from whose weights training starts, a projection of
    /// their 40 channels and a bottleneck residual block. 73,408 parameters, 129 MMAC at 224x224.
    InvertedResidual,
    /// Three stride-2 residual blocks 3-48-64-48 of FrankenSplit (arXiv 2302.10681), ReLU after both
    /// 3x3 convolutions. 141,696 parameters, 530 MMAC at 224x224.
    Frankensplit,
    /// A rival, for comparison: Entropic Student (Matsubara et al., arXiv 2108.09120), 5x5 stride 2 to 96 and to 48 channels, each
    /// with GDN, then 2x2 to 24; latent (24, H/4 - 1, W/4 - 1). No biases. 138,672 parameters, 588 MMAC at 224x224.
    EntropicStudent,
}

const STEM: i64 = 64;
const WIDTH: i64 = 128;
const HIDDEN: i64 = 64;
const BLOCKS: i64 = 2;
/// The backbone whose first blocks the inverted residuals are, and the last of those.
const HEAD: BackboneKind = BackboneKind::Lite0;
/// Last block of that backbone in the encoder.
pub const HEAD_BLOCK: usize = 4;
const FRANKENSPLIT: [i64; 4] = [3, 48, 64, LATENT];
const ENTROPIC_STUDENT: [i64; 4] = [3, 96, 48, 24];

/// One operation of an encoder; what the trainer runs and what the exported graph holds are made from
/// the same list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A convolution named `name` in the weights.
    Conv {
        /// Prefix of `.weight` and `.bias`.
        name: String,
        /// Input channels.
        input: i64,
        /// Output channels.
        output: i64,
        /// Square kernel.
        kernel: i64,
        /// Stride.
        stride: i64,
        /// Zeros before and after, both ways.
        padding: (i64, i64),
        /// Groups: 1, or as many as channels.
        groups: i64,
        /// With `.bias`.
        bias: bool,
    },
    /// Generalised divisive normalisation; `.beta` and `.gamma` in the weights are square roots.
    Gdn {
        /// Prefix in the weights.
        name: String,
        /// Channels.
        channels: i64,
    },
    /// Rectifier.
    Relu,
    /// Rectifier that ends at 6.
    Relu6,
    /// `skip(x) + body(x)`; an empty skip is the identity.
    Residual {
        /// Main path.
        body: Vec<Op>,
        /// Shortcut.
        skip: Vec<Op>,
    },
}

fn conv(name: &str, input: i64, output: i64, kernel: i64, stride: i64, padding: i64) -> Op {
    Op::Conv { name: name.into(), input, output, kernel, stride, padding: (padding, padding), groups: 1, bias: true }
}

/// A convolution with TensorFlow's "SAME" padding of an input whose side is a multiple of the stride.
fn same(name: &str, [output, input, kernel, _]: [i64; 4], stride: i64, groups: i64) -> Op {
    let missing = kernel - stride;
    let padding = (missing / 2, missing - missing / 2);
    Op::Conv { name: name.into(), input: input * groups, output, kernel, stride, padding, groups, bias: true }
}

impl EncoderKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::PatchStem, Self::InvertedResidual, Self::Frankensplit, Self::EntropicStudent];

    /// Public name, as in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::PatchStem => "patch-stem",
            Self::InvertedResidual => "inverted-residual",
            Self::Frankensplit => "frankensplit",
            Self::EntropicStudent => "entropic-student",
        }
    }

    /// The kind called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    /// The operations in order.
    pub fn ops(self) -> Vec<Op> {
        match self {
            Self::PatchStem => {
                let mut ops = vec![conv("stem0", 3, STEM, 4, 4, 0), Op::Relu, conv("stem1", STEM, WIDTH, 2, 2, 0)];
                for b in 0..BLOCKS {
                    let n = |part: &str| format!("block{b}_{part}");
                    let body = vec![
                        conv(&n("reduce"), WIDTH, HIDDEN, 1, 1, 0),
                        Op::Relu,
                        conv(&n("mix"), HIDDEN, HIDDEN, 3, 1, 1),
                        Op::Relu,
                        conv(&n("expand"), HIDDEN, WIDTH, 1, 1, 0),
                    ];
                    ops.push(Op::Residual { body, skip: vec![] });
                }
                ops.push(conv("latent", WIDTH, LATENT, 1, 1, 0));
                ops
            }
            Self::InvertedResidual => {
                let mut ops = vec![same("stem", [STEM_CHANNELS, 3, 3, 3], 2, 1), Op::Relu6];
                for (b, spec) in HEAD.blocks().into_iter().take(HEAD_BLOCK + 1).enumerate() {
                    let (expand, depthwise, project) = spec.shapes();
                    let n = |part: &str| format!("block{b}_{part}");
                    let mut body = Vec::new();
                    if let Some(shape) = expand {
                        body.extend([same(&n("expand"), shape, 1, 1), Op::Relu6]);
                    }
                    body.extend([
                        same(&n("depthwise"), depthwise, spec.stride, depthwise[0]),
                        Op::Relu6,
                        same(&n("project"), project, 1, 1),
                    ]);
                    if spec.skip() { ops.push(Op::Residual { body, skip: vec![] }) } else { ops.extend(body) }
                }
                let channels = self.latent_channels();
                ops.push(conv("latent", channels, channels, 1, 1, 0));
                let body = vec![
                    conv("mix_reduce", channels, channels, 1, 1, 0),
                    Op::Relu,
                    conv("mix_mix", channels, channels, 3, 1, 1),
                    Op::Relu,
                    conv("mix_expand", channels, channels, 1, 1, 0),
                ];
                ops.push(Op::Residual { body, skip: vec![] });
                ops
            }
            Self::Frankensplit => FRANKENSPLIT
                .windows(2)
                .enumerate()
                .map(|(b, w)| {
                    let n = |part: &str| format!("block{b}_{part}");
                    Op::Residual {
                        body: vec![conv(&n("down"), w[0], w[1], 3, 2, 1), Op::Relu, conv(&n("mix"), w[1], w[1], 3, 1, 1), Op::Relu],
                        skip: vec![conv(&n("skip"), w[0], w[1], 1, 2, 0)],
                    }
                })
                .collect(),
            Self::EntropicStudent => {
                let [pixels, first, second, latent] = ENTROPIC_STUDENT;
                let conv = |name: &str, input, output, kernel, stride, padding| Op::Conv {
                    name: name.into(),
                    input,
                    output,
                    kernel,
                    stride,
                    padding: (padding, padding),
                    groups: 1,
                    bias: false,
                };
                let gdn = |name: &str, channels| Op::Gdn { name: name.into(), channels };
                vec![
                    conv("conv0", pixels, first, 5, 2, 2),
                    gdn("gdn0", first),
                    conv("conv1", first, second, 5, 2, 2),
                    gdn("gdn1", second),
                    conv("latent", second, latent, 2, 1, 0),
                ]
            }
        }
    }

    /// Number of its blocks that are the first ones of this backbone.
    pub fn blocks_of(self, backbone: BackboneKind) -> usize {
        if self == Self::InvertedResidual && backbone == HEAD { HEAD_BLOCK + 1 } else { 0 }
    }

    /// Channels of the latent.
    pub fn latent_channels(self) -> i64 {
        match self {
            Self::PatchStem | Self::Frankensplit => LATENT,
            Self::InvertedResidual => HEAD.layer_shape(Place::Block(HEAD_BLOCK)).map_or(0, |[channels, ..]| channels),
            Self::EntropicStudent => ENTROPIC_STUDENT[3],
        }
    }

    /// The latent (C, H, W) of a square image of `side` pixels.
    pub fn latent(self, side: i64) -> [i64; 3] {
        let extent = self.walked(side).2;
        [self.latent_channels(), extent, extent]
    }

    /// Trainable parameters.
    pub fn parameters(self) -> u64 {
        self.walked(224).0 as u64
    }

    /// Multiply-accumulates for one square image of `side` pixels.
    pub fn macs(self, side: i64) -> u64 {
        self.walked(side).1 as u64
    }

    /// Parameters, multiply-accumulates, side of the latent.
    fn walked(self, side: i64) -> (i64, i64, i64) {
        fn walk(ops: &[Op], mut side: i64) -> (i64, i64, i64) {
            let (mut params, mut macs) = (0, 0);
            for op in ops {
                match op {
                    Op::Relu | Op::Relu6 => {}
                    Op::Gdn { channels, .. } => {
                        params += channels * (channels + 1);
                        macs += channels * channels * side * side;
                    }
                    Op::Conv { input, output, kernel, stride, padding, groups, bias, .. } => {
                        side = (side + padding.0 + padding.1 - kernel) / stride + 1;
                        let each = input / groups * kernel * kernel;
                        params += output * (each + i64::from(*bias));
                        macs += output * each * side * side;
                    }
                    Op::Residual { body, skip } => {
                        let s = walk(skip, side);
                        let b = walk(body, side);
                        params += s.0 + b.0;
                        macs += s.1 + b.1;
                        side = b.2;
                    }
                }
            }
            (params, macs, side)
        }
        walk(&self.ops(), side)
    }
}

enum Layer {
    /// With the zeros before and after that libtorch's convolution does not add by itself.
    Conv(nn::Conv2D, Option<(i64, i64)>),
    Gdn(Gdn),
    Relu,
    Relu6,
    Residual(Vec<Layer>, Vec<Layer>),
}

/// A convolution that starts from U(-b, b), b = 1 / sqrt(fan in): quiet enough that the first latents
/// span few quantisation steps.
pub(crate) fn conv2d(path: &nn::Path, input: i64, output: i64, kernel: i64, config: nn::ConvConfig) -> nn::Conv2D {
    let bound = 1.0 / ((input / config.groups * kernel * kernel) as f64).sqrt();
    let init = nn::Init::Uniform { lo: -bound, up: bound };
    nn::conv2d(path, input, output, kernel, nn::ConvConfig { ws_init: init, bs_init: init, ..config })
}

fn build(path: &nn::Path, ops: &[Op]) -> Vec<Layer> {
    ops.iter()
        .map(|op| match op {
            Op::Relu => Layer::Relu,
            Op::Relu6 => Layer::Relu6,
            Op::Residual { body, skip } => Layer::Residual(build(path, body), build(path, skip)),
            Op::Gdn { name, channels } => Layer::Gdn(Gdn::new(&(path / name.as_str()), *channels, false)),
            Op::Conv { name, input, output, kernel, stride, padding, groups, bias } => {
                let uneven = (padding.0 != padding.1).then_some(*padding);
                let padding = if uneven.is_some() { 0 } else { padding.0 };
                let config = nn::ConvConfig { stride: *stride, padding, groups: *groups, bias: *bias, ..Default::default() };
                Layer::Conv(conv2d(&(path / name.as_str()), *input, *output, *kernel, config), uneven)
            }
        })
        .collect()
}

fn run(layers: &[Layer], x: &Tensor) -> Tensor {
    let mut x = x.shallow_clone();
    for layer in layers {
        x = match layer {
            Layer::Conv(conv, None) => x.apply(conv),
            Layer::Conv(conv, Some((before, after))) => x.constant_pad_nd([*before, *after, *before, *after]).apply(conv),
            Layer::Gdn(gdn) => gdn.forward(&x),
            Layer::Relu => x.relu(),
            Layer::Relu6 => x.relu6(),
            Layer::Residual(body, skip) => run(skip, &x) + run(body, &x),
        };
    }
    x
}

/// Weights and biases of a backbone's convolutions, in order.
fn flatten<'a>(operations: &'a [Operation<'a>], into: &mut Vec<(&'a Tensor, &'a Tensor)>) {
    for operation in operations {
        match operation {
            Operation::Conv { weight, bias, .. } => into.push((weight, bias)),
            Operation::Residual(body) => flatten(body, into),
            Operation::Pool | Operation::Linear { .. } => {}
        }
    }
}

/// An encoder's convolutions, in order.
fn convolutions<'a>(layers: &'a [Layer], into: &mut Vec<&'a nn::Conv2D>) {
    for layer in layers {
        match layer {
            Layer::Conv(conv, _) => into.push(conv),
            Layer::Residual(body, skip) => [skip, body].into_iter().for_each(|part| convolutions(part, into)),
            Layer::Gdn(_) | Layer::Relu | Layer::Relu6 => {}
        }
    }
}

/// An encoder with weights in a `VarStore`.
pub struct Encoder {
    kind: EncoderKind,
    layers: Vec<Layer>,
}

impl Encoder {
    /// Creates the variables under `path`.
    pub fn new(path: &nn::Path, kind: EncoderKind) -> Self {
        Self { kind, layers: build(path, &kind.ops()) }
    }

    /// The shape of this encoder.
    pub fn kind(&self) -> EncoderKind {
        self.kind
    }

    /// Pixels (N, 3, H, W) to the latent ([`EncoderKind::latent`]), before any gain.
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        run(&self.layers, &channels_last(pixels)).contiguous()
    }

    /// Whether its blocks are the first ones of this backbone.
    pub fn is_head_of(&self, backbone: &Backbone) -> bool {
        self.kind.blocks_of(backbone.kind()) > 0
    }

    /// Takes the weights of the backbone whose first blocks its own are ([`Encoder::is_head_of`]); of another, nothing.
    pub fn start_from(&self, backbone: &Backbone) {
        if !self.is_head_of(backbone) {
            return;
        }
        let mut theirs = Vec::new();
        let operations = backbone.operations(Some(Place::Block(HEAD_BLOCK)));
        flatten(&operations, &mut theirs);
        let mut own = Vec::new();
        convolutions(&self.layers, &mut own);
        tch::no_grad(|| {
            for (conv, (weight, bias)) in own.into_iter().zip(theirs) {
                conv.ws.shallow_clone().copy_(weight);
                conv.bs.iter().for_each(|b| b.shallow_clone().copy_(bias));
            }
        });
    }

    /// The last layer, where it is a plain projection.
    pub fn projection(&self) -> Option<&nn::Conv2D> {
        match self.layers.last() {
            Some(Layer::Conv(last, None)) => Some(last),
            _ => None,
        }
    }

    /// What the last layer sees for `pixels` (N, 3, H, W).
    pub fn trunk(&self, pixels: &Tensor) -> Tensor {
        run(&self.layers[..self.layers.len().saturating_sub(1)], &channels_last(pixels)).contiguous()
    }
}
