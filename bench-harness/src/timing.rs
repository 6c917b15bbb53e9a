//! Timings of the encoder.

use std::path::Path;

use edge_client::engine::RtenEngine;
use edge_client::{Encoder, open_bundle};
use serde::Serialize;

use crate::error::HarnessError;

const MAX_WARM_UP: usize = 20;

/// Medians of one run, in microseconds.
#[derive(Debug, Serialize)]
pub struct EncodeTimes {
    /// Encodings timed.
    pub n: usize,
    /// Decoding, cropping, resizing, normalising.
    pub preprocess_us: u64,
    /// The encoder network.
    pub network_us: u64,
    /// Rounding and entropy coding.
    pub entropy_us: u64,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> HarnessError + '_ {
    move |cause| HarnessError::Io { path: path.into(), cause }
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Encodes the photos of a folder in turn and returns the medians of each stage.
///
/// # Errors
/// If the folder, bundle or graph is unusable.
pub fn encode(photos: &Path, bundle: &Path, graph: Option<&Path>, rounds: usize, threads: usize) -> Result<EncodeTimes, HarnessError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(photos).map_err(io(photos))?.filter_map(Result::ok) {
        let bytes = std::fs::read(entry.path()).map_err(io(photos))?;
        if isthmus_pixels::decode(&bytes).is_ok() {
            files.push(bytes);
        }
    }
    if files.is_empty() {
        return Err(HarnessError::data(photos.display().to_string(), "holds no photos"));
    }
    let bundle = open_bundle(bundle)?;
    let mut encoder = match graph {
        None => Encoder::new(bundle, threads)?,
        Some(path) => {
            let onnx = std::fs::read(path).map_err(io(path))?;
            let engine = RtenEngine::new(&onnx, bundle.manifest.input.size, threads)?;
            Encoder::with_engine(bundle, Box::new(engine))
        }
    };
    let quality = encoder.default_quality();
    let mut times = Vec::new();
    let warm_up = rounds.min(MAX_WARM_UP);
    for file in files.iter().cycle().take(warm_up + rounds) {
        times.push(encoder.encode(file, quality)?.timing);
    }
    let times = times.split_off(warm_up);
    let of = |f: fn(&edge_client::EncodeTiming) -> u64| median(times.iter().map(f).collect());
    Ok(EncodeTimes {
        n: times.len(),
        preprocess_us: of(|t| t.preprocess_us),
        network_us: of(|t| t.network_us),
        entropy_us: of(|t| t.entropy_us),
    })
}
