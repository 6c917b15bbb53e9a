//! Cuts an ONNX graph at its depthwise convolutions: they are computed here, what lies between them by rten.

use std::collections::{BTreeMap, BTreeSet};

use rten_onnx::onnx::{DataType, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

use super::depthwise::{Depthwise, UNBOUNDED};

/// Larger kernels, strides and paddings are left to rten: no network has them, and a padded copy is made of every channel.
const LARGEST: usize = 16;

/// A part of a graph; parts are computed one after the other.
pub(super) enum Part {
    /// A graph of its own.
    Graph {
        /// As ONNX.
        model: ModelProto,
        /// Values that it takes.
        inputs: Vec<String>,
        /// Values that it gives.
        outputs: Vec<String>,
    },
    /// A depthwise convolution.
    Depthwise {
        /// What it computes.
        conv: Depthwise,
        /// The value that it takes.
        input: String,
        /// The value that it gives.
        output: String,
    },
}

impl Part {
    /// Names of the values that it takes.
    pub fn inputs(&self) -> &[String] {
        match self {
            Self::Graph { inputs, .. } => inputs,
            Self::Depthwise { input, .. } => std::slice::from_ref(input),
        }
    }
}

/// What the nodes of a graph refer to.
struct Graph<'a> {
    constants: BTreeMap<&'a str, &'a TensorProto>,
    /// How often each value is used, as an input of a node or as an output of the graph.
    uses: BTreeMap<&'a str, usize>,
}

fn name(name: &Option<String>) -> &str {
    name.as_deref().unwrap_or_default()
}

