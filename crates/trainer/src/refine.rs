//! Refinements of a bundle's level 1, for progressive bitstreams ([`isthmus_codec::progressive`]): quantisers nested in each other, with contexts fitted to the
//! symbols of training crops. The networks stay as they are.

use std::collections::BTreeMap;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use isthmus_codec::manifest::Manifest;
use isthmus_codec::tables::Step;
use isthmus_codec::{
    ChannelTable, Contexts, Distribution, LatentShape, LevelTables, Quality, Refinement, Refinements, Tables, pmf, refinement,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::contexts::{self, Seen};
use crate::error::TrainError;
use crate::pack::Pack;
use crate::remake::Remake;

/// File of the refinements in a bundle.
const FILE: &str = "refinements.istr";

/// The quantisers of one refinement.
struct Nested {
    factors: Vec<u16>,
    quantisers: Vec<Step>,
    /// Channels that are coded by now, here or before.
    known: Vec<bool>,
}

/// Quantisers that go from level 1 towards the qualities `targets`: each channel's gain grows by the odd factor that takes it nearest to the target's.
fn nested(tables: &Tables, targets: &[Quality]) -> Result<Vec<Nested>, TrainError> {
    let base = tables.level(1)?;
    let mut below: Vec<Step> = base.channels.iter().map(|t| Step { gain: t.gain, inverse: t.inverse, median: t.median }).collect();
    let mut known: Vec<bool> = (0u16..).take(below.len()).map(|c| base.is_coded(c)).collect();
    let mut steps = Vec::new();
    for &target in targets {
        let target = tables.level(target)?;
        let mut factors = Vec::new();
        for (((below, known), wanted), channel) in below.iter_mut().zip(&mut known).zip(target.quantisers()).zip(0u16..) {
            let nearest = 2.0 * (0.5 * (wanted.gain / below.gain - 1.0)).round() + 1.0;
            let factor = if *known { nearest.clamp(1.0, refinement::MAX_FACTOR.into()) } else { 1.0 };
            // what nobody codes stands for the target's constants: decoders know qualities by them
            let (gain, median) = if *known { (below.gain * factor, below.median * factor) } else { (wanted.gain, wanted.median) };
            *below = Step { gain, median, inverse: wanted.inverse * wanted.gain / gain };
            *known |= target.is_coded(channel);
            factors.push(factor as u16);
        }
        steps.push(Nested { factors, quantisers: below.clone(), known: known.clone() });
    }
    Ok(steps)
}

impl Nested {
    /// The refinement that codes differences in this order with these contexts; without contexts nothing but quantisers.
    fn refinement(&self, order: Vec<u16>, contexts: &BTreeMap<u16, Contexts>) -> Result<Refinement, TrainError> {
        let unused = || Distribution::new(0, vec![pmf::TOTAL - 1, 1]).map(Contexts::none);
        let count = self.factors.len();
        let mut channels = Vec::with_capacity(2 * count);
        for _ in 0..count {
            channels.push(ChannelTable::with_contexts(1.0, 1.0, 0.0, unused()?)?);
        }
        for (q, channel) in self.quantisers.iter().zip(count as u16..) {
            let contexts = contexts.get(&channel).map_or_else(unused, |c| Ok(c.clone()))?;
            channels.push(ChannelTable::with_contexts(q.gain, q.inverse, q.median, contexts)?);
        }
        Ok(Refinement::new(self.factors.clone(), LevelTables::with_given(channels, order, count)?)?)
    }
}

/// Refinements of level 1 towards the qualities `targets`, from `latents` (one after the other).
///
/// # Errors
/// If the latents do not fit the tables, or there is no such quality.
pub fn fit(tables: &Tables, targets: &[Quality], latents: &[f32], shape: LatentShape) -> Result<Refinements, TrainError> {
    let base = tables.level(1)?;
    let steps = nested(tables, targets)?;
    let differences = |step: &Nested| (shape.channels..).zip(&step.known).filter(|(_, known)| **known).map(|(c, _)| c).collect();
    let plain = steps.iter().map(|s| s.refinement(differences(s), &BTreeMap::new())).collect::<Result<Vec<_>, _>>()?;
    let twice = LatentShape { channels: 2 * shape.channels, ..shape };
    let mut seen: Vec<Seen> = steps.iter().map(|_| Seen::new(twice)).collect();
    for latent in latents.chunks_exact(shape.symbols()) {
        let symbols = refinement::quantise(&base, &plain, latent, shape)?;
        for ((seen, step), pair) in seen.iter_mut().zip(&plain).zip(symbols.windows(2)) {
            seen.note(step.planes(&pair[0], &pair[1], shape)?);
        }
    }
    let bar = ProgressBar::new(steps.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} contexts of refinement {pos}/{len}, {eta} left") {
        bar.set_style(style);
    }
    let mut known: Vec<u16> = base.order().to_vec();
    let mut fitted = Vec::new();
    for (step, seen) in steps.iter().zip(&seen) {
        let (mut earlier, mut order, mut all) = (known, Vec::new(), BTreeMap::new());
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        // what never differs is not coded
        for (channel, busy) in seen.busiest(shape.channels..twice.channels).into_iter().filter(|(_, busy)| *busy > 0.0) {
            all.insert(channel, contexts::fit_if_busy(seen, (channel, busy), &earlier, &mut rng)?);
            earlier.push(channel);
            order.push(channel);
        }
        fitted.push(step.refinement(order, &all)?);
        known = (0u16..).zip(&step.known).filter(|(_, known)| **known).map(|(c, _)| c).collect();
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Refinements::new(fitted)?)
}

/// Writes the bundle of `folder` into `out` with refinements of level 1 towards the qualities `targets`, as crops of `pack` show them; all else stays.
///
/// # Errors
/// If a file cannot be read or written, or the qualities do not rise above level 1.
pub fn bundle(folder: &Path, targets: &[Quality], pack: &Pack, version: &str, out: &Path) -> Result<Manifest, TrainError> {
    let rising = std::iter::once(1.0).chain(targets.iter().map(|q| q.value())).collect::<Vec<_>>();
    if targets.is_empty() || targets.len() > refinement::MAX_STEPS || !rising.windows(2).all(|pair| pair[0] < pair[1]) {
        return Err(TrainError::data("--towards", format!("1 to {} qualities above 1, each above the one before", refinement::MAX_STEPS)));
    }
    let mut remake = Remake::open(folder, pack)?;
    let refinements = fit(&remake.old.tables, targets, &remake.latents, remake.manifest.latent)?;
    remake.files.insert(FILE.into(), refinements.to_bytes());
    remake.manifest.refinements = Some(FILE.into());
    remake.write(version, out)
}
