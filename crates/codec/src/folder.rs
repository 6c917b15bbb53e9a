//! Bundles on disk: a folder with a manifest, or a folder of such folders, one for each version.

use std::path::{Path, PathBuf};

use crate::bundle::MANIFEST;
use crate::{Bundle, CodecError, Trust};

/// Opens a bundle folder; `wanted` tells which files to read beside tables and golden container.
///
/// # Errors
/// [`CodecError::BadBundle`] names the folder, the file and what is wrong.
pub fn open(folder: &Path, wanted: impl Fn(&str) -> bool, trust: &Trust) -> Result<Bundle, CodecError> {
    let bundle = Bundle::load_trusted(|name| std::fs::read(folder.join(name)), wanted, trust);
    bundle.map_err(|e| match e {
        CodecError::BadBundle(why) => CodecError::BadBundle(format!("{}: {why}", folder.display())),
        other => other,
    })
}

/// The bundles at `folder`, newest version first: itself if it has a manifest, else its subfolders that have one. Versions are
/// numbers with dots.
///
/// # Errors
/// [`CodecError::BadBundle`] if there are none.
pub fn versions(folder: &Path) -> Result<Vec<PathBuf>, CodecError> {
    if folder.join(MANIFEST).is_file() {
        return Ok(vec![folder.into()]);
    }
    let bad = |why: String| CodecError::bundle(format!("{}: {why}", folder.display()));
    let entries = std::fs::read_dir(folder).map_err(|e| bad(e.to_string()))?;
    let mut found: Vec<(Vec<u64>, PathBuf)> = Vec::new();
    for path in entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| p.join(MANIFEST).is_file()) {
        let text = std::fs::read_to_string(path.join(MANIFEST)).map_err(|e| bad(e.to_string()))?;
        let value: toml::Table = toml::from_str(&text).map_err(|e| CodecError::bundle(format!("{}: {e}", path.display())))?;
        let version = value.get("version").and_then(toml::Value::as_str).unwrap_or_default();
        found.push((version.split('.').map(|n| n.parse().unwrap_or(0)).collect(), path));
    }
    if found.is_empty() {
        return Err(bad("no bundle: neither a manifest.toml nor folders with one".into()));
    }
    found.sort();
    Ok(found.into_iter().rev().map(|(_, path)| path).collect())
}
