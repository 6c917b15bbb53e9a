//! Which packets are lost.

use rand::Rng;

use crate::config::LossConfig;

/// State of a loss process.
#[derive(Debug, Clone)]
pub struct Loss {
    config: Option<LossConfig>,
    bad: bool,
}

impl Loss {
    /// Starts in the good state.
    pub fn new(config: Option<LossConfig>) -> Self {
        Self { config, bad: false }
    }

    /// True if the next packet is lost.
    pub fn next(&mut self, rng: &mut impl Rng) -> bool {
        match self.config {
            None => false,
            Some(LossConfig::Independent(p)) => rng.random_bool(p),
            Some(LossConfig::GilbertElliott { to_bad, to_good, good_loss, bad_loss }) => {
                let turns = rng.random_bool(if self.bad { to_good } else { to_bad });
                self.bad ^= turns;
                rng.random_bool(if self.bad { bad_loss } else { good_loss })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn lost(config: LossConfig) -> Vec<bool> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut loss = Loss::new(Some(config));
        (0..100_000).map(|_| loss.next(&mut rng)).collect()
    }

    fn share(lost: &[bool]) -> f64 {
        lost.iter().filter(|l| **l).count() as f64 / lost.len() as f64
    }

    #[test]
    fn independent_losses_have_the_stated_rate() {
        assert!((share(&lost(LossConfig::Independent(0.02))) - 0.02).abs() < 0.0015);
    }

    #[test]
    fn gilbert_elliott_losses_have_the_stationary_rate_and_come_in_bursts() {
        let config = LossConfig::GilbertElliott { to_bad: 0.01, to_good: 0.2, good_loss: 0.0, bad_loss: 0.7 };
        let lost = lost(config);
        let expected = 0.01 / 0.21 * 0.7;
        assert!((share(&lost) - expected).abs() < 0.004, "{}", share(&lost));
        let after: Vec<bool> = lost.windows(2).filter(|w| w[0]).map(|w| w[1]).collect();
        assert!(share(&after) > 10.0 * expected, "a loss makes the next one likelier: {}", share(&after));
    }
}
