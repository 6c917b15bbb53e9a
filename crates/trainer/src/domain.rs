//! A domain for fleets to fit a bundle to, made from the photos at hand: what monochrome cameras would see of them.

use std::path::Path;

use isthmus_federate::train::bundle::{HELD_OUT, photos};
use isthmus_pixels::Rgb;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::error::TrainError;
use crate::pack::Pack;

/// Side of the crops: that of the Lite0 teacher.
const SIDE: u32 = 224;

/// Luma (ITU-R BT.601) in all three channels.
fn grey(photo: &Rgb) -> Vec<u8> {
    let luma = |p: &[u8]| ((299 * u32::from(p[0]) + 587 * u32::from(p[1]) + 114 * u32::from(p[2]) + 500) / 1000) as u8;
    photo.data().chunks_exact(3).flat_map(|p| [luma(p); 3]).collect()
}

fn save(photo: &Rgb, path: &Path) -> Result<(), TrainError> {
    let wrong = |why: String| TrainError::data(path.display().to_string(), why);
    let image = image::RgbImage::from_raw(photo.width(), photo.height(), grey(photo)).ok_or_else(|| wrong("has no pixels".into()))?;
    image.save(path).map_err(|e| wrong(e.to_string()))
}

/// Writes `each` random crops of every training photo to `out`, and the crops of `held_out` to its folder of that name; how many of
/// both. Crops of one photo have neighbouring names.
///
/// # Errors
/// If the photos are missing or a file cannot be written.
pub fn monochrome(pack: &Pack, held_out: &Path, out: &Path, each: u32) -> Result<(usize, usize), TrainError> {
    let folder = out.join(HELD_OUT);
    std::fs::create_dir_all(&folder).map_err(|e| TrainError::io(&folder, e))?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for photo in 0..pack.len() {
        for crop in 0..each {
            save(&pack.crop_of(photo, &mut rng, SIDE)?, &out.join(format!("{photo:04}-{crop}.png")))?;
        }
    }
    let evaluation = photos::list(held_out)?;
    for path in &evaluation {
        // the same name: it says which crops are of one photo
        let name = path.file_stem().unwrap_or_default();
        save(&photos::one(path, SIDE)?, &folder.join(name).with_extension("png"))?;
    }
    Ok((pack.len() * each as usize, evaluation.len()))
}