/// Values of a tensor of single precision that lies in the file.
fn floats(tensor: &TensorProto) -> Option<Vec<f32>> {
    if tensor.data_type != Some(DataType::FLOAT) || tensor.data_location.is_some_and(|place| place.0 != 0) {
        return None;
    }
    let Some(raw) = &tensor.raw_data else { return Some(tensor.float_data.clone()) };
    let raw = raw.borrow();
    let (values, rest) = raw.as_chunks::<4>();
    rest.is_empty().then(|| values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

impl<'a> Graph<'a> {
    fn new(graph: &'a GraphProto) -> Self {
        let constants = graph.initializer.iter().map(|t| (name(&t.name), t)).collect();
        let mut uses = BTreeMap::new();
        let ends = graph.output.iter().map(|v| name(&v.name));
        for used in graph.node.iter().flat_map(|n| &n.input).map(String::as_str).chain(ends) {
            *uses.entry(used).or_default() += 1;
        }
        Self { constants, uses }
    }

    fn is_used_once(&self, value: &str) -> bool {
        self.uses.get(value) == Some(&1)
    }

    fn values(&self, constant: &str) -> Option<Vec<f32>> {
        floats(self.constants.get(constant)?)
    }

    /// The convolution of a node that is a depthwise one.
    fn depthwise(&self, node: &NodeProto) -> Option<Depthwise> {
        let [input, weights, bias @ ..] = node.input.as_slice() else { return None };
        if name(&node.op_type) != "Conv" || !name(&node.domain).is_empty() || self.constants.contains_key(input.as_str()) {
            return None;
        }
        let [channels, 1, height, width] = self.constants.get(weights.as_str())?.dims.as_slice() else { return None };
        let whole = |v: &i64| usize::try_from(*v).ok();
        let (channels, kernel) = (whole(channels)?, [whole(height)?, whole(width)?]);
        let (mut stride, mut padding, mut groups) = ([1; 2], [0; 4], 1);
        for attribute in &node.attribute {
            let sizes = || attribute.ints.iter().map(whole).collect::<Option<Vec<usize>>>();
            match name(&attribute.name) {
                "group" => groups = usize::try_from(attribute.i?).ok()?,
                "strides" => stride = sizes()?.try_into().ok()?,
                "pads" => padding = sizes()?.try_into().ok()?,
                "kernel_shape" if sizes()? == kernel => {}
                "dilations" if sizes()? == [1, 1] => {}
                _ => return None,
            }
        }
        let small = kernel.iter().chain(&stride).all(|v| (1..=LARGEST).contains(v)) && padding.iter().all(|v| *v <= LARGEST);
        let weights = self.values(weights)?;
        if !small || groups != channels || channels < 2 || Some(weights.len()) != channels.checked_mul(kernel[0] * kernel[1]) {
            return None;
        }
        let bias = match bias {
            [] => vec![0.0; channels],
            [bias] => self.values(bias)?,
            _ => return None,
        };
        (bias.len() == channels).then_some(Depthwise { kernel, stride, padding, weights, bias, bounds: [UNBOUNDED; 2] })
    }

    /// Input, bounds and output of a node that clamps.
    fn clamp<'n>(&self, node: &'n NodeProto) -> Option<(&'n String, (f32, f32), &'n String)> {
        let ([input, bounds @ ..], [output]) = (node.input.as_slice(), node.output.as_slice()) else { return None };
        if !name(&node.domain).is_empty() || !node.attribute.is_empty() || self.constants.contains_key(input.as_str()) {
            return None;
        }
        let bound = |name: &String| match self.values(name)?.as_slice() {
            [bound] => Some(*bound),
            _ => None,
        };
        let (least, most) = match (name(&node.op_type), bounds) {
            ("Relu", []) => (0.0, f32::INFINITY),
            ("Clip", [least, most]) => (bound(least)?, bound(most)?),
            _ => return None,
        };
        (least <= most).then_some((input, (least, most), output))
    }
}

/// Cuts a graph, whose nodes are in the order in which they are computed, as ONNX demands. Without a depthwise convolution it is one part.
pub(super) fn split(model: &ModelProto) -> Vec<Part> {
    let Some(whole) = &model.graph else { return Vec::new() };
    let graph = Graph::new(whole);
    let mut parts: Vec<Part> = Vec::new();
    let mut between: Vec<&NodeProto> = Vec::new();
    let mut nodes = whole.node.iter().peekable();
    while let Some(node) = nodes.next() {
        let (Some(mut conv), [input, ..], [output]) = (graph.depthwise(node), node.input.as_slice(), node.output.as_slice()) else {
            between.push(node);
            continue;
        };
        let (mut input, mut output) = (input, output);
        // clamps before and after whose inner value nothing else uses
        let before = between.last().and_then(|node| graph.clamp(node));
        if let Some((from, bounds, _)) = before.filter(|(_, _, to)| *to == input && graph.is_used_once(input)) {
            (input, conv.bounds[0]) = (from, bounds);
            between.pop();
        }
        let after = nodes.peek().and_then(|node| graph.clamp(node));
        if let Some((_, bounds, to)) = after.filter(|(from, ..)| *from == output && graph.is_used_once(output)) {
            (output, conv.bounds[1]) = (to, bounds);
            nodes.next();
        }
        parts.extend(part_of(&mut between, model, whole, &graph));
        parts.push(Part::Depthwise { conv, input: input.clone(), output: output.clone() });
    }
    parts.extend(part_of(&mut between, model, whole, &graph));
    what_is_used(parts, whole)
}

/// A graph of these nodes, which gives all that they compute.
fn part_of(nodes: &mut Vec<&NodeProto>, model: &ModelProto, whole: &GraphProto, graph: &Graph<'_>) -> Option<Part> {
    if nodes.is_empty() {
        return None;
    }
    let taken: BTreeSet<&str> = nodes.iter().flat_map(|n| &n.input).map(String::as_str).filter(|n| !n.is_empty()).collect();
    let given: BTreeSet<&str> = nodes.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    let inputs: Vec<String> =
        taken.iter().filter(|n| !given.contains(*n) && !graph.constants.contains_key(*n)).map(|n| (*n).to_owned()).collect();
    let proto = GraphProto {
        node: nodes.drain(..).cloned().collect(),
        initializer: whole.initializer.iter().filter(|t| taken.contains(name(&t.name))).cloned().collect(),
        input: inputs.iter().map(|n| value(n, &whole.input)).collect(),
        ..GraphProto::default()
    };
    let model =
        ModelProto { ir_version: model.ir_version, graph: Some(proto), opset_import: model.opset_import.clone(), ..ModelProto::default() };
    Some(Part::Graph { model, inputs, outputs: given.into_iter().map(str::to_owned).collect() })
}

/// The value of this name, of a shape that is known if it is one of those.
fn value(name: &str, known: &[ValueInfoProto]) -> ValueInfoProto {
    let found = known.iter().find(|v| v.name.as_deref() == Some(name)).cloned();
    found.unwrap_or_else(|| ValueInfoProto { name: Some(name.to_owned()), ..ValueInfoProto::default() })
}

/// Those parts, and those of their outputs, that a later one takes or that the whole graph gives.
fn what_is_used(parts: Vec<Part>, whole: &GraphProto) -> Vec<Part> {
    let mut used: BTreeSet<String> = whole.output.iter().map(|v| name(&v.name).to_owned()).collect();
    let mut kept = Vec::new();
    for mut part in parts.into_iter().rev() {
        let wanted = match &mut part {
            Part::Graph { model, outputs, .. } => {
                outputs.retain(|output| used.contains(output));
                if let Some(graph) = &mut model.graph {
                    graph.output = outputs.iter().map(|n| value(n, &whole.output)).collect();
                }
                !outputs.is_empty()
            }
            Part::Depthwise { output, .. } => used.contains(output),
        };
        if wanted {
            used.extend(part.inputs().iter().cloned());
            kept.push(part);
        }
    }
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rten_onnx::onnx::{AttributeProto, AttributeType, OperatorSetIdProto};

    use super::super::{Engine, RtenEngine, load};
    use super::*;

    const SIDE: usize = 9;

    fn constant(name: &str, dims: &[i64]) -> TensorProto {
        let count = dims.iter().product::<i64>();
        let float_data = (0..count).map(|i| ((i * 37 + name.len() as i64 * 11) % 19) as f32 / 19.0 - 0.4).collect();
        TensorProto { dims: dims.to_vec(), data_type: Some(DataType::FLOAT), name: Some(name.into()), float_data, ..Default::default() }
    }

    fn scalar(name: &str, value: f32) -> TensorProto {
        TensorProto { data_type: Some(DataType::FLOAT), name: Some(name.into()), float_data: vec![value], ..Default::default() }
    }

    fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
        let input = inputs.iter().map(|i| (*i).to_owned()).collect();
        NodeProto {
            name: Some(format!("{op}-{output}")),
            op_type: Some(op.into()),
            input,
            output: vec![output.into()],
            ..Default::default()
        }
    }

    fn conv(inputs: &[&str], output: &str, kernel: i64, stride: i64, groups: i64) -> NodeProto {
        let ints = |name: &str, ints: Vec<i64>| AttributeProto {
            name: Some(name.into()),
            ints,
            r#type: Some(AttributeType::INTS),
            ..Default::default()
        };
        let group = AttributeProto { name: Some("group".into()), i: Some(groups), r#type: Some(AttributeType::INT), ..Default::default() };
        let attribute =
            vec![ints("kernel_shape", vec![kernel; 2]), ints("strides", vec![stride; 2]), ints("pads", vec![kernel / 2; 4]), group];
        NodeProto { attribute, ..node("Conv", inputs, output) }
    }

    fn model(nodes: Vec<NodeProto>, output: &str) -> ModelProto {
        let initializer = vec![
            constant("first.weight", &[4, 3, 1, 1]),
            constant("first.bias", &[4]),
            constant("each.weight", &[4, 1, 3, 3]),
            constant("each.bias", &[4]),
            constant("wide.weight", &[4, 1, 5, 5]),
            constant("pairs.weight", &[4, 2, 3, 3]),
            constant("features", &[1, 4, SIDE as i64, SIDE as i64]),
            scalar("zero", 0.0),
            scalar("six", 0.3),
        ];
        let graph = GraphProto {
            node: nodes,
            initializer,
            input: vec![value("pixels", &[])],
            output: vec![value(output, &[])],
            ..Default::default()
        };
        let opset_import = vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(13) }];
        ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..Default::default() }
    }

    /// As rten computes the whole.
    fn by_rten(model: &ModelProto, pixels: Vec<f32>) -> Vec<f32> {
        let input = rten_tensor::NdTensor::from_data([1, 3, SIDE, SIDE], pixels);
        let output = load(model.write_buf().unwrap()).unwrap().run_one(input.into(), None).unwrap();
        rten_tensor::Tensor::<f32>::try_from(output).unwrap().into_data()
    }

    fn kinds(parts: &[Part]) -> String {
        parts.iter().map(|p| if matches!(p, Part::Graph { .. }) { 'g' } else { 'd' }).collect()
    }

    #[test]
    fn a_graph_that_was_cut_computes_what_the_whole_one_does() {
        let first = conv(&["pixels", "first.weight", "first.bias"], "a", 1, 1, 1);
        let each = |from: &str, to: &str, stride| conv(&[from, "each.weight", "each.bias"], to, 3, stride, 4);
        let clip = |from: &str, to: &str| node("Clip", &[from, "zero", "six"], to);
        let cases = [
            // a value that skips the convolution, and a clamp that belongs to it
            (vec![first.clone(), each("a", "b", 1), clip("b", "c"), node("Add", &["a", "c"], "d")], "d", "gdg"),
            // a clamp whose input is used elsewhere stays where it is
            (vec![first.clone(), each("a", "b", 1), clip("b", "c"), node("Add", &["b", "c"], "d")], "d", "gdg"),
            // a clamp before it, and one whose output is used elsewhere too
            (vec![first.clone(), clip("a", "b"), each("b", "c", 2), conv(&["c", "wide.weight"], "d", 5, 1, 4)], "d", "gdd"),
            (vec![first.clone(), clip("a", "b"), each("b", "c", 1), node("Add", &["b", "c"], "d")], "d", "gdg"),
            // nothing takes what one of them gives
            (vec![first.clone(), each("a", "b", 1), node("Relu", &["b"], "e"), each("a", "c", 2)], "c", "gd"),
            // a constant is no value to pass on
            (
                vec![
                    conv(&["features", "each.weight"], "b", 3, 1, 4),
                    conv(&["pixels", "first.weight"], "a", 1, 1, 1),
                    node("Add", &["a", "b"], "c"),
                ],
                "c",
                "g",
            ),
            // one after the other, the last of which is the output
            (vec![first.clone(), each("a", "b", 2), node("Relu", &["b"], "c"), conv(&["c", "wide.weight"], "d", 5, 1, 4)], "d", "gdd"),
            // groups of two are not depthwise
            (vec![first.clone(), conv(&["a", "pairs.weight"], "b", 3, 1, 2), node("Relu", &["b"], "c")], "c", "g"),
            // a value that two of them take
            (vec![first, each("a", "b", 1), each("a", "c", 1), node("Add", &["b", "c"], "d")], "d", "gddg"),
        ];
        for (nodes, output, wanted) in cases {
            let model = model(nodes, output);
            assert_eq!(kinds(&split(&model)), wanted);
            let pixels: Vec<f32> = (0..3 * SIDE * SIDE).map(|i| (i % 23) as f32 / 11.5 - 1.0).collect();
            let mut engine = RtenEngine::new(&model.write_buf().unwrap(), SIDE as u32, 2).unwrap();
            for _ in 0..2 {
                let (found, wanted) = (engine.run(pixels.clone()).unwrap(), by_rten(&model, pixels.clone()));
                assert_eq!(found.len(), wanted.len());
                let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-5, "{worst}");
            }
        }
    }

    #[test]
    fn graphs_that_cannot_be_computed_are_refused() {
        let refused =
            |model: &ModelProto| RtenEngine::new(&model.write_buf().unwrap(), SIDE as u32, 1).map(|_| ()).unwrap_err().to_string();
        let each = conv(&["a", "each.weight"], "b", 3, 1, 4);
        let first = conv(&["pixels", "first.weight"], "a", 1, 1, 1);
        assert!(refused(&model(vec![each.clone(), first.clone()], "b")).contains("computes a after it is used, or never"));
        assert!(refused(&model(vec![first.clone(), each.clone()], "c")).contains("never computes its output, c"));
        let mut two = model(vec![first, each.clone()], "b");
        two.graph.as_mut().unwrap().input.push(value("more", &[]));
        assert!(refused(&two).contains("2 inputs, 1 is needed"));
        assert!(refused(&ModelProto::default()).contains("no graph"));
        // weights whose shape is not what they are
        let mut huge = model(vec![conv(&["pixels", "each.weight"], "b", 3, 1, 4)], "b");
        huge.graph.as_mut().unwrap().initializer[2].dims[0] = 1 << 62;
        assert!(!refused(&huge).is_empty());
        // features of another number of channels than there are kernels
        let mut engine =
            RtenEngine::new(&model(vec![conv(&["pixels", "each.weight"], "b", 3, 1, 4)], "b").write_buf().unwrap(), 9, 1).unwrap();
        assert!(engine.run(vec![0.0; 3 * SIDE * SIDE]).unwrap_err().to_string().contains("shape [1, 3, 9, 9]"));
    }
}
