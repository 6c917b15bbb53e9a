//! Variation of the propagation delay.

use std::time::Duration;

use rand::Rng;
use rand_distr::{Distribution as _, Normal, Pareto};

use crate::config::{Distribution, JitterConfig};

/// Shape of the Pareto distribution: heavy tail, finite variance.
const SHAPE: f64 = 3.0;

/// The delay of one packet.
pub fn delay(rng: &mut impl Rng, base: Duration, jitter: Option<&JitterConfig>) -> Duration {
    let Some(jitter) = jitter else { return base };
    let spread = jitter.spread.as_secs_f64();
    let extra = match jitter.distribution {
        Distribution::Uniform => rng.random_range(-1.0..=1.0) * spread,
        Distribution::Normal => Normal::new(0.0, spread).map_or(0.0, |d| d.sample(rng)),
        // scale and mean of a Pareto variable differ by (shape - 1) / shape; what lies above the scale is what varies
        Distribution::Pareto => Pareto::new(1.0, SHAPE).map_or(0.0, |d| (d.sample(rng) - 1.0) * (SHAPE - 1.0)) * spread,
    };
    Duration::try_from_secs_f64((base.as_secs_f64() + extra).max(0.0)).unwrap_or(base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn sample(distribution: Distribution) -> (f64, f64) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let jitter = JitterConfig { distribution, spread: Duration::from_millis(10), reorder: true };
        let values: Vec<f64> =
            (0..20_000).map(|_| delay(&mut rng, Duration::from_secs(1), Some(&jitter)).as_secs_f64() * 1e3 - 1000.0).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt())
    }

    #[test]
    fn distributions_have_the_stated_spread() {
        let (mean, deviation) = sample(Distribution::Uniform);
        assert!(mean.abs() < 0.3 && (deviation - 10.0 / 3f64.sqrt()).abs() < 0.2, "{mean} {deviation}");
        let (mean, deviation) = sample(Distribution::Normal);
        assert!(mean.abs() < 0.3 && (deviation - 10.0).abs() < 0.3, "{mean} {deviation}");
        let (mean, deviation) = sample(Distribution::Pareto);
        assert!((mean - 10.0).abs() < 0.6 && deviation > 10.0, "{mean} {deviation}");
    }

    #[test]
    fn a_delay_never_falls_below_zero() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let jitter = JitterConfig { distribution: Distribution::Normal, spread: Duration::from_millis(50), reorder: true };
        assert!((0..1000).any(|_| delay(&mut rng, Duration::from_millis(1), Some(&jitter)).is_zero()));
    }
}
