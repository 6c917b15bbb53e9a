//! Contexts: which distribution a symbol is coded with, from the symbols coded before it.
//!
//! Earlier symbols (of the same channel to the left and above, of channels coded earlier anywhere nearby) estimate a
//! symbol's magnitude and its signed value, by two linear predictors or by a small network ([`crate::estimator`]);
//! thresholds turn the two estimates into the number of a distribution. All of it is integer arithmetic on symbols, so
//! every machine picks the same distribution. The method is that of context modelling in lossless image coding (Wu &
//! Memon, "Context-based, adaptive, lossless image coding", IEEE Trans. Communications 45(4), 1997).
//!
//! Most symbols are zero, and zeros say nothing: every other symbol adds what it says to the sums of those that read it.

use crate::CodecError;
use crate::distribution::Distribution;
use crate::estimator::{Estimator, REACH, Says, Sums};
use crate::tables::LatentShape;

/// Most thresholds on the magnitude, and on the signed value within one magnitude bin.
pub const MAX_CUTS: usize = 31;

/// How the distribution of each symbol of one channel is chosen.
#[derive(Debug, Clone)]
pub struct Contexts {
    estimator: Estimator,
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
    fn bin(&self, [magnitude, signed]: [i32; 2]) -> usize {
        let bin = Self::reached(&self.magnitude, magnitude);
        let rows = self.bins.saturating_sub(1).div_ceil(LANES);
        bin * self.bins + Self::reached(&self.signed[bin * rows..][..rows], signed)
    }
}

