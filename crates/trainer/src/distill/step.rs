//! One step: forward, loss, backward, update.

use isthmus_nets::{Backbone, Layer};
use tch::{Kind, Tensor};

use super::{Run, kl};
use crate::error::TrainError;
use crate::guide;
use crate::loader::Batch;
use crate::measure::squared;

/// What is the same in all steps.
pub(super) struct Constants {
    /// Loss weight of each level.
    balance: Tensor,
    /// Factor of each level on the weight of the KL.
    kl_balance: Tensor,
    /// Of latents that are rounded, for a recipe that trains the decoder alone.
    medians: Option<Tensor>,
    /// In the type that the recipe asks for.
    teacher: Backbone,
}

/// What a step came to.
pub(super) struct Stepped {
    /// Squared error of each element, in units of the features' variance.
    pub difference: Tensor,
    /// Of each sample.
    pub bits: Vec<f32>,
    /// Mean over the samples (nats), while it is trained on.
    pub kl: f64,
    /// Of the gradient.
    pub norm: f64,
    /// Mean over the samples.
    pub loss: Tensor,
}

impl Run {
    fn as_tensor(&self, v: &[f64]) -> Tensor {
        Tensor::from_slice(v).to_kind(Kind::Float).to_device(self.net.vs.device())
    }

    pub(super) fn constants(&self) -> Constants {
        let medians = self.recipe.decoder_only.then(|| self.medians());
        let (balance, kl_balance) = (self.as_tensor(&self.recipe.level_weights()), self.as_tensor(&self.recipe.kl_weights()));
        Constants { balance, kl_balance, medians, teacher: self.teacher.to_kind(self.recipe.kind()) }
    }

    /// Learns from a batch at a learning rate; `noise` seeds what is random in it. Schedules are those of the run's current step, which stays.
    pub(super) fn learn(&mut self, batch: &Batch, constants: &Constants, rate: f64, noise: u64) -> Result<Stepped, TrainError> {
        let r = &self.recipe;
        let (pixels, level) = self.batch_tensors(batch);
        tch::manual_seed((r.seed << 32 | noise) as i64);

        let (teacher, kind) = (&constants.teacher, r.kind());
        let layer = tch::no_grad(|| teacher.between(&self.seen_by_teacher(&pixels).to_kind(kind), Layer::Input, r.split()));
        let target = tch::no_grad(|| teacher.between(&layer, r.split(), r.measure()));
        let rounding = r.straight_through.then(|| self.net.medians());
        let passed = match &constants.medians {
            Some(medians) => self.net.round_pass(&pixels, &level, medians, kind),
            None => self.net.train_pass(&pixels, &level, rounding.as_ref(), kind),
        };
        let rebuilt = self.net.decoder.denormalise(&passed.rebuilt).to_kind(kind);
        let student = self.net.decoder.student(teacher);
        let got = student.between(&rebuilt, r.split(), r.measure());
        let difference = squared(&target, &got, &self.measure.std);
        let over = [1i64, 2, 3];
        let mut weighted = &difference * self.measure.weights.view([1, -1, 1, 1]);
        if let Some(weights) = guide::weights(&self.teacher, r, &target.to_kind(Kind::Float), &self.measure.std) {
            weighted *= weights;
        }
        let mut error = weighted.sum_dim_intlist(over.as_slice(), false, Kind::Float);
        let elements = (target.numel() as i64 / pixels.size()[0]) as f64;
        if r.rebuild_weight > 0.0 && r.split() != r.measure() {
            let own = (&passed.rebuilt - self.net.decoder.normalise(&layer)).square().mean_dim(over.as_slice(), false, Kind::Float);
            error = &error + own * (elements * r.rebuild_weight);
        }
        let mut deeper = (r.measure(), target.shallow_clone(), got.shallow_clone());
        for (&block, std) in r.hooks.iter().zip(&self.measure.hooks) {
            let layer = Layer::Block(block);
            let wanted = tch::no_grad(|| teacher.between(&deeper.1, deeper.0, layer));
            let found = student.between(&deeper.2, deeper.0, layer);
            error = &error + squared(&wanted, &found, std).mean_dim(over.as_slice(), false, Kind::Float) * elements;
            deeper = (layer, wanted, found);
        }
        let lambda = self.as_tensor(&self.lambdas).index_select(0, &level) * r.ramp_at(self.step);
        let mut loss = &error + lambda * &passed.bits;
        let kl_weight = r.kl_at(self.step);
        let mut kl_value = 0.0;
        if kl_weight > 0.0 {
            let (layer, wanted, found) = &deeper;
            let tail = |net: &Backbone, features: &Tensor| {
                (net.tail(features, *layer).to_kind(Kind::Float) * r.kl_sharpness).log_softmax(-1, Kind::Float)
            };
            let kl = kl(&tch::no_grad(|| tail(teacher, wanted)), &tail(&student, found));
            kl_value = kl.mean(Kind::Float).double_value(&[]);
            loss = &loss + kl * kl_weight * constants.kl_balance.index_select(0, &level);
        }
        let loss = (loss * constants.balance.index_select(0, &level)).mean(Kind::Float);
        self.adam.zero_grad();
        loss.backward();
        let norm = self.adam.step(rate, r.max_norm);
        Ok(Stepped { difference, bits: Vec::<f32>::try_from(passed.bits.detach())?, kl: kl_value, norm, loss: loss.detach() })
    }
}
