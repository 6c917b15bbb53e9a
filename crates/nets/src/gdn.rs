//! Generalised divisive normalisation without squares and roots: `y = x / (beta + gamma |x|)` over channels, or its approximate inverse
//! `y = x (beta + gamma |x|)` (Ballé et al. 2016; this form is of Johnston et al., arXiv 1912.08771).

use tch::{Tensor, nn};

/// Added to beta, so that nothing is divided by zero.
const LEAST: f64 = 1e-6;
/// Initial weight of a channel in its own norm, and of the others'.
const OWN: f32 = 0.1;
const OTHERS: f32 = 1e-6;

/// The layer. Its variables are the square roots of what counts: weights stay non-negative.
pub(crate) struct Gdn {
    beta: Tensor,
    gamma: Tensor,
    inverse: bool,
}

/// (beta, gamma) of the variables `beta` (C) and `gamma` (C, C), as a convolution's bias and weights (C, C, 1, 1).
pub fn effective(beta: &Tensor, gamma: &Tensor) -> (Tensor, Tensor) {
    (beta.square() + LEAST, gamma.square().unsqueeze(-1).unsqueeze(-1))
}

impl Gdn {
    /// Creates the variables under `path`.
    pub(crate) fn new(path: &nn::Path, channels: i64, inverse: bool) -> Self {
        let start: Vec<f32> = (0..channels * channels).map(|i| if i % (channels + 1) == 0 { OWN } else { OTHERS }.sqrt()).collect();
        Self {
            beta: path.ones("beta", &[channels]),
            gamma: path.var_copy("gamma", &Tensor::from_slice(&start).view([channels, channels])),
            inverse,
        }
    }

    /// (N, C, H, W) to the same shape.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let (beta, gamma) = effective(&self.beta, &self.gamma);
        let norm = x.abs().conv2d(&gamma, Some(beta), [1, 1], [0, 0], [1, 1], 1);
        if self.inverse { x * norm } else { x / norm }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_channel_is_divided_by_what_all_of_them_say() {
        let vs = nn::VarStore::new(tch::Device::Cpu);
        let (gdn, igdn) = (Gdn::new(&(vs.root() / "a"), 2, false), Gdn::new(&(vs.root() / "b"), 2, true));
        let x = Tensor::from_slice(&[3.0f32, -4.0]).view([1, 2, 1, 1]);
        let values = |t: Tensor| Vec::<f32>::try_from(t.view(-1)).unwrap();
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(close(&values(gdn.forward(&x)), &[3.0 / 1.3, -4.0 / 1.4]));
        assert!(close(&values(igdn.forward(&x)), &[3.0 * 1.3, -4.0 * 1.4]));
    }
}
