//! What an encoder that begins as the backbone's own first blocks starts with: its projection gives the principal components of the layer that they end in, weighted as
//! the distortion is, and the decoder takes them back. With gains and densities that is a transform codec of that layer; training goes on from there.

use isthmus_nets::{DecoderKind, Layer, encoder::HEAD_BLOCK};
use tch::{Kind, Tensor};

use super::{CALIBRATION_BATCHES, Run};
use crate::error::TrainError;
use crate::loader::{self, Plan};
use crate::pack::Pack;

/// Gain at a lambda of 1: it would be sqrt(ln 2 / 6) for the error at one layer alone; errors at hooks and the KL of the logits weigh about as much again.
const GAIN: f64 = 0.47;

impl Run {
    /// Sets projection and decoder so that the decoder rebuilds what the encoder's blocks say, but for rounding; whether this recipe can start so: an encoder of the
    /// backbone's own blocks, and a residual decoder of the layer that they end in, at least twice as wide.
    ///
    /// # Errors
    /// If data or libtorch fail.
    pub(super) fn start_as_transform(&mut self, pack: &Pack) -> Result<bool, TrainError> {
        let r = &self.recipe;
        let own = Layer::Block(HEAD_BLOCK);
        let spec = r.decoder();
        let fits = spec.kind == DecoderKind::Residual && spec.upsample == 1 && spec.resize.is_none() && spec.width >= 2 * spec.output;
        if !self.net.encoder.is_head_of(&self.teacher) || r.split() != own || r.measure() != own || !fits {
            return Ok(false);
        }
        let channels = spec.output;
        let mut products = Vec::new();
        for i in 0..CALIBRATION_BATCHES {
            let batch = loader::make(pack, &Plan::of(r), u64::MAX - i)?;
            let (pixels, _) = self.batch_tensors(&batch);
            let layer = tch::no_grad(|| self.teacher.between(&self.seen_by_teacher(&pixels), Layer::Input, own));
            let z = self.net.decoder.normalise(&layer).permute([0, 2, 3, 1]).reshape([-1, channels]).to_kind(Kind::Double);
            products.push(z.tr().matmul(&z) / z.size()[0]);
        }
        let covariance = Tensor::stack(&products, 0).mean_dim([0i64].as_slice(), false, Kind::Double);
        let need = self.measure.weights.to_kind(Kind::Double).sqrt();
        let weighted = &covariance * need.unsqueeze(0) * need.unsqueeze(1);
        let (_, vectors) = weighted.linalg_eigh("L");
        let vectors = vectors.flip([1]); // the strongest first
        let forward = (&vectors * need.unsqueeze(1)).tr().to_kind(Kind::Float); // (latent, normalised feature)
        let back = (&vectors / need.unsqueeze(1)).to_kind(Kind::Float); // (normalised feature, latent)

        // at high rate the best step grows with the square root of lambda (Gish & Pierce 1968)
        let gain: Vec<f32> = r.lambdas.iter().map(|lambda| (GAIN / lambda.sqrt()).ln() as f32).collect();
        let gain = Tensor::from_slice(&gain).view([-1, 1]).to_device(self.net.vs.device());

        tch::no_grad(|| {
            let variables = self.net.vs.variables();
            let of = |name: &str| variables.get(name).map(Tensor::shallow_clone).ok_or_else(|| TrainError::data(name, "is missing"));
            let weight = &forward / of("decoder.feature_std")?.view([1, -1]);
            let bias = weight.mv(&of("decoder.feature_mean")?).neg();
            of("encoder.latent.weight")?.copy_(&weight.view([channels, channels, 1, 1]));
            of("encoder.latent.bias")?.copy_(&bias);
            of("gain")?.copy_(&gain.expand_as(&of("gain")?));
            of("inverse")?.copy_(&gain.neg().expand_as(&of("inverse")?));
            // a value and its negative pass two leaky rectifiers; their difference is the value again
            let (input, output) = (of("decoder.input.weight")?, of("decoder.output.weight")?);
            let _ = output.shallow_clone().zero_();
            let _ = of("decoder.output.bias")?.zero_();
            let _ = input.narrow(0, 0, 2 * channels).zero_();
            let _ = of("decoder.input.bias")?.zero_();
            for c in 0..channels {
                for (k, sign) in [(2 * c, 1.0), (2 * c + 1, -1.0)] {
                    let _ = input.get(k).get(c).get(1).get(1).fill_(sign);
                    output.select(3, 1).select(2, 1).select(1, k).copy_(&(back.select(1, c) * sign));
                }
            }
            for (name, variable) in &variables {
                if (name.starts_with("decoder.block") && name.contains("expand")) || name.starts_with("encoder.mix_expand") {
                    let _ = variable.shallow_clone().zero_();
                }
            }
            Ok::<(), TrainError>(())
        })?;
        self.adam.restart();
        Ok(true)
    }
}
