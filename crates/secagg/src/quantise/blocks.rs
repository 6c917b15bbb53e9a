//! Splits a vector into blocks whose transforms have power-of-two lengths, with at most 5 % of padding in all.

use crate::error::SecAggError;
use crate::quantise::Transform;
use crate::quantise::kashin;

/// Longest vector.
pub const MAX_DIM: usize = 1 << 28;
/// Longest block: 4 MiB of single precision.
const MAX_BLOCK: usize = 1 << 20;
/// Padding is less than one part in this many.
const PADDING: usize = 20;

/// Part of the vector that is transformed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// First coordinate, after spreading.
    pub start: usize,
    /// Coordinates.
    pub len: usize,
    /// Coordinates after padding and transform.
    pub coded: usize,
}

/// Blocks of a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    dim: usize,
    coded: usize,
    stride: usize,
    blocks: Vec<Block>,
}

impl Blocks {
    /// For `dim` coordinates under `transform`.
    ///
    /// # Errors
    /// If `dim` is 0 or more than [`MAX_DIM`].
    pub fn new(dim: usize, transform: Transform) -> Result<Self, SecAggError> {
        if dim == 0 || dim > MAX_DIM {
            return Err(SecAggError::Config(format!("a vector has 1 to {MAX_DIM} coordinates, not {dim}")));
        }
        let lens = if transform == Transform::Identity { vec![dim] } else { lengths(dim) };
        let mut start = 0;
        let blocks = lens.into_iter().map(|len| {
            let coded = match transform {
                Transform::Identity => len,
                Transform::Hadamard => len.next_power_of_two(),
                Transform::Kashin => kashin::frame(len),
            };
            start += len;
            Block { start: start - len, len, coded }
        });
        let blocks: Vec<Block> = blocks.collect();
        let coded = blocks.iter().map(|b| b.coded).sum();
        let stride = if blocks.len() > 1 { coprime_near(dim, dim as f64 * 0.618_033_988_749_895) } else { 1 };
        Ok(Self { dim, coded, stride, blocks })
    }

    /// Coordinates.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Coded coordinates.
    pub fn coded(&self) -> usize {
        self.coded
    }

    /// One after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Block> {
        self.blocks.iter()
    }

    /// Coordinates in the order of the blocks: place p holds coordinate p x stride mod dim, so that every layer of a model is spread
    /// evenly over all blocks and one public scale suits them all.
    pub fn gather(&self, x: &[f32]) -> Vec<f32> {
        self.places().map(|j| x[j]).collect()
    }

    /// The reverse of [`Self::gather`].
    pub fn scatter(&self, spread: &[f64]) -> Vec<f64> {
        let mut x = vec![0.0; self.dim];
        for (j, v) in self.places().zip(spread) {
            x[j] = *v;
        }
        x
    }

    fn places(&self) -> impl Iterator<Item = usize> {
        let (dim, stride) = (self.dim, self.stride);
        let mut at = 0;
        (0..dim).map(move |_| {
            let here = at;
            at += stride;
            if at >= dim {
                at -= dim;
            }
            here
        })
    }
}

/// Largest powers of two first; the rest is padded as soon as that costs little enough.
fn lengths(dim: usize) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut left = dim;
    while left > 0 {
        let padded = left.next_power_of_two();
        if padded <= MAX_BLOCK && (padded - left) * PADDING < dim {
            lengths.push(left);
            break;
        }
        let len = MAX_BLOCK.min(padded / 2);
        lengths.push(len);
        left -= len;
    }
    lengths
}

/// A number without common divisor with `dim`, near `wanted`.
fn coprime_near(dim: usize, wanted: f64) -> usize {
    fn gcd(a: usize, b: usize) -> usize {
        if b == 0 { a } else { gcd(b, a % b) }
    }
    (wanted as usize..dim).find(|s| gcd(*s, dim) == 1).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_million_coordinates_are_one_block() {
        let blocks = Blocks::new(1_000_000, Transform::Hadamard).unwrap();
        assert_eq!(blocks.coded(), 1 << 20);
        assert!(blocks.coded() as f64 <= 1.05 * 1e6);
    }

    proptest! {
        #[test]
        fn padding_stays_below_5_percent_and_nothing_is_lost(dim in 1usize..3_000_000) {
            let blocks = Blocks::new(dim, Transform::Hadamard).unwrap();
            prop_assert!((blocks.coded() as f64) < 1.05 * dim as f64, "{}", blocks.coded());
            let mut end = 0;
            for b in blocks.iter() {
                prop_assert!(b.start == end && b.coded.is_power_of_two() && b.coded >= b.len && b.coded <= MAX_BLOCK);
                end += b.len;
            }
            prop_assert_eq!(end, dim);
        }

        #[test]
        fn spreading_is_undone(dim in 1usize..5000) {
            let blocks = Blocks::new(dim, Transform::Kashin).unwrap();
            let x: Vec<f32> = (0..dim).map(|j| j as f32).collect();
            let spread: Vec<f64> = blocks.gather(&x).iter().map(|v| f64::from(*v)).collect();
            prop_assert_eq!(blocks.scatter(&spread), x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        }
    }
}
