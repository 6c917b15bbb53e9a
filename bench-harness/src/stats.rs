//! Intervals and interpolation.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const RESAMPLES: usize = 2000;
const SEED: u64 = 20_260_101;

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Mean.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Wilson's 95 % interval of `hits` out of `n`.
pub fn wilson(hits: usize, n: usize) -> Interval {
    const Z: f64 = 1.959_963_985;
    if n == 0 {
        return Interval { mean: 0.0, low: 0.0, high: 1.0 };
    }
    let (p, n) = (hits as f64 / n as f64, n as f64);
    let centre = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    Interval { mean: p, low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
}

/// Bootstrap interval of the mean over groups: crops of one photo are not independent, so whole photos
/// are drawn. Seeded.
pub fn bootstrap(values: &[(&str, f64)]) -> Interval {
    let mut groups: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (group, value) in values {
        let g = groups.entry(group).or_default();
        g.0 += value;
        g.1 += 1.0;
    }
    let groups: Vec<(f64, f64)> = groups.into_values().collect();
    let mean_of = |picked: &mut dyn Iterator<Item = (f64, f64)>| {
        let (sum, n) = picked.fold((0.0, 0.0), |a, g| (a.0 + g.0, a.1 + g.1));
        if n > 0.0 { sum / n } else { 0.0 }
    };
    let mean = mean_of(&mut groups.iter().copied());
    if groups.is_empty() {
        return Interval { mean, low: mean, high: mean };
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut means: Vec<f64> =
        (0..RESAMPLES).map(|_| mean_of(&mut (0..groups.len()).map(|_| groups[rng.random_range(0..groups.len())]))).collect();
    means.sort_by(f64::total_cmp);
    Interval { mean, low: means[RESAMPLES / 40], high: means[RESAMPLES - 1 - RESAMPLES / 40] }
}

/// Points (bytes, value) by rising bytes, without those that another point beats in both.
pub(crate) fn envelope(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut envelope: Vec<(f64, f64)> = Vec::new();
    for (bytes, value) in sorted {
        if envelope.last().is_none_or(|last| value > last.1) {
            envelope.push((bytes, value));
        }
    }
    envelope
}

/// Bytes that a codec needs for `agreement`: log-linear interpolation along its upper envelope (points
/// that another point beats in both are left out). `None` outside the measured range.
pub fn bytes_at(points: &[(f64, f64)], agreement: f64) -> Option<f64> {
    let envelope = envelope(points);
    let first = envelope.first()?;
    if agreement <= first.1 {
        return (agreement >= first.1 - 1e-9).then_some(first.0);
    }
    let pair = envelope.windows(2).find(|w| w[0].1 <= agreement && agreement <= w[1].1)?;
    let share = (agreement - pair[0].1) / (pair[1].1 - pair[0].1);
    Some((pair[0].0.ln() + share * (pair[1].0 / pair[0].0).ln()).exp())
}

/// KL divergence (nats) of two sets of logits, teacher first, in f64.
pub fn kl(teacher: &[f32], student: &[f32]) -> f64 {
    let log_softmax = |logits: &[f32]| {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - highest).exp()).sum();
        logits.iter().map(|&l| f64::from(l - highest) - sum.ln()).collect::<Vec<f64>>()
    };
    let (t, s) = (log_softmax(teacher), log_softmax(student));
    t.iter().zip(&s).map(|(a, b)| a.exp() * (a - b)).sum()
}

/// Index of the largest value.
pub fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn wilson_knows_textbook_values() {
        let i = wilson(18, 20);
        assert!((i.low - 0.699).abs() < 2e-3 && (i.high - 0.972).abs() < 2e-3, "{i:?}");
        assert_eq!(wilson(0, 0).high, 1.0);
    }

    #[test]
    fn the_bootstrap_draws_photos_not_crops() {
        // ten photos of five equal crops: as uncertain as ten values, not as fifty
        let names: Vec<String> = (0..10).map(|i| i.to_string()).collect();
        let values: Vec<(&str, f64)> = names.iter().flat_map(|n| vec![(n.as_str(), f64::from(n < &"5".to_owned())); 5]).collect();
        let i = bootstrap(&values);
        assert!((i.mean - 0.5).abs() < 1e-12 && i.high - i.low > 0.4, "{i:?}");
    }

    #[test]
    fn interpolation_follows_the_envelope() {
        let points = [(1000.0, 0.5), (2000.0, 0.45), (4000.0, 0.7)];
        assert!((bytes_at(&points, 0.6).unwrap() - 2000.0).abs() < 1.0);
        assert_eq!(bytes_at(&points, 0.8), None);
        assert_eq!(bytes_at(&points, 0.4), None);
    }

    #[test]
    fn kl_of_equal_logits_is_zero() {
        assert!(kl(&[1.0, 2.0, 3.0], &[2.0, 3.0, 4.0]).abs() < 1e-7);
        assert!(kl(&[1.0, 0.0], &[0.0, 1.0]) > 0.0);
    }
}
