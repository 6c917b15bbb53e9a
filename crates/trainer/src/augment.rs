//! Changes of a training crop that leave its shallow statistics natural: colour, and blends of two photos.

use rand::Rng;
use serde::{Deserialize, Serialize};

/// Weight of the second photo of a blend.
const BLEND_WEIGHT: (f32, f32) = (0.2, 0.5);
/// Range of normalised pixels ((x - 127) / 128).
const BLACK: f32 = -127.0 / 128.0;
const WHITE: f32 = 1.0;

/// How much crops are changed; nothing by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Augment {
    /// Contrast, saturation and each channel's gain are drawn between `exp(-colour)` and `exp(colour)` (gains half as
    /// wide), brightness moves by up to a third of `colour`.
    #[serde(default)]
    pub colour: f32,
    /// Share of samples that are blends of two crops.
    #[serde(default)]
    pub blend: f64,
}

impl Augment {
    /// True if both numbers make sense.
    pub fn is_valid(&self) -> bool {
        (0.0..=1.0).contains(&self.colour) && (0.0..=1.0).contains(&self.blend)
    }

    /// True if crops stay as they are.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// Weight of a second crop, when this sample shall be a blend.
    pub fn blend_weight(&self, rng: &mut impl Rng) -> Option<f32> {
        (self.blend > 0.0 && rng.random_bool(self.blend)).then(|| rng.random_range(BLEND_WEIGHT.0..BLEND_WEIGHT.1))
    }

    /// Changes the colours of normalised planes (3 x positions) in place.
    pub fn recolour(&self, planes: &mut [f32], rng: &mut impl Rng) {
        if self.colour == 0.0 {
            return;
        }
        let mut factor = |range: f32| rng.random_range(-range..=range);
        let (contrast, saturation) = (factor(self.colour).exp(), factor(self.colour).exp());
        let gains = [(); 3].map(|()| factor(self.colour / 2.0).exp());
        let brightness = factor(self.colour / 3.0);
        let positions = planes.len() / 3;
        for i in 0..positions {
            let at = [i, i + positions, i + 2 * positions];
            let grey = at.iter().map(|&j| planes[j]).sum::<f32>() / 3.0;
            for (j, gain) in at.into_iter().zip(gains) {
                let value = (grey + (planes[j] - grey) * saturation) * contrast;
                planes[j] = ((value - BLACK) * gain + BLACK + brightness).clamp(BLACK, WHITE);
            }
        }
    }
}

/// Mixes `other` into `planes` with this weight.
pub fn blend(planes: &mut [f32], other: &[f32], weight: f32) {
    for (a, b) in planes.iter_mut().zip(other) {
        *a += (b - *a) * weight;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn colours_stay_in_range_and_nothing_changes_nothing() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let start: Vec<f32> = (0..300).map(|i| BLACK + (WHITE - BLACK) * (i as f32 / 299.0)).collect();
        let mut same = start.clone();
        Augment::default().recolour(&mut same, &mut rng);
        assert_eq!(same, start);
        let strong = Augment { colour: 0.8, blend: 0.5 };
        for _ in 0..50 {
            let mut changed = start.clone();
            strong.recolour(&mut changed, &mut rng);
            assert_ne!(changed, start);
            assert!(changed.iter().all(|v| (BLACK..=WHITE).contains(v)));
        }
        let blends = (0..2000).filter(|_| strong.blend_weight(&mut rng).is_some()).count();
        assert!((900..1100).contains(&blends), "{blends} of 2000");
    }
}
