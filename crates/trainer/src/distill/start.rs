//! What a run begins with: another run's weights, or a bundle's.

use std::path::{Path, PathBuf};

use isthmus_codec::{Bundle, ChannelTable, LevelTables};
use isthmus_nets::weights::Weights;
use tch::{Device, Tensor};

use super::{Frozen, Run, checkpoint};
use crate::error::TrainError;
use crate::history::History;
use crate::recipe::Recipe;

/// File of a run that names the bundle it started from.
const STARTED_FROM: &str = "started-from";
/// Beginning of the names of a decoder's tuned blocks.
const TUNED: &str = "tuned.";

impl Run {
    /// Takes encoder, gains, prior and whatever fits of the decoder from the moving averages of other runs: the mean of what all of them have (Wortsman et al.,
    /// "Model soups", ICML 2022; for runs of which one went on from the other). The history is that of the first.
    ///
    /// # Errors
    /// If a checkpoint cannot be read, nothing fits, or one has what another lacks: networks of other shapes have no mean.
    pub fn warm_start(&mut self, folders: &[PathBuf], device: Device) -> Result<usize, TrainError> {
        let open = |folder: &PathBuf| Ok((Weights::open(&checkpoint(folder), device)?, Recipe::open(&folder.join("recipe.toml"))?));
        let others: Vec<(Weights, Recipe)> = folders.iter().map(open).collect::<Result<_, TrainError>>()?;
        let mut taken = 0;
        for (name, mut variable) in self.net.vs.variables() {
            let tuned = name.strip_prefix("decoder.").is_some_and(|rest| rest.starts_with(TUNED));
            let of = |(state, earlier): &(Weights, Recipe)| {
                let fits = !tuned || earlier.backbone == self.recipe.backbone;
                let saved = |kind: &str| state.get(&format!("{kind}/{name}"), &variable.size()).ok();
                // blocks of the encoder that its recipe froze have no average
                let frozen = || saved("net").filter(|_| name.starts_with("encoder."));
                fits.then(|| saved("adam/average").or_else(frozen)).flatten()
            };
            let found: Vec<Option<Tensor>> = others.iter().map(of).collect();
            if let Some((without, _)) = folders.iter().zip(&found).find(|(_, t)| t.is_none()).filter(|_| found.iter().any(Option::is_some))
            {
                let why = format!("has no {name} of the shape that this recipe and another run have: they have no mean");
                return Err(TrainError::data(without.display().to_string(), why));
            }
            if let Some(saved) = found.into_iter().collect::<Option<Vec<Tensor>>>() {
                tch::no_grad(|| variable.copy_(&Tensor::stack(&saved, 0).mean_dim([0i64].as_slice(), false, None)));
                taken += 1;
            }
        }
        let ((state, earlier), folder) = match (others.first(), folders.first()) {
            (Some(first), Some(folder)) if taken > 0 => (first, folder),
            _ => {
                let names: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
                return Err(TrainError::data(names.join(" and "), "nothing fits this recipe"));
            }
        };
        self.started = true;
        self.adam.restart();
        let steps = state.get("step", &[1])?.double_value(&[0]) as u64;
        History::inherit(folder, &self.folder, steps, steps * earlier.batch as u64)?;
        for ((state, _), folder) in others.iter().zip(folders).skip(1) {
            History::mean_with(folder, state.get("step", &[1])?.double_value(&[0]) as u64, &self.folder)?;
        }
        Ok(taken)
    }

    /// Takes encoder, gains and what fits of the first decoder of a bundle; its densities are learned before the first step.
    ///
    /// # Errors
    /// If the bundle's have other shapes.
    pub fn start_from(&mut self, bundle: &Bundle, device: Device) -> Result<(), TrainError> {
        let recipe = &self.recipe;
        let manifest = &bundle.manifest;
        if manifest.encoder.kind != recipe.encoder.name() || bundle.tables.levels.len() != recipe.lambdas.len() {
            let why = "the recipe must have the bundle's encoder and as many lambdas as it has levels";
            return Err(TrainError::data(format!("bundle {}", manifest.name), why));
        }
        let _medians = self.take(bundle, Some(bundle), device)?;
        self.started = true;
        self.adam.restart();
        let path = self.folder.join(STARTED_FROM);
        std::fs::write(&path, bundle.hash.to_string()).map_err(|e| TrainError::io(&path, e))
    }

    /// SHA-256 of the manifest of the bundle that the run in `folder` started from.
    pub fn started_from(folder: &Path) -> Option<String> {
        std::fs::read_to_string(folder.join(STARTED_FROM)).ok()
    }

