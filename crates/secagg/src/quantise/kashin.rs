//! Kashin's representation: coefficients of a frame about twice as large as the vector, none of them much above the mean.
//!
//! Iterative clipping of Lyubarskii and Vershynin with the parameters of ScionFL's published code (eta 0.9, delta 1, 3 iterations).

use crate::bits::Bits;
use crate::quantise::{hadamard, norm};

const ETA: f64 = 0.9;
const DELTA: f64 = 1.0;
const ITERATIONS: usize = 3;
/// A vector that fills more of the next power of two than this gets a frame twice that.
const FULL: f64 = 0.85;

/// No coefficient exceeds this many times |x| / sqrt(frame).
pub const LEVEL: f64 = 1.0 + ETA + ETA * ETA;

/// Length of the frame for `len` coordinates.
pub fn frame(len: usize) -> usize {
    let padded = len.next_power_of_two();
    if len as f64 / padded as f64 > FULL { 2 * padded } else { padded }
}

/// Coefficients of `x` in the frame with `signs`, as many as there are signs; [`hadamard::unrotate`] gives `x` back, up to about a
/// thousandth of its square.
pub fn represent(x: &[f32], signs: &Bits) -> Vec<f32> {
    let mut coefficients = vec![0.0f32; signs.len()];
    let mut residual = x.to_vec();
    let mut limit = norm(x) / (DELTA * signs.len() as f64).sqrt();
    for iteration in 0..ITERATIONS {
        let mut step = residual.clone();
        step.resize(signs.len(), 0.0);
        hadamard::rotate(&mut step, signs);
        for (c, s) in coefficients.iter_mut().zip(&mut step) {
            *s = s.clamp(-limit as f32, limit as f32);
            *c += *s;
        }
        if iteration + 1 < ITERATIONS {
            hadamard::unrotate(&mut step, signs);
            residual.iter_mut().zip(&step).for_each(|(r, s)| *r -= s);
            limit *= ETA;
        }
    }
    coefficients
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/secure-aggregation.md gives these vectors.
    #[test]
    #[allow(clippy::approx_constant, reason = "as written down")]
    fn golden_vectors() {
        let signs = |minus: &[usize]| Bits::fill(8, |_| minus.iter().map(|j| 1 << j).sum());
        let x = [1.0, 2.0, 3.0, 4.0];
        let half = [3.535534, -0.707107, -1.414214, 0.0];
        let mixed = [0.0, -1.414214, -0.707107, 3.535534];
        for (minus, expected) in [(&[][..], half), (&[1, 2, 6, 7], mixed)] {
            let mut a = represent(&x, &signs(minus));
            for (a, e) in a.iter().zip(expected.iter().chain(&expected)) {
                assert!((a - e).abs() < 1e-5, "{a} {e}");
            }
            hadamard::unrotate(&mut a, &signs(minus));
            assert!(a[..4].iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?}");
        }
    }

    #[test]
    fn frames_have_the_published_lengths() {
        let cases = [(4, 8), (1000, 2048), (1740, 2048), (1741, 4096), (100_000, 131_072), (1_000_000, 1 << 21)];
        for (len, expected) in cases {
            assert_eq!(frame(len), expected, "{len}");
        }
    }
}
