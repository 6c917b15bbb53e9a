//! A backbone with the decoders that feed it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_codec::manifest::DecoderEntry;
use isthmus_codec::{Bundle, BundleHash};
use isthmus_nets::profile::LayerCost;
use isthmus_nets::weights::Weights;
use isthmus_nets::{Backbone, BackboneKind, Decoder, DecoderSpec, Layer, NetError};
use tch::{Device, Kind, Tensor, nn};

use crate::ServerError;
use crate::placement::{Instance, Precision};

/// Runs from which the time of one is taken.
const TIMED: usize = 5;

/// One decoder blueprint: from a bundle's latents to the backbone's features.
struct Blueprint {
    hash: BundleHash,
    decoder: Decoder,
    /// The backbone, with the blocks that are tuned with the decoder.
    student: Backbone,
    split: Layer,
    latent: [i64; 3],
    spec: DecoderSpec,
}

/// What a batch consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// De-quantised latents of the blueprint with this index.
    Latent(usize),
    /// Normalised pixels.
    Pixels,
    /// The output of a block.
    Features(Layer),
}

/// A loaded backbone.
pub struct Model {
    kind: BackboneKind,
    backbone: Backbone,
    blueprints: Vec<Blueprint>,
    device: Device,
    precision: Precision,
}

/// Inputs that are computed where `n` were asked for. A GPU's libraries choose, and in half precision compile, kernels for every size of batch when it first
/// comes, which takes up to seconds: few sizes come there, all of them before the first request (but for raw features, whose first layer only may be new).
fn padded(device: Device, n: usize) -> usize {
    if device.is_cuda() { n.next_power_of_two() } else { n }
}

fn read(path: &Path) -> Result<Vec<u8>, ServerError> {
    std::fs::read(path).map_err(|cause| ServerError::Io { path: path.into(), cause })
}

impl Model {
    /// Loads the backbone called `name` from the file `path`, and a decoder for it from each bundle that has one.
    /// `sole`: there is no other version of it that a bundle could have been made for.
    ///
    /// # Errors
    /// If a file is missing or differs from the manifest, or a golden test fails.
    pub fn load(name: &str, path: &Path, bundles: &[Arc<Bundle>], instance: Instance, sole: bool) -> Result<Self, ServerError> {
        let Instance { device, precision, .. } = instance;
        let kind = BackboneKind::from_name(name).ok_or_else(|| {
            let known: Vec<_> = BackboneKind::ALL.iter().map(|k| k.name()).collect();
            ServerError::Config(format!("model {name:?} is unknown; known: {}", known.join(", ")))
        })?;
        let bytes = read(path).map_err(|e| ServerError::Config(format!("{e}; `make setup` imports the backbones")))?;
        let digest = isthmus_codec::bundle::sha256(&bytes);
        let weights = Weights::from_safetensors(&bytes, &path.display().to_string(), device)?;
        let backbone = Backbone::new(kind, &weights)?.to_kind(precision.kind());
        let mut model = Self { kind, backbone, blueprints: Vec::new(), device, precision };
        for bundle in bundles {
            let Some(at) = bundle.manifest.decoders.iter().position(|d| d.backbone == name) else { continue };
            let entry = &bundle.manifest.decoders[at];
            if entry.backbone_sha256 != digest && !sole {
                tracing::info!(bundle = bundle.manifest.name, path = %path.display(), "made for another version of the model");
                continue;
            }
            if entry.backbone_sha256 != digest {
                let why = format!("bundle {} was made for another {name} (SHA-256 {})", bundle.manifest.name, entry.backbone_sha256);
                return Err(ServerError::Config(why));
            }
            model.add(bundle, entry)?;
            model.check_golden(bundle, at)?;
        }
        Ok(model)
    }

