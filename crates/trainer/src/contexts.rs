//! Contexts of the entropy coder, fitted to the symbols of training crops once the networks are fixed.
//!
//! Per level, channels are coded from the busiest to the quietest. For each, two ridge regressions on earlier
//! symbols nearby (magnitudes, signed values) keep their strongest terms and are rounded to integers; thresholds
//! are quantiles of the estimates, and each bin's distribution is its histogram, smoothed by the channel's.

use indicatif::{ProgressBar, ProgressIterator, ProgressStyle};
use isthmus_codec::contexts::Field;
use isthmus_codec::{ChannelTable, Contexts, Distribution, LatentShape, LevelTables, Predictor, Tables, Tap, pmf};
use isthmus_nets::Encoder;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::distill::Run;
use crate::error::TrainError;
use crate::export::{self, MAX_HALF_WIDTH};
use crate::loader::{self, Plan};
use crate::pack::Pack;
use crate::silence::silence;

/// Crops whose symbols are counted for a bundle.
pub const CROPS: usize = 1000;
/// Crops per pass through the encoder.
pub(crate) const BATCH: usize = 20;
/// Positions that the regressions see.
const ROWS: usize = 60_000;
/// Ridge of the regressions, in units of squared symbols summed over the rows.
const RIDGE: f64 = 1.0;
/// Terms kept per predictor.
const TAPS: usize = 20;
/// One, in a predictor's integer weights.
const ONE: f64 = 1024.0;
/// Bins of the magnitude: shares of the symbols above the thresholds fall geometrically to this.
const BINS: usize = 12;
const RAREST: f64 = 0.002;
/// Bins of the signed value within each bin of the magnitude, equally full.
const SIGNED_BINS: usize = 5;
/// Channels with fewer non-zero symbols than this keep their static table.
const LIVE: f64 = 2e-3;
/// Observations that the channel's own histogram is worth beside a bin's.
const SMOOTHING: f64 = 8.0;
/// Offsets at which the channel itself is read, and earlier channels.
const OWN: [(i8, i8); 6] = [(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0)];
const OTHERS: [(i8, i8); 9] = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)];

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
    let _frozen = tch::no_grad_guard();
    let plan = Plan { batch: BATCH, augment: crate::augment::Augment::default(), ..Plan::of(&run.recipe) };
    let latents = latents(&run.net.encoder, run.net.vs.device(), &plan, pack, crops)?;
    let bar = ProgressBar::new(tables.levels.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} contexts of level {pos}/{len}, {eta} left") {
        bar.set_style(style);
    }
    let levels = tables.levels.iter().progress_with(bar).map(|level| fit_level(level, &latents, shape, run.recipe.seed));
    silence(Tables { levels: levels.collect::<Result<_, _>>()? }, &latents, shape)
}

/// The symbols of one level, crop by crop.
pub(crate) struct Seen {
    symbols: Vec<Vec<i32>>,
    fields: Vec<Field>,
    shape: LatentShape,
}

impl Seen {
    /// None yet.
    pub(crate) fn new(shape: LatentShape) -> Self {
        Self { symbols: Vec::new(), fields: Vec::new(), shape }
    }

    /// Symbols of one channel, crop after crop.
    fn channel(&self, channel: usize) -> impl Iterator<Item = i32> {
        let positions = self.shape.positions();
        self.symbols.iter().flat_map(move |s| &s[channel * positions..][..positions]).copied()
    }

