//! Contexts: which distribution a symbol is coded with, from the symbols coded before it.
//!
//! Two linear predictors over earlier symbols (of the same channel to the left and above, of channels coded
//! earlier anywhere nearby) estimate a symbol's magnitude and its signed value; thresholds turn the two
//! estimates into the number of a distribution. All of it is integer arithmetic on symbols, so every machine
//! picks the same distribution. The method is that of context modelling in lossless image coding (Wu &
//! Memon, "Context-based, adaptive, lossless image coding", IEEE Trans. Communications 45(4), 1997).

use crate::CodecError;
use crate::distribution::Distribution;
use crate::tables::LatentShape;

/// Farthest position that a tap reads, each way.
pub const REACH: usize = 2;
/// Most taps of one predictor.
pub const MAX_TAPS: usize = 64;
/// Most thresholds on the magnitude, and on the signed value within one magnitude bin.
pub const MAX_CUTS: usize = 31;
/// Symbols count no more than this in the signed estimate, and half as much in that of the magnitude.
const SATURATION: i32 = 31;
/// Largest bias: sums of 64 saturated taps and a bias stay far below 2^31.
const MAX_BIAS: u32 = 1 << 28;

/// One term of a predictor: a symbol at an offset, times a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tap {
    /// Channel that is read.
    pub channel: u16,
    /// Rows below the symbol to code (negative: above).
    pub dy: i8,
    /// Columns to the right (negative: left).
    pub dx: i8,
    /// Factor.
    pub weight: i16,
}

/// `bias + sum of weight x symbol`, positions outside of the latent counting as zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Predictor {
    /// Constant term.
    pub bias: i32,
    /// Terms.
    pub taps: Vec<Tap>,
}

/// How the distribution of each symbol of one channel is chosen.
#[derive(Debug, Clone)]
pub struct Contexts {
    magnitude: Predictor,
    signed: Predictor,
    cuts: Vec<i32>,
    signed_cuts: Vec<Vec<i32>>,
    distributions: Vec<Distribution>,
    steps: Steps,
}

/// Thresholds as they are looked up: counting those that a value reaches, all of them, is faster than a search, whose branches cannot be foreseen.
#[derive(Debug, Clone)]
struct Steps {
    magnitude: Vec<[i32; LANES]>,
    /// Equally many rows for every magnitude bin.
    signed: Vec<[i32; LANES]>,
    /// Distributions of a magnitude bin.
    bins: usize,
}

/// Thresholds that are compared at once.
const LANES: usize = 4;

impl Steps {
    fn new(cuts: &[i32], signed_cuts: &[Vec<i32>]) -> Self {
        let rows = |cuts: &[i32]| -> Vec<[i32; LANES]> {
            // sums stay far below the largest integer: it is never reached
            cuts.chunks(LANES).map(|c| std::array::from_fn(|i| c.get(i).copied().unwrap_or(i32::MAX))).collect()
        };
        let bins = signed_cuts.first().map_or(0, Vec::len) + 1;
        Self { magnitude: rows(cuts), signed: signed_cuts.iter().flat_map(|c| rows(c)).collect(), bins }
    }

    #[inline(always)]
    fn reached(rows: &[[i32; LANES]], value: i32) -> usize {
        let mut counts = [0; LANES];
        for row in rows {
            for (count, &cut) in counts.iter_mut().zip(row) {
                *count += i32::from(cut <= value);
            }
        }
        counts.iter().sum::<i32>() as usize
    }

    #[inline(always)]
    fn bin(&self, magnitude: i32, signed: i32) -> usize {
        let bin = Self::reached(&self.magnitude, magnitude);
        let rows = self.bins.saturating_sub(1).div_ceil(LANES);
        bin * self.bins + Self::reached(&self.signed[bin * rows..][..rows], signed)
    }
}

