//! Contexts of the entropy coder, fitted to the symbols of training crops once the networks are fixed.
//!
//! Per level, channels are coded from the busiest to the quietest. For each, two ridge regressions on earlier symbols nearby
//! (magnitudes, signed values) tell which of them matter most; a small network ([`network`]) learns from these; thresholds
//! divide the range of its two estimates evenly, and each bin's distribution is its histogram, smoothed by the channel's.

mod network;

use std::path::Path;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};
use isthmus_codec::contexts::Field;
use isthmus_codec::estimator::{REACH, Says};
use isthmus_codec::manifest::Manifest;
use isthmus_codec::{
    BundleHash, ChannelTable, Contexts, Distribution, Estimator, LatentShape, LevelTables, Tables, container, golden, pmf,
};
use isthmus_nets::Encoder;
use isthmus_pixels::Rgb;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::distill::Run;
use crate::error::TrainError;
use crate::export::{self, MAX_HALF_WIDTH};
use crate::loader::{self, Plan};
use crate::pack::Pack;
use crate::remake::Remake;
use crate::silence::silence;

/// Crops whose symbols are counted for a bundle.
pub const CROPS: usize = 1000;
/// Crops per pass through the encoder.
pub(crate) const BATCH: usize = 20;
/// Positions that the regressions see.
const ROWS: usize = 40_000;
/// Ridge of the regressions, in units of squared symbols summed over the rows.
const RIDGE: f64 = 1.0;
/// Symbols that a network reads.
const INPUTS: usize = 48;
/// Bins of the magnitude.
const BINS: usize = 16;
/// Bins of the signed value within each bin of the magnitude.
const SIGNED_BINS: usize = 8;
/// Share of the estimates that lies beyond the evenly divided range, at either end.
const BEYOND: f64 = 0.002;
/// Channels with fewer non-zero symbols than this keep their static table.
const LIVE: f64 = 2e-3;
/// Observations that the channel's own histogram is worth beside a bin's.
const SMOOTHING: f64 = 8.0;
/// Offsets at which the channel itself is read, and earlier channels.
const OWN: [(i8, i8); 12] =
    [(0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1), (-1, 2), (-2, -2), (-2, -1), (-2, 0), (-2, 1), (-2, 2)];
const OTHERS: [(i8, i8); 9] = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)];

/// Where a symbol is read: channel, rows below, columns to the right.
type Place = (u16, i8, i8);

/// Latents of about `crops` crops of `pack`, one after the other.
///
/// # Errors
/// If crops cannot be made or libtorch fails.
pub(crate) fn latents(encoder: &Encoder, device: Device, plan: &Plan, pack: &Pack, crops: usize) -> Result<Vec<f32>, TrainError> {
    let mut latents = Vec::new();
    for i in 0..crops.div_ceil(plan.batch) as u64 {
        // streams from the middle, apart from those of training and calibration
        let batch = loader::make(pack, plan, u64::MAX / 2 + i)?;
        let pixels = Tensor::from_slice(&batch.pixels).view([-1, 3, plan.side.into(), plan.side.into()]);
        latents.extend(export::values(&encoder.forward(&pixels.to_device(device)))?);
    }
    Ok(latents)
}

/// Replaces the static tables of a run's live channels by contexts, from the symbols of about `crops` training
/// crops, and silences those that are empty on all of them; the rest stays.
///
/// # Errors
/// If crops cannot be made or libtorch fails.
pub fn fit(run: &Run, tables: &Tables, shape: LatentShape, pack: &Pack, crops: usize) -> Result<Tables, TrainError> {
    let plan = Plan { batch: BATCH, augment: crate::augment::Augment::default(), ..Plan::of(&run.recipe) };
    let latents = tch::no_grad(|| latents(&run.net.encoder, run.net.vs.device(), &plan, pack, crops))?;
    silence(fit_tables(tables, &latents, shape, run.recipe.seed)?, &latents, shape)
}

