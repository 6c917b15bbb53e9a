//! What a training run does; read from a TOML file and stored with the run and the bundle.

use std::path::Path;

use isthmus_nets::encoder::SIDE_MULTIPLE;
use isthmus_nets::{BackboneKind, DecoderKind, DecoderSpec, EncoderKind, Layer, NetError, TunedSpec};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::augment::Augment;
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
    /// Side of the square that the encoder takes, if it is not the backbone's: the teacher sees the same crop, resized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<u32>,
    /// The decoder rebuilds the output of this block of the backbone, or its input if absent; the server's
    /// tail starts there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split_block: Option<usize>,
    /// The distortion is measured after this block: the frozen blocks between the two are reused.
    pub measure_block: usize,
    /// The blocks behind the rebuilt layer up to this one are tuned with the decoder, as copies of its own; absent: all of the backbone's are frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned_to: Option<usize>,
    /// Their learning rate, as a share of the recipe's.
    #[serde(default = "tuned_pace", skip_serializing_if = "is_tuned_pace")]
    pub tuned_pace: f64,
    /// Learning rate of an encoder's layers that come from the backbone, as a share of the recipe's.
    #[serde(default = "encoder_pace", skip_serializing_if = "is_encoder_pace")]
    pub encoder_pace: f64,
    /// An encoder's first blocks (and stem) that come from the backbone and stay as they are: so many.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub frozen_blocks: usize,
    /// Errors count in units of each channel's deviation; if false, of all channels' together.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub by_channel: bool,
    /// Weight of the rebuilt layer's own error (per element), beside that of the measured layer.
    pub rebuild_weight: f64,
    /// Further blocks after which the error counts too, each like the measured layer's, per element.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<usize>,
    /// Shape of the decoder.
    #[serde(default, skip_serializing_if = "DecoderKind::is_default")]
    pub decoder_kind: DecoderKind,
    /// Decoder trunk.
    pub decoder_width: i64,
    /// Channels inside a decoder block.
    pub decoder_hidden: i64,
    /// Decoder blocks.
    pub decoder_blocks: i64,
    /// Rate weight of each quality level (times bits), falling: level 1 is the smallest stream.
    pub lambdas: Vec<f64>,
    /// Mean bytes per training crop that each level is steered to, by moving its lambda once the ramp is over;
    /// absent: the lambdas stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_bytes: Option<Vec<f64>>,
    /// For a run that starts from a bundle: steer each level to the bytes that it has on these photos before the first step.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_bytes: bool,
    /// Train this level alone, counted from 1: what an encoder of its own gains over one for all rates (docs/decisions/0037).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only_level: Option<usize>,
    /// Samples that each level gets, as a ratio: `[2, 1]` gives the first twice those of the second; absent: all as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level_draws: Option<Vec<u8>>,
    /// Dead latent channels to start anew before the first step (for a run that starts from another).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wake_channels: usize,
    /// Train the decoder alone, on latents rounded as at run time; encoder, gains and densities stay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub decoder_only: bool,
    /// The decoder sees latents rounded as at run time, the encoder learns as if they were not (straight through); densities see noise all the same (Minnen & Singh,
    /// "Channel-wise autoregressive entropy models for learned image compression", ICIP 2020). If false, noise stands for rounding in both places.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub straight_through: bool,
    /// Samples per step.
    pub batch: usize,
    /// Steps in all.
    pub steps: u64,
    /// Update the convolutions' weights by Muon instead of Adam.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub muon: bool,
    /// Decoder and backbone compute in bfloat16 while they train; weights, encoder, densities and loss stay in single precision. Faster where
    /// the processor has instructions for it, slower elsewhere (docs/decisions/0032).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bfloat16: bool,
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
    /// That weight at level q is multiplied by `(lambda_q / lambda_mean)^kl_balance`: above 0 it counts more where there are few bytes.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub kl_balance: f64,
    /// Both sides' logits are multiplied by this before that KL: above 1 it asks for the teacher's first choice more than
    /// for its doubts.
    #[serde(default = "one")]
    pub kl_sharpness: f64,
    /// Share of the distortion weight that follows the channels' Fisher information (0: plain sum).
    pub fisher: f64,
    /// Share that follows each photo's own Fisher information, by channel and position (0: all positions alike).
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub fisher_positions: f64,
    /// Share that follows each photo's class activation map (0.5: as FrankenSplit has it).
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub saliency: f64,
    /// Loss of level q is weighted by `(lambda_mean / lambda_q)^level_balance`.
    pub level_balance: f64,
    /// Half-width of the initial densities, in quantisation steps.
    pub prior_init_scale: f64,
    /// Decay of the weights' moving average.
    pub ema: f64,
    /// Seed of everything random.
    pub seed: u64,
    /// How training crops are changed.
    #[serde(default, skip_serializing_if = "Augment::is_nothing")]
    pub augment: Augment,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn is_nothing(share: &f64) -> bool {
    *share == 0.0
}

