//! Poisoned updates, to test defences with (Shejwalkar and Houmansadr, NDSS 2021; Baruch et al., NeurIPS 2019).
//!
//! Attackers know all honest updates, which is more than they could; all of them send the same.

use isthmus_secagg::Bits;
use rand::RngCore;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

/// What attackers send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attack {
    /// As far against the honest mean as two honest updates are apart.
    MinMax,
    /// As far that the squared distances to honest ones sum up to no more than an honest one's.
    MinSum,
    /// "A little is enough": the mean shifted by so many deviations that a majority seems to support it.
    Lie,
    /// The honest mean, reversed.
    SignFlip,
    /// The honest mean, reversed and ten times as long.
    ScaledFlip,
    /// Random values as long as the longest honest update, ten times.
    ScaledNoise,
    /// Honest training on reversed labels (done in training, not here).
    LabelFlip,
    /// Each bit against the direction of the honest mean: the most that a bit can do.
    AdversarialBits,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::MinMax,
        Self::MinSum,
        Self::Lie,
        Self::SignFlip,
        Self::ScaledFlip,
        Self::ScaledNoise,
        Self::LabelFlip,
        Self::AdversarialBits,
    ];
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(x - y) * f64::from(x - y)).sum()
}

/// Mean and standard deviation of each coordinate.
fn moments(honest: &[Vec<f32>]) -> (Vec<f32>, Vec<f32>) {
    let n = honest.len().max(1) as f64;
    let dim = honest.first().map_or(0, Vec::len);
    let mean: Vec<f64> = (0..dim).map(|j| honest.iter().map(|u| f64::from(u[j])).sum::<f64>() / n).collect();
    let deviation =
        mean.iter().enumerate().map(|(j, m)| (honest.iter().map(|u| (f64::from(u[j]) - m).powi(2)).sum::<f64>() / n).sqrt() as f32);
    let deviation = deviation.collect();
    (mean.into_iter().map(|m| m as f32).collect(), deviation)
}

/// The largest factor for which `fits` holds, by halving from 10 (fits must hold for small ones).
fn largest(fits: impl Fn(f64) -> bool) -> f64 {
    let (mut factor, mut step, mut best) = (10.0, 5.0, 0.0);
    while step > 1e-4 {
        if fits(factor) {
            best = factor;
            factor += step;
        } else {
            factor -= step;
        }
        step /= 2.0;
    }
    best
}

/// z of the "a little is enough" attack: the normal quantile of (n - f - s) / (n - f), s = n/2 + 1 - f.
fn lie_quantile(honest: usize, attackers: usize) -> f64 {
    let n = honest + attackers;
    let supporters = (n / 2 + 1).saturating_sub(attackers);
    let share = honest.saturating_sub(supporters) as f64 / honest.max(1) as f64;
    normal_quantile(share.clamp(0.001, 0.999))
}

/// By bisection of the normal distribution function (Abramowitz and Stegun 26.2.17).
fn normal_quantile(p: f64) -> f64 {
    let cdf = |x: f64| {
        let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
        let poly = t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
        let upper = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly;
        if x >= 0.0 { 1.0 - upper } else { upper }
    };
    let (mut low, mut high) = (-5.0, 5.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if cdf(middle) < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// The update that each of `attackers` sends; none for attacks that are no update.
pub fn update(attack: Attack, honest: &[Vec<f32>], attackers: usize, rng: &mut impl RngCore) -> Option<Vec<f32>> {
    let (mean, deviation) = moments(honest);
    let shifted = |direction: &[f32], factor: f64| -> Vec<f32> {
        mean.iter().zip(direction).map(|(m, d)| m + (factor * f64::from(*d)) as f32).collect()
    };
    let against: Vec<f32> = deviation.iter().map(|s| -s).collect();
    let distances = |u: &[f32]| honest.iter().map(|h| squared_distance(u, h)).collect::<Vec<f64>>();
    Some(match attack {
        Attack::MinMax => {
            let widest = honest.iter().flat_map(|h| distances(h)).fold(0.0, f64::max);
            shifted(&against, largest(|f| distances(&shifted(&against, f)).into_iter().fold(0.0, f64::max) <= widest))
        }
        Attack::MinSum => {
            let widest = honest.iter().map(|h| distances(h).iter().sum::<f64>()).fold(0.0, f64::max);
            shifted(&against, largest(|f| distances(&shifted(&against, f)).iter().sum::<f64>() <= widest))
        }
        Attack::Lie => shifted(&against, lie_quantile(honest.len(), attackers)),
        Attack::SignFlip => mean.iter().map(|m| -m).collect(),
        Attack::ScaledFlip => mean.iter().map(|m| -10.0 * m).collect(),
        Attack::ScaledNoise => {
            let longest = honest.iter().map(|h| isthmus_secagg::quantise::norm(h)).fold(0.0, f64::max);
            let noise: Vec<f32> = mean.iter().map(|_| StandardNormal.sample(rng)).collect();
            let factor = 10.0 * longest / isthmus_secagg::quantise::norm(&noise).max(1e-12);
            noise.iter().map(|v| (f64::from(*v) * factor) as f32).collect()
        }
        Attack::LabelFlip | Attack::AdversarialBits => return None,
    })
}

/// [`Attack::AdversarialBits`]: every bit against the signs of the honest mean, in coded coordinates.
pub fn bits(coded_mean: &[f32], len: usize) -> Bits {
    Bits::fill(len, |k| {
        let part = coded_mean.get(k * 64..coded_mean.len().min(k * 64 + 64)).unwrap_or_default();
        part.iter().enumerate().fold(0, |w, (j, v)| w | u64::from(*v <= 0.0) << j)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    #[test]
    fn attacks_are_what_their_names_say() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let honest: Vec<Vec<f32>> = (0..20)
            .map(|_| {
                (0..50)
                    .map(|j| {
                        let v: f32 = StandardNormal.sample(&mut rng);
                        0.3 * v + if j % 2 == 0 { 1.0 } else { -1.0 }
                    })
                    .collect()
            })
            .collect();
        let (mean, _) = moments(&honest);
        let farthest = |u: &[f32]| honest.iter().map(|h| squared_distance(u, h)).fold(0.0, f64::max);
        let widest = honest.iter().map(|h| farthest(h)).fold(0.0, f64::max);
        let min_max = update(Attack::MinMax, &honest, 5, &mut rng).unwrap();
        assert!(farthest(&min_max) <= widest && farthest(&min_max) > 0.9 * widest);
        assert!(update(Attack::SignFlip, &honest, 5, &mut rng).unwrap().iter().zip(&mean).all(|(a, m)| *a == -m));
        let noise = update(Attack::ScaledNoise, &honest, 5, &mut rng).unwrap();
        assert!(isthmus_secagg::quantise::norm(&noise) > 9.0 * isthmus_secagg::quantise::norm(&honest[0]));
        assert!(update(Attack::LabelFlip, &honest, 5, &mut rng).is_none());
        assert!((normal_quantile(0.975) - 1.96).abs() < 1e-3 && normal_quantile(0.5).abs() < 1e-3);
        let against = bits(&mean, 53);
        assert!((0..50).all(|j| against.get(j) == (mean[j] <= 0.0)) && !against.get(51));
    }
}
