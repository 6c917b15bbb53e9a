//! Photos decoded once into one file of raw pixels at several scales, and random crops from it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use isthmus_pixels::Rgb;
use memmap2::Mmap;
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

/// Where a picture lies in the file.
struct Picture {
    width: u32,
    height: u32,
    offset: usize,
}

/// Photos of one set, each as a pyramid of halvings, in a file that is mapped: runs beside each other share its pages, and only what is
/// drawn is read.
pub struct Pack {
    file: Mmap,
    photos: Vec<Vec<Picture>>,
}

/// Maps a file of ours.
#[allow(
    unsafe_code,
    reason = "mapping a file has no safe form: whoever shortens it meanwhile ends the process (SIGBUS), who writes to it changes pixels alone"
)]
fn map(path: &Path) -> Result<Mmap, TrainError> {
    let file = File::open(path).map_err(|e| {
        TrainError::data(path.display().to_string(), format!("{e}; run `trainer fetch` first, or `trainer prepare` for photos of your own"))
    })?;
    // SAFETY: bytes are read as bytes and every access is bounds-checked; the file is replaced by renaming, never written in place
    unsafe { Mmap::map(&file) }.map_err(|e| TrainError::io(path, e))
}

impl Pack {
    /// Decodes photos (name, file bytes) one after the other and writes their pyramids to `path` (safetensors of uint8 images).
    ///
    /// # Errors
    /// If a photo cannot be had, decoded or resized, or the file not be written.
    pub fn write(files: impl IntoIterator<Item = Result<(String, Vec<u8>), TrainError>>, path: &Path) -> Result<Self, TrainError> {
        let failed = |path: &Path, e: String| TrainError::data(path.display().to_string(), format!("{e} (is the disk full?)"));
        let (pixels, part) = (path.with_extension("pixels"), path.with_extension("part"));
        let mut out = BufWriter::new(File::create(&pixels).map_err(|e| TrainError::io(&pixels, e))?);
        let (mut pictures, mut offset) = (Vec::new(), 0);
        for (i, file) in files.into_iter().enumerate() {
            let (name, bytes) = file?;
            let photo = isthmus_pixels::decode(&bytes).map_err(|e| TrainError::data(name, e.to_string()))?;
            for (l, rgb) in pyramid(photo)?.iter().enumerate() {
                out.write_all(rgb.data()).map_err(|e| failed(&pixels, e.to_string()))?;
                pictures.push((format!("{i:06}/{l}"), Picture { width: rgb.width(), height: rgb.height(), offset }));
                offset += rgb.data().len();
            }
        }
        out.flush().map_err(|e| failed(&pixels, e.to_string()))?;
        if pictures.is_empty() {
            return Err(TrainError::data(path.display().to_string(), "there are no photos to pack"));
        }
        let mapped = map(&pixels)?;
        let views = pictures.iter().map(|(name, p)| {
            let shape = vec![p.height as usize, p.width as usize, 3];
            let data = &mapped[p.offset..][..shape.iter().product()];
            TensorView::new(Dtype::U8, shape, data).map(|view| (name.as_str(), view))
        });
        let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| failed(&part, e.to_string()))?;
        safetensors::serialize_to_file(views, None, &part).map_err(|e| failed(&part, e.to_string()))?;
        drop(mapped);
        std::fs::remove_file(&pixels).map_err(|e| TrainError::io(&pixels, e))?;
        std::fs::rename(&part, path).map_err(|e| TrainError::io(path, e))?;
        Self::open(path)
    }

    /// Maps a file written by [`Pack::write`].
    ///
    /// # Errors
    /// If it is missing or malformed; says how to make it.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let what = path.display().to_string();
        let file = map(path)?;
        let bad = |why: String| TrainError::data(what.clone(), why);
        let tensors = SafeTensors::deserialize(&file).map_err(|e| bad(e.to_string()))?;
        let mut names: Vec<&str> = tensors.names().into_iter().collect();
        names.sort_unstable();
        let mut photos: Vec<Vec<Picture>> = Vec::new();
        for name in names {
            let view = tensors.tensor(name).map_err(|e| bad(e.to_string()))?;
            let &[height, width, 3] = view.shape() else { return Err(bad(format!("{name} is no RGB image"))) };
            if height == 0 || width == 0 || view.dtype() != Dtype::U8 {
                return Err(bad(format!("{name} is empty, or not of bytes")));
            }
            // views lie in the file
            let offset = view.data().as_ptr().addr() - file.as_ptr().addr();
            let picture = Picture { width: width as u32, height: height as u32, offset };
            match (name.ends_with("/0"), photos.last_mut()) {
                (false, Some(levels)) => levels.push(picture),
                _ => photos.push(vec![picture]),
            }
        }
        if photos.is_empty() {
            return Err(bad("holds no photos".into()));
        }
        Ok(Self { file, photos })
    }

    /// The rectangle at (`x`, `y`) of `w` x `h` pixels, clipped to the picture.
    fn cut(&self, picture: &Picture, [x, y, w, h]: [u32; 4]) -> Result<Rgb, TrainError> {
        let (x, y) = (x.min(picture.width - 1), y.min(picture.height - 1));
        let (w, h) = (w.clamp(1, picture.width - x), h.clamp(1, picture.height - y));
        let mut data = Vec::with_capacity(w as usize * h as usize * 3);
        for row in y..y + h {
            let from = picture.offset + (row as usize * picture.width as usize + x as usize) * 3;
            data.extend_from_slice(&self.file[from..][..w as usize * 3]);
        }
        Rgb::new(w, h, data).ok_or_else(|| TrainError::data("pack", "a crop is empty"))
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
        let (w, h) = (f64::from(full.width), f64::from(full.height));
        let area = w * h * rng.random_range(CROP_AREA.0..CROP_AREA.1);
        let aspect = rng.random_range(CROP_ASPECT.0.ln()..CROP_ASPECT.1.ln()).exp();
        let cw = (area * aspect).sqrt().min(w);
        let ch = (area / aspect).sqrt().min(h);
        let (x, y) = (rng.random::<f64>() * (w - cw), rng.random::<f64>() * (h - ch));
        let short = cw.min(ch);
        let level = (0..levels.len()).rev().find(|&l| short / f64::from(1 << l) >= f64::from(side)).unwrap_or(0);
        let source = &levels[level];
        let (sx, sy) = (f64::from(source.width) / w, f64::from(source.height) / h);
        let px = |v: f64| v.round() as u32;
        let mut crop = self.cut(source, [px(x * sx), px(y * sy), px(cw * sx), px(ch * sy)])?.resize(side, side)?;
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
