//! Densities for an encoder that has learned already: a bundle holds tables, not the densities they were made from.

use std::sync::Arc;

use tch::Kind;

use super::Run;
use crate::adam::Adam;
use crate::error::TrainError;
use crate::loader::{self, Plan};
use crate::pack::Pack;
use crate::progress::progress;

/// Batches from which densities are learned, at a rate that falls from the first to the second.
const BATCHES: u64 = 400;
const RATES: (f64, f64) = (2e-2, 1e-3);
/// Batches of this purpose are drawn with a seed of their own.
const SEED: u64 = 0xde05;

impl Run {
    /// Learns the densities of the encoder's latents, and nothing else: with fresh ones the rate would pull gains and encoder away from what they are.
    ///
    /// # Errors
    /// If data or libtorch fail.
    pub(super) fn fit_densities(&mut self, pack: Arc<Pack>) -> Result<(), TrainError> {
        let plan = Plan { seed: self.recipe.seed ^ SEED, ..Plan::of(&self.recipe) };
        let mut batches = loader::start(pack, plan, 0);
        let mut adam = Adam::new(&self.net.vs, 0.0, &[], false);
        let bar = progress(BATCHES, 0);
        bar.set_message("densities of the bundle's encoder");
        for i in 0..BATCHES {
            let (pixels, level) = self.batch_tensors(&batches.recv()?);
            let bits = self.net.bits_of_frozen(&pixels, &level);
            adam.zero_grad();
            bits.mean(Kind::Float).backward();
            let rate = RATES.0 * (RATES.1 / RATES.0).powf(i as f64 / BATCHES as f64);
            adam.step(rate, f64::INFINITY);
            bar.inc(1);
        }
        bar.finish();
        self.adam.zero_grad();
        self.adam.restart();
        Ok(())
    }
}
