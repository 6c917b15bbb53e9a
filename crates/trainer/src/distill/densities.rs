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
    /// Learns the densities of the encoder's latents, and nothing else: with fresh ones the rate would pull gains and encoder away from what they are. Gives the mean bytes
    /// of a crop at each level, by the densities of the last quarter.
    ///
    /// # Errors
    /// If data or libtorch fail.
    pub(super) fn fit_densities(&mut self, pack: Arc<Pack>) -> Result<Vec<f64>, TrainError> {
        let plan = Plan { seed: self.recipe.seed ^ SEED, ..Plan::of(&self.recipe) };
        let mut batches = loader::start(pack, plan, 0);
        let mut adam = Adam::new(&self.net.vs, 0.0, &[], false);
        let bar = progress(BATCHES, 0);
        bar.set_message("densities of the bundle's encoder");
        let mut seen = vec![(0.0, 0.0); self.recipe.lambdas.len()];
        for i in 0..BATCHES {
            let batch = batches.recv()?;
            let (pixels, level) = self.batch_tensors(&batch);
            let bits = self.net.bits_of_frozen(&pixels, &level);
            adam.zero_grad();
            bits.mean(Kind::Float).backward();
            let rate = RATES.0 * (RATES.1 / RATES.0).powf(i as f64 / BATCHES as f64);
            adam.step(rate, f64::INFINITY);
            if i >= BATCHES * 3 / 4 {
                for (&level, bits) in batch.levels.iter().zip(Vec::<f32>::try_from(bits.detach())?) {
                    let (sum, crops) = &mut seen[level as usize];
                    (*sum, *crops) = (*sum + f64::from(bits) / 8.0, *crops + 1.0);
                }
            }
            bar.inc(1);
        }
        bar.finish();
        self.adam.zero_grad();
        self.adam.restart();
        Ok(seen.into_iter().map(|(sum, crops)| sum / crops).collect())
    }
}
