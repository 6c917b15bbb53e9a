//! From real vectors to one bit per coordinate, and from counts of bits back to the mean.
//!
//! The quantisers are linear: decoding commutes with summing, so that one inverse transform of the counts gives the mean of all
//! clients (ScionFL, arXiv 2210.07376; stochastic quantisation after randomised rotation: Suresh et al. 2017).

pub mod blocks;
pub mod hadamard;
pub mod kashin;
pub mod scale;
pub mod separate;

use rand::RngCore;

pub use blocks::Blocks;
pub use scale::Scale;

use crate::bits::{Bits, WORD};
use crate::error::{SecAggError, expect_size};
use crate::prg::{Seed, Stream};

/// What is done to a vector before it is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transform {
    /// Nothing.
    Identity,
    /// Randomised Hadamard transform: 1 to 1.05 bits per coordinate.
    Hadamard,
    /// Kashin's representation in a frame twice as large: about 2 bits per coordinate, no clipping.
    Kashin,
}

/// A transform for vectors of one length under one public seed.
pub struct Quantiser {
    transform: Transform,
    blocks: Blocks,
    /// Signs of all blocks, one bit per coded coordinate.
    signs: Vec<Bits>,
}

impl Quantiser {
    /// For `dim` coordinates. All clients of a round use the same public `seed`.
    ///
    /// # Errors
    /// If `dim` is 0 or more than [`blocks::MAX_DIM`].
    pub fn new(dim: usize, transform: Transform, seed: &Seed) -> Result<Self, SecAggError> {
        let blocks = Blocks::new(dim, transform)?;
        let rotated = if transform == Transform::Identity { 0 } else { blocks.iter().len() };
        let signs = (0..).zip(blocks.iter()).take(rotated).map(|(b, block)| {
            let mut words = vec![0; block.coded.div_ceil(WORD)];
            Stream::rotation(seed, b).fill(&mut words);
            Bits::fill(block.coded, |k| words[k])
        });
        let signs = signs.collect();
        Ok(Self { transform, blocks, signs })
    }

    /// How the vector is split.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Coded coordinates: bits of an upload.
    pub fn coded(&self) -> usize {
        self.blocks.coded()
    }

    /// Coordinates to be rounded.
    ///
    /// # Errors
    /// If `x` has another length, or a value that is not finite.
    pub fn forward(&self, x: &[f32]) -> Result<Vec<f32>, SecAggError> {
        expect_size("coordinates", self.blocks.dim(), x.len())?;
        if let Some(j) = x.iter().position(|v| !v.is_finite()) {
            return Err(SecAggError::NotFinite(j));
        }
        if self.transform == Transform::Identity {
            return Ok(x.to_vec());
        }
        let spread = self.blocks.gather(x);
        let mut y = Vec::with_capacity(self.coded());
        for (block, signs) in self.blocks.iter().zip(&self.signs) {
            let part = &spread[block.start..block.start + block.len];
            match self.transform {
                Transform::Kashin => y.extend(kashin::represent(part, signs)),
                _ => {
                    let start = y.len();
                    y.extend_from_slice(part);
                    y.resize(start + block.coded, 0.0);
                    hadamard::rotate(&mut y[start..], signs);
                }
            }
        }
        Ok(y)
    }

    /// The vector whose coded coordinates are `y`.
    ///
    /// # Errors
    /// If `y` has another length.
    pub fn inverse(&self, y: &[f64]) -> Result<Vec<f64>, SecAggError> {
        expect_size("coded coordinates", self.coded(), y.len())?;
        if self.transform == Transform::Identity {
            return Ok(y.to_vec());
        }
        let mut rest = y.to_vec();
        let mut spread = Vec::with_capacity(self.blocks.dim());
        let mut start = 0;
        for (block, signs) in self.blocks.iter().zip(&self.signs) {
            let part = &mut rest[start..start + block.coded];
            hadamard::unrotate(part, signs);
            spread.extend_from_slice(&part[..block.len]);
            start += block.coded;
        }
        Ok(self.blocks.scatter(&spread))
    }

    /// Rounds `x` to bits by `scale`: clipped to its range, then up with the probability that makes the expectation exact. `rng`
    /// must be the client's own.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn quantise(&self, x: &[f32], scale: &Scale, rng: &mut impl RngCore) -> Result<Bits, SecAggError> {
        let y = match scale.norm_limit() {
            Some(limit) => self.forward(&clip_norm(x, limit))?,
            None => self.forward(x)?,
        };
        self.round(&y, scale, rng)
    }

    /// Rounds coded coordinates to bits.
    ///
    /// # Errors
    /// If `y` has another length, or the scale is not finite.
    pub fn round(&self, y: &[f32], scale: &Scale, rng: &mut impl RngCore) -> Result<Bits, SecAggError> {
        expect_size("coded coordinates", self.coded(), y.len())?;
        let ranges = scale.ranges(&self.blocks)?;
        let mut bits = vec![0; y.len().div_ceil(WORD)];
        let mut start = 0;
        for (block, range) in self.blocks.iter().zip(ranges) {
            for (j, v) in (start..).zip(&y[start..start + block.coded]) {
                bits[j / WORD] |= u64::from(range.round(*v, rng.next_u32())) << (j % WORD);
            }
            start += block.coded;
        }
        Bits::from_words(y.len(), bits)
    }

    /// The mean over `n` clients from how many of them set each bit.
    ///
    /// # Errors
    /// If `counts` has another length, `n` is 0 or a count is more than `n`.
    pub fn mean(&self, counts: &[u32], n: u32, scale: &Scale) -> Result<Vec<f64>, SecAggError> {
        expect_size("counts", self.coded(), counts.len())?;
        if n == 0 || counts.iter().any(|c| *c > n) {
            return Err(SecAggError::Config(format!("counts of {n} clients must be 0 to {n}")));
        }
        let mut y = Vec::with_capacity(counts.len());
        for (block, range) in self.blocks.iter().zip(scale.ranges(&self.blocks)?) {
            let part = &counts[y.len()..y.len() + block.coded];
            y.extend(part.iter().map(|c| f64::from(range.min) + f64::from(range.step) * f64::from(*c) / f64::from(n)));
        }
        self.inverse(&y)
    }
}

/// `x`, shortened to at most `limit`.
fn clip_norm(x: &[f32], limit: f32) -> Vec<f32> {
    let norm = norm(x);
    let factor = if norm > f64::from(limit) { f64::from(limit) / norm } else { 1.0 };
    x.iter().map(|v| (f64::from(*v) * factor) as f32).collect()
}

/// Euclidean length, summed in double precision.
pub fn norm(x: &[f32]) -> f64 {
    x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}
