//! Writes an encoder as an ONNX graph for the edge engine (and for any other ONNX run time).
//!
//! Only the few messages and fields that such a graph needs are declared; numbers are those of onnx.proto3.

use std::collections::BTreeMap;

use isthmus_nets::encoder::Op;
use isthmus_nets::{EncoderKind, pth::RawTensor};
use prost::Message;

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

struct Writer<'a> {
    weights: &'a BTreeMap<String, RawTensor>,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    next: usize,
}

fn ints(name: &str, ints: Vec<i64>) -> AttributeProto {
    AttributeProto { name: name.into(), i: 0, ints, kind: ATTRIBUTE_INTS }
}

impl Writer<'_> {
    fn node(&mut self, op: &str, input: Vec<String>, attribute: Vec<AttributeProto>) -> String {
        let output = format!("v{}", self.next);
        self.next += 1;
        let name = format!("{}_{}", op.to_lowercase(), output);
        self.nodes.push(NodeProto { input, output: vec![output.clone()], name, op_type: op.into(), attribute });
        output
    }

    fn constant(&mut self, name: &str) -> Result<(), TrainError> {
        let t = self.weights.get(name).ok_or_else(|| TrainError::data("encoder weights", format!("{name} is missing")))?;
        self.constants.push(TensorProto {
            dims: t.shape.iter().map(|&d| d as i64).collect(),
            data_type: FLOAT,
            name: name.into(),
            raw_data: t.data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        });
        Ok(())
    }

    fn ops(&mut self, ops: &[Op], mut x: String) -> Result<String, TrainError> {
        for op in ops {
            x = match op {
                Op::Relu => self.node("Relu", vec![x], vec![]),
                Op::Conv { name, kernel, stride, padding, .. } => {
                    let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
                    self.constant(&weight)?;
                    self.constant(&bias)?;
                    let attributes = vec![
                        ints("kernel_shape", vec![*kernel; 2]),
                        ints("strides", vec![*stride; 2]),
                        ints("pads", vec![*padding; 4]),
                        ints("dilations", vec![1, 1]),
                        AttributeProto { name: "group".into(), i: 1, ints: vec![], kind: ATTRIBUTE_INT },
                    ];
                    self.node("Conv", vec![x, weight, bias], attributes)
                }
                Op::Residual { body, skip } => {
                    let shortcut = self.ops(skip, x.clone())?;
                    let main = self.ops(body, x)?;
                    self.node("Add", vec![shortcut, main], vec![])
                }
            };
        }
        Ok(x)
    }
}

fn tensor(name: &str, shape: [i64; 4]) -> ValueInfoProto {
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
    let mut w = Writer { weights, nodes: vec![], constants: vec![], next: 0 };
    let output = w.ops(&kind.ops(), "pixels".into())?;
    let graph = GraphProto {
        node: w.nodes,
        name: kind.name().into(),
        initializer: w.constants,
        input: vec![tensor("pixels", [1, 3, side, side])],
        output: vec![tensor(&output, latent)],
    };
    let model = ModelProto {
        ir_version: IR_VERSION,
        producer_name: "isthmus-trainer".into(),
        graph: Some(graph),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
    };
    Ok(model.encode_to_vec())
}
