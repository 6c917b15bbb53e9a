//! The product's own loop: clients fit the deployed bottleneck to what their cameras see, without labels and without sending a
//! picture.
//!
//! What is learned: the encoder's weights, and per level and channel three numbers of the entropy tables (step size, width and centre
//! of the distributions, [`rate`]). Decoder and backbone stay, so the server goes on as it is. The loss is that of head distillation
//! (FrankenSplit, arXiv 2302.10681): squared error of the backbone's features after a given block plus lambda times the bits, here with
//! the logits' KL through the frozen tail, and with the rate of the very tables that the bundle codes with.

pub mod photos;
pub mod rate;

use std::collections::BTreeMap;
use std::path::Path;

use isthmus_codec::{Bundle, ChannelTable, LevelTables, Tables, coder, container};
use isthmus_nets::weights::Weights;
use isthmus_nets::{Backbone, BackboneKind, Decoder, DecoderSpec, Encoder, EncoderKind, Layer};
use isthmus_pixels::Rgb;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::partition::Split;
use super::{Examples, Learner, Model, Score, Training, network, torch};
use crate::error::FederateError;
use rate::Rate;

/// Name of the task.
pub const TASK: &str = "bundle";
/// Folder beside the clients' photos with those that the coordinator scores on.
pub const HELD_OUT: &str = "held-out";
/// The tables' numbers are kept divided by this: a step of the optimiser moves them as far as it should, and they are as small as an
/// encoder's weight in the update that is summed.
const UNIT: f64 = 100.0;
/// Weight of level q: (geometric mean of lambda / lambda)^BALANCE.
const BALANCE: f64 = 0.35;
const SCORED_AT_ONCE: usize = 16;
const NUMBERS: [&str; 3] = ["tables.gain", "tables.scale", "tables.shift"];

/// How the bundle is fitted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fit {
    /// SHA-256 of the manifest of the bundle that clients have; an operator may leave it out: [`Self::name_bundle`].
    #[serde(default)]
    pub sha256: String,
    /// Lambdas of the bundle's levels are multiplied by this.
    #[serde(default = "one")]
    pub rate: f64,
    /// Weight of the logits' KL (nats) against the feature error.
    #[serde(default)]
    pub kl: f64,
    /// The feature error is measured after this block of the backbone.
    pub measure_block: usize,
}

impl Fit {
    /// Names the bundle in `folder` as the one that clients have, if none is named yet.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn name_bundle(&mut self, folder: &Path) -> Result<(), FederateError> {
        if self.sha256.is_empty() {
            self.sha256 = load(folder, |_| false)?.hash.to_string();
        }
        Ok(())
    }
}

fn one() -> f64 {
    1.0
}

/// A bundle, the frozen networks behind it, and photos.
pub struct Adaptation {
    bundle: Bundle,
    variables: nn::VarStore,
    encoder: Encoder,
    numbers: [Tensor; 3],
    decoder: Decoder,
    teacher: Backbone,
    /// Behind the decoder.
    student: Backbone,
    split: Layer,
    photos: Vec<Rgb>,
    held_out: Vec<Rgb>,
}

fn stack(photos: &[&Rgb]) -> Result<Tensor, FederateError> {
    let mut pixels = Vec::new();
    photos.iter().for_each(|p| p.normalise_into(&mut pixels));
    let side = photos.first().map_or(1, |p| i64::from(p.width()));
    Tensor::f_from_slice(&pixels).and_then(|t| t.f_view([-1, 3, side, side])).map_err(torch)
}

fn values(t: &Tensor) -> Result<Vec<f32>, FederateError> {
    Vec::<f32>::try_from(t.detach().contiguous().view(-1)).map_err(torch)
}

/// A bundle folder with everything in it.
///
/// # Errors
/// Names the file that is missing or wrong.
pub fn open(folder: &Path) -> Result<Bundle, FederateError> {
    load(folder, |_| true)
}

