//! Learning-rate range test (Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017): the rate grows from batch to batch, and the loss tells up to
//! where it is of use.

use std::sync::Arc;

use serde::Serialize;

use super::Run;
use crate::error::TrainError;
use crate::loader::{self, Plan};
use crate::pack::Pack;
use crate::progress::progress;

/// Share of the smoothed loss that a batch leaves as it was.
const SMOOTHING: f64 = 0.9;
/// The test ends where the smoothed loss is so many times its least.
const BLOWN_UP: f64 = 4.0;
/// Not before this share of the steps: the first losses are noise.
const SETTLED: f64 = 0.1;
/// The suggested peak lies so far below the rate at which the loss is least.
const BELOW_LEAST: f64 = 3.0;

/// One batch.
#[derive(Debug, Clone, Serialize)]
pub struct RangePoint {
    /// Learning rate.
    pub rate: f64,
    /// Loss before the update.
    pub loss: f64,
    /// Mean of this loss and those before, later ones weighing more.
    pub smoothed: f64,
}

impl Run {
    /// Learns from `steps` batches at rates from `rates.0` to `rates.1`, evenly spaced in the logarithm, or until the loss blows up. Lambda and the KL's weight are those of the
    /// run's current step. The networks are spoilt then: do not save or evaluate the run.
    ///
    /// # Errors
    /// If data or libtorch fail.
    pub fn range_test(&mut self, pack: Arc<Pack>, rates: (f64, f64), steps: u64) -> Result<Vec<RangePoint>, TrainError> {
        self.begin(&pack)?;
        let constants = self.constants();
        let mut batches = loader::start(pack, Plan::of(&self.recipe), self.step);
        let bar = progress(steps, 0);
        let mut points: Vec<RangePoint> = Vec::new();
        let mut mean = 0.0;
        for i in 0..steps {
            let rate = rates.0 * (rates.1 / rates.0).powf(i as f64 / (steps.max(2) - 1) as f64);
            let stepped = self.learn(&batches.recv()?, &constants, rate, self.step + i)?;
            let loss = stepped.loss.double_value(&[]);
            bar.inc(1);
            if !loss.is_finite() {
                break;
            }
            mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss;
            let smoothed = mean / (1.0 - SMOOTHING.powi(i as i32 + 1));
            points.push(RangePoint { rate, loss, smoothed });
            let settled = i as f64 >= SETTLED * steps as f64;
            let least = points.iter().map(|p| p.smoothed).fold(f64::INFINITY, f64::min);
            if settled && smoothed > BLOWN_UP * least {
                break;
            }
        }
        bar.finish_and_clear();
        Ok(points)
    }
}

/// A peak learning rate by a range test: a third of that at which the smoothed loss is least; none if it never fell.
pub fn suggested(points: &[RangePoint]) -> Option<f64> {
    let least = points.iter().min_by(|a, b| a.smoothed.total_cmp(&b.smoothed))?;
    let fell = least.smoothed < points.first()?.smoothed;
    fell.then_some(least.rate / BELOW_LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_lies_below_the_least_loss() {
        let points = |smoothed: &[f64]| -> Vec<RangePoint> {
            let rates = (0..).map(|i| 1e-5 * 10f64.powi(i));
            smoothed.iter().zip(rates).map(|(&s, rate)| RangePoint { rate, loss: s, smoothed: s }).collect()
        };
        let found = suggested(&points(&[10.0, 9.0, 4.0, 8.0, 50.0]));
        assert!(found.is_some_and(|rate| (rate - 1e-3 / 3.0).abs() < 1e-9), "{found:?}");
        assert_eq!(suggested(&points(&[1.0, 2.0, 3.0])), None);
        assert_eq!(suggested(&[]), None);
    }
}
