//! Head distillation: the encoder, prior and decoder learn to rebuild the frozen teacher's shallow
//! features at a rate (FrankenSplit, arXiv 2302.10681, section "phd"): loss = sum of squared error +
//! lambda x bits, here per-channel normalised and, late, with the logits' KL through the frozen tail.

mod densities;
mod range;
mod start;
mod step;
mod transform;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use isthmus_nets::backbone::at_size;
use isthmus_nets::encoder::HEAD_BLOCK;
use isthmus_nets::weights::{Storage, Weights, to_safetensors};
use isthmus_nets::{Backbone, Bottleneck, Layer};
use tch::{Device, Kind, Tensor};

pub use range::{RangePoint, suggested};
use step::Stepped;

use crate::adam::Adam;
use crate::error::TrainError;
use crate::loader::{self, Plan};
use crate::measure::{Measure, squared};
use crate::pack::Pack;
use crate::progress::{LogLine, Totals, progress};
use crate::recipe::Recipe;
use crate::wake::Waker;

/// Crops from which the features' statistics and Fisher weights are estimated.
const CALIBRATION_BATCHES: u64 = 24;
const LOG_EVERY: u64 = 20;
/// Densities and gains learn so many times as quickly as the rest.
const FAST: f64 = 2.5;
/// How far a step moves the logarithm of a level's lambda, per logarithm of bytes off target.
const STEERING: f64 = 0.01;

/// A run: its networks, teacher and optimiser.
pub struct Run {
    /// The recipe.
    pub recipe: Recipe,
    /// What is trained.
    pub net: Bottleneck,
    /// Frozen.
    pub teacher: Backbone,
    /// Steps done.
    pub step: u64,
    adam: Adam,
    measure: Measure,
    lambdas: Vec<f64>,
    /// Mean bytes per training crop that each level is steered to.
    targets: Option<Vec<f64>>,
    folder: PathBuf,
    frozen: Option<Frozen>,
    /// Goes on from a checkpoint.
    resumed: bool,
    /// Its weights are another run's, or a bundle's.
    started: bool,
}

/// What stays as it is in a bundle whose encoder is used and not trained here.
struct Frozen {
    /// Of all levels (levels, C).
    medians: Tensor,
    /// A photo's at each level, as measured when the bundle was made.
    bytes: Vec<f64>,
}

/// Their names in a checkpoint.
const FROZEN_MEDIANS: &str = "frozen/medians";
const FROZEN_BYTES: &str = "frozen/bytes";
/// Of what a run with `keep_bytes` steers to.
const TARGETS: &str = "target_bytes";

fn checkpoint(folder: &Path) -> PathBuf {
    folder.join("checkpoint.safetensors")
}

impl Run {
    /// Starts a run in `folder`, or resumes the one there.
    ///
    /// # Errors
    /// If the folder holds a run of another recipe or cannot be written.
    pub fn open(recipe: Recipe, folder: &Path, teacher: Backbone, device: Device, resume: bool) -> Result<Self, TrainError> {
        tch::manual_seed(recipe.seed as i64);
        let net = Bottleneck::new(device, recipe.encoder, &recipe.decoder(), &recipe.lambdas, recipe.prior_init_scale);
        net.decoder.tune_from(&teacher);
        net.encoder.start_from(&teacher);
        let mut paces = vec![("prior", FAST), ("gain", FAST), ("inverse", FAST), ("decoder.tuned.", recipe.tuned_pace)];
        if net.encoder.is_head_of(&teacher) {
            freeze_first(&net, recipe.frozen_blocks);
            paces.extend(["encoder.stem", "encoder.block", "encoder.latent"].map(|part| (part, recipe.encoder_pace)));
        }
        let adam = Adam::new(&net.vs, recipe.ema, &paces, recipe.muon);
        let measure = Measure::new(&recipe, device);
        let (lambdas, targets) = (recipe.lambdas.clone(), recipe.target_bytes.clone());
        let mut run = Self {
            recipe,
            net,
            teacher,
            step: 0,
            adam,
            measure,
            lambdas,
            targets,
            folder: folder.into(),
            frozen: None,
            resumed: false,
            started: false,
        };
        let (saved, path) = (checkpoint(folder), folder.join("recipe.toml"));
        if resume && (saved.exists() || path.exists()) && Recipe::open(&path)? != run.recipe {
            let why = "is of another recipe than the one given; use that one, or another --run folder";
            return Err(TrainError::data(path.display().to_string(), why));
        }
        match (saved.exists(), resume) {
            (true, true) => {
                run.restore(&saved, device)?;
                run.resumed = true;
                run.forget_later_lines()?;
            }
            (true, false) => {
                let why = "holds a run already; use --resume to go on with it, or another --run folder";
                return Err(TrainError::data(folder.display().to_string(), why));
            }
            (false, _) => {
                std::fs::create_dir_all(folder).map_err(|e| TrainError::io(folder, e))?;
                let text = toml::to_string(&run.recipe).map_err(|e| TrainError::data("recipe", e.to_string()))?;
                std::fs::write(path, text).map_err(|e| TrainError::io(folder, e))?;
            }
        }
        Ok(run)
    }

