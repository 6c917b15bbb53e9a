//! Writes encoders and backbones as ONNX graphs for the edge engine (and for any other ONNX run time).
//!
//! Only the few messages and fields that such a graph needs are declared; numbers are those of onnx.proto3.

use std::collections::BTreeMap;

use isthmus_nets::backbone::{CLASSES, Operation};
use isthmus_nets::encoder::Op;
use isthmus_nets::{Backbone, EncoderKind, Layer, gdn, pth::RawTensor};
use prost::Message;
use tch::Tensor;

use crate::error::TrainError;

const IR_VERSION: i64 = 8;
const OPSET: i64 = 13;
const FLOAT: i32 = 1;
const ATTRIBUTE_INTS: i32 = 7;
const ATTRIBUTE_INT: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(int64, tag = "1")]
    ir_version: i64,
    #[prost(string, tag = "2")]
    producer_name: String,
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    opset_import: Vec<OperatorSetIdProto>,
}

#[derive(Clone, PartialEq, Message)]
struct OperatorSetIdProto {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "12")]
    output: Vec<ValueInfoProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    output: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    op_type: String,
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct AttributeProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "3")]
    i: i64,
    #[prost(int64, repeated, packed = "false", tag = "8")]
    ints: Vec<i64>,
    #[prost(int32, tag = "20")]
    kind: i32,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, packed = "false", tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ValueInfoProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    kind: Option<TypeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeProto {
    #[prost(message, optional, tag = "1")]
    tensor_type: Option<TensorTypeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorTypeProto {
    #[prost(int32, tag = "1")]
    elem_type: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<ShapeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct ShapeProto {
    #[prost(message, repeated, tag = "1")]
    dim: Vec<DimensionProto>,
}

#[derive(Clone, PartialEq, Message)]
struct DimensionProto {
    #[prost(int64, tag = "1")]
    dim_value: i64,
}

#[derive(Default)]
struct Writer {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    next: usize,
}

fn ints(name: &str, ints: Vec<i64>) -> AttributeProto {
    AttributeProto { name: name.into(), i: 0, ints, kind: ATTRIBUTE_INTS }
}

fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i, ints: vec![], kind: ATTRIBUTE_INT }
}

/// Attributes of a square convolution with the same padding at both sides of each axis.
fn convolution(kernel: i64, stride: i64, (before, after): (i64, i64), groups: i64) -> Vec<AttributeProto> {
    vec![
        ints("kernel_shape", vec![kernel; 2]),
        ints("strides", vec![stride; 2]),
        ints("pads", vec![before, before, after, after]),
        ints("dilations", vec![1, 1]),
        int("group", groups),
    ]
}

fn weight<'a>(weights: &'a BTreeMap<String, RawTensor>, name: &str) -> Result<&'a RawTensor, TrainError> {
    weights.get(name).ok_or_else(|| TrainError::data("encoder weights", format!("{name} is missing")))
}

impl Writer {
    fn node(&mut self, op: &str, input: Vec<String>, attribute: Vec<AttributeProto>) -> String {
        let output = format!("v{}", self.next);
        self.next += 1;
        let name = format!("{}_{}", op.to_lowercase(), output);
        self.nodes.push(NodeProto { input, output: vec![output.clone()], name, op_type: op.into(), attribute });
        output
    }

    fn constant(&mut self, name: String, dims: Vec<i64>, values: &[f32]) -> String {
        let raw_data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constants.push(TensorProto { dims, data_type: FLOAT, name: name.clone(), raw_data });
        name
    }

    fn relu6(&mut self, x: String) -> String {
        let [zero, six] = [("zero", 0.0), ("six", 6.0)].map(|(name, value)| {
            if self.constants.iter().all(|c| c.name != name) { self.constant(name.into(), vec![], &[value]) } else { name.into() }
        });
        self.node("Clip", vec![x, zero, six], vec![])
    }

    fn tensor(&mut self, t: &Tensor) -> Result<String, TrainError> {
        let values = Vec::<f32>::try_from(t.contiguous().view(-1))?;
        Ok(self.constant(format!("c{}", self.constants.len()), t.size(), &values))
    }

