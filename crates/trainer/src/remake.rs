//! A bundle is read, to be written anew with the same networks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use isthmus_codec::bundle::MANIFEST;
use isthmus_codec::manifest::Manifest;
use isthmus_codec::{Bundle, Trust, folder};
use isthmus_nets::weights::Weights;
use isthmus_nets::{Encoder, EncoderKind};
use tch::{Device, nn};

use crate::augment::Augment;
use crate::contexts::{self, CROPS};
use crate::error::TrainError;
use crate::export;
use crate::history::History;
use crate::loader::Plan;
use crate::pack::Pack;

/// The old bundle and what it codes.
pub(crate) struct Remake {
    /// As it was.
    pub old: Bundle,
    folder: PathBuf,
    /// Of the new one.
    pub manifest: Manifest,
    /// Of the new one.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The encoder.
    pub encoder: Encoder,
    /// Of about [`CROPS`] training crops, one after the other.
    pub latents: Vec<f32>,
    /// Of the golden input.
    pub golden: Vec<f32>,
}

impl Remake {
    /// Reads the bundle of `folder` and encodes crops of `pack`.
    ///
    /// # Errors
    /// If a file cannot be read, or crops cannot be made.
    pub fn open(folder: &Path, pack: &Pack) -> Result<Self, TrainError> {
        let _frozen = tch::no_grad_guard();
        let old = folder::open(folder, |_| true, &Trust::all())?;
        let manifest = old.manifest.clone();
        let kind = EncoderKind::from_name(&manifest.encoder.kind)
            .ok_or_else(|| TrainError::data(MANIFEST, format!("encoder {} is unknown", manifest.encoder.kind)))?;
        let vs = nn::VarStore::new(Device::Cpu);
        let encoder = Encoder::new(&vs.root(), kind);
        Weights::from_safetensors(old.file(&manifest.encoder.weights)?, &manifest.encoder.weights, Device::Cpu)?.copy_to(&vs)?;
        let levels = old.tables.levels.len() as i64;
        let plan =
            Plan { batch: contexts::BATCH, side: manifest.input.size, levels: (0..levels).collect(), augment: Augment::default(), seed: 0 };
        let latents = contexts::latents(&encoder, Device::Cpu, &plan, pack, CROPS)?;
        let golden = export::values(&encoder.forward(&export::golden_input(plan.side, Device::Cpu)?))?;
        let mut files = BTreeMap::new();
        for name in manifest.files.keys() {
            files.insert(name.clone(), old.file(name)?.to_vec());
        }
        Ok(Self { old, folder: folder.into(), manifest, files, encoder, latents, golden })
    }

    /// Writes the new bundle into `out`, and how the old one came about.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(mut self, version: &str, out: &Path) -> Result<Manifest, TrainError> {
        self.manifest.version = version.into();
        self.manifest.files = export::hashes(&self.files);
        export::write(out, &self.manifest, &self.files)?;
        History::carry(&self.folder, out)?;
        Ok(self.manifest)
    }
}
