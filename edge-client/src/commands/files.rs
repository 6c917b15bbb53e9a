//! `encode` and `inspect`: containers as files.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use edge_client::{ClientError, open_bundle};
use isthmus_codec::bundle::hex;
use isthmus_codec::{Progressive, coder};
use serde_json::json;

use crate::EncodingArgs;

pub fn encode(file: &Path, output: Option<PathBuf>, encoding: &EncodingArgs) -> Result<bool> {
    let (mut encoder, quality) = super::encoder(encoding)?;
    let encoded = encoder.encode(&super::read(file)?, quality).with_context(|| file.display().to_string())?;
    let stem = file.file_stem().unwrap_or_default();
    let path = output.unwrap_or_else(|| PathBuf::from(stem).with_extension("isth"));
    std::fs::write(&path, &encoded.container).map_err(|cause| ClientError::Io { path: path.clone(), cause })?;
    let mut line = json!({
        "file": file.display().to_string(), "container": path.display().to_string(),
        "bytes": encoded.container.len(), "quality": encoded.quality, "encode": encoded.timing,
    });
    if encoded.over_target {
        line["over_target"] = json!(true);
    }
    writeln!(std::io::stdout(), "{line}")?;
    Ok(true)
}

pub fn inspect(file: &Path, bundle: Option<&Path>) -> Result<bool> {
    let bytes = super::read(file)?;
    let parsed = Progressive::parse(&bytes).with_context(|| file.display().to_string())?;
    let container = &parsed.container;
    let h = &container.header;
    let mut line = json!({
        "file": file.display().to_string(), "bytes": bytes.len(), "bundle": hex(&h.bundle), "quality": h.quality,
        "payload_bytes": h.payload_len, "refinements": parsed.refinements(),
    });
    if let Some(folder) = bundle {
        let bundle = open_bundle(folder)?;
        let symbols = container.decode(&bundle.hash, bundle.manifest.latent, &bundle.tables).with_context(|| file.display().to_string())?;
        let level = bundle.tables.level(h.quality)?;
        bundle.decode_parsed_into(&parsed, &mut Vec::new()).with_context(|| file.display().to_string())?;
        let latent = bundle.manifest.latent;
        line["decodes"] = json!(true);
        line["latent"] = json!([latent.channels, latent.height, latent.width]);
        line["symbols"] = json!(symbols.len());
        line["zero_symbols"] = json!(symbols.iter().filter(|&&s| s == 0).count());
        line["largest_symbol"] = json!(symbols.iter().map(|s| s.unsigned_abs()).max());
        line["ideal_payload_bytes"] = json!(coder::ideal_bits(&symbols, &level, latent)? / 8.0);
    }
    writeln!(std::io::stdout(), "{line:#}")?;
    Ok(true)
}
