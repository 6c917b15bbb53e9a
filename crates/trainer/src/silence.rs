//! Latent channels that are empty on all training crops: they are left out of the coding order, so that neither side spends time on them.

use std::path::Path;

use isthmus_codec::manifest::Manifest;
use isthmus_codec::{BundleHash, LatentShape, Quality, Tables, container};

use crate::error::TrainError;
use crate::pack::Pack;
use crate::remake::Remake;

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

/// Writes the bundle of `folder` into `out` with its empty channels silent, as about [`crate::contexts::CROPS`] crops of `pack` show them; all else stays.
///
/// # Errors
/// If a file cannot be read or written, or crops cannot be made.
pub fn bundle(folder: &Path, pack: &Pack, version: &str, out: &Path) -> Result<Manifest, TrainError> {
    let mut remake = Remake::open(folder, pack)?;
    let manifest = &remake.manifest;
    // the golden input stays what it was: its answers are the decoders'
    remake.latents.extend(&remake.golden);
    let tables = silence(remake.old.tables.clone(), &remake.latents, manifest.latent)?;
    let (header, symbols) = remake.old.golden_symbols()?;
    let golden = container::encode(&symbols, header.quality, &BundleHash([0; 32]), manifest.latent, &tables)?;
    remake.files.insert(manifest.tables.clone(), tables.to_bytes());
    remake.files.insert(manifest.golden.container.clone(), golden);
    remake.write(version, out)
}