    fn add(&mut self, bundle: &Bundle, entry: &DecoderEntry) -> Result<(), ServerError> {
        let l = bundle.manifest.latent;
        let split = Layer::from_block(entry.split_block);
        // a layer that is no multiple of the latent is resized from the next smaller one that is
        let [_, height, width] = entry.features;
        let scales = |side: i64, latent: u16| latent > 0 && entry.upsample > 0 && side / i64::from(latent) == entry.upsample;
        if self.kind.layer_shape(split) != Some(entry.features) || !scales(height, l.height) || !scales(width, l.width) || height != width {
            let why = format!("bundle {}: {:?} is not the shape of {split:?}", bundle.manifest.name, entry.features);
            return Err(ServerError::Config(why));
        }
        let spec = DecoderSpec::from_entry(entry, l)?;
        let weights = Weights::from_safetensors(bundle.file(&entry.weights)?, &entry.weights, self.device)?;
        let mut vs = nn::VarStore::new(self.device);
        let decoder = Decoder::new(&vs.root(), &spec);
        weights.copy_to(&vs)?;
        match self.precision {
            Precision::Float => {}
            Precision::Half => vs.half(),
            Precision::Bfloat16 => vs.bfloat16(),
        }
        let latent = [l.channels.into(), l.height.into(), l.width.into()];
        let student = decoder.student(&self.backbone);
        self.blueprints.push(Blueprint { hash: bundle.hash, decoder, student, split, latent, spec });
        Ok(())
    }

    /// Runs the golden container and compares the first logits with the manifest.
    fn check_golden(&self, bundle: &Bundle, decoder: usize) -> Result<(), ServerError> {
        let (header, symbols) = bundle.golden_symbols()?;
        let mut latent = Vec::new();
        bundle.tables.level(header.quality)?.dequantise_into(&symbols, bundle.manifest.latent, &mut latent)?;
        let stage = self.stage(&bundle.hash).ok_or_else(|| ServerError::Config("no blueprint".into()))?;
        let logits = self.run(stage, &[latent.as_slice()])?;
        let expected = bundle.manifest.golden.logits.get(decoder).map(Vec::as_slice).unwrap_or_default();
        // written so that a NaN fails
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= self.precision.tolerance();
        if expected.is_empty() || !expected.iter().zip(&logits[0]).all(close) {
            let found = &logits[0][..expected.len().min(logits[0].len())];
            let why = format!("bundle {}: golden logits are {found:?}, the manifest says {expected:?}", bundle.manifest.name);
            return Err(ServerError::Config(why));
        }
        Ok(())
    }

    /// Which backbone.
    pub fn kind(&self) -> BackboneKind {
        self.kind
    }

    /// Public name.
    pub fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// Side of the square input.
    pub fn input_size(&self) -> u32 {
        self.kind.input_size()
    }

    /// Hashes of the bundles that this model can answer.
    pub fn bundles(&self) -> impl Iterator<Item = &BundleHash> {
        self.blueprints.iter().map(|b| &b.hash)
    }

    /// The stage at which latents of bundle `hash` enter.
    pub fn stage(&self, hash: &BundleHash) -> Option<Stage> {
        self.blueprints.iter().position(|b| b.hash == *hash).map(Stage::Latent)
    }

    /// Layers that an entry at `stage` passes.
    pub fn layers(&self, stage: Stage) -> Vec<LayerCost> {
        match stage {
            Stage::Pixels => self.kind.layers(Layer::Input),
            Stage::Features(layer) => self.kind.layers(layer),
            Stage::Latent(i) => self.blueprints.get(i).map_or_else(Vec::new, |b| {
                let decoder = b.spec.layers(b.latent[1]);
                decoder.into_iter().chain(self.kind.layers(b.split)).collect()
            }),
        }
    }

    /// Every stage at which an entry may enter.
    pub fn stages(&self) -> Vec<Stage> {
        let blocks = (0..self.kind.block_count()).map(|i| Stage::Features(Layer::Block(i)));
        (0..self.blueprints.len()).map(Stage::Latent).chain([Stage::Pixels]).chain(blocks).collect()
    }