impl Contexts {
    /// One distribution for every symbol: a static table.
    pub fn none(distribution: Distribution) -> Self {
        Self {
            magnitude: Predictor::default(),
            signed: Predictor::default(),
            cuts: Vec::new(),
            signed_cuts: vec![Vec::new()],
            distributions: vec![distribution],
            steps: Steps::new(&[], &[]),
        }
    }

    /// Contexts from their parts: bin `b` of the magnitude (below `cuts[b]`) has the thresholds
    /// `signed_cuts[b]`, all bins equally many; distributions are in the order of bins, then of signed bins.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if the numbers of parts do not fit, thresholds do not rise, or a predictor is too
    /// large or reads too far.
    pub fn new(
        predictors: [Predictor; 2],
        cuts: Vec<i32>,
        signed_cuts: Vec<Vec<i32>>,
        distributions: Vec<Distribution>,
    ) -> Result<Self, CodecError> {
        let per_bin = signed_cuts.first().map_or(0, Vec::len);
        let rising = |v: &[i32]| v.windows(2).all(|w| w[0] <= w[1]);
        if signed_cuts.len() != cuts.len() + 1
            || signed_cuts.iter().any(|s| s.len() != per_bin || !rising(s))
            || !rising(&cuts)
            || cuts.len().max(per_bin) > MAX_CUTS
        {
            return Err(CodecError::tables("thresholds must rise, be at most 31, and be equally many in every magnitude bin"));
        }
        if distributions.len() != signed_cuts.len() * (per_bin + 1) {
            return Err(CodecError::tables(format!("{} distributions for the bins of a channel", distributions.len())));
        }
        for p in &predictors {
            let far = |t: &Tap| usize::from(t.dy.unsigned_abs().max(t.dx.unsigned_abs())) > REACH;
            if p.taps.len() > MAX_TAPS || p.bias.unsigned_abs() > MAX_BIAS || p.taps.iter().any(far) {
                return Err(CodecError::tables("a predictor has more than 64 taps, reads farther than 2 positions or has a huge bias"));
            }
        }
        let [magnitude, signed] = predictors;
        let steps = Steps::new(&cuts, &signed_cuts);
        Ok(Self { magnitude, signed, cuts, signed_cuts, distributions, steps })
    }

    /// True if every symbol has the same distribution.
    pub fn is_static(&self) -> bool {
        self.distributions.len() == 1
    }

    /// The predictors of magnitude and signed value.
    pub fn predictors(&self) -> [&Predictor; 2] {
        [&self.magnitude, &self.signed]
    }

    /// Thresholds on the magnitude.
    pub fn cuts(&self) -> &[i32] {
        &self.cuts
    }

    /// Thresholds on the signed value, per magnitude bin.
    pub fn signed_cuts(&self) -> &[Vec<i32>] {
        &self.signed_cuts
    }

    /// The distributions, in the order of bins, then of signed bins.
    pub fn distributions(&self) -> &[Distribution] {
        &self.distributions
    }

    /// Checks that taps read nothing that a decoder does not know yet: channels coded `earlier`, or the
    /// channel itself above and to the left.
    pub(crate) fn check_causal(&self, channel: u16, earlier: impl Fn(u16) -> bool) -> Result<(), CodecError> {
        let known = |t: &Tap| earlier(t.channel) || (t.channel == channel && before(t));
        match self.magnitude.taps.iter().chain(&self.signed.taps).find(|t| !known(t)) {
            Some(t) => Err(CodecError::tables(format!("channel {channel} is predicted from channel {} before that is coded", t.channel))),
            None => Ok(()),
        }
    }

    #[inline(always)]
    pub(crate) fn bin(&self, magnitude: i32, signed: i32) -> usize {
        self.steps.bin(magnitude, signed)
    }
}

/// True for positions that are coded before the symbol itself in row order.
fn before(t: &Tap) -> bool {
    t.dy < 0 || (t.dy == 0 && t.dx < 0)
}

