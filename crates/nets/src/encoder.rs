//! Encoders that run on the device: pixels (N, 3, H, W) to a latent, (N, 48, H/8, W/8) but for the rival's.

use serde::{Deserialize, Serialize};
use tch::{Tensor, nn};

use crate::gdn::Gdn;
use crate::layout::channels_last;

/// Sides of the square input are multiples of this.
pub const SIDE_MULTIPLE: i64 = 8;
/// Channels of the latent, but for the rival's.
const LATENT: i64 = 48;

/// Shape of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EncoderKind {
    /// Patch stem (4x4 stride 4, then 2x2 stride 2) and two bottleneck residual blocks; after the
    /// patch-stem encoder of Duan & Zhu (arXiv 2211.09897), narrowed. 149,232 parameters, 124 MMAC at 224x224.
    PatchStem,
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
        /// Zero padding on every side.
        padding: i64,
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
    /// `skip(x) + body(x)`; an empty skip is the identity.
    Residual {
        /// Main path.
        body: Vec<Op>,
        /// Shortcut.
        skip: Vec<Op>,
    },
}

fn conv(name: &str, input: i64, output: i64, kernel: i64, stride: i64, padding: i64) -> Op {
    Op::Conv { name: name.into(), input, output, kernel, stride, padding, bias: true }
}

impl EncoderKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PatchStem, Self::Frankensplit, Self::EntropicStudent];

    /// Public name, as in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::PatchStem => "patch-stem",
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
                    padding,
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

    /// Channels of the latent.
    pub fn latent_channels(self) -> i64 {
        match self {
            Self::PatchStem | Self::Frankensplit => LATENT,
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
                    Op::Relu => {}
                    Op::Gdn { channels, .. } => {
                        params += channels * (channels + 1);
                        macs += channels * channels * side * side;
                    }
                    Op::Conv { input, output, kernel, stride, padding, bias, .. } => {
                        side = (side + 2 * padding - kernel) / stride + 1;
                        params += output * (input * kernel * kernel + i64::from(*bias));
                        macs += output * input * kernel * kernel * side * side;
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
    Conv(nn::Conv2D),
    Gdn(Gdn),
    Relu,
    Residual(Vec<Layer>, Vec<Layer>),
}

/// A convolution that starts from U(-b, b), b = 1 / sqrt(fan in): quiet enough that the first latents
/// span few quantisation steps.
pub(crate) fn conv2d(path: &nn::Path, input: i64, output: i64, kernel: i64, config: nn::ConvConfig) -> nn::Conv2D {
    let bound = 1.0 / ((input * kernel * kernel) as f64).sqrt();
    let init = nn::Init::Uniform { lo: -bound, up: bound };
    nn::conv2d(path, input, output, kernel, nn::ConvConfig { ws_init: init, bs_init: init, ..config })
}

fn build(path: &nn::Path, ops: &[Op]) -> Vec<Layer> {
    ops.iter()
        .map(|op| match op {
            Op::Relu => Layer::Relu,
            Op::Residual { body, skip } => Layer::Residual(build(path, body), build(path, skip)),
            Op::Gdn { name, channels } => Layer::Gdn(Gdn::new(&(path / name.as_str()), *channels, false)),
            Op::Conv { name, input, output, kernel, stride, padding, bias } => {
                let config = nn::ConvConfig { stride: *stride, padding: *padding, bias: *bias, ..Default::default() };
                Layer::Conv(conv2d(&(path / name.as_str()), *input, *output, *kernel, config))
            }
        })
        .collect()
}

fn run(layers: &[Layer], x: &Tensor) -> Tensor {
    let mut x = x.shallow_clone();
    for layer in layers {
        x = match layer {
            Layer::Conv(conv) => x.apply(conv),
            Layer::Gdn(gdn) => gdn.forward(&x),
            Layer::Relu => x.relu(),
            Layer::Residual(body, skip) => run(skip, &x) + run(body, &x),
        };
    }
    x
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

    /// The last layer, where it is a plain projection.
    pub fn projection(&self) -> Option<&nn::Conv2D> {
        match self.layers.last() {
            Some(Layer::Conv(last)) => Some(last),
            _ => None,
        }
    }

    /// What the last layer sees for `pixels` (N, 3, H, W).
    pub fn trunk(&self, pixels: &Tensor) -> Tensor {
        run(&self.layers[..self.layers.len().saturating_sub(1)], &channels_last(pixels)).contiguous()
    }
}