fn load(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Bundle, FederateError> {
    let bundle = Bundle::load(|name| std::fs::read(folder.join(name)), wanted);
    bundle.map_err(|e| FederateError::Invalid(format!("{}: {e}", folder.display())))
}

/// The bundle's entropy tables with a model's numbers.
///
/// # Errors
/// If the model is another bundle's.
pub fn tables(bundle: &Bundle, model: &Model) -> Result<Tables, FederateError> {
    let (levels, channels) = (bundle.tables.levels.len(), usize::from(bundle.manifest.latent.channels));
    let mut numbers = Vec::new();
    for name in NUMBERS {
        let found = model.tensors().find(|(n, shape, _)| *n == name && *shape == [levels, channels]);
        numbers.push(found.ok_or_else(|| FederateError::Invalid(format!("the model has no {name} of {levels} x {channels}")))?.2);
    }
    let mut adapted = Vec::new();
    for (l, level) in bundle.tables.levels.iter().enumerate() {
        let mut tables = Vec::new();
        for (c, table) in level.channels.iter().enumerate() {
            let [gain, scale, shift] = [0, 1, 2].map(|i: usize| f64::from(numbers[i][l * channels + c]) * UNIT);
            let contexts = rate::tilt(&table.contexts, scale, shift)?;
            let step = gain.exp() as f32;
            tables.push(ChannelTable::with_contexts(table.gain * step, table.inverse / step, table.median, contexts)?);
        }
        adapted.push(LevelTables::in_order(tables, level.order().to_vec())?);
    }
    Ok(Tables { levels: adapted })
}

/// The encoder's weights of a model, by name.
pub fn encoder_weights(model: &Model) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let of = |(name, shape, values): (&str, &[usize], &[f32])| {
        Some((name.strip_prefix("encoder.")?.to_owned(), (shape.to_vec(), values.to_vec())))
    };
    model.tensors().filter_map(of).collect()
}

impl Adaptation {
    /// Opens a bundle, its first backbone, and the photos of a folder.
    ///
    /// # Errors
    /// Names what is missing or wrong.
    pub fn open(photos: &Path, bundle: &Path, backbones: &Path) -> Result<Self, FederateError> {
        let bundle = open(bundle)?;
        let m = &bundle.manifest;
        let invalid = |why: String| FederateError::Invalid(format!("bundle {}: {why}", m.name));
        let kind = EncoderKind::from_name(&m.encoder.kind).ok_or_else(|| invalid(format!("encoder {} is unknown", m.encoder.kind)))?;
        let entry = &m.decoders[0];
        let backbone =
            BackboneKind::from_name(&entry.backbone).ok_or_else(|| invalid(format!("backbone {} is unknown", entry.backbone)))?;
        let net = |e: isthmus_nets::NetError| invalid(e.to_string());
        let file = backbones.join(format!("{}.safetensors", backbone.name()));
        let teacher = Backbone::open(backbone, &file, Device::Cpu).map_err(net)?;
        let mut variables = nn::VarStore::new(Device::Cpu);
        let root = variables.root();
        let encoder = Encoder::new(&(&root / "encoder"), kind);
        let shape = [bundle.tables.levels.len() as i64, m.latent.channels.into()];
        let numbers = NUMBERS.map(|name| (&root / "tables").zeros(name.trim_start_matches("tables."), &shape));
        let weights = Weights::from_safetensors(bundle.file(&m.encoder.weights)?, &m.encoder.weights, Device::Cpu).map_err(net)?;
        for (name, variable) in &mut variables.variables() {
            if let Some(name) = name.strip_prefix("encoder.") {
                let saved = weights.get(name, &variable.size()).map_err(net)?;
                tch::no_grad(|| variable.f_copy_(&saved)).map_err(torch)?;
            }
        }
        let frozen = nn::VarStore::new(Device::Cpu);
        let spec = DecoderSpec::from_entry(entry, m.latent).map_err(net)?;
        let decoder = Decoder::new(&frozen.root(), &spec);
        let weights = Weights::from_safetensors(bundle.file(&entry.weights)?, &entry.weights, Device::Cpu).map_err(net)?;
        weights.copy_to(&frozen).map_err(net)?;
        let mut frozen = frozen;
        frozen.freeze();
        variables.unfreeze();
        let student = decoder.student(&teacher);
        let (side, split) = (m.input.size, Layer::from_block(entry.split_block));
        let held_out = photos.join(HELD_OUT);
        let held_out = if held_out.is_dir() { photos::open(&held_out, side)? } else { Vec::new() };
        let photos = photos::open(photos, side)?;
        Ok(Self { bundle, variables, encoder, numbers, decoder, teacher, student, split, photos, held_out })
    }

