//! Randomised Hadamard transform: signs, then the orthonormal Walsh-Hadamard matrix, in place.
//!
//! Sums are formed for h = 1, 2, 4, ... as in the textbook; only the order in which independent sums are visited is chosen for the
//! caches, so results are the same to the bit everywhere.

use std::ops::{Add, Mul, Sub};

use crate::bits::{Bits, WORD};

/// Values that fit the first cache together.
const CACHED: usize = 2048;

/// Single or double precision.
pub trait Real: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    /// 1 / sqrt(n).
    fn inverse_root(n: usize) -> Self;
    /// Negated if `bit` is 1.
    #[must_use]
    fn negated_if(self, bit: u64) -> Self;
}

impl Real for f32 {
    fn inverse_root(n: usize) -> Self {
        (1.0 / (n as f64).sqrt()) as Self
    }

    fn negated_if(self, bit: u64) -> Self {
        Self::from_bits(self.to_bits() ^ (bit as u32) << 31)
    }
}

impl Real for f64 {
    fn inverse_root(n: usize) -> Self {
        1.0 / (n as Self).sqrt()
    }

    fn negated_if(self, bit: u64) -> Self {
        Self::from_bits(self.to_bits() ^ bit << 63)
    }
}

/// H S x in place; the length is a power of two, `signs` as long.
pub fn rotate<T: Real>(x: &mut [T], signs: &Bits) {
    flip(x, signs);
    transform(x);
}

/// S H x in place: the inverse of [`rotate`].
pub fn unrotate<T: Real>(x: &mut [T], signs: &Bits) {
    transform(x);
    flip(x, signs);
}

fn flip<T: Real>(x: &mut [T], signs: &Bits) {
    for (x, word) in x.chunks_mut(WORD).zip(signs.words()) {
        for (j, x) in x.iter_mut().enumerate() {
            *x = x.negated_if(word >> j & 1);
        }
    }
}

/// H x in place; the length is a power of two.
pub fn transform<T: Real>(x: &mut [T]) {
    debug_assert!(x.len().is_power_of_two());
    let factor = T::inverse_root(x.len());
    for part in x.chunks_mut(CACHED) {
        let mut h = 1;
        while h < part.len() {
            h = if 4 * h <= part.len() { two_stages(part, h) } else { stage(part, h) };
        }
    }
    let mut h = CACHED;
    while h < x.len() {
        h = if 4 * h <= x.len() { two_stages(x, h) } else { stage(x, h) };
    }
    x.iter_mut().for_each(|x| *x = *x * factor);
}

fn stage<T: Real>(x: &mut [T], h: usize) -> usize {
    for pair in x.chunks_exact_mut(2 * h) {
        let (a, b) = pair.split_at_mut(h);
        for (a, b) in a.iter_mut().zip(b) {
            (*a, *b) = (*a + *b, *a - *b);
        }
    }
    2 * h
}

/// Stages h and 2 h with one pass over the memory.
fn two_stages<T: Real>(x: &mut [T], h: usize) -> usize {
    for four in x.chunks_exact_mut(4 * h) {
        let (ab, cd) = four.split_at_mut(2 * h);
        let ((a, b), (c, d)) = (ab.split_at_mut(h), cd.split_at_mut(h));
        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
            let (p, q, r, s) = (*a + *b, *a - *b, *c + *d, *c - *d);
            (*a, *b, *c, *d) = (p + r, q + s, p - r, q - s);
        }
    }
    4 * h
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_vector() {
        let mut x = [1f32, 2.0, 3.0, 4.0];
        rotate(&mut x, &Bits::zeros(4));
        assert_eq!(x, [5.0, -1.0, -2.0, 0.0]);
    }

    /// The textbook's loop.
    fn plain(x: &mut [f32]) {
        let mut h = 1;
        while h < x.len() {
            for i in (0..x.len()).filter(|i| i & h == 0) {
                (x[i], x[i + h]) = (x[i] + x[i + h], x[i] - x[i + h]);
            }
            h *= 2;
        }
        let factor = f32::inverse_root(x.len());
        x.iter_mut().for_each(|v| *v *= factor);
    }

    #[test]
    fn every_length_gives_the_textbooks_bits_and_is_its_own_inverse() {
        for log in 0..=15 {
            let n = 1usize << log;
            let signs = Bits::fill(n, |k| 0xD1B5_4A32_D192_ED03u64.rotate_left(k as u32 % 63));
            let x: Vec<f32> = (0..n).map(|j| ((j * 7919 % 1009) as f32 - 504.0) / 37.0).collect();
            let (mut fast, mut slow) = (x.clone(), x.clone());
            transform(&mut fast);
            plain(&mut slow);
            assert_eq!(fast, slow, "{n}");
            let mut y = x.clone();
            rotate(&mut y, &signs);
            let (before, after) = (super::super::norm(&x), super::super::norm(&y));
            assert!((before - after).abs() <= 1e-6 * before, "{n}: {before} {after}");
            unrotate(&mut y, &signs);
            let error: Vec<f32> = x.iter().zip(&y).map(|(a, b)| a - b).collect();
            assert!(super::super::norm(&error) <= 1e-6 * before.max(1e-9), "{n}");
        }
    }
}
