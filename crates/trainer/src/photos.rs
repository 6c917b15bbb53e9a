//! Which photos there are, which of them are duplicates, and which set each belongs to.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use globset::{Glob, GlobSet, GlobSetBuilder};
use image_hasher::{HashAlg, HasherConfig, ImageHash};
use isthmus_codec::bundle::hex;
pub use isthmus_codec::bundle::sha256;
use isthmus_pixels::Rgb;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::{crops, frames, rcc};

const SOURCES: &str = include_str!("../sources.toml");
const LABELLED: &str = include_str!("../labelled.json");
/// Photos smaller than this on the shorter side are left out.
const MIN_SIDE: u32 = 200;
/// Perceptual hashes (256 bits of gradient signs) this close count as the same picture.
const NEAR: u32 = 48;
/// One in this many of the unlabelled photos is held out.
const HOLD_OUT_ONE_IN: u8 = 5;

/// The sets. Training reads `Train` only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Set {
    /// ImageNet photos with true labels (foolbox).
    Demo,
    /// Evaluation without labels.
    HeldOut,
    /// Evaluation with weak labels (mapped from file stems).
    Labelled,
    /// Distillation.
    Train,
    /// Not used: duplicate or too small.
    Dropped,
}

#[derive(Deserialize)]
struct Sources {
    source: Vec<Source>,
}

#[derive(Deserialize)]
struct Source {
    package: String,
    role: Role,
    #[serde(default)]
    rcc: bool,
    /// The files are videos, of which one frame is taken every so many seconds.
    frame_every_s: Option<f64>,
    files: Vec<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Role {
    Demo,
    HeldOut,
    Split,
    Train,
}

impl Role {
    /// Sets that photos of this role may be in.
    fn sets(self) -> &'static [Set] {
        match self {
            Self::Demo => &[Set::Demo],
            Self::HeldOut => &[Set::HeldOut],
            Self::Split => &[Set::HeldOut, Set::Labelled, Set::Train],
            Self::Train => &[Set::Train],
        }
    }
}

#[derive(Deserialize)]
struct Labelled {
    items: Vec<LabelledItem>,
}

#[derive(Deserialize)]
struct LabelledItem {
    path: String,
    imagenet_ids: Vec<i64>,
}

/// One photo of the frozen split: where it is and what it must hash to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `package/path`.
    pub name: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Perceptual hash, base64.
    pub phash: String,
    /// The set.
    pub set: Set,
    /// Accepted ImageNet ids, for labelled sets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<i64>,
    /// Why it was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A photo file as found in its package.
#[derive(Clone)]
pub struct Found {
    /// `package/path`.
    pub name: String,
    /// File content.
    pub bytes: Vec<u8>,
    role: Role,
}

fn globs(patterns: &[String]) -> Result<(GlobSet, GlobSet), TrainError> {
    let (mut yes, mut no) = (GlobSetBuilder::new(), GlobSetBuilder::new());
    for p in patterns {
        let glob = |text: &str| Glob::new(text).map_err(|e| TrainError::data("sources.toml", e.to_string()));
        match p.strip_prefix('!') {
            Some(rest) => no.add(glob(rest)?),
            None => yes.add(glob(p)?),
        };
    }
    let build = |b: GlobSetBuilder| b.build().map_err(|e| TrainError::data("sources.toml", e.to_string()));
    Ok((build(yes)?, build(no)?))
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(path).and_then(|mut f| f.read_to_end(&mut bytes));
    opened.map_err(|source| TrainError::io(path, source))?;
    Ok(bytes)
}

