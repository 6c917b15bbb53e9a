//! What a network costs, before it runs: multiply-accumulates, bytes moved, and the time that a roofline gives them.
//!
//! A layer takes at least as long as its arithmetic at the machine's peak, and at least as long as its bytes at the memory's rate
//! (Williams et al., Roofline, 2009). Real kernels reach neither; the caller learns by which factor from what it measures.

use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Device, Kind, Tensor};

const FLOAT: u64 = 4;
/// Side of the matrices that are multiplied and values that are copied: a GPU needs more of both to be busy, and to leave its cache.
const MATRIX: (i64, i64) = (512, 8192);
const COPIED: (i64, i64) = (16 << 20, 256 << 20);
const REPEATS: usize = 5;

/// One layer, for one photo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerCost {
    /// Where it is.
    pub name: String,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Bytes of its weights, read once for a batch.
    pub weight_bytes: u64,
    /// Bytes of its input and output.
    pub activation_bytes: u64,
}

impl LayerCost {
    /// A convolution from (input, side) to (output, side / stride), each output seeing `fan_in` inputs.
    pub(crate) fn conv(name: String, (input, side_in): (i64, i64), (output, side_out): (i64, i64), fan_in: i64) -> Self {
        let positions = side_out * side_out;
        Self {
            name,
            macs: (fan_in * output * positions) as u64,
            weight_bytes: FLOAT * (fan_in * output) as u64,
            activation_bytes: FLOAT * (input * side_in * side_in + output * positions) as u64,
        }
    }

    /// Bytes moved for a batch of photos.
    pub fn bytes(&self, batch: u64) -> u64 {
        self.weight_bytes + batch * self.activation_bytes
    }

    /// Operations for each byte moved, of a batch.
    pub fn intensity(&self, batch: u64) -> f64 {
        (2 * batch * self.macs) as f64 / self.bytes(batch).max(1) as f64
    }
}

/// What a machine can do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Machine {
    /// Operations a second (a multiply-accumulate is two).
    pub flops: f64,
    /// Bytes to and from memory a second.
    pub bytes_per_second: f64,
}

impl Machine {
    /// Measures the device: a product of matrices of this precision, and a copy. Takes some 50 ms on a CPU.
    pub fn measure(device: Device, kind: Kind) -> Self {
        let _inference = tch::no_grad_guard();
        let (side, copied) = if device.is_cuda() { (MATRIX.1, COPIED.1) } else { (MATRIX.0, COPIED.0) };
        let matrix = Tensor::ones([side, side], (kind, device)) / side as f64;
        let long = Tensor::ones([copied], (Kind::Float, device));
        // waits for the device
        let read = |t: &Tensor| t.view(-1).get(0).double_value(&[]);
        let best = |work: &dyn Fn() -> Tensor| {
            read(&work());
            let times = (0..REPEATS).map(|_| {
                let start = Instant::now();
                read(&work());
                start.elapsed().as_secs_f64().max(1e-9)
            });
            times.fold(f64::INFINITY, f64::min)
        };
        let product = best(&|| matrix.matmul(&matrix));
        let copy = best(&|| long.copy());
        Self { flops: 2.0 * (side as f64).powi(3) / product, bytes_per_second: 2.0 * (copied as u64 * FLOAT) as f64 / copy }
    }

    /// The roofline's time of a batch.
    pub fn time(&self, layers: &[LayerCost], batch: u64) -> Duration {
        let each = layers.iter().map(|l| {
            let arithmetic = (2 * batch * l.macs) as f64 / self.flops;
            arithmetic.max(l.bytes(batch) as f64 / self.bytes_per_second)
        });
        Duration::from_secs_f64(each.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackboneKind, DecoderKind, DecoderSpec, Layer};

    #[test]
    fn layers_add_up_to_the_networks_multiply_accumulates() {
        for kind in BackboneKind::ALL {
            let sum = |from: Layer| kind.layers(from).iter().map(|l| l.macs).sum::<u64>();
            assert_eq!(sum(Layer::Input), kind.macs(None));
            for block in 0..kind.block_count() - 1 {
                assert_eq!(sum(Layer::Block(block)), kind.macs(Some(block + 1)), "after block {block}");
            }
        }
        for kind in [DecoderKind::Residual, DecoderKind::EntropicStudent] {
            let spec =
                DecoderSpec { kind, input: 48, width: 96, hidden: 48, blocks: 3, output: 16, upsample: 4, resize: None, tuned: None };
            let weights: u64 = spec.layers(28).iter().map(|l| l.weight_bytes / 4).sum();
            assert!(weights <= spec.parameters() && weights > spec.parameters() * 9 / 10, "all but the biases");
        }
    }

    #[test]
    fn the_roof_is_the_slower_of_arithmetic_and_memory() {
        let machine = Machine { flops: 1e9, bytes_per_second: 1e9 };
        let layer = LayerCost { name: "x".into(), macs: 1_000_000, weight_bytes: 1_000_000, activation_bytes: 1_000_000 };
        assert_eq!(machine.time(std::slice::from_ref(&layer), 1), Duration::from_millis(2));
        assert!((layer.intensity(1) - 1.0).abs() < 1e-9);
        let heavy = LayerCost { macs: 10_000_000, ..layer };
        assert_eq!(machine.time(&[heavy], 2), Duration::from_millis(40));
        let here = Machine::measure(Device::Cpu, Kind::Float);
        assert!(here.flops > 1e8 && here.bytes_per_second > 1e8, "{here:?}");
    }
}