    /// Adds a crop's.
    pub(crate) fn note(&mut self, symbols: Vec<i32>) {
        let mut field = Field::new(self.shape, |_| true);
        for (channel, plane) in (0..self.shape.channels).zip(symbols.chunks_exact(self.shape.positions())) {
            field.note(channel, plane);
        }
        self.symbols.push(symbols);
        self.fields.push(field);
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

fn fit_level(level: &LevelTables, latents: &[f32], shape: LatentShape, seed: u64) -> Result<LevelTables, TrainError> {
    let mut seen = Seen::new(shape);
    for latent in latents.chunks_exact(shape.symbols()) {
        seen.note(level.quantise(latent, shape)?);
    }
    let order = seen.busiest(0..shape.channels);
    let mut channels = level.channels.clone();
    let mut earlier: Vec<u16> = Vec::new();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for &(c, _) in order.iter().filter(|(_, busy)| *busy >= LIVE) {
        let old = &level.channels[usize::from(c)];
        let contexts = fit_channel(&seen, c, &earlier, &mut rng)?;
        channels[usize::from(c)] = ChannelTable::with_contexts(old.gain, old.inverse, old.median, contexts)?;
        earlier.push(c);
    }
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
    let tap = |channel, &(dy, dx): &(i8, i8)| Tap { channel, dy, dx, weight: 0 };
    let mut taps: Vec<Tap> = OWN.iter().map(|at| tap(channel, at)).collect();
    taps.extend(earlier.iter().flat_map(|&c| OTHERS.iter().map(move |at| tap(c, at))));
    let predictors = regress(seen, channel, &taps, rng)?;

    // estimates under a preliminary table without bins
    let flat =
        |p: &[Predictor; 2]| Contexts::new(p.clone(), Vec::new(), vec![Vec::new()], vec![Distribution::new(0, vec![1, pmf::TOTAL - 1])?]);
    let preliminary = flat(&predictors)?;
    let (mut magnitudes, mut signed) = (Vec::new(), Vec::new());
    for field in &seen.fields {
        let [m, s] = field.estimate_all(&preliminary);
        magnitudes.extend(m);
        signed.extend(s);
    }
    let cuts = {
        let mut sorted = magnitudes.clone();
        sorted.sort_unstable();
        let above = |i: usize| RAREST.powf(i as f64 / BINS as f64);
        let mut cuts: Vec<i32> = (1..BINS).map(|i| at_share(&sorted, 1.0 - above(i))).collect();
        cuts.dedup();
        cuts
    };
    let mut binned: Vec<Vec<(i32, i32)>> = vec![Vec::new(); cuts.len() + 1];
    for ((&m, &s), symbol) in magnitudes.iter().zip(&signed).zip(seen.channel(channel.into())) {
        binned[cuts.partition_point(|&c| c <= m)].push((s, symbol));
    }
    let whole = Histogram::of(seen.channel(channel.into()));
    let (mut signed_cuts, mut distributions) = (Vec::new(), Vec::new());
    for mut bin in binned {
        bin.sort_unstable();
        let estimates: Vec<i32> = bin.iter().map(|b| b.0).collect();
        let cuts: Vec<i32> = (1..SIGNED_BINS).map(|i| at_share(&estimates, i as f64 / SIGNED_BINS as f64)).collect();
        let mut parts = vec![Vec::new(); SIGNED_BINS];
        for (estimate, symbol) in bin {
            parts[cuts.partition_point(|&c| c <= estimate)].push(symbol);
        }
        for part in parts {
            distributions.push(Histogram::of(part).smoothed(&whole)?);
        }
        signed_cuts.push(cuts);
    }
    Ok(Contexts::new(predictors, cuts, signed_cuts, distributions)?)
}

/// The value below which this share of sorted values lies.
fn at_share(sorted: &[i32], share: f64) -> i32 {
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// Predictors of magnitude and signed value from random positions: the strongest terms, refitted, as integers.
fn regress(seen: &Seen, channel: u16, taps: &[Tap], rng: &mut impl Rng) -> Result<[Predictor; 2], TrainError> {
    let positions = seen.shape.positions();
    let total = seen.symbols.len() * positions;
    let own = Tap { channel, dy: 0, dx: 0, weight: 0 };
    // columns: taps, one, target
    let columns = taps.len() + 2;
    let rows = sample(rng, total, ROWS.min(total));
    let mut data = [Vec::with_capacity(rows.len() * columns), Vec::with_capacity(rows.len() * columns)];
    for row in rows {
        let (field, at) = (&seen.fields[row / positions], row % positions);
        for tap in taps {
            let value = field.read(tap, at);
            data[0].push(f32::from(value[0]));
            data[1].push(f32::from(value[1]));
        }
        let value = field.read(&own, at);
        data[0].extend([1.0, f32::from(value[0])]);
        data[1].extend([1.0, f32::from(value[1])]);
    }
    let mut predictors = [Predictor::default(), Predictor::default()];
    for (predictor, values) in predictors.iter_mut().zip(data) {
        let x = Tensor::from_slice(&values).view([-1, columns as i64]).to_kind(Kind::Double);
        let gram = x.tr().matmul(&x);
        let all: Vec<i64> = (0..taps.len() as i64).collect();
        let weights = solve(&gram, &all)?;
        let spread = Vec::<f64>::try_from(gram.diagonal(0, 0, 1).sqrt())?;
        let mut strongest = all;
        strongest.sort_by(|&a, &b| {
            (weights[b as usize].abs() * spread[b as usize]).total_cmp(&(weights[a as usize].abs() * spread[a as usize]))
        });
        strongest.truncate(TAPS);
        let weights = solve(&gram, &strongest)?;
        let fixed = |w: f64| (w * ONE).round().clamp(f64::from(i16::MIN), f64::from(i16::MAX)) as i16;
        predictor.taps = strongest.iter().zip(&weights).map(|(&t, &w)| Tap { weight: fixed(w), ..taps[t as usize] }).collect();
        predictor.bias = (weights.last().copied().unwrap_or(0.0) * ONE).round() as i32;
    }
    Ok(predictors)
}

/// Least squares on the chosen columns and the constant, from the Gram matrix whose last two columns are the constant
/// and the target; the constant's weight comes last.
fn solve(gram: &Tensor, columns: &[i64]) -> Result<Vec<f64>, TrainError> {
    let last = gram.size()[0] - 1;
    let mut chosen = columns.to_vec();
    chosen.push(last - 1);
    let index = Tensor::from_slice(&chosen);
    let rows = gram.index_select(0, &index);
    let n = chosen.len() as i64;
    let a = rows.index_select(1, &index) + Tensor::eye(n, (Kind::Double, gram.device())) * RIDGE;
    let target = rows.select(1, last).view([n, 1]);
    let solved = target.cholesky_solve(&a.linalg_cholesky(false), false);
    Ok(Vec::<f64>::try_from(solved.view(-1))?)
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