    /// One number of the tables, for a level (C).
    fn number(&self, which: usize, level: usize) -> Tensor {
        self.numbers[which].get(level as i64) * UNIT
    }

    /// The loss of each sample at a level (N).
    fn loss(&self, pixels: &Tensor, level: usize, rate: &Rate<'_>, fit: &Fit) -> Result<Tensor, FederateError> {
        let tables = &self.bundle.tables.levels[level];
        let row = |values: Vec<f32>| Tensor::f_from_slice(&values).and_then(|t| t.f_view([1, -1, 1, 1])).map_err(torch);
        let of = |f: fn(&ChannelTable) -> f32| row(tables.channels.iter().map(f).collect());
        let (gain, inverse, median) = (row(tables.gains())?, of(|c| c.inverse)?, of(|c| c.median)?);
        let step = self.number(0, level).exp().view([1, -1, 1, 1]);
        let steps = self.encoder.forward(pixels) * gain * &step - &median;
        // rounded as at run time; the gradient passes as if it were not
        let rounded = &steps + (steps.detach().round() - steps.detach());
        let bits = rate.bits(&steps, &self.number(1, level), &self.number(2, level))?;
        let rebuilt = self.decoder.forward(&((rounded + median) * inverse / step));
        let measure = Layer::Block(fit.measure_block);
        let wanted = tch::no_grad(|| self.teacher.between(pixels, Layer::Input, measure));
        let got = self.student.between(&rebuilt, self.split, measure);
        let std = wanted.std_dim([0i64, 2, 3].as_slice(), true, true).clamp_min(1e-3);
        let error = ((got.shallow_clone() - &wanted) / std).square().sum_dim_intlist([1i64, 2, 3].as_slice(), false, Kind::Float);
        let mut loss = error + bits * (self.bundle.manifest.quality[level].lambda * fit.rate);
        if fit.kl > 0.0 {
            let answer = |net: &Backbone, features: &Tensor| net.tail(features, measure).log_softmax(-1, Kind::Float);
            let wanted = tch::no_grad(|| answer(&self.teacher, &wanted));
            let kl = (wanted.exp() * (&wanted - answer(&self.student, &got))).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            loss = &loss + kl * fit.kl;
        }
        Ok(loss)
    }

    /// Weight of each level.
    fn balance(&self) -> Vec<f64> {
        let lambdas = self.bundle.manifest.quality.iter().map(|q| q.lambda.max(f64::MIN_POSITIVE).ln());
        let mean = lambdas.clone().sum::<f64>() / self.bundle.tables.levels.len() as f64;
        lambdas.map(|l| ((mean - l) * BALANCE).exp()).collect()
    }
}

/// How a level does on held-out photos: on one (agreement is 0 or 1), or the mean.
#[derive(Debug, Clone, Copy)]
pub struct LevelScore {
    /// Bytes of the container.
    pub bytes: f64,
    /// Share of photos whose first answer is the backbone's on the unharmed photo.
    pub agreement: f64,
    /// KL (nats) to the backbone's answer.
    pub kl: f64,
}

