//! Mode F, for study: approximate conversion of XOR shares to integers, as in ScionFL's published code.
//!
//! A bit hidden as m = b ^ l1 ^ .. ^ lq has b = m + (1 - 2 m) L with L = sum over k of (-2)^(k-1) e_k(l). Keeping the sum and the full
//! product alone needs one secure product instead of 2^q - q - 1 and stays unbiased, because all that is left out averages to nothing
//! against 1 - 2 m; it costs variance. Nothing here is used by the service: exact counting ([`crate::boolean3`]) is cheaper.

use crate::error::SecAggError;

/// Coefficients of the kept terms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conversion {
    shares: u32,
    sum: f64,
    constant: f64,
}

impl Conversion {
    /// Middle terms replaced by their expectation.
    ///
    /// # Errors
    /// For fewer than 2 or more than 16 shares.
    pub fn expectation(shares: u32) -> Result<Self, SecAggError> {
        let q = f64::from(check(shares)?);
        let parity = if shares.is_multiple_of(2) { 1.0 } else { -1.0 };
        Ok(Self { shares, sum: 1.0, constant: (1.0 - q + parity) / 2.0 })
    }

    /// Least variance: the sum enters with (-1)^q. Our own choice.
    ///
    /// # Errors
    /// As [`Self::expectation`].
    pub fn tuned(shares: u32) -> Result<Self, SecAggError> {
        check(shares)?;
        let (sum, constant) = if shares.is_multiple_of(2) { (1.0, 1.0 - f64::from(shares) / 2.0) } else { (-1.0, f64::from(shares) / 2.0) };
        Ok(Self { shares, sum, constant })
    }

    /// The estimate of b from the public `masked` bit and the hidden shares.
    ///
    /// # Errors
    /// For another number of shares.
    pub fn estimate(&self, masked: bool, hidden: &[bool]) -> Result<f64, SecAggError> {
        crate::error::expect_size("shares", self.shares as usize, hidden.len())?;
        let ones = hidden.iter().filter(|l| **l).count() as f64;
        let top = if hidden.iter().all(|l| *l) { (-2f64).powi(self.shares as i32 - 1) } else { 0.0 };
        let lambda = self.sum * ones + self.constant + top;
        Ok(if masked { 1.0 - lambda } else { lambda })
    }
}

fn check(shares: u32) -> Result<u32, SecAggError> {
    if (2..=16).contains(&shares) { Ok(shares) } else { Err(SecAggError::Config(format!("2 to 16 shares, not {shares}"))) }
}

/// XOR of `shares` as an integer, exactly: sum over k of (-2)^(k-1) e_k.
pub fn exact(shares: &[bool]) -> i64 {
    // with t ones, e_k is t choose k
    let ones = shares.iter().filter(|s| **s).count() as i64;
    let mut choose = 1;
    let mut power = 1;
    let mut sum = 0;
    for k in 1..=ones {
        choose = choose * (ones - k + 1) / k;
        sum += power * choose;
        power *= -2;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(q: u32) -> impl Iterator<Item = Vec<bool>> {
        (0..1u32 << q).map(move |bits| (0..q).map(|k| bits >> k & 1 == 1).collect())
    }

    #[test]
    fn xor_as_an_integer_is_exact() {
        for q in 1..=7 {
            for shares in all(q) {
                assert_eq!(exact(&shares), i64::from(shares.iter().fold(false, |a, b| a ^ b)), "{shares:?}");
            }
        }
    }

    /// Mean and variance of the estimate of `b` over all hidden shares, exactly.
    fn moments(conversion: &Conversion, q: u32, b: bool) -> (f64, f64) {
        let estimates: Vec<f64> = all(q).map(|l| conversion.estimate(l.iter().fold(b, |a, x| a ^ x), &l).unwrap()).collect();
        let mean = estimates.iter().sum::<f64>() / estimates.len() as f64;
        (mean, estimates.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / estimates.len() as f64)
    }

    #[test]
    fn estimates_are_unbiased_with_the_known_variance() {
        let table = [(2, 0.0, 0.0), (3, 3.75, 0.75), (4, 2.5, 2.5), (5, 11.25, 6.25), (6, 14.0, 14.0)];
        for (q, expectation, tuned) in table {
            for b in [false, true] {
                for (conversion, variance) in [(Conversion::expectation(q).unwrap(), expectation), (Conversion::tuned(q).unwrap(), tuned)] {
                    let (mean, v) = moments(&conversion, q, b);
                    assert!((mean - f64::from(u8::from(b))).abs() < 1e-12, "{q} {b} {mean}");
                    assert!((v - variance).abs() < 1e-9, "{q}: {v} instead of {variance}");
                }
            }
        }
        assert!(Conversion::tuned(1).is_err() && Conversion::expectation(17).is_err());
    }
}
