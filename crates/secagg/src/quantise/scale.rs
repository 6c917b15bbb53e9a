//! What the two values of a bit mean.

use crate::error::SecAggError;
use crate::quantise::{Blocks, Transform, kashin};

/// Default of [`Scale::public`] for rotated vectors: 0.3 % of coordinates are clipped.
pub const KAPPA: f32 = 3.0;

/// Values of a 0 and a 1, by block.
#[derive(Debug, Clone, PartialEq)]
pub enum Scale {
    /// Public and independent of all data: nothing leaks, nothing is sent, no client counts for more than another.
    Public {
        /// Vectors are shortened to this length.
        norm: f32,
        /// Half the range in root mean squares of a coded coordinate.
        kappa: f32,
    },
    /// The same range for every block: a client's own, or agreed by all.
    Range(Range),
}

/// Values of a 0 (`min`) and a 1 (`min + step`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// Value of a 0.
    pub min: f32,
    /// What a 1 adds.
    pub step: f32,
}

impl Range {
    /// The smallest that holds all of `y`.
    pub fn of(y: &[f32]) -> Self {
        let (min, max) = y.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
        if min < max { Self { min, step: max - min } } else { Self { min: if y.is_empty() { 0.0 } else { min }, step: 0.0 } }
    }

    /// The smallest that holds both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        let min = self.min.min(other.min);
        Self { min, step: (self.min + self.step).max(other.min + other.step) - min }
    }

    /// Up with probability (v - min) / step, decided by the uniform `u`; 0 if the range is empty.
    pub fn round(&self, v: f32, u: u32) -> bool {
        let p = (f64::from(v) - f64::from(self.min)) / f64::from(self.step);
        // 0 / 0 and negative values give 0, large ones 2^32
        let threshold = (p * 4_294_967_296.0).min(4_294_967_296.0) as u64;
        self.step > 0.0 && u64::from(u) < threshold
    }
}

impl Scale {
    /// For vectors of length up to `norm` under `transform`, with the transform's own width.
    ///
    /// # Errors
    /// If `norm` is not a positive number, or the transform has no bound (identity).
    pub fn public(norm: f32, transform: Transform) -> Result<Self, SecAggError> {
        let kappa = match transform {
            Transform::Identity => return Err(SecAggError::Config("a public scale needs a transform that spreads the vector".into())),
            Transform::Hadamard => KAPPA,
            Transform::Kashin => kashin::LEVEL as f32,
        };
        if !(norm.is_finite() && norm > 0.0) {
            return Err(SecAggError::Config(format!("the norm limit must be a positive number, not {norm}")));
        }
        Ok(Self::Public { norm, kappa })
    }

    /// Longest vector, if there is such a limit.
    pub fn norm_limit(&self) -> Option<f32> {
        match self {
            Self::Public { norm, .. } => Some(*norm),
            Self::Range(_) => None,
        }
    }

    /// Range of each block. A block's expected share of the squared norm is its share of the coordinates.
    ///
    /// # Errors
    /// If the scale is not finite or its step negative.
    pub fn ranges(&self, blocks: &Blocks) -> Result<Vec<Range>, SecAggError> {
        let range = |len: usize, coded: usize| match self {
            Self::Range(range) => *range,
            Self::Public { norm, kappa } => {
                let rms = f64::from(*norm) * (len as f64 / blocks.dim() as f64 / coded as f64).sqrt();
                let half = (f64::from(*kappa) * rms) as f32;
                Range { min: -half, step: 2.0 * half }
            }
        };
        let ranges: Vec<Range> = blocks.iter().map(|b| range(b.len, b.coded)).collect();
        if ranges.iter().any(|r| !r.min.is_finite() || !r.step.is_finite() || r.step < 0.0) {
            return Err(SecAggError::Config("the scale is not finite".into()));
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_exact_at_the_ends_and_defined_for_an_empty_range() {
        let range = Range { min: -1.0, step: 2.0 };
        for u in [0, 1, u32::MAX] {
            assert!(!range.round(-1.0, u) && !range.round(-9.0, u) && range.round(1.0, u) && range.round(9.0, u));
            assert!(!Range::of(&[3.0, 3.0]).round(3.0, u) && !Range::of(&[]).round(0.0, u));
        }
        assert!(range.round(0.0, (1 << 31) - 1) && !range.round(0.0, 1 << 31));
        assert_eq!(Range::of(&[1.0, -2.0, 0.5]), Range { min: -2.0, step: 3.0 });
        assert_eq!(Range { min: 0.0, step: 1.0 }.union(Range { min: -1.0, step: 1.5 }), Range { min: -1.0, step: 2.0 });
    }

    #[test]
    fn senseless_scales_are_refused() {
        assert!(Scale::public(1.0, Transform::Identity).is_err());
        for norm in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(Scale::public(norm, Transform::Kashin).is_err());
        }
    }
}