impl LevelScore {
    /// Of several photos.
    pub fn mean(scores: &[Self]) -> Self {
        let mean = |f: fn(&Self) -> f64| scores.iter().map(f).sum::<f64>() / scores.len().max(1) as f64;
        Self { bytes: mean(|s| s.bytes), agreement: mean(|s| s.agreement), kl: mean(|s| s.kl) }
    }
}

impl Adaptation {
    /// Takes a model's encoder over.
    ///
    /// # Errors
    /// If it is another bundle's.
    pub fn set(&mut self, model: &Model) -> Result<(), FederateError> {
        network::load(&self.variables, model, TASK)
    }

    /// The bundle that is fitted.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Photos that no client has.
    pub fn held_out(&self) -> &[Rgb] {
        &self.held_out
    }

    /// Latents of photos, one after the other (channel-major).
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn latents(&self, photos: &[Rgb]) -> Result<Vec<f32>, FederateError> {
        tch::no_grad(|| values(&self.encoder.forward(&stack(&photos.iter().collect::<Vec<_>>())?)))
    }

    /// The backbone's logits behind the decoder (N, classes) for de-quantised latents.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn answers(&self, dequantised: &[f32]) -> Result<Tensor, FederateError> {
        let s = self.bundle.manifest.latent;
        let shape = [-1, s.channels.into(), s.height.into(), s.width.into()];
        let latent = Tensor::f_from_slice(dequantised).and_then(|t| t.f_view(shape.as_slice())).map_err(torch)?;
        Ok(tch::no_grad(|| self.student.tail(&self.decoder.forward(&latent), self.split)))
    }

    /// How the encoder does with the tables of a level on the held-out photos, as client and server would compute it: the mean.
    ///
    /// # Errors
    /// As [`Self::each`].
    pub fn level(&self, level: &LevelTables) -> Result<LevelScore, FederateError> {
        Ok(LevelScore::mean(&self.each(level)?))
    }

    /// As [`Self::level`], of each photo.
    ///
    /// # Errors
    /// If libtorch fails or a photo cannot be coded.
    pub fn each(&self, level: &LevelTables) -> Result<Vec<LevelScore>, FederateError> {
        let shape = self.bundle.manifest.latent;
        let _frozen = tch::no_grad_guard();
        let mut scores = Vec::with_capacity(self.held_out.len());
        for some in self.held_out.chunks(SCORED_AT_ONCE) {
            let (mut decoded, mut bytes) = (Vec::new(), Vec::new());
            for latent in self.latents(some)?.chunks_exact(shape.symbols()) {
                let symbols = level.quantise(latent, shape)?;
                bytes.push(coder::encode(&symbols, level, shape)?.len() + container::OVERHEAD);
                level.dequantise_into(&symbols, shape, &mut decoded)?;
            }
            let wanted = self.teacher.forward(&stack(&some.iter().collect::<Vec<_>>())?).log_softmax(-1, Kind::Float);
            let answer = self.answers(&decoded)?.log_softmax(-1, Kind::Float);
            let right = values(&answer.argmax(1, false).eq_tensor(&wanted.argmax(1, false)).to_kind(Kind::Float))?;
            let kl = values(&(wanted.exp() * (&wanted - &answer)).sum_dim_intlist([1i64].as_slice(), false, Kind::Float))?;
            let score =
                |((bytes, right), kl): ((usize, f32), f32)| LevelScore { bytes: bytes as f64, agreement: right.into(), kl: kl.into() };
            scores.extend(bytes.into_iter().zip(right).zip(kl).map(score));
        }
        Ok(scores)
    }
}

