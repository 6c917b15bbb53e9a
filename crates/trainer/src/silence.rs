//! Latent channels that are empty on all training crops: they are left out of the coding order, so that neither side spends time on them.

use std::collections::BTreeMap;
use std::path::Path;

use isthmus_codec::bundle::MANIFEST;
use isthmus_codec::manifest::Manifest;
use isthmus_codec::{BundleHash, LatentShape, Quality, Tables, container};
use isthmus_nets::weights::Weights;
use isthmus_nets::{Encoder, EncoderKind};
use tch::{Device, nn};

use crate::augment::Augment;
use crate::contexts::{self, CROPS};
use crate::error::TrainError;
use crate::export;
use crate::loader::Plan;
use crate::pack::Pack;

/// Silences, level by level, the channels without a symbol other than zero in all of `latents` (one after the other), at the level's own quality and at the
/// finest that is coded with its tables.
///
/// # Errors
/// If the latents do not fit the tables.
pub fn silence(tables: Tables, latents: &[f32], shape: LatentShape) -> Result<Tables, TrainError> {
    let mut silent = Vec::new();
    for level in (1u8..).take(tables.levels.len()) {
        let finest = Quality { level, fraction: 127 };
        let qualities = [Some(tables.level(level)?), tables.level(finest).ok()];
        let mut alive = vec![false; usize::from(shape.channels)];
        for latent in latents.chunks_exact(shape.symbols()) {
            for quality in qualities.iter().flatten() {
                let symbols = quality.quantise(latent, shape)?;
                for (alive, plane) in alive.iter_mut().zip(symbols.chunks_exact(shape.positions())) {
                    *alive |= plane.iter().any(|&s| s != 0);
                }
            }
        }
        silent.push((0u16..).zip(alive).filter(|(_, alive)| !alive).map(|(c, _)| c).collect::<Vec<_>>());
    }
    let levels = tables.levels.into_iter().zip(silent).map(|(level, silent)| level.silenced(&silent));
    Ok(Tables { levels: levels.collect::<Result<_, _>>()? })
}

/// Writes the bundle of `folder` into `out` with its empty channels silent, as about [`CROPS`] crops of `pack` show them; all else stays.
///
/// # Errors
/// If a file cannot be read or written, or crops cannot be made.
pub fn bundle(folder: &Path, pack: &Pack, version: &str, out: &Path) -> Result<Manifest, TrainError> {
    let _frozen = tch::no_grad_guard();
    let old = isthmus_codec::folder::open(folder, |_| true, &isthmus_codec::Trust::all())?;
    let mut manifest = old.manifest.clone();
    let kind = EncoderKind::from_name(&manifest.encoder.kind)
        .ok_or_else(|| TrainError::data(MANIFEST, format!("encoder {} is unknown", manifest.encoder.kind)))?;
    let vs = nn::VarStore::new(Device::Cpu);
    let encoder = Encoder::new(&vs.root(), kind);
    Weights::from_safetensors(old.file(&manifest.encoder.weights)?, &manifest.encoder.weights, Device::Cpu)?.copy_to(&vs)?;
    let levels = old.tables.levels.len() as i64;
    let plan = Plan { batch: contexts::BATCH, side: manifest.input.size, levels, augment: Augment::default(), seed: 0 };
    let mut latents = contexts::latents(&encoder, Device::Cpu, &plan, pack, CROPS)?;
    // the golden input stays what it was: its answers are the decoders'
    latents.extend(export::values(&encoder.forward(&export::golden_input(plan.side, Device::Cpu)?))?);
    let tables = silence(old.tables.clone(), &latents, manifest.latent)?;

    let (header, symbols) = old.golden_symbols()?;
    let unbound = BundleHash([0; 32]);
    let golden = container::encode(&symbols, header.quality, &unbound, manifest.latent, &tables)?;
    let mut files = BTreeMap::new();
    for name in manifest.files.keys() {
        files.insert(name.clone(), old.file(name)?.to_vec());
    }
    files.insert(manifest.tables.clone(), tables.to_bytes());
    files.insert(manifest.golden.container.clone(), golden);
    manifest.version = version.into();
    manifest.files = export::hashes(&files);
    export::write(out, &manifest, &files)?;
    Ok(manifest)
}
