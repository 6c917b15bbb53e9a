//! What a training run does; read from a TOML file and stored with the run and the bundle.

use std::path::Path;

use isthmus_nets::{BackboneKind, DecoderSpec, EncoderKind};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// A training recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the bundle.
    pub name: String,
    /// Encoder shape.
    pub encoder: EncoderKind,
    /// Teacher and server backbone.
    pub backbone: BackboneKind,
    /// Features are rebuilt after this block of the backbone.
    pub split_block: usize,
    /// Decoder trunk.
    pub decoder_width: i64,
    /// Channels inside a decoder block.
    pub decoder_hidden: i64,
    /// Decoder blocks.
    pub decoder_blocks: i64,
    /// Rate weight of each quality level (times bits), falling: level 1 is the smallest stream.
    pub lambdas: Vec<f64>,
    /// Samples per step.
    pub batch: usize,
    /// Steps in all.
    pub steps: u64,
    /// Peak learning rate; linear warm-up, cosine to a hundredth.
    pub learning_rate: f64,
    /// Warm-up steps.
    pub warmup: u64,
    /// Gradient norm limit.
    pub max_norm: f64,
    /// Lambda starts at a twentieth and reaches its value after this share of the steps.
    pub lambda_ramp: f64,
    /// From this share of the steps on, the logits' KL through the frozen tail is added.
    pub kl_from: f64,
    /// Weight of that KL (nats) against the feature error (sum over elements).
    pub kl_weight: f64,
    /// Share of the distortion weight that follows the channels' Fisher information (0: plain sum).
    pub fisher: f64,
    /// Loss of level q is weighted by `(lambda_mean / lambda_q)^level_balance`.
    pub level_balance: f64,
    /// Half-width of the initial densities, in quantisation steps.
    pub prior_init_scale: f64,
    /// Decay of the weights' moving average.
    pub ema: f64,
    /// Seed of everything random.
    pub seed: u64,
}

impl Recipe {
    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(|e| TrainError::io(path, e))?;
        let recipe: Self = toml::from_str(&text).map_err(|e| TrainError::data(path.display().to_string(), e.to_string()))?;
        recipe.check().map_err(|why| TrainError::data(path.display().to_string(), why))?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), String> {
        let falling = self.lambdas.windows(2).all(|w| w[0] > w[1]);
        if self.lambdas.is_empty() || self.lambdas.len() > 255 || !falling || self.lambdas.iter().any(|&l| l <= 0.0) {
            return Err("lambdas: 1 to 255 positive values, falling".into());
        }
        let shape = self.backbone.feature_shape(self.split_block).ok_or("split_block: the backbone has fewer blocks")?;
        if shape[1] * 8 != i64::from(self.backbone.input_size()) {
            return Err(format!("split_block: features are {}x{}, the latent's resolution (an eighth) is needed", shape[1], shape[2]));
        }
        if self.batch == 0 || self.steps == 0 {
            return Err("batch and steps must be positive".into());
        }
        Ok(())
    }

    /// The decoder for this recipe's backbone and split.
    pub fn decoder(&self) -> DecoderSpec {
        let output = self.backbone.feature_shape(self.split_block).map_or(0, |s| s[0]);
        DecoderSpec { width: self.decoder_width, hidden: self.decoder_hidden, blocks: self.decoder_blocks, output }
    }

    /// Learning rate at `step`.
    pub fn rate_at(&self, step: u64) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let progress = (step as f64 / self.steps as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.learning_rate * warm * (0.01 + 0.99 * cosine)
    }

    /// Factor on lambda at `step`: geometric from 0.05 to 1.
    pub fn ramp_at(&self, step: u64) -> f64 {
        let share = step as f64 / (self.lambda_ramp * self.steps as f64).max(1.0);
        0.05f64.powf(1.0 - share.min(1.0))
    }

    /// Weight of the KL at `step`.
    pub fn kl_at(&self, step: u64) -> f64 {
        if (step as f64) < self.kl_from * self.steps as f64 { 0.0 } else { self.kl_weight }
    }

    /// Loss weight of each level.
    pub fn level_weights(&self) -> Vec<f64> {
        let mean = self.lambdas.iter().map(|l| l.ln()).sum::<f64>() / self.lambdas.len() as f64;
        self.lambdas.iter().map(|l| ((mean - l.ln()) * self.level_balance).exp()).collect()
    }
}
