//! Inference engines for the networks on the device, behind one small trait.

use std::sync::Arc;

use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool};
use rten_tensor::{NdTensor, Tensor};

use crate::ClientError;

/// Runs one graph: an encoder, a backbone, or the head of one.
pub trait Engine: Send {
    /// Normalised pixels (3 x `side` x `side`, CHW) to the graph's output (channel-major), for an encoder the latent before any gain.
    ///
    /// # Errors
    /// [`ClientError::Engine`] if the graph fails.
    fn run(&mut self, pixels: Vec<f32>) -> Result<Vec<f32>, ClientError>;
}

/// The default engine: rten, pure Rust, SIMD on x86-64 and ARM.
pub struct RtenEngine {
    model: Model,
    input: NodeId,
    output: NodeId,
    side: usize,
    pool: Arc<ThreadPool>,
}

fn failed(e: impl std::fmt::Display) -> ClientError {
    ClientError::Engine(e.to_string())
}

impl RtenEngine {
    /// Loads an ONNX graph for square inputs of `side` pixels; `threads` worker threads (at least 1).
    ///
    /// # Errors
    /// [`ClientError::Engine`] if the graph cannot be loaded.
    pub fn new(onnx: &[u8], side: u32, threads: usize) -> Result<Self, ClientError> {
        // only the operators that encoders and backbones use, which keeps the binary small
        let mut options = ModelOptions::with_ops(rten::op_registry!(Abs, Add, Clip, Conv, Div, Flatten, Gemm, GlobalAveragePool, Relu));
        let model = options.prepack_weights(true).load(onnx.to_vec()).map_err(failed)?;
        let one = |ids: &[NodeId], what: &str| match ids {
            [id] => Ok(*id),
            _ => Err(ClientError::Engine(format!("the graph has {} {what}s, 1 is needed", ids.len()))),
        };
        let (input, output) = (one(model.input_ids(), "input")?, one(model.output_ids(), "output")?);
        let pool = Arc::new(ThreadPool::with_num_threads(threads.max(1)));
        Ok(Self { model, input, output, side: side as usize, pool })
    }
}

impl Engine for RtenEngine {
    fn run(&mut self, pixels: Vec<f32>) -> Result<Vec<f32>, ClientError> {
        if pixels.len() != 3 * self.side * self.side {
            return Err(ClientError::Engine(format!("{} input values for side {}", pixels.len(), self.side)));
        }
        let input = NdTensor::from_data([1, 3, self.side, self.side], pixels);
        let options = RunOptions::default().with_thread_pool(Some(self.pool.clone()));
        let [output] = self.model.run_n(vec![(self.input, input.into())], [self.output], Some(options)).map_err(failed)?;
        let output: Tensor<f32> = output.try_into().map_err(failed)?;
        Ok(output.into_data())
    }
}