    fn encoder(&mut self, ops: &[Op], weights: &BTreeMap<String, RawTensor>, mut x: String) -> Result<String, TrainError> {
        for op in ops {
            x = match op {
                Op::Relu => self.node("Relu", vec![x], vec![]),
                Op::Relu6 => self.relu6(x),
                Op::Gdn { name, channels } => {
                    let part = |part: &str| weight(weights, &format!("{name}.{part}")).map(|t| Tensor::from_slice(&t.data));
                    let (beta, gamma) = gdn::effective(&part("beta")?, &part("gamma")?.view([*channels, *channels]));
                    let magnitude = self.node("Abs", vec![x.clone()], vec![]);
                    let input = vec![magnitude, self.tensor(&gamma)?, self.tensor(&beta)?];
                    let norm = self.node("Conv", input, convolution(1, 1, (0, 0), 1));
                    self.node("Div", vec![x, norm], vec![])
                }
                Op::Conv { name, kernel, stride, padding, groups, bias, .. } => {
                    let mut input = vec![x];
                    for part in ["weight", "bias"].into_iter().take(1 + usize::from(*bias)) {
                        let name = format!("{name}.{part}");
                        let t = weight(weights, &name)?;
                        input.push(self.constant(name, t.shape.iter().map(|&d| d as i64).collect(), &t.data));
                    }
                    self.node("Conv", input, convolution(*kernel, *stride, *padding, *groups))
                }
                Op::Residual { body, skip } => {
                    let shortcut = self.encoder(skip, weights, x.clone())?;
                    let main = self.encoder(body, weights, x)?;
                    self.node("Add", vec![shortcut, main], vec![])
                }
            };
        }
        Ok(x)
    }

    fn backbone(&mut self, operations: &[Operation<'_>], mut x: String) -> Result<String, TrainError> {
        for operation in operations {
            x = match operation {
                Operation::Conv { weight, bias, stride, groups, padding, relu6 } => {
                    let input = vec![x, self.tensor(weight)?, self.tensor(bias)?];
                    let y = self.node("Conv", input, convolution(weight.size()[2], *stride, *padding, *groups));
                    if *relu6 { self.relu6(y) } else { y }
                }
                Operation::Residual(body) => {
                    let main = self.backbone(body, x.clone())?;
                    self.node("Add", vec![x, main], vec![])
                }
                Operation::Pool => {
                    let pooled = self.node("GlobalAveragePool", vec![x], vec![]);
                    self.node("Flatten", vec![pooled], vec![int("axis", 1)])
                }
                Operation::Linear { weight, bias } => {
                    let input = vec![x, self.tensor(weight)?, self.tensor(bias)?];
                    self.node("Gemm", input, vec![int("transB", 1)])
                }
            };
        }
        Ok(x)
    }

    /// The file; `input` and `output` with their shapes.
    fn finish(self, name: &str, input: ValueInfoProto, output: ValueInfoProto) -> Vec<u8> {
        let graph =
            GraphProto { node: self.nodes, name: name.into(), initializer: self.constants, input: vec![input], output: vec![output] };
        let model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "isthmus-trainer".into(),
            graph: Some(graph),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
        };
        model.encode_to_vec()
    }
}

fn value(name: &str, shape: &[i64]) -> ValueInfoProto {
    let dim = shape.iter().map(|&dim_value| DimensionProto { dim_value }).collect();
    let tensor_type = Some(TensorTypeProto { elem_type: FLOAT, shape: Some(ShapeProto { dim }) });
    ValueInfoProto { name: name.into(), kind: Some(TypeProto { tensor_type }) }
}

/// ONNX file of `kind` with `weights` (by the names of its operations): input `pixels`
/// (1, 3, `side`, `side`), output of shape `latent` (1, C, H, W).
///
/// # Errors
/// If a weight is missing.
pub fn encoder(kind: EncoderKind, weights: &BTreeMap<String, RawTensor>, side: i64, latent: [i64; 4]) -> Result<Vec<u8>, TrainError> {
    let mut w = Writer::default();
    let output = w.encoder(&kind.ops(), weights, "pixels".into())?;
    Ok(w.finish(kind.name(), value("pixels", &[1, 3, side, side]), value(&output, &latent)))
}

/// ONNX file of a backbone from its input `pixels` (1, 3, S, S) up to the layer `to`, or to the logits (1, 1000).
///
/// # Errors
/// If there is no such layer, or a weight cannot be read.
pub fn backbone(net: &Backbone, to: Option<Layer>) -> Result<Vec<u8>, TrainError> {
    let kind = net.kind();
    let side = i64::from(kind.input_size());
    let shape = match to {
        Some(layer) => {
            let [c, h, w] = kind.layer_shape(layer).ok_or_else(|| TrainError::data(kind.name(), format!("has no {layer:?}")))?;
            vec![1, c, h, w]
        }
        None => vec![1, CLASSES],
    };
    let mut w = Writer::default();
    let output = w.backbone(&net.operations(to), "pixels".into())?;
    Ok(w.finish(kind.name(), value("pixels", &[1, 3, side, side]), value(&output, &shape)))
}