/// Fits the contexts of all levels to `latents` (one after the other), as many levels at once as there are processors.
///
/// # Errors
/// If the latents do not fit the tables or libtorch fails.
pub(crate) fn fit_tables(tables: &Tables, latents: &[f32], shape: LatentShape, seed: u64) -> Result<Tables, TrainError> {
    let bar = ProgressBar::new((tables.levels.len() * usize::from(shape.channels)) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} contexts of {pos}/{len} channels, {eta} left") {
        bar.set_style(style);
    }
    let threads = tch::get_num_threads();
    // the last level, which takes longest, first
    let left = Mutex::new((0..tables.levels.len()).collect::<Vec<_>>());
    let next = || left.lock().ok().and_then(|mut left| left.pop());
    let work = || {
        tch::set_num_threads(1);
        let mut done = Vec::new();
        while let Some(level) = next() {
            done.push((level, fit_level(&tables.levels[level], latents, shape, seed, &bar)));
        }
        done
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(tables.levels.len());
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|w| w.join()).collect::<Result<Vec<_>, _>>()
    });
    tch::set_num_threads(threads);
    bar.finish_and_clear();
    let done = done.map_err(|_| TrainError::data("contexts", "a thread ended before its time"))?;
    let mut levels: Vec<_> = done.into_iter().flatten().collect();
    levels.sort_by_key(|(level, _)| *level);
    Ok(Tables { levels: levels.into_iter().map(|(_, fitted)| fitted).collect::<Result<_, _>>()? })
}

/// Writes the bundle of `folder` into `out` with contexts fitted anew to about [`CROPS`] crops of `pack`, and channels silent that are empty on all of them; its
/// manifest has the bytes of the `held_out` photos' containers. All else stays.
///
/// # Errors
/// If a file cannot be read or written, or crops cannot be made.
pub fn bundle(folder: &Path, pack: &Pack, held_out: &[Rgb], version: &str, out: &Path) -> Result<Manifest, TrainError> {
    let mut remake = Remake::open(folder, pack)?;
    let (shape, name) = (remake.manifest.latent, remake.manifest.golden.container.clone());
    let tables = fit_tables(&remake.old.tables, &remake.latents, shape, 0)?;
    // the golden input stays what it was: its answers are the decoders'
    remake.latents.extend(&remake.golden);
    let tables = silence(tables, &remake.latents, shape)?;
    let (header, symbols) = remake.old.golden_symbols()?;
    let golden = container::encode(&symbols, header.quality, &BundleHash([0; 32]), shape, &tables)?;
    remake.files.insert(remake.manifest.tables.clone(), tables.to_bytes());
    remake.files.insert(name, golden);
    // what silent channels stand for may differ in the last bit
    let mut latent = Vec::new();
    tables.level(header.quality)?.dequantise_into(&symbols, shape, &mut latent)?;
    remake.manifest.golden.latent_sha256 = golden::latent_sha256(&latent);
    let bytes = export::coded_bytes(&remake.encoder, Device::Cpu, &tables, shape, held_out)?;
    remake.manifest.quality.iter_mut().zip(bytes).for_each(|(quality, bytes)| quality.bytes = bytes);
    remake.write(version, out)
}

/// The symbols of one level, crop by crop.
pub(crate) struct Seen {
    symbols: Vec<Vec<i32>>,
    fields: Vec<Field>,
    /// Saturated symbols of each crop, all channels of one position after those of another, with a border of zeros.
    bordered: Vec<Vec<i8>>,
    shape: LatentShape,
}

impl Seen {
    /// None yet.
    pub(crate) fn new(shape: LatentShape) -> Self {
        Self { symbols: Vec::new(), fields: Vec::new(), bordered: Vec::new(), shape }
    }

    /// Symbols of one channel, crop after crop.
    fn channel(&self, channel: usize) -> impl Iterator<Item = i32> {
        let positions = self.shape.positions();
        self.symbols.iter().flat_map(move |s| &s[channel * positions..][..positions]).copied()
    }

    /// Adds a crop's.
    pub(crate) fn note(&mut self, symbols: Vec<i32>) {
        let mut field = Field::new(self.shape);
        let (width, channels) = (usize::from(self.shape.width), usize::from(self.shape.channels));
        let mut bordered = vec![0; (width + 2 * REACH) * (usize::from(self.shape.height) + 2 * REACH) * channels];
        for (channel, symbols) in (0..self.shape.channels).zip(symbols.chunks_exact(self.shape.positions())) {
            field.note(channel, symbols);
            for (at, &symbol) in symbols.iter().enumerate() {
                bordered[self.inside(at) * channels + usize::from(channel)] = Says::of(symbol).signed as i8;
            }
        }
        self.symbols.push(symbols);
        self.fields.push(field);
        self.bordered.push(bordered);
    }

