//! Waking of dead latent channels.
//!
//! A channel whose values stay inside one quantisation step carries nothing, so neither encoder nor decoder gets a
//! gradient that would make it useful, and it stays dead. Here such channels start anew: the encoder's projection
//! takes the directions of its last features that best explain, in a linear way, what the decoder still gets
//! wrong (reduced-rank regression, Izenman 1975), weighted by the Fisher information of the rebuilt layer. Gains and
//! densities are those of a live channel of like spread. The decoder ignores a woken channel until it has learned
//! to use it, so its answers do not change.

use std::collections::HashMap;

use isthmus_nets::{Backbone, Bottleneck, Layer};
use tch::{Kind, Tensor, nn};

use crate::error::TrainError;

/// Below this standard deviation, in quantisation steps at the finest level, a channel is dead.
const DEAD: f64 = 0.2;
/// The live channel whose standard deviation is nearest to this lends its gains and density.
const LENDER: f64 = 1.0;
/// Added to covariances, as a share of their mean diagonal.
const RIDGE: f64 = 1e-3;

/// Second moments gathered over batches, in double precision.
#[derive(Default)]
struct Sums {
    rows: f64,
    trunk: Vec<Tensor>,
    latent: Vec<Tensor>,
    latent_squares: Vec<Tensor>,
    trunk_trunk: Vec<Tensor>,
    missing: Vec<Tensor>,
    missing_trunk: Vec<Tensor>,
    fisher: Vec<Tensor>,
}

/// (N, C, H, W) to (N H W, C).
fn rows(x: &Tensor) -> Tensor {
    let channels = x.size()[1];
    x.permute([0, 2, 3, 1]).reshape([-1, channels]).to_kind(Kind::Double)
}

fn total(parts: &[Tensor]) -> Tensor {
    Tensor::stack(parts, 0).sum_dim_intlist([0i64].as_slice(), false, Kind::Double)
}

/// A symmetric matrix raised to `power`, after adding the ridge.
fn power(matrix: &Tensor, power: f64) -> Tensor {
    let n = matrix.size()[0];
    let level = matrix.trace().double_value(&[]) / n as f64 * RIDGE;
    let (values, vectors) = (matrix + Tensor::eye(n, (Kind::Double, matrix.device())) * level).linalg_eigh("L");
    (&vectors * values.clamp_min(level * 1e-3).pow_tensor_scalar(power).unsqueeze(0)).matmul(&vectors.tr())
}

/// The networks whose dead channels start anew, and the teacher that says what they lack.
pub struct Waker<'a> {
    /// The networks.
    pub net: &'a Bottleneck,
    /// The frozen teacher.
    pub teacher: &'a Backbone,
    /// The layer that the decoder rebuilds.
    pub split: Layer,
}