    /// Whether a folder holds a run with a checkpoint.
    pub fn is_in(folder: &Path) -> bool {
        checkpoint(folder).is_file()
    }

    /// True if it goes on from a checkpoint: the weights are its own.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Crops seen.
    pub fn crops(&self) -> u64 {
        self.step * self.recipe.batch as u64
    }

    /// Drops log lines of steps that the checkpoint does not know: they will be done again.
    fn forget_later_lines(&self) -> Result<(), TrainError> {
        let path = self.folder.join("log.jsonl");
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
        let known = |line: &&str| serde_json::from_str::<LogLine>(line).is_ok_and(|l| l.step <= self.step);
        let kept: String = text.lines().filter(known).flat_map(|l| [l, "\n"]).collect();
        std::fs::write(&path, kept).map_err(|e| TrainError::io(&path, e))
    }

    fn restore(&mut self, path: &Path, device: Device) -> Result<(), TrainError> {
        let state = Weights::open(path, device)?;
        for (name, mut variable) in self.net.vs.variables() {
            let saved = state.get(&format!("net/{name}"), &variable.size())?;
            tch::no_grad(|| variable.copy_(&saved));
        }
        for (name, tensor) in self.measure.parts() {
            *tensor = state.get(&format!("measure/{name}"), &tensor.size())?;
        }
        let by_level = |name| {
            let saved = Vec::<f32>::try_from(state.get(name, &[self.lambdas.len() as i64])?)?;
            Ok::<Vec<f64>, TrainError>(saved.into_iter().map(f64::from).collect())
        };
        if self.recipe.keep_bytes {
            self.targets = Some(by_level(TARGETS)?);
        }
        if self.targets.is_some() {
            self.lambdas = by_level("lambdas")?;
        }
        if state.has(FROZEN_MEDIANS) {
            let levels = self.recipe.lambdas.len() as i64;
            let bytes = Vec::<f32>::try_from(state.get(FROZEN_BYTES, &[levels])?)?;
            let medians = state.get(FROZEN_MEDIANS, &[levels, self.recipe.encoder.latent_channels()])?;
            self.frozen = Some(Frozen { medians, bytes: bytes.into_iter().map(f64::from).collect() });
        }
        self.step = state.get("step", &[1])?.double_value(&[0]) as u64;
        self.adam.restore(&state, "adam/")
    }

