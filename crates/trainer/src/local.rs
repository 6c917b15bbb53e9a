//! The server's networks in this process, for evaluation without a server.

use std::path::Path;
use std::time::Instant;

use bench_harness::compare::Backend;
use bench_harness::error::HarnessError;
use edge_client::Payload;
use isthmus_codec::Bundle;
use isthmus_nets::backbone::at_size;
use isthmus_nets::weights::Weights;
use isthmus_nets::{Backbone, BackboneKind, Decoder, DecoderSpec, Layer};
use tch::{Device, Tensor, nn};

use crate::error::TrainError;

/// What [`Local::time`] measured.
#[derive(Debug, serde::Serialize)]
pub struct Direct {
    /// Photos per call.
    pub batch: i64,
    /// Calls timed.
    pub n: usize,
    /// Median time of a call, in microseconds.
    pub call_us: u64,
    /// Photos per second at that median.
    pub photos_per_second: f64,
}

/// Decoder and backbone of one of a bundle's blueprints.
pub struct Local {
    bundle: Bundle,
    backbone: Backbone,
    decoder: Decoder,
    /// Behind the decoder.
    student: Backbone,
    split: Layer,
}

impl Local {
    /// Opens a bundle folder with its decoder for `model` (its first if none), and the backbone from `backbones`.
    ///
    /// # Errors
    /// If a file is missing or inconsistent.
    pub fn open(folder: &Path, backbones: &Path, model: Option<&str>) -> Result<Self, TrainError> {
        let bundle = Bundle::load(|name| std::fs::read(folder.join(name)), |name| name.starts_with("decoder"))?;
        let mut decoders = bundle.manifest.decoders.iter();
        let entry = decoders.find(|d| model.is_none_or(|m| d.backbone == m)).cloned().ok_or_else(|| {
            TrainError::data("bundle", model.map_or_else(|| "has no decoder".into(), |m| format!("has no decoder for {m}")))
        })?;
        let kind = BackboneKind::from_name(&entry.backbone)
            .ok_or_else(|| TrainError::data("bundle", format!("unknown backbone {}", entry.backbone)))?;
        let backbone = Backbone::open(kind, &backbones.join(format!("{}.safetensors", kind.name())), Device::Cpu)?;
        let spec = DecoderSpec::from_entry(&entry, bundle.manifest.latent)?;
        let weights = Weights::from_safetensors(bundle.file(&entry.weights)?, &entry.weights, Device::Cpu)?;
        let vs = nn::VarStore::new(Device::Cpu);
        let decoder = Decoder::new(&vs.root(), &spec);
        weights.copy_to(&vs)?;
        let student = decoder.student(&backbone);
        Ok(Self { bundle, backbone, decoder, student, split: Layer::from_block(entry.split_block) })
    }

    /// Calls decoder and tail `rounds` times on a batch of zeros: the median, in a form for people and scripts.
    pub fn time(&self, batch: i64, rounds: usize) -> Direct {
        let _frozen = tch::no_grad_guard();
        let s = self.bundle.manifest.latent;
        let shape = [batch, s.channels.into(), s.height.into(), s.width.into()];
        let x = Tensor::zeros(shape, (tch::Kind::Float, Device::Cpu));
        let warm_up = rounds.div_ceil(10);
        let mut times = Vec::new();
        for _ in 0..warm_up + rounds {
            let start = Instant::now();
            let logits = self.student.tail(&self.decoder.forward(&x), self.split);
            std::hint::black_box(logits.double_value(&[0, 0]));
            times.push(start.elapsed().as_secs_f64());
        }
        let mut times = times.split_off(warm_up);
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        Direct { batch, n: times.len(), call_us: (median * 1e6) as u64, photos_per_second: batch as f64 / median }
    }

    fn logits(&self, payload: &Payload) -> Result<Vec<f32>, TrainError> {
        let _frozen = tch::no_grad_guard();
        let logits = match payload {
            Payload::Bitstream(bytes) => {
                let mut latent = Vec::new();
                self.bundle.decode_into(bytes, &mut latent)?;
                let s = self.bundle.manifest.latent;
                let x = Tensor::from_slice(&latent).view([1, s.channels.into(), s.height.into(), s.width.into()]);
                self.student.tail(&self.decoder.forward(&x), self.split)
            }
            Payload::Features(_) => return Err(TrainError::data("features", "are not evaluated here")),
            Payload::Refinement(_) => return Err(TrainError::data("refinements", "are evaluated with what they refine")),
            Payload::Image(bytes) => {
                let side = i64::from(self.bundle.manifest.input.size);
                let mut pixels = Vec::new();
                isthmus_avif::decode_any(bytes)?.network_input(self.bundle.manifest.input.size)?.normalise_into(&mut pixels);
                let pixels = Tensor::from_slice(&pixels).view([1, 3, side, side]);
                self.backbone.forward(&at_size(&pixels, self.backbone.kind()))
            }
        };
        Ok(Vec::<f32>::try_from(logits.view(-1))?)
    }
}

impl Backend for Local {
    async fn logits(&mut self, payload: Payload) -> Result<Vec<f32>, HarnessError> {
        Self::logits(self, &payload).map_err(|e| HarnessError::Backend(e.to_string()))
    }
}
