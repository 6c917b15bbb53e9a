//! Inference engines for the networks on the device, behind one small trait.

mod depthwise;
mod split;

use std::collections::BTreeMap;
use std::sync::Arc;

use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value, ValueOrView};
use rten_onnx::onnx::{GraphProto, ModelProto};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensor, NdTensorView, Tensor};

use crate::ClientError;
use depthwise::Depthwise;

/// Runs one graph: an encoder, a backbone, or the head of one.
pub trait Engine: Send {
    /// Normalised pixels (3 x `side` x `side`, CHW) to the graph's output (channel-major), for an encoder the latent before any gain.
    ///
    /// # Errors
    /// [`ClientError::Engine`] if the graph fails.
    fn run(&mut self, pixels: Vec<f32>) -> Result<Vec<f32>, ClientError>;
}

/// The default engine: rten (pure Rust, SIMD on x86-64 and ARM) with depthwise convolutions of its own.
pub struct RtenEngine {
    steps: Vec<Step>,
    /// Number of values that pass from step to step.
    slots: usize,
    input: usize,
    output: usize,
    side: usize,
    pool: Arc<ThreadPool>,
}

/// A value that a step takes, by its slot.
struct Taken {
    slot: usize,
    /// No later step takes it.
    last: bool,
}

/// A part of the graph, loaded.
enum Step {
    /// The slots of the outputs are in their order.
    Graph {
        model: Box<Model>,
        inputs: Vec<(NodeId, Taken)>,
        outputs: Vec<usize>,
    },
    Depthwise {
        conv: Depthwise,
        input: Taken,
        output: usize,
    },
}

fn failed(e: impl std::fmt::Display) -> ClientError {
    ClientError::Engine(e.to_string())
}

fn load(onnx: Vec<u8>) -> Result<Model, ClientError> {
    // only the operators that encoders and backbones use, which keeps the binary small
    let mut options = ModelOptions::with_ops(rten::op_registry!(Abs, Add, Clip, Conv, Div, Flatten, Gemm, GlobalAveragePool, Relu));
    options.prepack_weights(true).load(onnx).map_err(failed)
}

/// Names of the one input and the one output of a graph.
fn ends(graph: &GraphProto) -> Result<[String; 2], ClientError> {
    let constant = |name: &Option<String>| graph.initializer.iter().any(|t| t.name == *name);
    let inputs: Vec<_> = graph.input.iter().filter(|v| !constant(&v.name)).collect();
    let one = |values: &[&rten_onnx::onnx::ValueInfoProto], what: &str| match values {
        [value] => Ok(value.name.clone().unwrap_or_default()),
        _ => Err(ClientError::Engine(format!("the graph has {} {what}s, 1 is needed", values.len()))),
    };
    Ok([one(&inputs, "input")?, one(&graph.output.iter().collect::<Vec<_>>(), "output")?])
}

