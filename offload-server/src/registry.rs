//! The loaded models and bundles.

use std::path::Path;
use std::sync::Arc;

use isthmus_codec::{Bundle, BundleHash, CodecError, Trust, folder};
use isthmus_nets::BackboneKind;
use isthmus_nets::backbone::CLASSES;
use isthmus_nets::device::parse_device;

use crate::admission::Admission;
use crate::batcher::Batcher;
use crate::model::{Model, Stage};
use crate::{Config, ServerError, labels};

/// One model: how to reach its network, and what it accepts.
pub struct Entry {
    /// Name.
    pub name: &'static str,
    /// Which backbone.
    pub kind: BackboneKind,
    /// Side of the square input.
    pub input_size: u32,
    /// Where it runs.
    pub device: String,
    /// Who may come in.
    pub admission: Arc<Admission>,
    /// Its queue and network thread.
    pub batcher: Batcher,
    stages: Vec<(BundleHash, Stage)>,
}

impl Entry {
    /// The stage at which latents of a bundle enter this model.
    pub fn stage(&self, hash: &BundleHash) -> Option<Stage> {
        self.stages.iter().find(|(h, _)| h == hash).map(|(_, s)| *s)
    }
}

/// All models and bundles.
pub struct Registry {
    /// The first is the default.
    pub models: Vec<Entry>,
    /// Loaded bundles.
    pub bundles: Vec<Bundle>,
    /// Class names.
    pub labels: Vec<String>,
}

/// All versions at a folder.
fn open_bundles(folder: &Path, trust: &Trust) -> Result<Vec<Bundle>, ServerError> {
    if !folder.is_dir() {
        let why = "is no bundle folder; name one with --bundle or in `bundles` (the repository has bundles/lite0-patch-stem)";
        return Err(ServerError::Config(format!("{} {why}", folder.display())));
    }
    let wrong = |e: CodecError| ServerError::Config(e.to_string());
    let versions = folder::versions(folder).map_err(wrong)?;
    versions.iter().map(|version| folder::open(version, |name| name.starts_with("decoder"), trust).map_err(wrong)).collect()
}

impl Registry {
    /// Loads everything that `config` names.
    ///
    /// # Errors
    /// Names the file or key that is wrong.
    pub fn load(config: &Config) -> Result<Self, ServerError> {
        let device = parse_device(&config.device).map_err(ServerError::Config)?;
        tch::set_num_threads(config.network_threads() as i32);
        let keys = config.trusted_bundle_keys.iter().map(String::as_str);
        let trust = Trust::keys(keys).map_err(|e| ServerError::Config(format!("trusted_bundle_keys: {e}")))?;
        let mut bundles = Vec::new();
        for folder in &config.bundles {
            bundles.extend(open_bundles(folder, &trust)?);
        }
        if bundles.is_empty() {
            tracing::warn!("bundles is empty: only whole images will be answered");
        }
        let labels = labels::open(&config.backbones.join("labels.json"), CLASSES as usize)?;
        let mut models = Vec::new();
        for name in &config.models {
            let model = Model::load(name, &config.backbones, &bundles, device)?;
            let stages: Vec<_> = model.bundles().copied().filter_map(|h| model.stage(&h).map(|s| (h, s))).collect();
            let alone = model.time_alone()?;
            let (name, kind, input_size) = (model.name(), model.kind(), model.input_size());
            tracing::info!(model = name, device = ?device, bundles = stages.len(), "model loaded");
            let batcher = Batcher::start(model, name, config.max_batch, config.max_queue)?;
            let device = match device {
                tch::Device::Cuda(n) => format!("cuda:{n}"),
                _ => "cpu".to_owned(),
            };
            models.push(Entry { name, kind, input_size, device, admission: Admission::new(config.max_batch, alone), batcher, stages });
        }
        Ok(Self { models, bundles, labels })
    }

    /// The model called `name`, or the default if it is empty.
    ///
    /// # Errors
    /// [`ServerError::UnknownModel`].
    pub fn model(&self, name: &str) -> Result<&Entry, ServerError> {
        let found = if name.is_empty() { self.models.first() } else { self.models.iter().find(|m| m.name == name) };
        found.ok_or_else(|| ServerError::UnknownModel(name.chars().take(64).collect()))
    }

    /// The bundle whose hash starts with `prefix`.
    ///
    /// # Errors
    /// [`CodecError::WrongBundle`] names what is loaded.
    pub fn bundle(&self, prefix: &[u8]) -> Result<&Bundle, ServerError> {
        let found = self.bundles.iter().find(|b| b.hash.prefix() == prefix);
        let hex = isthmus_codec::bundle::hex;
        found.ok_or_else(|| {
            let expected = self.bundles.iter().map(|b| hex(&b.hash.prefix())).collect::<Vec<_>>().join(" or ");
            CodecError::WrongBundle { expected, found: hex(prefix) }.into()
        })
    }
}
