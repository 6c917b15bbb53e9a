//! Photos of a folder as square network inputs.

use std::path::Path;

use isthmus_pixels::Rgb;

use crate::error::FederateError;

/// Most photos of one folder: they are kept in memory, 150 kB each.
const MOST: usize = 20_000;

/// All photos of a folder, in order of name, each cut to a square of `side` pixels. Other files are passed over.
///
/// # Errors
/// If the folder cannot be read, holds no photo, or a photo is damaged.
pub fn open(folder: &Path, side: u32) -> Result<Vec<Rgb>, FederateError> {
    let bad = |path: &Path, why: String| FederateError::Invalid(format!("{}: {why}", path.display()));
    let entries = std::fs::read_dir(folder).map_err(|e| bad(folder, e.to_string()))?;
    let mut paths: Vec<_> = entries.filter_map(Result::ok).map(|e| e.path()).collect();
    let known = ["jpg", "jpeg", "png", "webp"];
    paths.retain(|p| p.extension().is_some_and(|e| known.iter().any(|k| e.eq_ignore_ascii_case(k))));
    paths.sort();
    if paths.is_empty() || paths.len() > MOST {
        return Err(bad(folder, format!("{} photos (JPEG, PNG, WebP); 1 to {MOST} are needed", paths.len())));
    }
    let photo = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).map_err(|e| bad(path, e.to_string()))?;
        let square = isthmus_pixels::decode(&bytes).and_then(|p| p.network_input(side));
        square.map_err(|e| bad(path, e.to_string()))
    };
    paths.iter().map(photo).collect()
}