    /// Where a position (row-major) lies with the border around.
    fn inside(&self, at: usize) -> usize {
        let width = usize::from(self.shape.width);
        (at / width + REACH) * (width + 2 * REACH) + at % width + REACH
    }

    /// Positions of all crops.
    fn rows(&self) -> usize {
        self.symbols.len() * self.shape.positions()
    }

    /// The symbol of `channel` at a row (position of a crop, crop after crop).
    fn symbol(&self, channel: u16, row: usize) -> i32 {
        let positions = self.shape.positions();
        self.symbols[row / positions][usize::from(channel) * positions + row % positions]
    }

    /// What the symbols say that are read from a row at these places.
    fn read<'a>(&'a self, places: &'a [Place], row: usize) -> impl Iterator<Item = Says> + 'a {
        let (positions, channels) = (self.shape.positions(), usize::from(self.shape.channels));
        let (symbols, inside) = (&self.bordered[row / positions], self.inside(row % positions));
        let stride = (usize::from(self.shape.width) + 2 * REACH) as isize;
        places.iter().map(move |&(channel, dy, dx)| {
            let at = inside.wrapping_add_signed(isize::from(dy) * stride + isize::from(dx));
            Says::of(symbols[at * channels + usize::from(channel)].into())
        })
    }

    /// These channels with their mean magnitudes, the busiest first.
    pub(crate) fn busiest(&self, channels: std::ops::Range<u16>) -> Vec<(u16, f64)> {
        let count = (self.symbols.len() * self.shape.positions()) as f64;
        let busy = |c: u16| self.channel(c.into()).map(|s| f64::from(s.unsigned_abs())).sum::<f64>() / count;
        let mut order: Vec<(u16, f64)> = channels.map(|c| (c, busy(c))).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        order
    }
}

fn fit_level(level: &LevelTables, latents: &[f32], shape: LatentShape, seed: u64, bar: &ProgressBar) -> Result<LevelTables, TrainError> {
    let mut seen = Seen::new(shape);
    for latent in latents.chunks_exact(shape.symbols()) {
        seen.note(level.quantise(latent, shape)?);
    }
    let mut order = seen.busiest(0..shape.channels);
    order.retain(|(c, _)| level.is_coded(*c));
    let mut channels = level.channels.clone();
    let mut earlier: Vec<u16> = Vec::new();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for &(c, busy) in &order {
        let old = &level.channels[usize::from(c)];
        // contexts from before may read what comes later now
        if busy >= LIVE || !old.contexts.is_static() {
            let contexts = fit_if_busy(&seen, (c, busy), &earlier, &mut rng)?;
            channels[usize::from(c)] = ChannelTable::with_contexts(old.gain, old.inverse, old.median, contexts)?;
        }
        if busy >= LIVE {
            earlier.push(c);
            bar.inc(1);
        }
    }
    bar.inc((level.channels.len() - earlier.len()) as u64);
    Ok(LevelTables::in_order(channels, order.into_iter().map(|(c, _)| c).collect())?)
}

/// Contexts of a channel that read itself and `earlier` ones; without any if it is hardly ever `busy`.
pub(crate) fn fit_if_busy(seen: &Seen, (channel, busy): (u16, f64), earlier: &[u16], rng: &mut impl Rng) -> Result<Contexts, TrainError> {
    if busy >= LIVE {
        return fit_channel(seen, channel, earlier, rng);
    }
    let all = Histogram::of(seen.channel(channel.into()));
    Ok(Contexts::none(all.smoothed(&all)?))
}