impl Learner for Adaptation {
    /// The bundle as it is.
    fn initial(&mut self, _: u64) -> Result<Model, FederateError> {
        let numbers = [self.bundle.tables.levels.len(), usize::from(self.bundle.manifest.latent.channels)];
        let mut tensors: Vec<_> = NUMBERS.iter().map(|n| ((*n).to_owned(), numbers.to_vec(), vec![0.0; numbers[0] * numbers[1]])).collect();
        let m = &self.bundle.manifest;
        let weights = Weights::from_safetensors(self.bundle.file(&m.encoder.weights)?, &m.encoder.weights, Device::Cpu);
        let weights = weights.map_err(|e| FederateError::Invalid(e.to_string()))?;
        for name in weights.names() {
            if let Some(t) = weights.get_any(name) {
                tensors.push((format!("encoder.{name}"), t.size().iter().map(|s| *s as usize).collect(), values(t)?));
            }
        }
        Model::new(tensors)
    }

    fn deal(&self, clients: usize, split: Split, seed: u64) -> Result<Vec<Examples>, FederateError> {
        match split {
            // consecutive names: crops of one photo, photos of one walk
            Split::Natural => super::partition::in_runs(self.photos.len(), clients),
            _ => super::partition::deal(&vec![0; self.photos.len()], clients, split, seed),
        }
    }

    fn update(&mut self, model: &Model, own: &Examples, training: &Training, seed: u64) -> Result<Vec<f32>, FederateError> {
        let fit = training.bundle.as_ref().ok_or_else(|| FederateError::Invalid("training.bundle is missing".into()))?;
        let have = self.bundle.hash.to_string();
        if fit.sha256 != have {
            return Err(FederateError::Invalid(format!("the round is for bundle {}, this client has {have}", fit.sha256)));
        }
        if self.teacher.kind().layer_shape(Layer::Block(fit.measure_block)).is_none() || Layer::Block(fit.measure_block) < self.split {
            return Err(FederateError::Invalid(format!(
                "training.bundle.measure_block: {} is no block after the split",
                fit.measure_block
            )));
        }
        network::load(&self.variables, model, TASK)?;
        let shape = self.bundle.manifest.latent;
        let rates = self.bundle.tables.levels.iter().map(|l| Rate::new(l, shape)).collect::<Result<Vec<_>, _>>()?;
        let balance = self.balance();
        let mut optimiser = nn::Adam::default().build(&self.variables, training.learning_rate).map_err(torch)?;
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        if own.flipped {
            return Err(FederateError::Invalid(format!("{TASK}: there are no labels to be flipped")));
        }
        let mut order = own.places.clone();
        if order.iter().any(|p| *p >= self.photos.len()) {
            return Err(FederateError::Invalid("a photo that the folder does not have".into()));
        }
        let mut levels: Vec<usize> = (0..rates.len()).collect();
        let mut steps = 0;
        for _ in 0..training.epochs {
            order.shuffle(&mut rng);
            for batch in order.chunks(training.batch_size) {
                if steps % levels.len() == 0 {
                    levels.shuffle(&mut rng);
                }
                let level = levels[steps % levels.len()];
                steps += 1;
                let mut photos: Vec<Rgb> = batch.iter().map(|p| self.photos[*p].clone()).collect();
                photos.iter_mut().filter(|_| rng.random()).for_each(Rgb::flip);
                let pixels = stack(&photos.iter().collect::<Vec<_>>())?;
                let loss = self.loss(&pixels, level, &rates[level], fit)?.mean(Kind::Float) * balance[level];
                optimiser.backward_step(&loss);
            }
        }
        Ok(network::difference(&network::store(&self.variables)?, model))
    }

    /// Agreement with the backbone on the unharmed photo, and bytes, at the middle level; over `held-out` beside the clients' photos.
    fn score(&mut self, model: &Model) -> Result<Score, FederateError> {
        self.set(model)?;
        let tables = tables(&self.bundle, model)?;
        let level = self.level(&tables.levels[tables.levels.len() / 2])?;
        let of = self.held_out.len();
        Ok(Score { right: (level.agreement * of as f64).round() as usize, of, bytes: (of > 0).then_some(level.bytes) })
    }
}