    /// What one image takes by itself once libtorch has warmed up, each time with a `turn` at what others compute with too.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn time_alone<T>(&self, turn: impl Fn() -> T) -> Result<Duration, ServerError> {
        let side = self.input_size() as usize;
        let input = vec![0.0; 3 * side * side];
        {
            let _turn = turn();
            self.run(Stage::Pixels, &[&input])?;
        }
        // the least of several: whatever else the cores do meanwhile is no part of it
        let mut least = Duration::MAX;
        for _ in 0..TIMED {
            let _turn = turn();
            let start = Instant::now();
            self.run(Stage::Pixels, &[&input])?;
            least = least.min(start.elapsed());
        }
        Ok(least)
    }

    /// Chooses kernels and takes memory for batches of up to `largest`. On a CPU the first stage is enough, which is that of most requests: the others' layers are among
    /// its own, and a server is not to start later for their sake.
    pub fn warm_up(&self, largest: usize) {
        let stages = self.stages();
        let (stages, sizes): (Vec<Stage>, Vec<usize>) = if self.device.is_cuda() {
            let whole = stages.into_iter().filter(|stage| !matches!(stage, Stage::Features(_)));
            (whole.collect(), (0..=largest.next_power_of_two().ilog2()).map(|power| 1 << power).collect())
        } else {
            (stages.into_iter().take(1).collect(), vec![largest])
        };
        for stage in stages {
            let input = vec![0.0; self.input_len(stage)];
            for &size in &sizes {
                // what fails here fails again for the request, which is told
                let _ = self.run(stage, &vec![input.as_slice(); size]);
            }
        }
    }

    /// Shape (C, H, W) of an input at `stage`.
    fn shape(&self, stage: Stage) -> Option<[i64; 3]> {
        match stage {
            Stage::Pixels => self.kind.layer_shape(Layer::Input),
            Stage::Features(layer) => self.kind.layer_shape(layer),
            Stage::Latent(i) => self.blueprints.get(i).map(|b| b.latent),
        }
    }

    /// Values of an input at `stage`; 0 if there is no such stage.
    pub fn input_len(&self, stage: Stage) -> usize {
        self.shape(stage).map_or(0, |s| s.iter().product::<i64>() as usize)
    }

    /// Logits of a batch that enters at `stage`.
    ///
    /// # Errors
    /// [`ServerError::Network`] if libtorch fails or an input has another length.
    pub fn run(&self, stage: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError> {
        let _inference = tch::no_grad_guard();
        let failed = |e: tch::TchError| ServerError::Network(e.to_string());
        let shape = self.shape(stage).ok_or_else(|| ServerError::Network(format!("no {stage:?}")))?;
        let blueprint = if let Stage::Latent(i) = stage { self.blueprints.get(i) } else { None };
        let wanted = shape.iter().product::<i64>() as usize;
        if inputs.iter().any(|i| i.len() != wanted) {
            return Err(ServerError::Network(format!("an input has not {wanted} values")));
        }
        let computed = padded(self.device, inputs.len());
        let mut flat = inputs.concat();
        flat.resize(computed * wanted, 0.0);
        let batch = Tensor::f_from_slice(&flat).map_err(failed)?.f_view([computed as i64, shape[0], shape[1], shape[2]]).map_err(failed)?;
        let batch = batch.to_device(self.device).to_kind(self.precision.kind());
        let logits = match (stage, blueprint) {
            (Stage::Features(layer), _) => self.backbone.tail(&batch, layer),
            (_, None) => self.backbone.forward(&batch),
            (_, Some(b)) => b.student.tail(&b.decoder.forward(&batch), b.split),
        };
        let logits = logits.to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
        let classes = logits.size().last().copied().unwrap_or(1).max(1) as usize;
        let flat = Vec::<f32>::try_from(logits.view(-1)).map_err(failed)?;
        if flat.len() != classes * computed {
            return Err(NetError::format("logits", "unexpected size").into());
        }
        Ok(flat.chunks_exact(classes).take(inputs.len()).map(<[f32]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_sees_few_sizes_of_batches() {
        let sizes = |device| (1..=9).map(|n| padded(device, n)).collect::<Vec<_>>();
        assert_eq!(sizes(Device::Cuda(0)), [1, 2, 4, 4, 8, 8, 8, 8, 16]);
        assert_eq!(sizes(Device::Cpu), (1..=9).collect::<Vec<_>>());
    }
}