fn yes() -> bool {
    true
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn is_yes(v: &bool) -> bool {
    *v
}

fn one() -> f64 {
    1.0
}

/// A twentieth did better than a fifth (docs/decisions/0033).
fn tuned_pace() -> f64 {
    0.05
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn is_tuned_pace(v: &f64) -> bool {
    *v == tuned_pace()
}

fn encoder_pace() -> f64 {
    0.1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn is_encoder_pace(v: &f64) -> bool {
    *v == encoder_pace()
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
        if self.target_bytes.as_ref().is_some_and(|t| t.len() != self.lambdas.len() || t.iter().any(|&b| b <= 0.0)) {
            return Err("target_bytes: one positive value per lambda".into());
        }
        if self.only_level.is_some_and(|l| l == 0 || l > self.lambdas.len()) {
            return Err(format!("only_level: from 1 to {}, one for each lambda", self.lambdas.len()));
        }
        let draws = self.level_draws.as_ref();
        if draws.is_some_and(|d| d.len() != self.lambdas.len() || d.contains(&0) || self.only_level.is_some()) {
            return Err("level_draws: one positive number per lambda, and no only_level".into());
        }
        if self.decoder_only && (self.target_bytes.is_some() || self.keep_bytes || self.wake_channels > 0) {
            return Err("decoder_only: target_bytes, keep_bytes and wake_channels change what it leaves alone; remove them".into());
        }
        if self.keep_bytes && self.target_bytes.is_some() {
            return Err("keep_bytes, target_bytes: one of the two".into());
        }
        let missing = "split_block, measure_block: the backbone has fewer blocks";
        let shape = self.backbone.layer_shape(self.split()).ok_or(missing)?;
        self.backbone.layer_shape(self.measure()).ok_or(missing)?;
        if self.split() > self.measure() {
            return Err("measure_block: must not come before split_block".into());
        }
        self.tuned().map_err(|e| e.to_string())?;
        let side = i64::from(self.input_size());
        if side < SIDE_MULTIPLE || side % SIDE_MULTIPLE != 0 {
            return Err(format!("input: the encoder takes sides that are multiples of {SIDE_MULTIPLE}, not {side}"));
        }
        let latent = self.encoder.latent(side)[1];
        let fits = match self.decoder_kind {
            DecoderKind::Residual => shape[1] >= latent,
            DecoderKind::EntropicStudent => shape[1] == latent + 1,
        };
        if !fits {
            return Err(format!("split_block: {} x {} does not fit the latent's {latent} x {latent}", shape[1], shape[2]));
        }
        let layers: Vec<usize> = std::iter::once(self.measure_block).chain(self.hooks.iter().copied()).collect();
        if !layers.is_sorted_by(|a, b| a < b) || layers.last().is_some_and(|&l| l >= self.backbone.block_count()) {
            return Err("hooks: rising, behind measure_block, and blocks of the backbone".into());
        }
        let of_backbone = self.encoder.blocks_of(self.backbone);
        if self.frozen_blocks > of_backbone {
            return Err(format!("frozen_blocks: the encoder has {of_backbone} blocks of the backbone"));
        }
        let shares = [self.fisher, self.fisher_positions, self.saliency, self.lambda_ramp, self.kl_from];
        if shares.iter().any(|s| !(0.0..=1.0).contains(s)) {
            return Err("fisher, fisher_positions, saliency, lambda_ramp and kl_from are shares between 0 and 1".into());
        }
        let sound = |v: f64, least: f64| v.is_finite() && v >= least;
        let positive = [self.learning_rate, self.tuned_pace, self.encoder_pace, self.max_norm, self.kl_sharpness, self.prior_init_scale];
        if !positive.iter().all(|&v| sound(v, f64::MIN_POSITIVE)) || !self.lambdas.iter().all(|l| l.is_finite()) {
            return Err(
                "learning_rate, tuned_pace, encoder_pace, max_norm, kl_sharpness and prior_init_scale must be positive, lambdas finite"
                    .into(),
            );
        }
        if !sound(self.kl_weight, 0.0)
            || !sound(self.rebuild_weight, 0.0)
            || !self.level_balance.is_finite()
            || !self.kl_balance.is_finite()
        {
            return Err("kl_weight and rebuild_weight must not be negative, level_balance and kl_balance must be finite".into());
        }
        if !(0.0..1.0).contains(&self.ema) {
            return Err("ema: from 0 to below 1".into());
        }
        if self.batch == 0 || self.steps == 0 {
            return Err("batch and steps must be positive".into());
        }
        if !self.augment.is_valid() {
            return Err("augment: colour and blend must lie between 0 and 1".into());
        }
        Ok(())
    }

    /// The layer that the decoder rebuilds.
    pub fn split(&self) -> Layer {
        Layer::from_block(self.split_block)
    }

    /// The layer at which the distortion is measured.
    pub fn measure(&self) -> Layer {
        Layer::Block(self.measure_block)
    }

    /// Type that decoder and backbone compute in while they train.
    pub fn kind(&self) -> Kind {
        if self.bfloat16 { Kind::BFloat16 } else { Kind::Float }
    }

    fn tuned(&self) -> Result<Option<TunedSpec>, NetError> {
        self.tuned_to.map(|last| TunedSpec::new(self.backbone, self.split(), last)).transpose()
    }

    /// The decoder for this recipe's backbone and split.
    pub fn decoder(&self) -> DecoderSpec {
        let [output, height, _] = self.backbone.layer_shape(self.split()).unwrap_or_default();
        let [input, latent, _] = self.encoder.latent(self.input_size().into());
        let (upsample, resize) = match self.decoder_kind {
            DecoderKind::Residual => {
                let upsample = height / latent;
                (upsample, (latent * upsample != height).then_some(height))
            }
            DecoderKind::EntropicStudent => (1, None),
        };
        let (width, hidden, blocks) = (self.decoder_width, self.decoder_hidden, self.decoder_blocks);
        DecoderSpec {
            kind: self.decoder_kind,
            input,
            width,
            hidden,
            blocks,
            output,
            upsample,
            resize,
            tuned: self.tuned().unwrap_or_default(),
        }
    }

    /// Side of the square that the encoder takes.
    pub fn input_size(&self) -> u32 {
        self.input.unwrap_or_else(|| self.backbone.input_size())
    }

    /// Levels of a batch's samples in turn, from 0.
    pub fn drawn_levels(&self) -> Vec<i64> {
        let all = 0..self.lambdas.len() as i64;
        match (self.only_level, &self.level_draws) {
            (Some(only), _) => vec![only as i64 - 1],
            (None, None) => all.collect(),
            (None, Some(draws)) => all.zip(draws).flat_map(|(level, draws)| std::iter::repeat_n(level, (*draws).into())).collect(),
        }
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
        self.by_lambda(-self.level_balance)
    }

    /// Factor of each level on the weight of the KL.
    pub fn kl_weights(&self) -> Vec<f64> {
        self.by_lambda(self.kl_balance)
    }

    /// `(lambda_q / lambda_mean)^power`, by the geometric mean.
    fn by_lambda(&self, power: f64) -> Vec<f64> {
        let mean = self.lambdas.iter().map(|l| l.ln()).sum::<f64>() / self.lambdas.len() as f64;
        self.lambdas.iter().map(|l| ((l.ln() - mean) * power).exp()).collect()
    }
}
