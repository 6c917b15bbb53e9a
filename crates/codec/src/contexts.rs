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
        Ok(Self { magnitude, signed, cuts, signed_cuts, distributions })
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

    pub(crate) fn bin(&self, magnitude: i32, signed: i32) -> usize {
        let bin = self.cuts.partition_point(|&c| c <= magnitude);
        let signed_cuts = &self.signed_cuts[bin];
        bin * (signed_cuts.len() + 1) + signed_cuts.partition_point(|&c| c <= signed)
    }
}

/// True for positions that are coded before the symbol itself in row order.
fn before(t: &Tap) -> bool {
    t.dy < 0 || (t.dy == 0 && t.dx < 0)
}

/// Symbols as predictors see them: saturated, in planes with a border of zeros.
pub struct Field {
    width: usize,
    height: usize,
    stride: usize,
    magnitudes: Vec<i16>,
    signed: Vec<i16>,
}

impl Field {
    /// All symbols zero.
    pub fn new(shape: LatentShape) -> Self {
        let (width, height) = (usize::from(shape.width), usize::from(shape.height));
        let stride = width + 2 * REACH;
        let len = usize::from(shape.channels) * stride * (height + 2 * REACH);
        Self { width, height, stride, magnitudes: vec![0; len], signed: vec![0; len] }
    }

    /// Notes the symbol of `channel` at position `at` (row-major).
    pub fn set(&mut self, channel: usize, at: usize, symbol: i32) {
        self.put(self.index(channel, at / self.width, at % self.width), symbol);
    }

    /// Notes a symbol at a place given by [`Field::index`].
    pub(crate) fn put(&mut self, index: usize, symbol: i32) {
        let signed = symbol.clamp(-SATURATION, SATURATION);
        self.signed[index] = signed as i16;
        self.magnitudes[index] = signed.abs().min(SATURATION / 2) as i16;
    }

    /// Place of row `y`, column `x` (of the latent) in the planes.
    pub(crate) fn index(&self, channel: usize, y: usize, x: usize) -> usize {
        (channel * (self.height + 2 * REACH) + y + REACH) * self.stride + x + REACH
    }

    fn at(&self, tap: &Tap, y: usize, x: usize) -> usize {
        let (y, x) = (y as isize + isize::from(tap.dy), x as isize + isize::from(tap.dx));
        let row = (usize::from(tap.channel) * (self.height + 2 * REACH) + REACH) as isize + y;
        (row * self.stride as isize + x) as usize + REACH
    }

    /// The symbol that `tap` reads from position `at` (row-major): magnitude and signed value, saturated.
    pub fn read(&self, tap: &Tap, at: usize) -> [i16; 2] {
        let i = self.at(tap, at / self.width, at % self.width);
        [self.magnitudes[i], self.signed[i]]
    }

    /// Adds the terms of `predictor` whose tap passes `wanted` to `sums`: rows as far apart as in the planes, so that all of them are one
    /// loop; what lies between them means nothing.
    fn add(&self, planes: &[i16], predictor: &Predictor, wanted: impl Fn(&Tap) -> bool, sums: &mut [i32]) {
        for tap in predictor.taps.iter().filter(|t| wanted(t)) {
            let from = self.at(tap, 0, 0);
            for (sum, &value) in sums.iter_mut().zip(&planes[from..]) {
                *sum += i32::from(tap.weight) * i32::from(value);
            }
        }
    }

    /// Estimates (magnitude, signed) from the taps that pass `wanted`, at [`Field::place`].
    fn estimates(&self, contexts: &Contexts, wanted: impl Fn(&Tap) -> bool) -> [Vec<i32>; 2] {
        let len = self.place(self.height - 1, self.width);
        let mut sums = contexts.predictors().map(|p| vec![p.bias; len]);
        self.add(&self.magnitudes, &contexts.magnitude, &wanted, &mut sums[0]);
        self.add(&self.signed, &contexts.signed, &wanted, &mut sums[1]);
        sums
    }

    /// Where [`Field::estimate_others`] has row `y`, column `x`.
    pub(crate) fn place(&self, y: usize, x: usize) -> usize {
        y * self.stride + x
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

    /// Estimates from other channels at [`Field::place`], to be completed position by position with [`Field::complete`].
    pub(crate) fn estimate_others(&self, contexts: &Contexts, channel: u16) -> [Vec<i32>; 2] {
        self.estimates(contexts, |t| t.channel != channel)
    }

    /// The channel's taps on itself: distance in the planes, weights in both predictors.
    pub(crate) fn own_taps(&self, contexts: &Contexts, channel: u16) -> Vec<(isize, [i32; 2])> {
        let mut own: Vec<(isize, [i32; 2])> = Vec::new();
        for (which, predictor) in contexts.predictors().into_iter().enumerate() {
            for tap in predictor.taps.iter().filter(|t| t.channel == channel) {
                let distance = isize::from(tap.dy) * self.stride as isize + isize::from(tap.dx);
                match own.iter_mut().find(|(d, _)| *d == distance) {
                    Some((_, weights)) => weights[which] += i32::from(tap.weight),
                    None => {
                        let mut weights = [0; 2];
                        weights[which] = tap.weight.into();
                        own.push((distance, weights));
                    }
                }
            }
        }
        own
    }

    /// Number of the distribution at `index`, given the `partial` sums of other channels.
    #[inline]
    pub(crate) fn complete(&self, contexts: &Contexts, own: &[(isize, [i32; 2])], partial: [i32; 2], index: usize) -> usize {
        let [mut magnitude, mut signed] = partial;
        for &(distance, weights) in own {
            let at = index.wrapping_add_signed(distance);
            magnitude += weights[0] * i32::from(self.magnitudes[at]);
            signed += weights[1] * i32::from(self.signed[at]);
        }
        contexts.bin(magnitude, signed)
    }
}
