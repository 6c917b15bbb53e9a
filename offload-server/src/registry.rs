//! What is loaded at one moment: models and bundles. A change makes a new registry; requests keep the one that they came in with.

use std::sync::Arc;

use isthmus_codec::{Bundle, BundleHash, CodecError};
use isthmus_nets::{BackboneKind, Layer};

use crate::ServerError;
use crate::batcher::Batcher;
use crate::model::Stage;
use crate::placement::Instance;
use crate::statistics::Statistics;
use crate::telemetry::Kind;

/// One version of a model: how to reach its network, and what it accepts.
pub struct Entry {
    /// Name.
    pub name: &'static str,
    /// From 1 on.
    pub version: u64,
    /// Which backbone.
    pub kind: BackboneKind,
    /// Side of the square input.
    pub input_size: u32,
    /// Its copies.
    pub instances: Vec<Instance>,
    /// Its queue and network thread.
    pub batcher: Batcher,
    /// What it has done.
    pub statistics: Arc<Statistics>,
    pub(crate) stages: Vec<(BundleHash, Stage)>,
}

impl Entry {
    /// The stage at which latents of a bundle enter this model.
    pub fn stage(&self, hash: &BundleHash) -> Option<Stage> {
        self.stages.iter().find(|(h, _)| h == hash).map(|(_, s)| *s)
    }

    /// Where it runs, as the configuration names it.
    pub fn device(&self) -> String {
        let mut names: Vec<String> = self.instances.iter().map(Instance::device_name).collect();
        names.dedup();
        names.join(", ")
    }

    /// Where a payload of this kind will enter, as far as that is known before it is decoded. Bundles' decoders differ little in cost.
    pub fn likely_stage(&self, kind: Kind) -> Stage {
        match kind {
            Kind::Bitstream => self.stages.first().map_or(Stage::Pixels, |(_, stage)| *stage),
            Kind::Features(map) => Stage::Features(Layer::Block(map.block as usize)),
            Kind::Image | Kind::Pixels { .. } | Kind::Normalised => Stage::Pixels,
        }
    }
}

/// All models and bundles of one moment.
#[derive(Clone)]
pub struct Registry {
    /// Name of the default model.
    pub default: Arc<str>,
    /// In the order of the configuration, then as they came. Versions of a model are neighbours, the newest first.
    pub models: Vec<Arc<Entry>>,
    /// Loaded bundles.
    pub bundles: Vec<Arc<Bundle>>,
    /// Class names.
    pub labels: Arc<Vec<String>>,
}

impl Registry {
    /// The model called `name` (empty: the default) in this version (empty: the newest).
    ///
    /// # Errors
    /// [`ServerError::UnknownModel`].
    pub fn model(&self, name: &str, version: &str) -> Result<&Arc<Entry>, ServerError> {
        let name = if name.is_empty() { &self.default } else { name };
        let fits = |m: &&Arc<Entry>| m.name == name && (version.is_empty() || version == m.version.to_string());
        let found = self.models.iter().find(fits);
        let shown = |text: &str| text.chars().take(64).collect::<String>();
        found.ok_or_else(|| match version {
            "" => ServerError::UnknownModel(shown(name)),
            version => ServerError::UnknownModel(format!("{} version {}", shown(name), shown(version))),
        })
    }

    /// The bundle whose hash starts with `prefix`.
    ///
    /// # Errors
    /// [`CodecError::WrongBundle`] names what is loaded.
    pub fn bundle(&self, prefix: &[u8]) -> Result<&Arc<Bundle>, ServerError> {
        let found = self.bundles.iter().find(|b| b.hash.prefix() == prefix);
        let hex = isthmus_codec::bundle::hex;
        found.ok_or_else(|| {
            let expected = self.bundles.iter().map(|b| hex(&b.hash.prefix())).collect::<Vec<_>>().join(" or ");
            CodecError::WrongBundle { expected, found: hex(prefix) }.into()
        })
    }
}
