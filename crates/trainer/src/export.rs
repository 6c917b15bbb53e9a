//! Turns a run into a bundle: weights, edge graph, integer tables, golden container, manifest.

use std::collections::BTreeMap;
use std::path::Path;

use isthmus_codec::bundle::{MANIFEST, sha256};
use isthmus_codec::manifest::{DecoderEntry, EncoderEntry, FORMAT, Golden, Input, Manifest, QualityEntry, Resize, Training};
use isthmus_codec::{BundleHash, ChannelTable, LatentShape, LevelTables, Tables, coder, container, golden, pmf};
use isthmus_nets::pth::RawTensor;
use isthmus_nets::weights::{Storage, to_safetensors};
use isthmus_nets::{Encoder, EncoderKind};
use isthmus_pixels::Rgb;
use tch::{Device, Kind, Tensor, nn};

use crate::distill::Run;
use crate::error::TrainError;
use crate::quick::CurvePoint;
use crate::recipe::Recipe;
use crate::{onnx, quick};

/// Symbols to either side of a channel's median that get an own width; the rest are escapes.
pub(crate) const MAX_HALF_WIDTH: i32 = 400;
/// Logits of the golden container kept in the manifest.
pub(crate) const GOLDEN_LOGITS: usize = 8;

const TABLES: &str = "tables.istb";
const GRAPH: &str = "encoder.onnx";
const ENCODER: &str = "encoder.safetensors";
const GOLDEN: &str = "golden.isth";

pub(crate) fn values(t: &Tensor) -> Result<Vec<f32>, TrainError> {
    Ok(Vec::<f32>::try_from(t.to_device(tch::Device::Cpu).contiguous().view(-1))?)
}

/// Integer tables from the learned densities and gains.
///
/// # Errors
/// If a density cannot be tabulated.
pub fn tables(run: &Run) -> Result<Tables, TrainError> {
    let (gains, inverses) = (values(&run.net.gains())?, values(&run.net.inverses())?);
    let channels = run.recipe.encoder.latent_channels() as usize;
    let mut levels = Vec::new();
    for level in 0..run.recipe.lambdas.len() {
        let mut tables = Vec::new();
        for (c, channel) in run.net.prior.pmfs(level as i64, MAX_HALF_WIDTH)?.into_iter().enumerate() {
            let widths = pmf::quantise(&channel.pmf, channel.tail)?;
            let at = level * channels + c;
            tables.push(ChannelTable::new(gains[at], inverses[at], channel.median, channel.offset, widths)?);
        }
        levels.push(LevelTables::new(tables)?);
    }
    Ok(Tables { levels })
}

/// The latent of a recipe's encoder.
pub fn latent_shape(recipe: &Recipe) -> LatentShape {
    let [channels, height, width] = recipe.encoder.latent(recipe.input_size().into()).map(|d| d as u16);
    LatentShape { channels, height, width }
}

/// Mean size of the containers of square `photos` at each level.
///
/// # Errors
/// If a photo cannot be coded.
pub fn coded_bytes(encoder: &Encoder, device: Device, tables: &Tables, shape: LatentShape, photos: &[Rgb]) -> Result<Vec<f64>, TrainError> {
    let _frozen = tch::no_grad_guard();
    let mut sums = vec![0usize; tables.levels.len()];
    for photo in photos {
        let y = values(&encoder.forward(&quick::stack(std::slice::from_ref(photo), device)))?;
        for (level, sum) in tables.levels.iter().zip(&mut sums) {
            *sum += coder::encode(&level.quantise(&y, shape)?, level, shape)?.len() + container::OVERHEAD;
        }
    }
    Ok(sums.into_iter().map(|s| s as f64 / photos.len().max(1) as f64).collect())
}

/// Tensors under `prefix.` of the run's variables, without the prefix, sorted.
pub(crate) fn part(run: &Run, prefix: &str) -> BTreeMap<String, Tensor> {
    let of = |(name, t): (String, Tensor)| name.strip_prefix(prefix).map(|rest| (rest.to_owned(), t));
    run.net.vs.variables().into_iter().filter_map(of).collect()
}

pub(crate) fn safetensors(tensors: &BTreeMap<String, Tensor>, storage: Storage) -> Result<Vec<u8>, TrainError> {
    Ok(to_safetensors(tensors.iter().map(|(n, t)| (n.as_str(), t)), storage)?)
}