impl RtenEngine {
    /// Loads an ONNX graph for square inputs of `side` pixels; `threads` worker threads (at least 1).
    ///
    /// # Errors
    /// [`ClientError::Engine`] if the graph cannot be loaded.
    pub fn new(onnx: &[u8], side: u32, threads: usize) -> Result<Self, ClientError> {
        let proto = ModelProto::parse_buf(onnx).map_err(failed)?;
        let [input, output] = ends(proto.graph.as_ref().ok_or_else(|| failed("the file has no graph"))?)?;
        let parts = split::split(&proto);
        drop(proto);
        let mut last: BTreeMap<String, usize> = BTreeMap::new();
        for (i, part) in parts.iter().enumerate() {
            last.extend(part.inputs().iter().map(|name| (name.clone(), i)));
        }
        last.insert(output.clone(), usize::MAX);
        let mut slots = BTreeMap::from([(input.clone(), 0)]);
        let mut steps = Vec::new();
        for (i, part) in parts.into_iter().enumerate() {
            let taken = |name: &str, slots: &BTreeMap<String, usize>| {
                let slot = slots.get(name).ok_or_else(|| failed(format!("the graph computes {name} after it is used, or never")))?;
                Ok::<_, ClientError>(Taken { slot: *slot, last: last.get(name) == Some(&i) })
            };
            let given = |name: String, slots: &mut BTreeMap<String, usize>| {
                let next = slots.len();
                *slots.entry(name).or_insert(next)
            };
            steps.push(match part {
                split::Part::Graph { model, inputs, outputs } => {
                    let model = Box::new(load(model.write_buf().map_err(failed)?)?);
                    let ids = model.input_ids().iter().zip(&inputs);
                    let inputs = ids.map(|(id, name)| Ok((*id, taken(name, &slots)?))).collect::<Result<_, ClientError>>()?;
                    let outputs = outputs.into_iter().map(|name| given(name, &mut slots)).collect();
                    Step::Graph { model, inputs, outputs }
                }
                split::Part::Depthwise { conv, input, output } => {
                    let input = taken(&input, &slots)?;
                    Step::Depthwise { conv, input, output: given(output, &mut slots) }
                }
            });
        }
        let slot = |name: &str| slots.get(name).copied().ok_or_else(|| failed(format!("the graph never computes its output, {name}")));
        let (input, output) = (slot(&input)?, slot(&output)?);
        let pool = Arc::new(ThreadPool::with_num_threads(threads.max(1)));
        Ok(Self { steps, slots: slots.len(), input, output, side: side as usize, pool })
    }
}

impl Step {
    fn run(&self, values: &mut [Option<Value>], pool: &Arc<ThreadPool>) -> Result<(), ClientError> {
        let missing = || failed("a value is missing");
        match self {
            Self::Graph { model, inputs, outputs } => {
                let mut owned: Vec<Option<Value>> =
                    inputs.iter().map(|(_, taken)| if taken.last { values[taken.slot].take() } else { None }).collect();
                let given = inputs.iter().zip(&mut owned).map(|((node, taken), owned)| {
                    let value = match owned.take() {
                        Some(value) => ValueOrView::Value(value),
                        None => ValueOrView::View(values[taken.slot].as_ref().ok_or_else(missing)?.as_view()),
                    };
                    Ok((*node, value))
                });
                let given = given.collect::<Result<Vec<_>, ClientError>>()?;
                let options = RunOptions::default().with_thread_pool(Some(pool.clone()));
                let computed = model.run(given, model.output_ids(), Some(options)).map_err(failed)?;
                outputs.iter().zip(computed).for_each(|(slot, value)| values[*slot] = Some(value));
            }
            Self::Depthwise { conv, input, output } => {
                let value = values[input.slot].as_ref().ok_or_else(missing)?;
                let features: NdTensorView<f32, 4> = value.try_into().map_err(failed)?;
                let [batch, channels, height, width] = features.shape();
                let fits = batch == 1 && channels == conv.channels();
                let run = || conv.run(features.to_contiguous().data(), [height, width], pool);
                let (result, [h, w]) = fits.then(run).flatten().ok_or_else(|| {
                    let shape = features.shape();
                    failed(format!("a depthwise convolution of {} channels was given features of shape {shape:?}", conv.channels()))
                })?;
                values[*output] = Some(NdTensor::from_data([1, conv.channels(), h, w], result).into());
                if input.last {
                    values[input.slot] = None;
                }
            }
        }
        Ok(())
    }
}

impl Engine for RtenEngine {
    fn run(&mut self, pixels: Vec<f32>) -> Result<Vec<f32>, ClientError> {
        if pixels.len() != 3 * self.side * self.side {
            return Err(ClientError::Engine(format!("{} input values for side {}", pixels.len(), self.side)));
        }
        let mut values: Vec<Option<Value>> = (0..self.slots).map(|_| None).collect();
        values[self.input] = Some(NdTensor::from_data([1, 3, self.side, self.side], pixels).into());
        let Self { steps, pool, .. } = self;
        // at once, not step by step: handing work over to the pool costs a tenth of a millisecond or more
        pool.run(|| steps.iter().try_for_each(|step| step.run(&mut values, pool)))?;
        let output = values[self.output].take().ok_or_else(|| failed("the graph gave no output"))?;
        let output: Tensor<f32> = output.try_into().map_err(failed)?;
        Ok(output.into_data())
    }
}
