//! Class names.

use std::path::Path;

use crate::ServerError;

/// Reads `labels.json`, a list of `classes` names in class order.
///
/// # Errors
/// If the file is missing or has another number of names.
pub fn open(path: &Path, classes: usize) -> Result<Vec<String>, ServerError> {
    let missing = |e: std::io::Error| ServerError::Config(format!("{}: {e}; `make setup` writes it", path.display()));
    let bytes = std::fs::read(path).map_err(missing)?;
    let names: Vec<String> = serde_json::from_slice(&bytes)
        .map_err(|e| ServerError::Config(format!("{}: a JSON list of names is needed: {e}", path.display())))?;
    if names.len() != classes {
        return Err(ServerError::Config(format!("{}: {} names for {classes} classes", path.display(), names.len())));
    }
    Ok(names)
}
