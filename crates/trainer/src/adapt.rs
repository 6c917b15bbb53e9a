//! A bundle that a fleet has fitted to its photos: the old one's decoder with the encoder and tables of a federated model.

use std::collections::BTreeMap;
use std::path::Path;

use isthmus_codec::bundle::MANIFEST;
use isthmus_codec::manifest::{Manifest, QualityEntry};
use isthmus_codec::{BundleHash, container, golden};
use isthmus_federate::train::Model;
use isthmus_federate::train::bundle::{self, Adaptation};
use isthmus_nets::EncoderKind;
use isthmus_nets::weights::Storage;
use isthmus_pixels::Rgb;
use tch::Tensor;

use crate::error::TrainError;
use crate::export::{self, GOLDEN_LOGITS, graph, safetensors};

/// Where everything is.
pub struct Release<'a> {
    /// The bundle that the fleet had.
    pub bundle: &'a Path,
    /// Folder with imported backbones.
    pub backbones: &'a Path,
    /// The federated model (safetensors).
    pub model: &'a Path,
    /// Photos of the clients' domain, those to score on in `held-out`.
    pub photos: &'a Path,
    /// Version of the new bundle.
    pub version: &'a str,
    /// Where it goes.
    pub out: &'a Path,
}

/// Writes the new bundle; its quality levels are scored on the held-out photos, if there are any. It has the decoder of the bundle's first backbone alone: encoder and
/// densities were fitted to that; `trainer distill --bundle` makes decoders for others.
///
/// # Errors
/// If the model is another bundle's, or a file cannot be made.
pub fn release(r: &Release<'_>) -> Result<Manifest, TrainError> {
    let bytes = std::fs::read(r.model).map_err(|e| TrainError::io(r.model, e))?;
    let model = Model::decode(&bytes)?;
    let mut fitted = Adaptation::open(r.photos, r.bundle, r.backbones)?;
    fitted.set(&model)?;
    let tables = bundle::tables(fitted.bundle(), &model)?;
    let old = fitted.bundle();
    let mut manifest = old.manifest.clone();
    let kind = EncoderKind::from_name(&manifest.encoder.kind)
        .ok_or_else(|| TrainError::data(MANIFEST, format!("encoder {} is unknown", manifest.encoder.kind)))?;
    let mut encoder = BTreeMap::new();
    for (name, (shape, values)) in bundle::encoder_weights(&model) {
        let shape: Vec<i64> = shape.into_iter().map(|s| s as i64).collect();
        encoder.insert(name, Tensor::f_from_slice(&values)?.f_view(shape.as_slice())?);
    }
    let side = manifest.input.size;
    let pixels = golden::pixels(side);
    let rgb = Rgb::new(side, side, pixels).ok_or_else(|| TrainError::data("golden input", "has another size"))?;
    let quality = (tables.levels.len() / 2 + 1) as u8;
    let level = tables.level(quality)?;
    let symbols = level.quantise(&fitted.latents(&[rgb])?, manifest.latent)?;
    let mut dequantised = Vec::new();
    level.dequantise_into(&symbols, manifest.latent, &mut dequantised)?;
    // the manifest holds this file's hash, so the container cannot hold the manifest's
    let golden_file = container::encode(&symbols, quality, &BundleHash([0; 32]), manifest.latent, &tables)?;
    let logits = Vec::<f32>::try_from(fitted.answers(&dequantised)?.view(-1))?;

    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    // other blueprints were made for the old features, refinements for the old gains
    let dropped: Vec<_> = manifest.decoders.split_off(1).into_iter().map(|d| d.weights).chain(manifest.refinements.take()).collect();
    for name in manifest.files.keys().filter(|name| !dropped.contains(name)) {
        files.insert(name.clone(), old.file(name)?.to_vec());
    }
    files.insert(manifest.encoder.graph.clone(), graph(kind, &encoder, side)?);
    files.insert(manifest.encoder.weights.clone(), safetensors(&encoder, Storage::Single)?);
    files.insert(manifest.tables.clone(), tables.to_bytes());
    files.insert(manifest.golden.container.clone(), golden_file);
    manifest.version = r.version.into();
    manifest.files = export::hashes(&files);
    manifest.training.adapted_from = Some(old.hash.to_string());
    manifest.golden.symbols_sha256 = golden::symbols_sha256(&symbols);
    manifest.golden.latent_sha256 = golden::latent_sha256(&dequantised);
    manifest.golden.logits = vec![logits.into_iter().take(GOLDEN_LOGITS).collect()];
    if !fitted.held_out().is_empty() {
        let mut scored = Vec::new();
        for (level, entry) in tables.levels.iter().zip(&manifest.quality) {
            let s = fitted.level(level)?;
            scored.push(QualityEntry { lambda: entry.lambda, bytes: s.bytes, agreement: s.agreement, kl: s.kl });
        }
        manifest.quality = scored;
        manifest.training.held_out_crops = fitted.held_out().len();
    }
    export::write(r.out, &manifest, &files)?;
    Ok(manifest)
}

/// Writes the signature of a bundle's manifest beside it.
///
/// # Errors
/// If key or manifest cannot be read.
pub fn sign(folder: &Path, key: &Path) -> Result<(), TrainError> {
    let secret = isthmus_federate::identity::open_signer(key)?.expose();
    let path = folder.join(MANIFEST);
    let manifest = std::fs::read(&path).map_err(|e| TrainError::io(&path, e))?;
    let path = folder.join(isthmus_codec::signature::SIGNATURE);
    std::fs::write(&path, isthmus_codec::signature::sign(&manifest, &secret)).map_err(|e| TrainError::io(&path, e))
}
