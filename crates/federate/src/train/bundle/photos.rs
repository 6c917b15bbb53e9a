//! Photos of a folder as square network inputs.

use std::path::{Path, PathBuf};

use isthmus_pixels::Rgb;

use super::HELD_OUT;
use crate::error::FederateError;

/// Most photos of one folder: they are kept in memory, 150 kB each.
const MOST: usize = 20_000;

fn bad(path: &Path, why: impl std::fmt::Display) -> FederateError {
    FederateError::Invalid(format!("{}: {why}", path.display()))
}

/// All photos of a folder, in order of name. Other files are passed over.
///
/// # Errors
/// If the folder cannot be read, or holds no photo.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>, FederateError> {
    let entries = std::fs::read_dir(folder).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            bad(folder, format!("not there; a folder of photos is needed, with others to measure by in its folder {HELD_OUT}"))
        }
        _ => bad(folder, e),
    })?;
    let mut paths: Vec<_> = entries.filter_map(Result::ok).map(|e| e.path()).collect();
    let known = ["jpg", "jpeg", "png", "webp"];
    paths.retain(|p| p.extension().is_some_and(|e| known.iter().any(|k| e.eq_ignore_ascii_case(k))));
    paths.sort();
    if paths.is_empty() || paths.len() > MOST {
        return Err(bad(folder, format!("{} photos (JPEG, PNG, WebP); 1 to {MOST} are needed", paths.len())));
    }
    Ok(paths)
}

/// The photos of a folder, each cut to a square of `side` pixels.
///
/// # Errors
/// As [`list`], or if a photo is damaged.
pub fn open(folder: &Path, side: u32) -> Result<Vec<Rgb>, FederateError> {
    list(folder)?.iter().map(|path| one(path, side)).collect()
}

/// One photo, cut to a square of `side` pixels.
///
/// # Errors
/// If it cannot be read or is damaged.
pub fn one(path: &Path, side: u32) -> Result<Rgb, FederateError> {
    let bytes = std::fs::read(path).map_err(|e| bad(path, e))?;
    isthmus_pixels::decode(&bytes).and_then(|p| p.network_input(side)).map_err(|e| bad(path, e))
}
