//! Where the values of a tensor lie in memory.

use tch::{Device, Kind, Tensor};

/// The same values (N, C, H, W) with the channels of each position beside each other, where that is faster: oneDNN otherwise rearranges the input and the output of
/// every convolution (decision 0029), cuDNN those of what it computes in bfloat16 (decision 0037). Convolutions, and what works element by element, leave the order as
/// it is, so this is done once for a network.
pub(crate) fn channels_last(x: &Tensor) -> Tensor {
    match (x.device(), x.kind()) {
        (Device::Cpu, _) | (_, Kind::BFloat16) => x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]),
        _ => x.shallow_clone(),
    }
}
