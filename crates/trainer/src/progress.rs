//! What a run shows while it trains: its log and its progress bar.

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::TrainError;

/// One line of a run's log.
#[derive(Debug, Serialize, Deserialize)]
pub struct LogLine {
    /// Step just done.
    pub step: u64,
    /// Crops seen so far.
    pub crops: u64,
    /// Crops per second since the last line.
    pub crops_per_s: f64,
    /// Share of the wall time spent waiting for crops.
    pub waiting: f64,
    /// Feature error per element (normalised) of each level.
    pub error: Vec<f64>,
    /// Bytes per photo (from the likelihoods) of each level.
    pub bytes: Vec<f64>,
    /// KL of the logits (nats), while it is trained on.
    pub kl: f64,
    /// Gradient norm.
    pub norm: f64,
}

/// A bar over the steps from `from` on.
pub(crate) fn progress(until: u64, from: u64) -> ProgressBar {
    let bar = ProgressBar::new(until);
    let template = "{bar:30} {pos}/{len} steps, {eta} left  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_position(from);
    bar.reset_eta();
    bar
}

/// A bar over photos.
pub(crate) fn counted(photos: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(photos);
    if let Ok(style) = ProgressStyle::with_template(&format!("{{bar:30}} {{pos}}/{{len}} photos {what}, {{eta}} left")) {
        bar.set_style(style);
    }
    bar
}

/// Sums since the last line of the log.
pub(crate) struct Totals {
    error: Vec<f64>,
    bytes: Vec<f64>,
    count: Vec<f64>,
    kl: f64,
    steps: f64,
    /// Seconds.
    pub(crate) waited: f64,
}

impl Totals {
    pub(crate) fn new(levels: usize) -> Self {
        let zero = vec![0.0; levels];
        Self { error: zero.clone(), bytes: zero.clone(), count: zero, kl: 0.0, steps: 0.0, waited: 0.0 }
    }

    pub(crate) fn add(&mut self, levels: &[i64], difference: &Tensor, bits: &[f32], kl: f64) -> Result<(), TrainError> {
        let error = Vec::<f32>::try_from(difference.detach().mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float))?;
        for ((&l, e), b) in levels.iter().zip(error).zip(bits) {
            self.error[l as usize] += f64::from(e);
            self.bytes[l as usize] += f64::from(*b) / 8.0;
            self.count[l as usize] += 1.0;
        }
        self.kl += kl;
        self.steps += 1.0;
        Ok(())
    }

    pub(crate) fn line(&self, step: u64, batch: u64, seconds: f64, norm: f64) -> LogLine {
        let mean = |v: &[f64]| v.iter().zip(&self.count).map(|(s, n)| s / n.max(1.0)).collect();
        LogLine {
            step,
            crops: step * batch,
            crops_per_s: self.steps * batch as f64 / seconds,
            waiting: self.waited / seconds,
            error: mean(&self.error),
            bytes: mean(&self.bytes),
            kl: self.kl / self.steps.max(1.0),
            norm,
        }
    }
}