    /// Writes the checkpoint (to a new file, then renamed over the old one).
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&mut self) -> Result<(), TrainError> {
        let mut tensors: Vec<(String, Tensor)> = self.net.vs.variables().into_iter().map(|(n, t)| (format!("net/{n}"), t)).collect();
        tensors.extend(self.adam.state().into_iter().map(|(n, t)| (format!("adam/{n}"), t)));
        tensors.extend(self.measure.parts().into_iter().map(|(name, tensor)| (format!("measure/{name}"), tensor.shallow_clone())));
        let by_level = |v: &[f64]| Tensor::from_slice(&v.iter().map(|&v| v as f32).collect::<Vec<_>>());
        tensors.push(("lambdas".into(), by_level(&self.lambdas)));
        if let Some(targets) = self.targets.as_ref().filter(|_| self.recipe.keep_bytes) {
            tensors.push((TARGETS.into(), by_level(targets)));
        }
        if let Some(Frozen { medians, bytes }) = &self.frozen {
            tensors.push((FROZEN_MEDIANS.into(), medians.shallow_clone()));
            tensors.push((FROZEN_BYTES.into(), by_level(bytes)));
        }
        tensors.push(("step".into(), Tensor::from_slice(&[self.step as f32])));
        let bytes = to_safetensors(tensors.iter().map(|(n, t)| (n.as_str(), t)), Storage::Single)?;
        let path = checkpoint(&self.folder);
        let part = path.with_extension("part");
        std::fs::write(&part, bytes).map_err(|e| TrainError::io(&part, e))?;
        std::fs::rename(&part, &path).map_err(|e| TrainError::io(&path, e))
    }

    /// Medians of all levels (levels, C).
    pub fn medians(&self) -> Tensor {
        self.frozen.as_ref().map_or_else(|| self.net.medians(), |f| f.medians.shallow_clone())
    }

    /// A photo's bytes at each level, if they are a bundle's and no longer change.
    pub fn frozen_bytes(&self) -> Option<&[f64]> {
        self.frozen.as_ref().map(|f| f.bytes.as_slice())
    }

    /// Mean bytes per training crop that each level is steered to, if any.
    pub fn target_bytes(&self) -> Option<&[f64]> {
        self.targets.as_deref()
    }

    /// Pixels for the encoder (N, 3, S, S) as the teacher sees them, at its own size.
    pub fn seen_by_teacher(&self, pixels: &Tensor) -> Tensor {
        at_size(pixels, self.recipe.backbone)
    }

    /// The network that goes on from what the decoder rebuilds.
    pub fn student(&self) -> Backbone {
        self.net.decoder.student(&self.teacher)
    }

    /// Runs `f` with the moving average in place of the weights.
    pub fn with_average<T>(&mut self, f: impl FnOnce(&Self) -> T) -> T {
        self.adam.swap_average();
        let out = f(self);
        self.adam.swap_average();
        out
    }

    /// Mean squared error at the measured layer, in units of the teacher's variance.
    pub fn error(&self, wanted: &Tensor, got: &Tensor) -> f64 {
        squared(wanted, got, &self.measure.std).mean(Kind::Float).double_value(&[])
    }

    fn batch_tensors(&self, batch: &loader::Batch) -> (Tensor, Tensor) {
        let side = i64::from(self.recipe.input_size());
        let device = self.net.vs.device();
        let pixels = Tensor::from_slice(&batch.pixels).view([-1, 3, side, side]).to_device(device);
        (pixels, Tensor::from_slice(&batch.levels).to_device(device))
    }

    /// Estimates the teacher's feature statistics and how much its answer depends on each channel
    /// (expected squared gradient of the log-probability of a class drawn from its own answer).
    fn calibrate(&mut self, pack: &Pack) -> Result<(), TrainError> {
        let r = self.recipe.clone();
        let (mut rebuilt, mut measured, mut fisher) = (Moments::default(), Moments::default(), Vec::new());
        let mut hooked: Vec<Moments> = r.hooks.iter().map(|_| Moments::default()).collect();
        for i in 0..CALIBRATION_BATCHES {
            // streams from the far end, so that training never repeats them
            let batch = loader::make(pack, &Plan::of(&r), u64::MAX - i)?;
            let (pixels, _) = self.batch_tensors(&batch);
            let layer = tch::no_grad(|| self.teacher.between(&self.seen_by_teacher(&pixels), Layer::Input, r.split()));
            rebuilt.add(&layer);
            let features = tch::no_grad(|| self.teacher.between(&layer, r.split(), r.measure())).set_requires_grad(true);
            let log_p = self.teacher.tail(&features, r.measure()).log_softmax(-1, Kind::Float);
            let class = log_p.exp().multinomial(1, true);
            log_p.gather(1, &class, false).sum(Kind::Float).backward();
            measured.add(&features.detach());
            let mut deeper = (r.measure(), features.detach());
            for (&block, moments) in r.hooks.iter().zip(&mut hooked) {
                deeper = (Layer::Block(block), tch::no_grad(|| self.teacher.between(&deeper.1, deeper.0, Layer::Block(block))));
                moments.add(&deeper.1);
            }
            fisher.push(per_channel(&features.grad().square()));
        }
        let (mean, variance) = rebuilt.finish();
        self.net.decoder.set_statistics(&mean, &variance.sqrt());
        let (mean, mut variance) = measured.finish();
        if !r.by_channel {
            variance = variance.ones_like() * variance.mean(Kind::Float);
        }
        let need = Tensor::stack(&fisher, 0).mean_dim([0i64].as_slice(), false, Kind::Float) * &variance;
        let need = &need / need.mean(Kind::Float);
        let hooks = hooked.into_iter().map(|moments| moments.finish().1.sqrt()).collect();
        self.measure = Measure { mean, std: variance.sqrt(), weights: need * r.fisher + (1.0 - r.fisher), hooks };
        Ok(())
    }

    /// Starts dead channels anew, if the recipe asks for it; returns how many.
    fn wake(&mut self, pack: &Pack) -> Result<usize, TrainError> {
        let r = &self.recipe;
        if r.wake_channels == 0 {
            return Ok(0);
        }
        let batches = (0..CALIBRATION_BATCHES).map(|i| {
            let seen = u64::MAX - CALIBRATION_BATCHES - i;
            let batch = loader::make(pack, &Plan::of(r), seen)?;
            Ok(self.batch_tensors(&batch).0)
        });
        let waker = Waker { net: &self.net, teacher: &self.teacher, split: r.split() };
        let woken = waker.wake(r.wake_channels, batches)?;
        self.adam.restart();
        Ok(woken)
    }

    /// Moves each level's lambda against its distance from the target, given this step's mean bytes per level.
    /// Kept in single precision, as the checkpoint has it, so that a resumed run goes on alike.
    fn steer(&mut self, levels: &[i64], bits: &[f32]) {
        let Some(targets) = &self.targets else { return };
        if self.recipe.ramp_at(self.step) < 1.0 {
            return;
        }
        for (l, (lambda, target)) in self.lambdas.iter_mut().zip(targets).enumerate() {
            let of_level: Vec<f64> = levels.iter().zip(bits).filter(|(v, _)| **v == l as i64).map(|(_, b)| f64::from(*b) / 8.0).collect();
            let bytes = of_level.iter().sum::<f64>() / of_level.len() as f64;
            let off = bytes / target;
            if off.is_finite() && off > 0.0 {
                *lambda = f64::from((*lambda * off.powf(STEERING)) as f32);
            }
        }
    }

    /// What comes before the first step.
    fn begin(&mut self, pack: &Arc<Pack>) -> Result<(), TrainError> {
        if !self.resumed {
            self.calibrate(pack)?;
            let transformed = !self.started && self.start_as_transform(pack)?;
            if transformed {
                eprintln!("encoder and decoder begin as a transform codec of the backbone's block {HEAD_BLOCK}");
            }
            let woken = self.wake(pack)?;
            if woken > 0 {
                eprintln!("{woken} dead channels started anew");
            }
            if transformed || Self::started_from(&self.folder).is_some() {
                let bytes = self.fit_densities(pack.clone())?;
                if self.recipe.keep_bytes {
                    self.targets = Some(bytes);
                }
            }
        }
        Ok(())
    }

    /// Trains to the recipe's last step; `every` and `evaluate` report along the way.
    ///
    /// # Errors
    /// If data, disk or libtorch fail.
    pub fn train(
        &mut self,
        pack: Arc<Pack>,
        until: u64,
        every: u64,
        mut evaluate: impl FnMut(&mut Self) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let r = self.recipe.clone();
        if !self.resumed {
            self.begin(&pack)?;
            // whoever stops before the first evaluation goes on from the weights that the run began with
            self.save()?;
        }
        let levels = r.lambdas.len();
        let constants = self.constants();
        let mut batches = loader::start(pack, Plan::of(&r), self.step);
        let log_path = self.folder.join("log.jsonl");
        let mut log = std::fs::OpenOptions::new().create(true).append(true).open(&log_path).map_err(|e| TrainError::io(&log_path, e))?;
        let bar = progress(until, self.step);
        let mut totals = Totals::new(levels);
        let mut since = Instant::now();
        while self.step < until {
            let asked = Instant::now();
            let batch = batches.recv()?;
            totals.waited += asked.elapsed().as_secs_f64();
            let Stepped { difference, bits, kl, norm, .. } = self.learn(&batch, &constants, r.rate_at(self.step), self.step)?;
            if !norm.is_finite() {
                bar.println(format!("step {}: gradient is not finite, batch skipped", self.step));
            }
            self.step += 1;
            bar.set_position(self.step);
            self.steer(&batch.levels, &bits);
            totals.add(&batch.levels, &difference, &bits, kl)?;

            if self.step.is_multiple_of(LOG_EVERY) {
                let seconds = since.elapsed().as_secs_f64();
                let mut line = totals.line(self.step, r.batch as u64, seconds, norm);
                if let Some(bytes) = self.frozen_bytes() {
                    line.bytes = bytes.to_vec();
                }
                bar.set_message(format!(
                    "{:.1} crops/s, {:?} bytes",
                    line.crops_per_s,
                    line.bytes.iter().map(|b| b.round() as i64).collect::<Vec<_>>()
                ));
                let text = serde_json::to_string(&line).map_err(|e| TrainError::data("log", e.to_string()))?;
                writeln!(log, "{text}").map_err(|e| TrainError::io(&log_path, e))?;
                totals = Totals::new(levels);
                since = Instant::now();
            }
            if self.step.is_multiple_of(every) || self.step == until {
                self.save()?;
                bar.suspend(|| evaluate(self))?;
                since = Instant::now();
            }
        }
        bar.finish();
        Ok(())
    }
}

