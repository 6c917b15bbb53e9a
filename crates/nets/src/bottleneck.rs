//! The trainable whole: encoder, per-level gains, factorised prior, decoder.
//!
//! One set of encoder weights serves every quality level: level q multiplies latent channel c by
//! `gain[q][c]` before rounding, the decoder multiplies the de-quantised value by `inverse[q][c]`
//! (gain vectors after Cui et al., "Asymmetric Gained Deep Image Compression", CVPR 2021).
//!
//! Run time: `symbol = round_half_even(y * gain - median)`, `y_hat = (symbol + median) * inverse`.

use tch::{Device, Kind, Tensor, nn};

use crate::{Decoder, DecoderSpec, Encoder, EncoderKind, FactorisedPrior};

/// Encoder, gains, prior and decoder in one `VarStore`.
pub struct Bottleneck {
    /// Variables: `encoder.*`, `gain`, `inverse`, `prior.*`, `decoder.*`.
    pub vs: nn::VarStore,
    /// The device's network.
    pub encoder: Encoder,
    /// Densities of the latents.
    pub prior: FactorisedPrior,
    /// The server's blueprint.
    pub decoder: Decoder,
    log_gain: Tensor,
    log_inverse: Tensor,
}

/// Result of a training forward pass.
pub struct Passed {
    /// The rebuilt layer, per-channel normalised (N, C, H, W).
    pub rebuilt: Tensor,
    /// Bits per sample (N).
    pub bits: Tensor,
}

impl Bottleneck {
    /// Fresh weights. `lambdas` (one per quality level, large = few bytes) place the initial gains: at
    /// high rate the best step goes with the square root of lambda.
    pub fn new(device: Device, kind: EncoderKind, decoder: &DecoderSpec, lambdas: &[f64], init_scale: f64) -> Self {
        let vs = nn::VarStore::new(device);
        let root = vs.root();
        let levels = lambdas.len() as i64;
        let encoder = Encoder::new(&(&root / "encoder"), kind);
        let channels = kind.latent_channels();
        let prior = FactorisedPrior::new(&(&root / "prior"), levels, channels, init_scale);
        let decoder = Decoder::new(&(&root / "decoder"), decoder);
        let reference = lambdas.iter().map(|l| l.ln()).sum::<f64>() / lambdas.len() as f64;
        let start: Vec<f32> = lambdas.iter().map(|l| (0.5 * (reference - l.ln())) as f32).collect();
        let start = Tensor::from_slice(&start).view([-1, 1]).repeat([1, channels]).to_device(device);
        let mut log_gain = root.zeros("gain", &[levels, channels]);
        let mut log_inverse = root.zeros("inverse", &[levels, channels]);
        tch::no_grad(|| {
            log_gain.copy_(&start);
            log_inverse.copy_(&start.neg());
        });
        Self { vs, encoder, prior, decoder, log_gain, log_inverse }
    }

    fn picked(log: &Tensor, level: &Tensor) -> Tensor {
        log.index_select(0, level).exp().unsqueeze(-1).unsqueeze(-1)
    }

    /// Training pass with additive uniform noise: pixels (N, 3, H, W), level (N) int64. The decoder computes in `kind`. With `medians` (levels, C) it sees
    /// latents rounded around those, and the gradient passes as if they were not.
    pub fn train_pass(&self, pixels: &Tensor, level: &Tensor, medians: Option<&Tensor>, kind: Kind) -> Passed {
        let y = self.encoder.forward(pixels) * Self::picked(&self.log_gain, level);
        let noisy = &y + (y.rand_like() - 0.5);
        let bits = self.prior.bits(&noisy, level);
        let seen = match medians {
            Some(medians) => {
                let median = medians.index_select(0, level).unsqueeze(-1).unsqueeze(-1);
                let rounded = tch::no_grad(|| (&y - &median).round() + &median - &y);
                &y + rounded
            }
            None => noisy,
        };
        let latent = seen * Self::picked(&self.log_inverse, level);
        Passed { rebuilt: self.decoder.forward_normalised(&latent.to_kind(kind)), bits }
    }

    /// Medians of all levels (levels, C).
    pub fn medians(&self) -> Tensor {
        self.prior.medians()
    }

    /// Bits of each sample (N) with additive uniform noise; only the densities get a gradient.
    pub fn bits_of_frozen(&self, pixels: &Tensor, level: &Tensor) -> Tensor {
        let y = tch::no_grad(|| self.encoder.forward(pixels) * Self::picked(&self.log_gain, level));
        self.prior.bits(&(&y + (y.rand_like() - 0.5)), level)
    }

    /// As at run time, with rounding around the `medians` (levels, C); no gradient goes further back than the decoder,
    /// which computes in `kind`.
    pub fn round_pass(&self, pixels: &Tensor, level: &Tensor, medians: &Tensor, kind: Kind) -> Passed {
        let (latent, bits) = tch::no_grad(|| {
            let y = self.encoder.forward(pixels) * Self::picked(&self.log_gain, level);
            let median = medians.index_select(0, level).unsqueeze(-1).unsqueeze(-1);
            let rounded = (&y - &median).round() + median;
            let bits = self.prior.bits(&rounded, level);
            (rounded * Self::picked(&self.log_inverse, level), bits)
        });
        Passed { rebuilt: self.decoder.forward_normalised(&latent.to_kind(kind)), bits }
    }

    /// Encoder-side gains (levels, C).
    pub fn gains(&self) -> Tensor {
        tch::no_grad(|| self.log_gain.exp())
    }

    /// Decoder-side inverse gains (levels, C).
    pub fn inverses(&self) -> Tensor {
        tch::no_grad(|| self.log_inverse.exp())
    }

    /// A tensor of `n` equal levels.
    pub fn level_tensor(&self, level: i64, n: i64) -> Tensor {
        Tensor::full([n], level, (Kind::Int64, self.vs.device()))
    }
}
