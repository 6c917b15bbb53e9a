//! Training of bottlenecks: photos, head distillation, evaluation and export of bundles.

pub mod adam;
pub mod adapt;
pub mod augment;
pub mod blueprint;
pub mod contexts;
pub mod crops;
pub mod curves;
pub mod distill;
pub mod domain;
pub mod error;
pub mod evaluation;
pub mod export;
pub mod frames;
pub mod gain;
pub mod guide;
pub mod history;
pub mod import;
pub mod loader;
pub mod local;
mod measure;
pub mod onnx;
pub mod own;
pub mod pack;
pub mod photos;
mod progress;
pub mod quick;
pub mod rcc;
pub mod recipe;
pub mod refine;
mod remake;
pub mod silence;
pub mod wake;

/// Appends `value` as one JSON line to `path`.
///
/// # Errors
/// If the file cannot be written.
pub fn append_json<T: serde::Serialize>(path: &std::path::Path, value: &T) -> Result<(), error::TrainError> {
    use std::io::Write;
    let text = serde_json::to_string(value).map_err(|e| error::TrainError::data("log", e.to_string()))?;
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut f| writeln!(f, "{text}")).map_err(|e| error::TrainError::io(path, e))
}