/// Leaves the encoder's stem and so many of its blocks as they are; none: all are trained.
fn freeze_first(net: &Bottleneck, blocks: usize) {
    let mut parts: Vec<String> = (0..blocks).map(|b| format!("encoder.block{b}_")).collect();
    if blocks > 0 {
        parts.push("encoder.stem".into());
    }
    for (name, variable) in net.vs.variables() {
        if parts.iter().any(|part| name.starts_with(part.as_str())) {
            let _ = variable.set_requires_grad(false);
        }
    }
}

fn per_channel(t: &Tensor) -> Tensor {
    t.mean_dim([0i64, 2, 3].as_slice(), false, Kind::Float)
}

/// Mean and variance per channel over batches.
#[derive(Default)]
struct Moments {
    first: Vec<Tensor>,
    second: Vec<Tensor>,
}

impl Moments {
    fn add(&mut self, t: &Tensor) {
        self.first.push(per_channel(t));
        self.second.push(per_channel(&t.square()));
    }

    fn finish(self) -> (Tensor, Tensor) {
        let mean_of = |v: &[Tensor]| Tensor::stack(v, 0).mean_dim([0i64].as_slice(), false, Kind::Float);
        let mean = mean_of(&self.first);
        let variance = (mean_of(&self.second) - mean.square()).clamp_min(1e-6);
        (mean, variance)
    }
}

/// KL divergence (nats) of each sample, teacher against student, from log-probabilities (N, K).
pub fn kl(teacher: &Tensor, student: &Tensor) -> Tensor {
    (teacher.exp() * (teacher - student)).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
}