fn fit_channel(seen: &Seen, channel: u16, earlier: &[u16], rng: &mut impl Rng) -> Result<Contexts, TrainError> {
    let mut places: Vec<Place> = OWN.iter().map(|&(dy, dx)| (channel, dy, dx)).collect();
    places.extend(earlier.iter().flat_map(|&c| OTHERS.iter().map(move |&(dy, dx)| (c, dy, dx))));
    let places = strongest(seen, channel, places, rng)?;
    let estimator = Estimator::from(network::fit(seen, channel, &places, rng)?);

    let estimates: Vec<[i32; 2]> = seen.fields.iter().flat_map(|field| field.estimate_all(&estimator)).collect();
    let cuts = evenly(estimates.iter().map(|e| e[0]).collect(), BINS);
    let mut binned: Vec<Vec<(i32, i32)>> = vec![Vec::new(); cuts.len() + 1];
    for (&[magnitude, signed], symbol) in estimates.iter().zip(seen.channel(channel.into())) {
        binned[cuts.partition_point(|&c| c <= magnitude)].push((signed, symbol));
    }
    let whole = Histogram::of(seen.channel(channel.into()));
    let (mut signed_cuts, mut distributions) = (Vec::new(), Vec::new());
    for bin in binned {
        let cuts = evenly(bin.iter().map(|b| b.0).collect(), SIGNED_BINS);
        let mut parts = vec![Vec::new(); SIGNED_BINS];
        for (signed, symbol) in bin {
            parts[cuts.partition_point(|&c| c <= signed)].push(symbol);
        }
        for part in parts {
            distributions.push(Histogram::of(part).smoothed(&whole)?);
        }
        signed_cuts.push(cuts);
    }
    Ok(Contexts::new(estimator, cuts, signed_cuts, distributions)?)
}

/// Thresholds that divide evenly what lies between nearly the least and nearly the largest of these values.
fn evenly(mut values: Vec<i32>, bins: usize) -> Vec<i32> {
    values.sort_unstable();
    let at = |share: f64| {
        let at = (values.len() as f64 * share) as usize;
        values.get(at.min(values.len().saturating_sub(1))).copied().map_or(0, i64::from)
    };
    let (least, largest) = (at(BEYOND), at(1.0 - BEYOND));
    (1..bins as i64).map(|i| (least + (largest - least) * i / bins as i64) as i32).collect()
}

/// The places from which magnitude and signed value follow best in linear regressions, at most [`INPUTS`].
fn strongest(seen: &Seen, channel: u16, mut places: Vec<Place>, rng: &mut impl Rng) -> Result<Vec<Place>, TrainError> {
    if places.len() <= INPUTS {
        return Ok(places);
    }
    // columns: places, one, target
    let columns = places.len() + 2;
    let rows = sample(rng, seen.rows(), ROWS.min(seen.rows()));
    let mut data = [Vec::with_capacity(rows.len() * columns), Vec::with_capacity(rows.len() * columns)];
    for row in rows {
        let target = Says::of(seen.symbol(channel, row));
        for says in seen.read(&places, row) {
            data[0].push(f32::from(says.magnitude));
            data[1].push(f32::from(says.signed));
        }
        data[0].extend([1.0, f32::from(target.magnitude)]);
        data[1].extend([1.0, f32::from(target.signed)]);
    }
    let mut strength = vec![0f64; places.len()];
    for values in data {
        let x = Tensor::from_slice(&values).view([-1, columns as i64]);
        let gram = x.tr().matmul(&x).to_kind(Kind::Double);
        let last = columns as i64 - 1;
        let a = gram.narrow(0, 0, last).narrow(1, 0, last) + Tensor::eye(last, (Kind::Double, gram.device())) * RIDGE;
        let target = gram.narrow(0, 0, last).select(1, last).view([last, 1]);
        let weights = Vec::<f64>::try_from(target.cholesky_solve(&a.linalg_cholesky(false), false).view(-1))?;
        let spread = Vec::<f64>::try_from(gram.diagonal(0, 0, 1).sqrt())?;
        let terms: Vec<f64> = weights.iter().zip(&spread).take(places.len()).map(|(w, s)| (w * s).abs()).collect();
        let norm = terms.iter().map(|t| t * t).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        strength.iter_mut().zip(terms).for_each(|(s, term)| *s = s.max(term / norm));
    }
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by(|&a, &b| strength[b].total_cmp(&strength[a]));
    order.truncate(INPUTS);
    order.sort_unstable();
    places = order.into_iter().map(|i| places[i]).collect();
    Ok(places)
}