impl Waker<'_> {
    fn projection(&self) -> Result<&nn::Conv2D, TrainError> {
        let last = self.net.encoder.projection();
        last.ok_or_else(|| TrainError::data("wake_channels", "this encoder does not end in a projection; set it to 0"))
    }

    fn add(&self, sums: &mut Sums, pixels: &Tensor) -> Result<(), TrainError> {
        let top = self.net.prior.levels() - 1;
        let plain = |t: Tensor| t.get(top).view([1, -1, 1, 1]);
        let layer = tch::no_grad(|| self.teacher.between(pixels, Layer::Input, self.split)).set_requires_grad(true);
        // what is rebuilt is passed to the blocks that are tuned with the decoder
        let log_p = self.net.decoder.student(self.teacher).tail(&layer, self.split).log_softmax(-1, Kind::Float);
        let class = log_p.exp().multinomial(1, true);
        log_p.gather(1, &class, false).sum(Kind::Float).backward();
        tch::no_grad(|| {
            let trunk = self.net.encoder.trunk(pixels);
            let latent = trunk.apply(self.projection()?);
            let seen = &latent * plain(self.net.gains() * self.net.inverses());
            let decoder = &self.net.decoder;
            let missing = (decoder.normalise(&layer) - decoder.forward_normalised(&seen)).pixel_unshuffle(decoder.upsample());
            // gradient in the normalised units of the decoder's output
            let scale = decoder.denormalise(&layer.ones_like()) - decoder.denormalise(&layer.zeros_like());
            let gradient = rows(&(layer.grad() * scale).pixel_unshuffle(decoder.upsample()));
            let (trunk, missing, latent) = (rows(&trunk), rows(&missing), rows(&latent));
            let over = [0i64];
            let sum = |t: &Tensor| t.sum_dim_intlist(over.as_slice(), false, Kind::Double);
            sums.rows += trunk.size()[0] as f64;
            sums.trunk.push(sum(&trunk));
            sums.missing.push(sum(&missing));
            sums.latent.push(sum(&latent));
            sums.latent_squares.push(sum(&latent.square()));
            sums.trunk_trunk.push(trunk.tr().matmul(&trunk));
            sums.missing_trunk.push(missing.tr().matmul(&trunk));
            sums.fisher.push(gradient.tr().matmul(&gradient));
            Ok(())
        })
    }

    /// Starts at most `count` dead channels anew; returns how many. `batches` are pixels (N, 3, H, W).
    ///
    /// # Errors
    /// If the encoder does not end in a projection, no channel is alive, or a batch cannot be made.
    pub fn wake(&self, count: usize, batches: impl Iterator<Item = Result<Tensor, TrainError>>) -> Result<usize, TrainError> {
        let mut sums = Sums::default();
        for pixels in batches {
            self.add(&mut sums, &pixels?)?;
        }
        tch::no_grad(|| self.apply(count, &sums))
    }

    fn apply(&self, count: usize, sums: &Sums) -> Result<usize, TrainError> {
        let mean = |parts: &[Tensor]| total(parts) / sums.rows;
        let latent_mean = Vec::<f64>::try_from(mean(&sums.latent))?;
        let squares = Vec::<f64>::try_from(mean(&sums.latent_squares))?;
        let top = self.net.prior.levels() - 1;
        let gain = Vec::<f64>::try_from(self.net.gains().get(top).to_kind(Kind::Double))?;
        let deviation: Vec<f64> = squares.iter().zip(&latent_mean).map(|(s, m)| (s - m * m).max(0.0).sqrt()).collect();
        let steps: Vec<f64> = deviation.iter().zip(&gain).map(|(d, g)| d * g).collect();
        let dead: Vec<usize> = (0..steps.len()).filter(|&c| steps[c] < DEAD).take(count).collect();
        let distance = |c: &usize| (steps[*c] / LENDER).ln().abs();
        let alive = (0..steps.len()).filter(|&c| steps[c] >= DEAD).min_by(|a, b| distance(a).total_cmp(&distance(b)));
        let Some(lender) = alive else {
            return Err(TrainError::data("wake_channels", "no channel is alive; start from a run that has learned something"));
        };
        if dead.is_empty() {
            return Ok(0);
        }

        let (trunk_mean, missing_mean) = (mean(&sums.trunk), mean(&sums.missing));
        let spread = mean(&sums.trunk_trunk) - trunk_mean.outer(&trunk_mean);
        let cross = mean(&sums.missing_trunk) - missing_mean.outer(&trunk_mean);
        let whiten = power(&spread, -0.5);
        let (_, _, directions) = power(&mean(&sums.fisher), 0.5).matmul(&cross).matmul(&whiten).svd(true, true);
        let take = directions.narrow(1, 0, dead.len() as i64).tr().matmul(&whiten);

        let variables: HashMap<String, Tensor> = self.net.vs.variables();
        let projection = self.projection()?;
        for (k, &channel) in dead.iter().enumerate() {
            let (c, l) = (channel as i64, lender as i64);
            let row = take.get(k as i64) * deviation[lender];
            let offset = latent_mean[lender] - row.dot(&trunk_mean).double_value(&[]);
            projection.ws.get(c).view([-1]).copy_(&row.to_kind(Kind::Float));
            if let Some(bias) = &projection.bs {
                bias.get(c).copy_(&Tensor::from(offset as f32));
            }
            for (name, variable) in &variables {
                if name == "gain" || name == "inverse" || name.starts_with("prior.") {
                    variable.select(1, c).copy_(&variable.select(1, l));
                } else if name == "decoder.input.weight" {
                    let _ = variable.select(1, c).zero_();
                }
            }
        }
        Ok(dead.len())
    }
}
