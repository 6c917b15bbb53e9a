//! A data folder of somebody's own photos: `train.pack`, `eval/held-out`, and `photos.json`, which says what became of each photo.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use isthmus_pixels::Rgb;
use walkdir::WalkDir;

use crate::error::TrainError;
use crate::pack::Pack;
use crate::photos::{self, Entry, Set};
use crate::progress::counted;
use crate::{crops, photos::FROZEN};

/// Names the photos of a folder; the frozen split counts where it is missing.
const LIST: &str = "photos.json";
const EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// With fewer photos in a set nothing can be said or learned.
const FEWEST: (usize, usize) = (8, 2);

/// Photo files in `folder` and its subfolders, by path; links are followed, but not in circles.
fn files(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut found = Vec::new();
    for entry in WalkDir::new(folder).follow_links(true) {
        let path = match entry {
            Ok(entry) if entry.file_type().is_file() => entry.into_path(),
            // a link to what is not there
            Err(e) if e.depth() > 0 && e.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound) => {
                eprintln!("left out: {e}");
                continue;
            }
            Err(e) if e.loop_ancestor().is_none() => {
                let why = e.io_error().map_or_else(|| e.to_string(), ToString::to_string);
                return Err(TrainError::data(e.path().unwrap_or(folder).display().to_string(), why));
            }
            _ => continue,
        };
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        if EXTENSIONS.contains(&extension.as_str()) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    std::fs::read(path).map_err(|e| TrainError::io(path, e))
}

/// A line for each photo that is not used, and why.
pub fn dropped(entries: &[Entry]) -> impl Iterator<Item = String> {
    let unused = entries.iter().filter(|e| e.set == Set::Dropped);
    unused.map(|e| format!("dropped: {} ({})", e.name, e.reason.as_deref().unwrap_or("?")))
}

/// Splits the photos of `folder` by photo (one in five is held out; near-duplicates of others, and of the photos that bundles are evaluated on,
/// are dropped), packs those to train on, and cuts the crops of the others, all into `data`, in place of what an earlier call left there. One photo at a time is held in memory.
///
/// # Errors
/// If too few are left, `data` holds photos that are not from here, or a file cannot be read or written.
pub fn prepare(folder: &Path, side: u32, data: &Path) -> Result<Vec<Entry>, TrainError> {
    let named = |path: PathBuf| (path.strip_prefix(folder).unwrap_or(&path).display().to_string(), path);
    let paths: BTreeMap<String, PathBuf> = files(folder)?.into_iter().map(named).collect();
    let crops_of = data.join("eval").join("held-out");
    if !data.join(LIST).exists() && (crops_of.exists() || data.join("train.pack").exists()) {
        let why = "holds other photos, which would be mixed with these; name another folder (--data)";
        return Err(TrainError::data(data.display().to_string(), why));
    }
    let bar = counted(paths.len() as u64, "looked at");
    let entries = photos::split_own(bar.wrap_iter(paths.iter()).map(|(name, path)| Ok((name.clone(), read(path)?))))?;
    bar.finish_and_clear();
    let of = |set: Set| entries.iter().filter(|e| e.set == set).count();
    if of(Set::Train) < FEWEST.0 || of(Set::HeldOut) < FEWEST.1 {
        let (train, held_out, dropped) = (of(Set::Train), of(Set::HeldOut), of(Set::Dropped));
        let why = format!(
            "{train} photos to train on, {held_out} held out, {dropped} dropped (small, damaged or near-duplicates); at least {} and {} are \
             needed (one in five is held out, by chance), some hundreds are better{}",
            FEWEST.0,
            FEWEST.1,
            self::dropped(&entries).map(|line| format!("\n{line}")).collect::<String>()
        );
        return Err(TrainError::data(folder.display().to_string(), why));
    }
    std::fs::create_dir_all(data).map_err(|e| TrainError::io(data, e))?;
    if crops_of.exists() {
        std::fs::remove_dir_all(&crops_of).map_err(|e| TrainError::io(&crops_of, e))?;
    }
    let content = |name: &String| paths.get(name).map_or_else(|| Ok(Vec::new()), |path| read(path));
    crops::write(&entries, |i| content(&entries[i].name).map(Into::into), side, &data.join("eval"), &[Set::HeldOut])?;
    let bar = counted(of(Set::Train) as u64, "packed");
    let train = bar.wrap_iter(entries.iter().filter(|e| e.set == Set::Train)).map(|e| Ok((e.name.clone(), content(&e.name)?)));
    Pack::write(train, &data.join("train.pack"))?;
    bar.finish_and_clear();
    let text = serde_json::to_vec_pretty(&entries).map_err(|e| TrainError::data(LIST, e.to_string()))?;
    let path = data.join(LIST);
    std::fs::write(&path, text).map_err(|e| TrainError::io(&path, e))?;
    Ok(entries)
}

/// SHA-256 of the list of photos, and how many of them are trained on.
///
/// # Errors
/// If the list is damaged.
pub fn listed(data: &Path) -> Result<(String, usize), TrainError> {
    let path = data.join(LIST);
    let text = match path.is_file() {
        true => std::fs::read_to_string(&path).map_err(|e| TrainError::io(&path, e))?,
        false => FROZEN.to_owned(),
    };
    let entries: Vec<Entry> = serde_json::from_str(&text).map_err(|e| TrainError::data(path.display().to_string(), e.to_string()))?;
    Ok((photos::sha256(text.as_bytes()), entries.iter().filter(|e| e.set == Set::Train).count()))
}

/// Crops of the held-out photos at the network's size: the centre of each, with `borders` eight more.
///
/// # Errors
/// If they are missing.
pub fn held_out(data: &Path, third_party: &Path, side: u32, borders: bool) -> Result<Vec<Rgb>, TrainError> {
    if !data.join(LIST).is_file() {
        let mut found = Vec::new();
        for (_, bytes) in photos::load(third_party, &[Set::HeldOut])? {
            found.extend(crops::of(&isthmus_pixels::decode(&bytes)?, side, borders)?);
        }
        return Ok(found);
    }
    let paths = files(&data.join("eval/held-out"))?;
    let wanted = |path: &&PathBuf| borders || path.file_stem().is_some_and(|name| name.to_string_lossy().ends_with("-0"));
    let crop = |path: &PathBuf| {
        let crop = isthmus_pixels::decode(&std::fs::read(path).map_err(|e| TrainError::io(path, e))?)?;
        Ok(if crop.width() == side { crop } else { crop.resize(side, side)? })
    };
    paths.iter().filter(wanted).map(crop).collect()
}
