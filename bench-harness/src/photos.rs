//! A folder of photos, with labels if it has a `labels.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use isthmus_pixels::Rgb;

use crate::error::HarnessError;

/// One square crop at the network's size.
pub struct Photo {
    /// File name.
    pub name: String,
    /// Crops of one photo share this (the part of the name before `-K`).
    pub group: String,
    /// Pixels.
    pub pixels: Rgb,
    /// Accepted class ids; empty if unlabelled.
    pub labels: Vec<usize>,
}

/// A named set of photos.
pub struct PhotoSet {
    /// Name of the folder.
    pub name: String,
    /// In order of file name.
    pub photos: Vec<Photo>,
    /// Files that cannot be decoded, and why.
    pub left_out: Vec<String>,
}

/// The JPEG, PNG and WebP files of a folder, by name.
///
/// # Errors
/// If there are none or the folder cannot be read.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>, HarnessError> {
    let entries = std::fs::read_dir(folder).map_err(|cause| HarnessError::Io { path: folder.into(), cause })?;
    let known = |p: &Path| {
        let extension = p.extension().map(|e| e.to_string_lossy().to_lowercase());
        matches!(extension.as_deref(), Some("jpg" | "jpeg" | "png" | "webp"))
    };
    let mut files: Vec<PathBuf> = entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| known(p)).collect();
    files.sort();
    if files.is_empty() {
        return Err(HarnessError::data(folder.display().to_string(), "holds no .jpg, .jpeg, .png or .webp files"));
    }
    Ok(files)
}

impl PhotoSet {
    /// Reads every JPEG, PNG and WebP file of `folder`, cropped and resized to `side`.
    ///
    /// # Errors
    /// If there are none or one cannot be read.
    pub fn open(folder: &Path, side: u32) -> Result<Self, HarnessError> {
        Ok(Self::read(folder, side, true)?.0)
    }

    /// The same, but what cannot be decoded is left out.
    ///
    /// # Errors
    /// If there are none or none can be read.
    pub fn open_readable(folder: &Path, side: u32) -> Result<Self, HarnessError> {
        let (set, error) = Self::read(folder, side, false)?;
        error.filter(|_| set.photos.is_empty()).map_or(Ok(set), Err)
    }

    /// The photos of a folder, and the first error among them; `all`: it ends with that.
    fn read(folder: &Path, side: u32, all: bool) -> Result<(Self, Option<HarnessError>), HarnessError> {
        let io = |path: &Path, cause| HarnessError::Io { path: path.into(), cause };
        let files = files(folder)?;
        let labels_path = folder.join("labels.json");
        let labels: HashMap<String, Vec<usize>> = match std::fs::read(&labels_path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| HarnessError::data(labels_path.display().to_string(), format!("file name to class ids is needed: {e}")))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => HashMap::new(),
            Err(e) => return Err(io(&labels_path, e)),
        };
        let (mut photos, mut left_out, mut damaged) = (Vec::new(), Vec::new(), None);
        for path in &files {
            match photo(path, side) {
                Ok(photo) => photos.push(photo),
                Err(error) if all => return Err(error),
                Err(error) => {
                    left_out.push(error.to_string());
                    damaged = damaged.or(Some(error));
                }
            }
        }
        for photo in &mut photos {
            photo.labels = labels.get(&photo.name).cloned().unwrap_or_default();
        }
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((Self { name, photos, left_out }, damaged))
    }

    /// Leaves the first `most` crops of each photo.
    pub fn keep_of_each(&mut self, most: usize) {
        let mut seen: HashMap<String, usize> = HashMap::new();
        self.photos.retain(|photo| {
            let count = seen.entry(photo.group.clone()).or_default();
            *count += 1;
            *count <= most
        });
    }

    /// A single photo.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn one(path: &Path, side: u32) -> Result<Self, HarnessError> {
        let photo = photo(path, side)?;
        Ok(Self { name: photo.name.clone(), photos: vec![photo], left_out: Vec::new() })
    }
}

fn photo(path: &Path, side: u32) -> Result<Photo, HarnessError> {
    let bytes = std::fs::read(path).map_err(|cause| HarnessError::Io { path: path.into(), cause })?;
    let bad = |e: isthmus_pixels::PixelError| HarnessError::data(path.display().to_string(), e.to_string());
    let pixels = isthmus_pixels::decode(&bytes).and_then(|p| p.network_input(side)).map_err(bad)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let group = name.rsplit_once('-').map_or(name.as_str(), |(g, _)| g).to_owned();
    Ok(Photo { name, group, pixels, labels: Vec::new() })
}
