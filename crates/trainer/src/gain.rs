//! What fitting a bundle saves: bytes of the new one against bytes of the old one at the same KL to the backbone.

use std::path::Path;

use isthmus_federate::train::bundle::{Adaptation, HELD_OUT, LevelScore, photos};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::error::TrainError;

/// Resamplings of the photos.
const RESAMPLED: usize = 2000;

/// A level of the new bundle.
#[derive(Debug, Clone, Serialize)]
pub struct Gain {
    /// From 1.
    pub level: usize,
    /// Mean scores of the old bundle's level, and of the new one's: (bytes, agreement, KL).
    pub before: [f64; 3],
    /// Of the new one's.
    pub after: [f64; 3],
    /// Bytes that the old bundle needs for the new level's KL, between its own levels; absent beyond them.
    pub needed: Option<f64>,
    /// Share of those that the new level saves; with its 95 % interval over photos.
    pub saved: Option<[f64; 3]>,
}

/// Scores of photos at each level, grouped by what they are crops of.
type Scores = Vec<Vec<Vec<LevelScore>>>;

fn scores(bundle: &Path, backbones: &Path, folder: &Path, groups: &[Vec<usize>]) -> Result<Scores, TrainError> {
    let opened = Adaptation::open(folder, bundle, backbones)?;
    let of = |level| -> Result<Vec<Vec<LevelScore>>, TrainError> {
        let each = opened.each(level)?;
        Ok(groups.iter().map(|g| g.iter().map(|i| each[*i]).collect()).collect())
    };
    opened.bundle().tables.levels.iter().map(of).collect()
}

/// Mean bytes and KL of some groups.
fn curve(scores: &Scores, some: &[usize]) -> Vec<LevelScore> {
    let level = |groups: &Vec<Vec<LevelScore>>| LevelScore::mean(&some.iter().flat_map(|g| groups[*g].iter().copied()).collect::<Vec<_>>());
    scores.iter().map(level).collect()
}

/// Bytes at which a curve has this KL: linear between logarithms.
fn bytes_at(curve: &[LevelScore], kl: f64) -> Option<f64> {
    let pair = curve.windows(2).find(|w| w[0].kl >= kl && kl >= w[1].kl)?;
    let share = (pair[0].kl.ln() - kl.ln()) / (pair[0].kl.ln() - pair[1].kl.ln()).max(f64::MIN_POSITIVE);
    Some((pair[0].bytes.ln() + share * (pair[1].bytes.ln() - pair[0].bytes.ln())).exp())
}

/// Compares two bundles on `folder`/held-out; names `PHOTO-CROP` say which crops are of one photo.
///
/// # Errors
/// If a bundle or the photos cannot be read.
pub fn compare(before: &Path, after: &Path, backbones: &Path, folder: &Path) -> Result<(usize, usize, Vec<Gain>), TrainError> {
    let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
    for (i, path) in photos::list(&folder.join(HELD_OUT))?.iter().enumerate() {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = stem.split_once('-').map_or(stem.as_str(), |(photo, _)| photo).to_owned();
        match groups.last_mut().filter(|(last, _)| *last == name) {
            Some((_, places)) => places.push(i),
            None => groups.push((name, vec![i])),
        }
    }
    let groups: Vec<Vec<usize>> = groups.into_iter().map(|(_, places)| places).collect();
    let (old, new) = (scores(before, backbones, folder, &groups)?, scores(after, backbones, folder, &groups)?);
    let all: Vec<usize> = (0..groups.len()).collect();
    let saved = |some: &[usize]| -> Vec<Option<(f64, f64)>> {
        let before = curve(&old, some);
        curve(&new, some).iter().map(|s| bytes_at(&before, s.kl).map(|needed| (needed, 1.0 - s.bytes / needed))).collect()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut drawn: Vec<Vec<f64>> = vec![Vec::new(); new.len()];
    for _ in 0..RESAMPLED {
        let some: Vec<usize> = all.iter().map(|_| rng.random_range(0..all.len())).collect();
        saved(&some).into_iter().zip(&mut drawn).for_each(|(s, d)| d.extend(s.map(|s| s.1)));
    }
    let numbers = |s: &LevelScore| [s.bytes, s.agreement, s.kl];
    let (was, is, whole) = (curve(&old, &all), curve(&new, &all), saved(&all));
    let gains = was.iter().zip(&is).zip(whole).zip(&mut drawn).enumerate().map(|(i, (((was, is), whole), drawn))| {
        drawn.sort_by(f64::total_cmp);
        let at = |share: f64| drawn.get((share * drawn.len() as f64) as usize).copied().unwrap_or(f64::NAN);
        // a level that is beyond the old curve in many resamplings has no interval
        let saved = whole.filter(|_| drawn.len() * 10 >= RESAMPLED * 9).map(|w| [w.1, at(0.025), at(0.975)]);
        Gain { level: i + 1, before: numbers(was), after: numbers(is), needed: whole.map(|w| w.0), saved }
    });
    Ok((groups.iter().map(Vec::len).sum(), groups.len(), gains.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_between_levels_and_nowhere_else() {
        let at = |bytes, kl| LevelScore { bytes, agreement: 0.0, kl };
        let curve = [at(100.0, 1.0), at(400.0, 0.25)];
        assert!((bytes_at(&curve, 0.5).unwrap() - 200.0).abs() < 1e-9);
        assert!(bytes_at(&curve, 1.1).is_none() && bytes_at(&curve, 0.2).is_none());
    }
}
