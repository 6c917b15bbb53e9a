//! Photos decoded once into one file of raw pixels at several scales, and random crops from it.

use std::path::Path;

use isthmus_pixels::Rgb;
use rand::Rng;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::TrainError;

/// Photos are stored with at most this many pixels on the shorter side.
const MAX_SHORT_SIDE: u32 = 640;
/// Halving stops below this.
const MIN_SHORT_SIDE: u32 = 256;
/// Share of a photo's area that a crop covers, and its aspect ratio.
const CROP_AREA: (f64, f64) = (0.15, 1.0);
const CROP_ASPECT: (f64, f64) = (0.75, 4.0 / 3.0);

/// Photos of one set, each as a pyramid of halvings.
pub struct Pack {
    photos: Vec<Vec<Rgb>>,
}

impl Pack {
    /// Decodes photos (name, file bytes) and builds their pyramids.
    ///
    /// # Errors
    /// If a photo cannot be decoded or resized.
    pub fn build(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Result<Self, TrainError> {
        let mut photos = Vec::new();
        for (name, bytes) in files {
            let photo = isthmus_pixels::decode(&bytes).map_err(|e| TrainError::data(name, e.to_string()))?;
            photos.push(pyramid(photo)?);
        }
        Ok(Self { photos })
    }

    /// Writes all pixels to `path` (safetensors of uint8 images).
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        let mut views = Vec::new();
        for (i, levels) in self.photos.iter().enumerate() {
            for (l, rgb) in levels.iter().enumerate() {
                let shape = vec![rgb.height() as usize, rgb.width() as usize, 3];
                let view = TensorView::new(Dtype::U8, shape, rgb.data()).map_err(|e| TrainError::data("pack", e.to_string()))?;
                views.push((format!("{i:06}/{l}"), view));
            }
        }
        let part = path.with_extension("part");
        safetensors::serialize_to_file(views, None, &part)
            .map_err(|e| TrainError::data(part.display().to_string(), format!("{e} (is the disk full?)")))?;
        std::fs::rename(&part, path).map_err(|e| TrainError::io(path, e))
    }

    /// Reads a file written by [`Pack::save`] into memory.
    ///
    /// # Errors
    /// If it is missing or malformed; says how to make it.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let what = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|e| TrainError::data(what.clone(), format!("{e}; run `trainer fetch` first")))?;
        let bad = |why: String| TrainError::data(what.clone(), why);
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let mut names: Vec<&str> = file.names().into_iter().collect();
        names.sort_unstable();
        let mut photos: Vec<Vec<Rgb>> = Vec::new();
        for name in names {
            let view = file.tensor(name).map_err(|e| bad(e.to_string()))?;
            let &[h, w, 3] = view.shape() else { return Err(bad(format!("{name} is no RGB image"))) };
            let rgb = Rgb::new(w as u32, h as u32, view.data().to_vec()).ok_or_else(|| bad(format!("{name} is empty")))?;
            match (name.ends_with("/0"), photos.last_mut()) {
                (false, Some(levels)) => levels.push(rgb),
                _ => photos.push(vec![rgb]),
            }
        }
        if photos.is_empty() {
            return Err(bad("holds no photos".into()));
        }
        Ok(Self { photos })
    }

    /// Number of photos.
    pub fn len(&self) -> usize {
        self.photos.len()
    }

    /// True if there are no photos.
    pub fn is_empty(&self) -> bool {
        self.photos.is_empty()
    }

    /// A random resized crop of `side` pixels, mirrored half of the time. Photos are drawn with equal
    /// probability; the coarsest pyramid level that still has the crop's resolution is used.
    ///
    /// # Errors
    /// If resizing fails.
    pub fn random_crop(&self, rng: &mut impl Rng, side: u32) -> Result<Rgb, TrainError> {
        let photo = rng.random_range(0..self.photos.len());
        self.crop_of(photo, rng, side)
    }

    /// As [`Pack::random_crop`], of one photo.
    ///
    /// # Errors
    /// If resizing fails.
    pub fn crop_of(&self, photo: usize, rng: &mut impl Rng, side: u32) -> Result<Rgb, TrainError> {
        let levels = &self.photos[photo];
        let full = &levels[0];
        let (w, h) = (f64::from(full.width()), f64::from(full.height()));
        let area = w * h * rng.random_range(CROP_AREA.0..CROP_AREA.1);
        let aspect = rng.random_range(CROP_ASPECT.0.ln()..CROP_ASPECT.1.ln()).exp();
        let cw = (area * aspect).sqrt().min(w);
        let ch = (area / aspect).sqrt().min(h);
        let (x, y) = (rng.random::<f64>() * (w - cw), rng.random::<f64>() * (h - ch));
        let short = cw.min(ch);
        let level = (0..levels.len()).rev().find(|&l| short / f64::from(1 << l) >= f64::from(side)).unwrap_or(0);
        let source = &levels[level];
        let (sx, sy) = (f64::from(source.width()) / w, f64::from(source.height()) / h);
        let px = |v: f64| v.round() as u32;
        let mut crop = source.crop(px(x * sx), px(y * sy), px(cw * sx), px(ch * sy)).resize(side, side)?;
        if rng.random::<bool>() {
            crop.flip();
        }
        Ok(crop)
    }
}

fn pyramid(photo: Rgb) -> Result<Vec<Rgb>, TrainError> {
    let short = photo.width().min(photo.height());
    let scaled = |s: f64| photo.resize((f64::from(photo.width()) * s).round() as u32, (f64::from(photo.height()) * s).round() as u32);
    let mut levels = vec![if short > MAX_SHORT_SIDE { scaled(f64::from(MAX_SHORT_SIDE) / f64::from(short))? } else { photo }];
    while let Some(last) = levels.last().filter(|l| l.width().min(l.height()) / 2 >= MIN_SHORT_SIDE) {
        levels.push(last.resize(last.width() / 2, last.height() / 2)?);
    }
    Ok(levels)
}