/// Symbols as predictors see them: saturated, in planes with a border of zeros. Channels that no predictor reads have none.
pub struct Field {
    width: usize,
    height: usize,
    stride: usize,
    /// Where each channel's plane begins.
    planes: Vec<Option<usize>>,
    magnitudes: Vec<i8>,
    signed: Vec<i8>,
}

/// Magnitude and value of a symbol as predictors see it.
#[inline(always)]
fn saturated(symbol: i32) -> [i8; 2] {
    let signed = symbol.clamp(-SATURATION, SATURATION);
    [signed.abs().min(SATURATION / 2) as i8, signed as i8]
}

/// Adds `weight` times the values to the sums.
#[inline(always)]
fn add(sums: &mut [i32], weight: i16, values: &[i8]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += i32::from(weight) * i32::from(value);
    }
}

impl Field {
    /// All symbols zero; predictors read only channels that are `wanted`.
    pub fn new(shape: LatentShape, wanted: impl Fn(u16) -> bool) -> Self {
        let (width, height) = (usize::from(shape.width), usize::from(shape.height));
        let stride = width + 2 * REACH;
        let mut len = 0;
        let planes = (0..shape.channels).map(|channel| {
            let begin = len;
            wanted(channel).then(|| {
                len += stride * (height + 2 * REACH);
                begin
            })
        });
        let planes = planes.collect();
        Self { width, height, stride, planes, magnitudes: vec![0; len], signed: vec![0; len] }
    }

    /// Columns of the latent.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Notes the symbols of `channel` (row-major), once.
    pub fn note(&mut self, channel: u16, symbols: &[i32]) {
        // most channels of most levels are empty: a new field is zero
        let empty = symbols.iter().fold(0, |any, s| any | s) == 0;
        let Some(begin) = self.planes.get(usize::from(channel)).copied().flatten().filter(|_| !empty) else { return };
        for (y, row) in symbols.chunks_exact(self.width).enumerate() {
            let at = begin + self.inside(y, 0);
            for ((magnitude, signed), &symbol) in self.magnitudes[at..].iter_mut().zip(&mut self.signed[at..]).zip(row) {
                [*magnitude, *signed] = saturated(symbol);
            }
        }
    }

    /// Row `y`, column `x` of the latent in a plane.
    fn inside(&self, y: usize, x: usize) -> usize {
        (y + REACH) * self.stride + x + REACH
    }

    /// Where `tap` reads from for row `y`, column `x` in a plane.
    fn shifted(&self, tap: &Tap, y: usize, x: usize) -> usize {
        let distance = isize::from(tap.dy) * self.stride as isize + isize::from(tap.dx);
        self.inside(y, x).wrapping_add_signed(distance)
    }

    /// The symbol that `tap` reads from position `at` (row-major): magnitude and signed value, saturated.
    pub fn read(&self, tap: &Tap, at: usize) -> [i8; 2] {
        let begin = self.planes.get(usize::from(tap.channel)).copied().flatten();
        begin.map_or([0; 2], |begin| {
            let i = begin + self.shifted(tap, at / self.width, at % self.width);
            [self.magnitudes[i], self.signed[i]]
        })
    }

    /// Estimates (magnitude, signed) from the taps that pass `wanted`, in rows as far apart as in the planes, so that all of them are one loop; what
    /// lies between them means nothing.
    fn estimates(&self, contexts: &Contexts, wanted: impl Fn(&Tap) -> bool) -> [Vec<i32>; 2] {
        let len = (self.height - 1) * self.stride + self.width;
        let of = |predictor: &Predictor, planes: &[i8]| {
            let mut sums = vec![predictor.bias; len];
            for tap in predictor.taps.iter().filter(|t| wanted(t)) {
                if let Some(begin) = self.planes.get(usize::from(tap.channel)).copied().flatten() {
                    add(&mut sums, tap.weight, &planes[begin + self.shifted(tap, 0, 0)..]);
                }
            }
            sums
        };
        [of(&contexts.magnitude, &self.magnitudes), of(&contexts.signed, &self.signed)]
    }

