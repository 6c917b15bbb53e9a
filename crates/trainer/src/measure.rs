//! How far rebuilt features are from the teacher's.

use isthmus_nets::Layer;
use tch::{Device, Kind, Tensor};

use crate::recipe::Recipe;

/// How errors at the measured layer count: statistics of the teacher's features there, and channel weights.
pub(crate) struct Measure {
    pub(crate) mean: Tensor,
    pub(crate) std: Tensor,
    pub(crate) weights: Tensor,
    /// Deviations at the recipe's hooks.
    pub(crate) hooks: Vec<Tensor>,
}

/// Squared difference (N, C, H, W) in units of the teacher's variance, in single precision.
pub(crate) fn squared(wanted: &Tensor, got: &Tensor, std: &Tensor) -> Tensor {
    ((got.to_kind(Kind::Float) - wanted) / std.view([1, -1, 1, 1])).square()
}

impl Measure {
    pub(crate) fn new(recipe: &Recipe, device: Device) -> Self {
        let ones = |layer| Tensor::ones([recipe.backbone.layer_shape(layer).map_or(1, |s| s[0])], (Kind::Float, device));
        let hooks = recipe.hooks.iter().map(|&block| ones(Layer::Block(block))).collect();
        let measured = || ones(recipe.measure());
        Self { mean: measured() - 1.0, std: measured(), weights: measured(), hooks }
    }

    pub(crate) fn parts(&mut self) -> Vec<(String, &mut Tensor)> {
        let own = [("mean", &mut self.mean), ("std", &mut self.std), ("weights", &mut self.weights)];
        let hooks = self.hooks.iter_mut().enumerate().map(|(i, t)| (format!("hook{i}"), t));
        own.into_iter().map(|(name, t)| (name.to_owned(), t)).chain(hooks).collect()
    }
}