/// Counts of consecutive symbols.
struct Histogram {
    offset: i32,
    counts: Vec<f64>,
    total: f64,
}

impl Histogram {
    /// Symbols farther out than tables reach count in the total alone.
    fn of(symbols: impl IntoIterator<Item = i32>) -> Self {
        let symbols: Vec<i32> = symbols.into_iter().collect();
        let near = || symbols.iter().copied().filter(|s| s.abs() <= MAX_HALF_WIDTH);
        let offset = near().min().unwrap_or(0);
        let mut counts = vec![0.0; (near().max().unwrap_or(0) - offset) as usize + 1];
        near().for_each(|s| counts[(s - offset) as usize] += 1.0);
        Self { offset, counts, total: symbols.len() as f64 }
    }

    fn share(&self, symbol: i32) -> f64 {
        let count = usize::try_from(symbol - self.offset).ok().and_then(|i| self.counts.get(i));
        count.map_or(0.0, |c| c / self.total.max(1.0))
    }

    /// This histogram and a little of the channel's, over the symbols seen here and one to either side; what
    /// lies outside goes to the escape.
    fn smoothed(&self, whole: &Self) -> Result<Distribution, TrainError> {
        let (first, last) = (self.offset - 1, self.offset + self.counts.len() as i32);
        let mass = |s: i32| {
            let own = usize::try_from(s - self.offset).ok().and_then(|i| self.counts.get(i)).copied().unwrap_or(0.0);
            (own + SMOOTHING * whole.share(s)) / (self.total + SMOOTHING)
        };
        let pmf: Vec<f64> = (first..=last).map(mass).collect();
        let outside = (1.0 - pmf.iter().sum::<f64>()).max(1e-5);
        Ok(Distribution::new(first, pmf::quantise(&pmf, outside)?)?)
    }
}

#[cfg(test)]
mod tests {
    use isthmus_codec::coder;

    use super::*;

    const SHAPE: LatentShape = LatentShape { channels: 3, height: 12, width: 12 };
    const CROPS_SEEN: usize = 500;

    /// The third channel is loud where the second is positive, which no magnitude tells, and has the first one's sign.
    #[test]
    fn contexts_learn_what_symbols_say_of_others() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut latents = || -> Vec<f32> {
            let crop = |rng: &mut ChaCha8Rng| {
                let mut sign = |_| if rng.random::<bool>() { 1.0 } else { -1.0 };
                let signs: Vec<f32> = (0..SHAPE.symbols()).map(&mut sign).collect();
                let (first, rest) = signs.split_at(SHAPE.positions());
                let second = &rest[..SHAPE.positions()];
                let third = first.iter().zip(second).map(|(a, b)| if *b > 0.0 { *a } else { 0.0 });
                // the busiest channel is coded first
                first.iter().map(|s| 3.0 * s).chain(second.iter().map(|s| 2.0 * s)).chain(third).collect::<Vec<f32>>()
            };
            (0..CROPS_SEEN).flat_map(|_| crop(&mut rng)).collect()
        };
        let whole = || Histogram::of((-4..=4).flat_map(|s| vec![s; 100]));
        let channel = |_| ChannelTable::with_contexts(1.0, 1.0, 0.0, Contexts::none(whole().smoothed(&whole()).unwrap())).unwrap();
        let flat = Tables { levels: vec![LevelTables::new((0..3).map(channel).collect()).unwrap()] };
        let tables = fit_tables(&flat, &latents(), SHAPE, 7).unwrap();
        assert_eq!(tables.levels[0].order(), [0, 1, 2]);
        let level = &tables.levels[0];
        let bits = |latent: &[f32]| coder::ideal_bits(&level.quantise(latent, SHAPE).unwrap(), level, SHAPE).unwrap();
        let unseen = latents();
        let mean = unseen.chunks_exact(SHAPE.symbols()).map(bits).sum::<f64>() / (CROPS_SEEN * SHAPE.positions()) as f64;
        // two signs, from which the rest follows; without contexts another bit and a half
        assert!(mean < 2.1, "{mean} bits a position, 2 are needed");
    }
}