    /// Estimates at every position from all taps, once all symbols they read are known.
    pub fn estimate_all(&self, contexts: &Contexts) -> [Vec<i32>; 2] {
        self.estimates(contexts, |_| true).map(|sums| sums.chunks(self.stride).flat_map(|row| &row[..self.width]).copied().collect())
    }

    /// Number of the distribution of every position of a channel whose symbols are all known.
    pub(crate) fn bins(&self, contexts: &Contexts) -> Vec<usize> {
        let [magnitude, signed] = self.estimate_all(contexts);
        magnitude.into_iter().zip(signed).map(|(m, s)| contexts.bin(m, s)).collect()
    }

    /// The channel that is decoded now: what other channels say of it is known.
    pub(crate) fn decoding<'a>(&'a self, contexts: &'a Contexts, channel: u16) -> Decoding<'a> {
        let mut left = [[0; 2]; REACH];
        for (which, predictor) in contexts.predictors().into_iter().enumerate() {
            for tap in predictor.taps.iter().filter(|t| t.channel == channel && t.dy == 0) {
                // a channel's taps on its own row lie to the left: `check_causal`
                if let Some(weights) = left.get_mut(usize::from(tap.dx.unsigned_abs()).wrapping_sub(1)) {
                    weights[which] += i32::from(tap.weight);
                }
            }
        }
        let above = contexts.predictors().map(|p| p.taps.iter().filter(|t| t.channel == channel && t.dy < 0).collect());
        let len = self.stride * (self.height + 2 * REACH);
        Decoding {
            field: self,
            contexts,
            estimates: self.estimates(contexts, |t| t.channel != channel),
            above,
            left,
            planes: [vec![0; len], vec![0; len]],
            near: [[0; 2]; REACH],
            row: [0; 2],
        }
    }
}

/// A channel of which symbols become known one by one.
pub(crate) struct Decoding<'a> {
    field: &'a Field,
    contexts: &'a Contexts,
    /// As of [`Field::estimates`].
    estimates: [Vec<i32>; 2],
    /// Taps of both predictors on the channel's own rows above.
    above: [Vec<&'a Tap>; 2],
    /// Weights of both predictors on its own symbols to the left, nearest first.
    left: [[i32; 2]; REACH],
    /// Magnitudes and signed values so far.
    planes: [Vec<i8>; 2],
    /// The last ones of this row, the last first.
    near: [[i32; 2]; REACH],
    /// Where this row begins in estimates and in planes.
    row: [usize; 2],
}

impl Decoding<'_> {
    /// Goes on to row `y`: those above are known.
    pub(crate) fn begin_row(&mut self, y: usize) {
        self.row = [y * self.field.stride, self.field.inside(y, 0)];
        self.near = [[0; 2]; REACH];
        let columns = self.row[0]..self.row[0] + self.field.width;
        for ((sums, taps), plane) in self.estimates.iter_mut().zip(&self.above).zip(&self.planes) {
            for tap in taps {
                add(&mut sums[columns.clone()], tap.weight, &plane[self.field.shifted(tap, y, 0)..]);
            }
        }
    }

    /// The distribution of column `x`: those to the left are known.
    #[inline(always)]
    pub(crate) fn distribution(&self, x: usize) -> &Distribution {
        let [mut magnitude, mut signed] = [self.estimates[0][self.row[0] + x], self.estimates[1][self.row[0] + x]];
        for (weights, symbol) in self.left.iter().zip(&self.near) {
            magnitude += weights[0] * symbol[0];
            signed += weights[1] * symbol[1];
        }
        &self.contexts.distributions[self.contexts.bin(magnitude, signed)]
    }

    /// Notes the symbol of column `x`.
    #[inline(always)]
    pub(crate) fn put(&mut self, x: usize, symbol: i32) {
        let seen = saturated(symbol);
        [self.planes[0][self.row[1] + x], self.planes[1][self.row[1] + x]] = seen;
        self.near.rotate_right(1);
        self.near[0] = seen.map(i32::from);
    }
}