impl Contexts {
    /// One distribution for every symbol: a static table.
    pub fn none(distribution: Distribution) -> Self {
        Self {
            estimator: Estimator::default(),
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
    /// [`CodecError::BadTables`] if the numbers of parts do not fit, thresholds do not rise, or an estimator is too
    /// large or reads too far.
    pub fn new(
        estimator: impl Into<Estimator>,
        cuts: Vec<i32>,
        signed_cuts: Vec<Vec<i32>>,
        distributions: Vec<Distribution>,
    ) -> Result<Self, CodecError> {
        let estimator = estimator.into();
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
        estimator.check()?;
        let steps = Steps::new(&cuts, &signed_cuts);
        Ok(Self { estimator, cuts, signed_cuts, distributions, steps })
    }

    /// The same choice among other distributions.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if they are not equally many.
    pub fn with_distributions(&self, distributions: Vec<Distribution>) -> Result<Self, CodecError> {
        Self::new(self.estimator.clone(), self.cuts.clone(), self.signed_cuts.clone(), distributions)
    }

    /// True if every symbol has the same distribution.
    pub fn is_static(&self) -> bool {
        self.distributions.len() == 1
    }

    /// What estimates magnitude and signed value.
    pub fn estimator(&self) -> &Estimator {
        &self.estimator
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
        let known = |c: u16, dy: i8, dx: i8| earlier(c) || (c == channel && (dy < 0 || (dy == 0 && dx < 0)));
        match self.estimator.reads().find(|&(c, dy, dx)| !known(c, dy, dx)) {
            Some((c, ..)) => Err(CodecError::tables(format!("channel {channel} is predicted from channel {c} before that is coded"))),
            None => Ok(()),
        }
    }
}

/// A symbol that is not zero: where it lies in a plane with a border, and what it is.
#[derive(Debug, Clone, Copy)]
struct Spoken {
    at: u32,
    says: Says,
}

/// Symbols as estimators see them: those that are not zero, by channel.
pub struct Field {
    shape: LatentShape,
    planes: Vec<Vec<Spoken>>,
}

/// Planes have a border of [`REACH`] on all sides, so that whatever a tap reads lies inside.
#[derive(Debug, Clone, Copy)]
struct Plane {
    stride: usize,
    len: usize,
}

impl Plane {
    fn of(shape: LatentShape) -> Self {
        let stride = usize::from(shape.width) + 2 * REACH;
        Self { stride, len: stride * (usize::from(shape.height) + 2 * REACH) }
    }

    /// Where lies what reads a symbol at such a place, from the symbol on.
    fn back(self, (_, dy, dx): (u16, i8, i8)) -> isize {
        -(isize::from(dy) * self.stride as isize + isize::from(dx))
    }

    /// Row `y`, column `x` of the latent.
    #[inline(always)]
    fn inside(self, y: usize, x: usize) -> usize {
        (y + REACH) * self.stride + x + REACH
    }
}

impl Field {
    /// All symbols zero.
    pub fn new(shape: LatentShape) -> Self {
        Self { shape, planes: vec![Vec::new(); shape.channels.into()] }
    }

    /// Columns of the latent.
    pub(crate) fn width(&self) -> usize {
        self.shape.width.into()
    }

    /// Notes the symbols of `channel` (row-major), once.
    pub fn note(&mut self, channel: u16, symbols: &[i32]) {
        let Some(spoken) = self.planes.get_mut(usize::from(channel)) else { return };
        let plane = Plane::of(self.shape);
        // chunks of nothing cannot be made
        for (y, row) in symbols.chunks_exact(usize::from(self.shape.width).max(1)).enumerate() {
            for (x, &symbol) in row.iter().enumerate().filter(|(_, s)| **s != 0) {
                spoken.push(Spoken { at: plane.inside(y, x) as u32, says: Says::of(symbol) });
            }
        }
    }

    /// Sums at every position of a plane, from what reads a channel that is `wanted`.
    fn sums<S: Sums>(&self, of: &S, wanted: impl Fn(u16) -> bool) -> Vec<S::Sum> {
        let plane = Plane::of(self.shape);
        let mut sums = vec![of.bias(); plane.len];
        for &reader in of.readers() {
            let place = S::place(&reader);
            let (back, spoken) = (plane.back(place), self.planes.get(usize::from(place.0)));
            for spoken in spoken.filter(|_| wanted(place.0)).into_iter().flatten() {
                if let Some(sum) = sums.get_mut((spoken.at as usize).wrapping_add_signed(back)) {
                    S::add(&reader, sum, spoken.says);
                }
            }
        }
        sums
    }

    fn estimates<S: Sums>(&self, of: &S) -> Vec<[i32; 2]> {
        let (plane, sums) = (Plane::of(self.shape), self.sums(of, |_| true));
        let rows = (0..usize::from(self.shape.height)).map(|y| &sums[plane.inside(y, 0)..][..self.shape.width.into()]);
        rows.flatten().map(|sum| of.estimate(sum)).collect()
    }

    /// Estimates of magnitude and signed value at every position, once all symbols that are read are known.
    pub fn estimate_all(&self, estimator: &Estimator) -> Vec<[i32; 2]> {
        match estimator {
            Estimator::Linear(linear) => self.estimates(linear),
            Estimator::Network(network) => self.estimates(network.as_ref()),
        }
    }

    /// Number of the distribution of every position of a channel whose symbols are all known.
    pub(crate) fn bins(&self, contexts: &Contexts) -> Vec<usize> {
        self.estimate_all(&contexts.estimator).into_iter().map(|e| contexts.steps.bin(e)).collect()
    }

    /// The channel that is decoded now: what other channels say of it is known.
    pub(crate) fn decoding<'a, S: Sums>(&self, contexts: &'a Contexts, of: &'a S, channel: u16) -> Decoding<'a, S> {
        let plane = Plane::of(self.shape);
        let own = of.readers().iter().map(|r| (S::place(r), *r)).filter(|(place, _)| place.0 == channel);
        let own = own.map(|(place, reader)| (plane.back(place), reader)).collect();
        Decoding { contexts, of, plane, sums: self.sums(of, |c| c != channel), own }
    }
}

/// A channel of which symbols become known one by one.
pub(crate) struct Decoding<'a, S: Sums> {
    contexts: &'a Contexts,
    of: &'a S,
    plane: Plane,
    sums: Vec<S::Sum>,
    /// What reads the channel itself, and where it lies, from a symbol on.
    own: Vec<(isize, S::Reader)>,
}

impl<S: Sums> Decoding<'_, S> {
    /// The distribution of row `y`, column `x`: what is above and to the left is known.
    #[inline(always)]
    pub(crate) fn distribution(&self, y: usize, x: usize) -> &Distribution {
        let estimates = self.of.estimate(&self.sums[self.plane.inside(y, x)]);
        &self.contexts.distributions[self.contexts.steps.bin(estimates)]
    }

    /// Notes the symbol of row `y`, column `x`.
    #[inline(always)]
    pub(crate) fn put(&mut self, y: usize, x: usize, symbol: i32) {
        if symbol == 0 {
            return;
        }
        let (at, says) = (self.plane.inside(y, x), Says::of(symbol));
        for (back, reader) in &self.own {
            if let Some(sum) = self.sums.get_mut(at.wrapping_add_signed(*back)) {
                S::add(reader, sum, says);
            }
        }
    }
}
