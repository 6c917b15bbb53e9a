//! The fixed evaluation crops: the centre crop of every photo, and for held-out photos eight more.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use isthmus_pixels::Rgb;

use crate::error::TrainError;
use crate::photos::{Entry, Set};

/// Side of the crops at corners and edges as a share of the photo's shorter side.
const CORNER_SHARE: f64 = 0.7;

/// The crops of one photo at the network's size: centre first; with `borders`, four squares at the
/// corners and four at the middle of the edges follow.
///
/// # Errors
/// If the photo cannot be resized.
pub fn of(photo: &Rgb, side: u32, borders: bool) -> Result<Vec<Rgb>, TrainError> {
    let mut out = vec![photo.center_square(side)?];
    if borders {
        let (w, h) = (photo.width(), photo.height());
        let s = (f64::from(w.min(h)) * CORNER_SHARE) as u32;
        let (right, bottom) = (w - s, h - s);
        let (middle, half) = (right / 2, bottom / 2);
        let corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)];
        for (x, y) in corners.into_iter().chain([(middle, 0), (0, half), (right, half), (middle, bottom)]) {
            out.push(photo.crop(x, y, s, s).resize(side, side)?);
        }
    }
    Ok(out)
}

/// Writes the crops (`content` gives the file of a photo by its index) of the evaluation `sets` as PNG into `out/{demo,held-out,labelled}`, named
/// `NNN-K.png` (photo, crop), with `labels.json` (file name to accepted class ids) where there are labels.
///
/// # Errors
/// If a photo cannot be decoded or a file cannot be written.
pub fn write<'a>(
    photos: &[Entry],
    content: impl Fn(usize) -> Result<Cow<'a, [u8]>, TrainError>,
    side: u32,
    out: &Path,
    sets: &[Set],
) -> Result<(), TrainError> {
    for (set, name) in [(Set::Demo, "demo"), (Set::HeldOut, "held-out"), (Set::Labelled, "labelled")] {
        if !sets.contains(&set) {
            continue;
        }
        let folder = out.join(name);
        std::fs::create_dir_all(&folder).map_err(|e| TrainError::io(&folder, e))?;
        let mut labels: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for (i, (at, entry)) in photos.iter().enumerate().filter(|(_, e)| e.set == set).enumerate() {
            let photo = isthmus_pixels::decode(&content(at)?)?;
            for (k, crop) in of(&photo, side, set == Set::HeldOut)?.into_iter().enumerate() {
                let file = format!("{i:03}-{k}.png");
                let path = folder.join(&file);
                let saved = image::RgbImage::from_raw(crop.width(), crop.height(), crop.data().to_vec())
                    .ok_or_else(|| TrainError::data(entry.name.clone(), "has no pixels"))?
                    .save(&path);
                saved.map_err(|e| TrainError::data(path.display().to_string(), e.to_string()))?;
                if !entry.labels.is_empty() {
                    labels.insert(file, entry.labels.clone());
                }
            }
        }
        if !labels.is_empty() {
            let path = folder.join("labels.json");
            let text = serde_json::to_vec(&labels).map_err(|e| TrainError::data("labels.json", e.to_string()))?;
            std::fs::write(&path, text).map_err(|e| TrainError::io(&path, e))?;
        }
    }
    Ok(())
}