    /// Takes encoder, gains and medians of a bundle, which this run then leaves as they are, and for a new run what fits of a decoder:
    /// `start`'s for the recipe's backbone (the bundle's own without one), or its first if it has none for that.
    ///
    /// # Errors
    /// If the recipe would change them, the bundles' have other shapes, or a resumed run was on another encoder.
    pub fn freeze(&mut self, bundle: &Bundle, start: Option<&Bundle>, device: Device) -> Result<(), TrainError> {
        let (manifest, levels) = (&bundle.manifest, &bundle.tables.levels);
        let recipe = &self.recipe;
        let fits = manifest.encoder.kind == recipe.encoder.name() && manifest.input.size == recipe.input_size();
        if !recipe.decoder_only || !fits || levels.len() != recipe.lambdas.len() {
            let why = "the recipe must say decoder_only = true and have the bundle's encoder, input and number of lambdas";
            return Err(TrainError::data(format!("bundle {}", manifest.name), why));
        }
        if self.resumed && !self.has_encoder_of(bundle)? {
            let why = "is not the bundle whose encoder the run was on; give that one, or train a new run on this one";
            return Err(TrainError::data(format!("bundle {} {}", manifest.name, manifest.version), why));
        }
        let table = self.take(bundle, (!self.resumed).then(|| start.unwrap_or(bundle)), device)?;
        self.frozen = Some(Frozen { medians: table, bytes: manifest.quality.iter().map(|q| q.bytes).collect() });
        self.started = true;
        if !self.resumed {
            self.adam.restart();
        }
        Ok(())
    }

    fn has_encoder_of(&self, bundle: &Bundle) -> Result<bool, TrainError> {
        let name = &bundle.manifest.encoder.weights;
        let encoder = Weights::from_safetensors(bundle.file(name)?, name, self.net.vs.device())?;
        let own = self.net.vs.variables();
        let mut parts = own.iter().filter_map(|(name, t)| name.strip_prefix("encoder.").map(|rest| (rest, t)));
        Ok(parts.all(|(name, t)| encoder.get(name, &t.size()).is_ok_and(|e| e == *t)))
    }

    /// Whether a run of `recipe` that starts from the decoder of `start` has a place for all of its tuned blocks.
    ///
    /// # Errors
    /// If not; says what to set.
    pub fn keeps_blocks(recipe: &Recipe, start: &Bundle) -> Result<(), TrainError> {
        let own = start.manifest.decoders.iter().find(|d| d.backbone == recipe.backbone.name());
        match own.and_then(|d| d.tuned_to) {
            Some(tuned) if recipe.tuned_to.is_none_or(|to| to < tuned) => {
                let why =
                    format!("its decoder has blocks of its own up to {tuned}, which the recipe would lose; set tuned_to = {tuned} in it");
                Err(TrainError::data(format!("bundle {}", start.manifest.name), why))
            }
            _ => Ok(()),
        }
    }

    /// Copies encoder and gains of a bundle, and what fits of the decoder of `start` for this backbone, else its first; gives the
    /// medians (levels, C).
    fn take(&self, bundle: &Bundle, start: Option<&Bundle>, device: Device) -> Result<Tensor, TrainError> {
        let (manifest, levels) = (&bundle.manifest, &bundle.tables.levels);
        let encoder = Weights::from_safetensors(bundle.file(&manifest.encoder.weights)?, &manifest.encoder.weights, device)?;
        let entry = start.and_then(|start| {
            let decoders = &start.manifest.decoders;
            let own = decoders.iter().find(|d| d.backbone == self.recipe.backbone.name());
            Some((start, own.or(decoders.first())?))
        });
        let own = entry.is_some_and(|(_, d)| d.backbone == self.recipe.backbone.name());
        if let Some((start, _)) = entry {
            Self::keeps_blocks(&self.recipe, start)?;
        }
        let decoder = match entry {
            Some((start, d)) => Some(Weights::from_safetensors(start.file(&d.weights)?, &d.weights, device)?),
            None => None,
        };
        let by_level = |all: Vec<f32>| Tensor::from_slice(&all).view([levels.len() as i64, -1]).to_device(device);
        let table = |of: fn(&ChannelTable) -> f32| by_level(levels.iter().flat_map(|l| l.channels.iter().map(of)).collect());
        for (name, mut variable) in self.net.vs.variables() {
            let size = variable.size();
            let saved = match name.split_once('.') {
                Some(("encoder", rest)) => Some(encoder.get(rest, &size)?),
                // another backbone's blocks are no beginning for this one's
                Some(("decoder", rest)) if rest.starts_with(TUNED) && !own => None,
                Some(("decoder", rest)) => decoder.as_ref().and_then(|d| d.get(rest, &size).ok()),
                _ if name == "gain" => Some(by_level(levels.iter().flat_map(LevelTables::gains).collect()).log()),
                _ if name == "inverse" => Some(table(|c| c.inverse.ln())),
                _ => None,
            };
            if let Some(saved) = saved {
                tch::no_grad(|| variable.copy_(&saved));
            }
        }
        Ok(table(|c| c.median))
    }
}