/// The decoder's weights for a bundle, in half precision; the run goes on with what that leaves of them, so that what it answers is what the bundle does.
///
/// # Errors
/// If a weight is not finite in that precision.
pub(crate) fn decoder(run: &Run) -> Result<Vec<u8>, TrainError> {
    let weights = part(run, "decoder.");
    for (name, t) in &weights {
        let half = t.to_kind(Kind::Half);
        if half.isfinite().all().int64_value(&[]) == 0 {
            return Err(TrainError::data(format!("decoder.{name}"), "has a weight that is not finite in half precision: the run diverged"));
        }
        tch::no_grad(|| t.shallow_clone().copy_(&half));
    }
    safetensors(&weights, Storage::Half)
}

/// The edge engine's graph of an encoder for square inputs of `side` pixels.
pub(crate) fn graph(kind: EncoderKind, weights: &BTreeMap<String, Tensor>, side: u32) -> Result<Vec<u8>, TrainError> {
    let mut raw = BTreeMap::new();
    for (name, t) in weights {
        raw.insert(name.clone(), RawTensor { data: values(t)?, shape: t.size().iter().map(|&d| d as usize).collect() });
    }
    let [channels, height, width] = kind.latent(side.into());
    onnx::encoder(kind, &raw, side.into(), [1, channels, height, width])
}

/// A graph with fresh weights: engines take as long on it as on a trained one.
///
/// # Errors
/// If libtorch fails.
pub fn untrained_graph(kind: EncoderKind, side: u32) -> Result<Vec<u8>, TrainError> {
    let vs = nn::VarStore::new(Device::Cpu);
    let _encoder = Encoder::new(&vs.root(), kind);
    graph(kind, &vs.variables().into_iter().collect(), side)
}

/// What the manifest says beside the networks.
pub struct Origin<'a> {
    /// Version of the bundle.
    pub version: &'a str,
    /// The command that trained it.
    pub command: &'a str,
    /// SHA-256 of the backbone's safetensors file.
    pub backbone_sha256: String,
    /// SHA-256 of the list of photos, and how many of them were trained on ([`crate::own::listed`]).
    pub photos: (String, usize),
    /// The bundle that it started from: SHA-256 of its manifest.
    pub started_from: Option<String>,
}

/// Writes the bundle of `run` (weights as they stand; use the moving average) into `folder`.
///
/// # Errors
/// If a table, graph or file cannot be made.
pub fn bundle(run: &Run, tables: &Tables, point: &CurvePoint, origin: &Origin, folder: &Path) -> Result<Manifest, TrainError> {
    let _frozen = tch::no_grad_guard();
    let r = &run.recipe;
    let side = r.input_size();
    let latent = latent_shape(r);
    let extent = latent.height;

    let encoder = part(run, "encoder.");
    let graph = graph(r.encoder, &encoder, side)?;
    let decoder_file = format!("decoder-{}.safetensors", r.backbone.name());
    let decoder = decoder(run)?;

    let y = run.net.encoder.forward(&golden_input(side, run.net.vs.device())?);
    let quality = (r.lambdas.len() / 2 + 1) as u8;
    let level = tables.level(quality)?;
    let symbols = level.quantise(&values(&y)?, latent)?;
    let mut dequantised = Vec::new();
    level.dequantise_into(&symbols, latent, &mut dequantised)?;
    // the manifest holds this file's hash, so the container cannot hold the manifest's
    let unbound = BundleHash([0; 32]);
    let golden_file = container::encode(&symbols, quality, &unbound, latent, tables)?;
    let input = Tensor::from_slice(&dequantised).view([1, latent.channels.into(), extent.into(), extent.into()]);
    let features = run.net.decoder.forward(&input.to_device(run.net.vs.device()));
    let logits = values(&run.student().tail(&features, r.split()))?;

    let files: [(&str, Vec<u8>); 5] = [
        (GRAPH, graph),
        (ENCODER, safetensors(&encoder, Storage::Single)?),
        (TABLES, tables.to_bytes()),
        (&decoder_file, decoder),
        (GOLDEN, golden_file),
    ];
    let files = files.map(|(name, content)| (name.to_owned(), content)).into();
    let spec = r.decoder();
    let features = r.backbone.layer_shape(r.split()).unwrap_or_default();
    let manifest = Manifest {
        format: FORMAT,
        name: r.name.clone(),
        version: origin.version.into(),
        tables: TABLES.into(),
        refinements: None,
        files: hashes(&files),
        input: Input { size: side, resize: Resize::CenterBicubic, mean: 127.0, scale: 128.0 },
        latent,
        encoder: EncoderEntry {
            kind: r.encoder.name().into(),
            graph: GRAPH.into(),
            weights: ENCODER.into(),
            parameters: r.encoder.parameters(),
            macs: r.encoder.macs(side.into()),
        },
        decoders: vec![DecoderEntry {
            backbone: r.backbone.name().into(),
            backbone_sha256: origin.backbone_sha256.clone(),
            kind: (!spec.kind.is_default()).then(|| spec.kind.name().into()),
            split_block: r.split_block,
            tuned_to: r.tuned_to,
            width: spec.width,
            hidden: spec.hidden,
            blocks: spec.blocks,
            upsample: spec.upsample,
            features,
            weights: decoder_file.clone(),
            parameters: spec.parameters(),
            macs: spec.macs(extent.into()),
        }],
        quality: point
            .levels
            .iter()
            .zip(&r.lambdas)
            .map(|(l, &lambda)| QualityEntry { lambda, bytes: l.bytes, agreement: l.agreement, kl: l.kl })
            .collect(),
        training: Training {
            teacher: r.backbone.name().into(),
            photos_sha256: origin.photos.0.clone(),
            photos: origin.photos.1,
            crops: point.crops,
            held_out_crops: point.photos,
            command: origin.command.into(),
            adapted_from: origin.started_from.clone(),
        },
        golden: Golden {
            input_sha256: sha256(&golden::pixels(side)),
            container: GOLDEN.into(),
            symbols_sha256: golden::symbols_sha256(&symbols),
            latent_sha256: golden::latent_sha256(&dequantised),
            logits: vec![logits.iter().take(GOLDEN_LOGITS).copied().collect()],
        },
    };
    write(folder, &manifest, &files)?;
    Ok(manifest)
}

