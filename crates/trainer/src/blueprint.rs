//! One encoder, several backbones: adds the decoder of a run with a frozen encoder to the bundle whose encoder it is
//! (FrankenSplit, arXiv 2302.10681, section "decoder blueprints").

use std::collections::BTreeMap;
use std::path::Path;

use isthmus_codec::Bundle;
use isthmus_codec::manifest::{DecoderEntry, Manifest};
use tch::Tensor;

use crate::distill::Run;
use crate::error::TrainError;
use crate::export::{self, GOLDEN_LOGITS, values};

/// Writes `bundle` (of `folder`) with the decoder of `run` (weights as they stand; use the moving average) as another blueprint into `out`. A blueprint for
/// the same backbone is replaced. Bitstreams stay as they are, but for the bundle's hash in their header.
///
/// # Errors
/// If a file cannot be read or written.
pub fn add(run: &Run, bundle: &Bundle, folder: &Path, version: &str, backbone_sha256: &str, out: &Path) -> Result<Manifest, TrainError> {
    let _frozen = tch::no_grad_guard();
    let r = &run.recipe;
    let mut manifest = bundle.manifest.clone();
    let (header, symbols) = bundle.golden_symbols()?;
    let mut latent = Vec::new();
    bundle.tables.level(header.quality)?.dequantise_into(&symbols, manifest.latent, &mut latent)?;
    let [c, h, w] = [manifest.latent.channels, manifest.latent.height, manifest.latent.width].map(i64::from);
    let input = Tensor::from_slice(&latent).view([1, c, h, w]).to_device(run.net.vs.device());
    let weights = export::decoder(run)?;
    let logits = values(&run.student().tail(&run.net.decoder.forward(&input), r.split()))?;

    let name = format!("decoder-{}.safetensors", r.backbone.name());
    let spec = r.decoder();
    let entry = DecoderEntry {
        backbone: r.backbone.name().into(),
        backbone_sha256: backbone_sha256.into(),
        kind: (!spec.kind.is_default()).then(|| spec.kind.name().into()),
        split_block: r.split_block,
        tuned_to: r.tuned_to,
        width: spec.width,
        hidden: spec.hidden,
        blocks: spec.blocks,
        upsample: spec.upsample,
        features: r.backbone.layer_shape(r.split()).unwrap_or_default(),
        weights: name.clone(),
        parameters: spec.parameters(),
        macs: spec.macs(h),
    };
    let golden = logits.iter().take(GOLDEN_LOGITS).copied().collect();
    match manifest.decoders.iter().position(|d| d.backbone == entry.backbone) {
        Some(at) => {
            manifest.decoders[at] = entry;
            manifest.golden.logits[at] = golden;
        }
        None => {
            manifest.decoders.push(entry);
            manifest.golden.logits.push(golden);
        }
    }
    manifest.version = version.into();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for file in manifest.files.keys().filter(|f| **f != name) {
        files.insert(file.clone(), std::fs::read(folder.join(file)).map_err(|e| TrainError::io(&folder.join(file), e))?);
    }
    files.insert(name, weights);
    manifest.files = export::hashes(&files);
    export::write(out, &manifest, &files)?;
    Ok(manifest)
}