/// Reads every listed file of the packages unpacked under `third_party`, sorted by name.
///
/// # Errors
/// If a package is missing (says how to fetch it) or a file cannot be read.
pub fn find(third_party: &Path, only: Option<&[Set]>) -> Result<Vec<Found>, TrainError> {
    let sources: Sources = toml::from_str(SOURCES).map_err(|e| TrainError::data("sources.toml", e.to_string()))?;
    let mut found = Vec::new();
    for source in sources.source {
        if only.is_some_and(|sets| !source.role.sets().iter().any(|s| sets.contains(s))) {
            continue;
        }
        let root = third_party.join(&source.package);
        if !root.is_dir() {
            let why = "not there; run `python3 setup/fetch.py demo-photos photos training-photos`";
            return Err(TrainError::data(root.display().to_string(), why));
        }
        let (yes, no) = globs(&source.files)?;
        let wanted = |path: &str| yes.is_match(path) && !no.is_match(path);
        let mut add = |path: String, bytes: Vec<u8>| {
            found.push(Found { name: format!("{}/{path}", source.package), bytes, role: source.role });
        };
        let base: PathBuf = root.canonicalize().map_err(|e| TrainError::io(&root, e))?;
        for entry in walkdir::WalkDir::new(&base).sort_by_file_name() {
            let entry = entry.map_err(|e| TrainError::data(base.display().to_string(), e.to_string()))?;
            let relative = entry.path().strip_prefix(&base).unwrap_or(entry.path()).to_string_lossy().into_owned();
            if source.rcc && relative.ends_with(".rcc") {
                let archive = read(entry.path())?;
                for (path, bytes) in rcc::files(&archive, |p| wanted(p))? {
                    add(path, bytes);
                }
            } else if !source.rcc && entry.file_type().is_file() && wanted(&relative) {
                match source.frame_every_s {
                    None => add(relative, read(entry.path())?),
                    Some(seconds) => {
                        for (n, frame) in frames::of(entry.path(), seconds, third_party)?.into_iter().enumerate() {
                            add(format!("{relative}#{n:03}"), frame);
                        }
                    }
                }
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn perceptual(rgb: &Rgb) -> Option<ImageHash> {
    let image = image::RgbImage::from_raw(rgb.width(), rgb.height(), rgb.data().to_vec())?;
    Some(HasherConfig::new().hash_alg(HashAlg::Gradient).hash_size(16, 16).to_hasher().hash_image(&image))
}

/// ImageNet id in a foolbox file name (`imagenet_NN_LABEL.jpg`).
fn demo_label(name: &str) -> Option<i64> {
    name.rsplit('_').next()?.strip_suffix(".jpg")?.parse().ok()
}

/// Decides the set of every photo: evaluation photos first, so that a near-duplicate of one is never
/// trained on; then the first of each group of near-duplicates.
///
/// # Errors
/// If the label list cannot be parsed.
pub fn split(found: &[Found]) -> Result<Vec<Entry>, TrainError> {
    // copied one at a time
    split_beside(found.iter().cloned().map(Ok), Vec::new())
}

/// The same for somebody's own photos (name, content), one of which is held at a time: none of them is labelled, one in five is held out, and near-duplicates of the photos that
/// bundles are evaluated on, and of the crops of them, are dropped. In the order of sets, then names.
///
/// # Errors
/// If the frozen split cannot be parsed, or a photo not be had.
pub fn split_own(photos: impl IntoIterator<Item = Result<(String, Vec<u8>), TrainError>>) -> Result<Vec<Entry>, TrainError> {
    let evaluated = frozen()?.into_iter().filter(|e| ![Set::Train, Set::Dropped].contains(&e.set));
    let evaluated = evaluated.map(|e| (e.name, e.phash)).chain(frozen_crops()?.into_iter().map(|c| (c.name, c.phash)));
    let known = evaluated.filter_map(|(name, phash)| Some((name, ImageHash::from_base64(&phash).ok()?))).collect();
    let found = photos.into_iter().map(|photo| photo.map(|(name, bytes)| Found { name, bytes, role: Role::Split }));
    split_beside(found, known)
}

/// What is near to a `known` photo is dropped.
fn split_beside(
    found: impl IntoIterator<Item = Result<Found, TrainError>>,
    known: Vec<(String, ImageHash)>,
) -> Result<Vec<Entry>, TrainError> {
    let labelled: Labelled = serde_json::from_str(LABELLED).map_err(|e| TrainError::data("labelled.json", e.to_string()))?;
    let labels: HashMap<String, Vec<i64>> =
        labelled.items.into_iter().map(|i| (format!("gcompris-qt-data/{}", i.path), i.imagenet_ids)).collect();
    let mut entries = Vec::new();
    for photo in found {
        let photo = photo?;
        let digest = Sha256::digest(&photo.bytes);
        let label = labels.get(&photo.name);
        let set = match (photo.role, label) {
            (Role::Demo, _) => Set::Demo,
            (Role::HeldOut, _) => Set::HeldOut,
            (Role::Train, _) => Set::Train,
            (Role::Split, Some(_)) => Set::Labelled,
            (Role::Split, None) if digest[0] % HOLD_OUT_ONE_IN == 0 => Set::HeldOut,
            (Role::Split, None) => Set::Train,
        };
        let decoded = isthmus_pixels::decode(&photo.bytes);
        let hash = decoded.as_ref().ok().and_then(perceptual);
        let mut entry = Entry {
            name: photo.name.clone(),
            sha256: hex(&digest),
            phash: hash.as_ref().map(ImageHash::to_base64).unwrap_or_default(),
            set,
            labels: label.cloned().or_else(|| demo_label(&photo.name).filter(|_| set == Set::Demo).map(|l| vec![l])).unwrap_or_default(),
            reason: None,
        };
        match decoded {
            Err(e) => drop_entry(&mut entry, e.to_string()),
            Ok(rgb) if rgb.width().min(rgb.height()) < MIN_SIDE => drop_entry(&mut entry, "too small".into()),
            Ok(_) => {}
        }
        entries.push((entry, hash));
    }
    entries.sort_by(|a, b| (a.0.set, &a.0.name).cmp(&(b.0.set, &b.0.name)));
    let mut kept = known;
    for (entry, hash) in &mut entries {
        let Some(hash) = hash.take().filter(|_| entry.set != Set::Dropped) else { continue };
        match kept.iter().find(|(_, other)| other.dist(&hash) <= NEAR) {
            Some((twin, _)) => drop_entry(entry, format!("near-duplicate of {twin}")),
            None => kept.push((entry.name.clone(), hash)),
        }
    }
    let mut entries: Vec<Entry> = entries.into_iter().map(|(e, _)| e).collect();
    entries.sort_by(|a, b| (a.set, &a.name).cmp(&(b.set, &b.name)));
    Ok(entries)
}

fn drop_entry(entry: &mut Entry, reason: String) {
    entry.set = Set::Dropped;
    entry.labels.clear();
    entry.reason = Some(reason);
}

/// The committed split file.
pub const FROZEN: &str = include_str!("../split.json");

/// The frozen split, as committed.
///
/// # Errors
/// If the committed file cannot be parsed.
pub fn frozen() -> Result<Vec<Entry>, TrainError> {
    serde_json::from_str(FROZEN).map_err(|e| TrainError::data("split.json", e.to_string()))
}

/// A crop of an evaluation photo, by which it is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationCrop {
    /// `package/path` of the photo, and the crop's number.
    pub name: String,
    /// Perceptual hash, base64.
    pub phash: String,
}

/// The committed list of [`EvaluationCrop`]s.
pub const FROZEN_CROPS: &str = include_str!("../evaluation-crops.json");

/// All crops that bundles are evaluated on, as committed.
///
/// # Errors
/// If the committed file cannot be parsed.
pub fn frozen_crops() -> Result<Vec<EvaluationCrop>, TrainError> {
    serde_json::from_str(FROZEN_CROPS).map_err(|e| TrainError::data("evaluation-crops.json", e.to_string()))
}

/// The crops that the evaluation photos among `entries` are evaluated on; `content` gives a photo's file by its name.
///
/// # Errors
/// If a photo cannot be decoded.
pub fn evaluation_crops<'a>(
    entries: &[Entry],
    content: impl Fn(&str) -> Option<&'a [u8]>,
    side: u32,
) -> Result<Vec<EvaluationCrop>, TrainError> {
    let mut all = Vec::new();
    for entry in entries.iter().filter(|e| ![Set::Train, Set::Dropped].contains(&e.set)) {
        let bytes = content(&entry.name).ok_or_else(|| TrainError::data(entry.name.clone(), "is missing"))?;
        let crops = crops::of(&isthmus_pixels::decode(bytes)?, side, entry.set == Set::HeldOut)?;
        for (k, hash) in crops.iter().filter_map(perceptual).enumerate() {
            all.push(EvaluationCrop { name: format!("{}, crop {k}", entry.name), phash: hash.to_base64() });
        }
    }
    Ok(all)
}

/// Pairs of a photo that is trained on and an evaluation crop that it is near to.
///
/// # Errors
/// If a committed list cannot be parsed.
pub fn trained_on_crops(entries: &[Entry], crops: &[EvaluationCrop]) -> Result<Vec<(String, String)>, TrainError> {
    let hashed = |name: &str, phash: &str| {
        let hash: ImageHash = ImageHash::from_base64(phash).map_err(|e| TrainError::data(name.to_owned(), format!("{e:?}")))?;
        Ok::<_, TrainError>((name.to_owned(), hash))
    };
    let crops = crops.iter().map(|c| hashed(&c.name, &c.phash)).collect::<Result<Vec<_>, _>>()?;
    let mut near = Vec::new();
    for entry in entries.iter().filter(|e| e.set == Set::Train) {
        let (name, hash) = hashed(&entry.name, &entry.phash)?;
        near.extend(crops.iter().filter(|(_, other)| other.dist(&hash) <= NEAR).map(|(crop, _)| (name.clone(), crop.clone())));
    }
    Ok(near)
}

/// Pairs every photo of `sets` in the frozen split with its file content.
///
/// # Errors
/// If a photo is missing or its hash differs from the frozen one.
pub fn load(third_party: &Path, sets: &[Set]) -> Result<Vec<(Entry, Vec<u8>)>, TrainError> {
    let mut files: HashMap<String, Vec<u8>> = find(third_party, Some(sets))?.into_iter().map(|f| (f.name, f.bytes)).collect();
    let mut out = Vec::new();
    for entry in frozen()?.into_iter().filter(|e| sets.contains(&e.set)) {
        let bytes = files.remove(&entry.name).ok_or_else(|| TrainError::data(entry.name.clone(), "is missing"))?;
        if sha256(&bytes) != entry.sha256 {
            return Err(TrainError::data(entry.name, "differs from the frozen split (SHA-256)"));
        }
        out.push((entry, bytes));
    }
    Ok(out)
}