/// The golden input as the encoder takes it.
pub(crate) fn golden_input(side: u32, device: Device) -> Result<Tensor, TrainError> {
    let rgb = Rgb::new(side, side, golden::pixels(side)).ok_or_else(|| TrainError::data("golden input", "has another size"))?;
    Ok(quick::stack(&[rgb], device))
}

/// What a manifest says of its files.
pub(crate) fn hashes(files: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, String> {
    files.iter().map(|(name, content)| (name.clone(), sha256(content))).collect()
}

/// Writes a bundle's folder, and reads it back the way client and server do.
pub(crate) fn write(folder: &Path, manifest: &Manifest, files: &BTreeMap<String, Vec<u8>>) -> Result<(), TrainError> {
    std::fs::create_dir_all(folder).map_err(|e| TrainError::io(folder, e))?;
    let text = toml::to_string(manifest).map_err(|e| TrainError::data(MANIFEST, e.to_string()))?;
    let all = files.iter().map(|(name, content)| (name.as_str(), content.as_slice())).chain([(MANIFEST, text.as_bytes())]);
    for (name, content) in all {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(|e| TrainError::io(&path, e))?;
    }
    isthmus_codec::Bundle::load(|name| std::fs::read(folder.join(name)), |_| true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use edge_client::engine::{Engine, RtenEngine};

    use super::*;

    #[test]
    fn on_the_device_every_encoder_computes_what_was_trained() {
        const SIDE: u32 = 32;
        for kind in EncoderKind::ALL {
            let vs = nn::VarStore::new(tch::Device::Cpu);
            let network = Encoder::new(&vs.root(), kind);
            let graph = graph(kind, &vs.variables().into_iter().collect(), SIDE).unwrap();
            let pixels = Tensor::rand([1, 3, SIDE.into(), SIDE.into()], (tch::Kind::Float, tch::Device::Cpu)) * 2.0 - 1.0;
            let wanted = tch::no_grad(|| network.forward(&pixels));
            assert_eq!(wanted.size()[1..], kind.latent(SIDE.into()), "{kind:?}");
            let found = RtenEngine::new(&graph, SIDE, 1).unwrap().run(values(&pixels).unwrap()).unwrap();
            let worst = values(&wanted).unwrap().iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "{kind:?}: {worst}");
        }
    }
}
