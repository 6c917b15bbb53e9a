//! What estimates a symbol's magnitude and signed value from earlier symbols, in integers: two linear predictors, or a
//! network with one hidden layer.
//!
//! Networks tell what linear predictors cannot: that a symbol is large where any of several others is, or which sign it
//! has where two of them agree.

use crate::CodecError;

/// Farthest position that a tap reads, each way.
pub const REACH: usize = 2;
/// Most taps of one predictor or network.
pub const MAX_TAPS: usize = 64;
/// Units of a network's hidden layer.
pub const UNITS: usize = 16;
/// Symbols count no more than this as signed values, and half as much as magnitudes.
const SATURATION: i32 = 31;
/// Largest bias of a predictor: sums of 64 saturated symbols and a bias stay far below 2^31.
const MAX_BIAS: u32 = 1 << 28;

/// What a symbol says to those that read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Says {
    /// The symbol, at most 31 either way.
    pub signed: i16,
    /// Its magnitude, at most 15.
    pub magnitude: i16,
}

impl Says {
    /// What `symbol` says.
    #[inline(always)]
    pub fn of(symbol: i32) -> Self {
        let signed = symbol.clamp(-SATURATION, SATURATION);
        Self { signed: signed as i16, magnitude: signed.abs().min(SATURATION / 2) as i16 }
    }
}

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

/// A symbol at an offset that all units of a network read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Input {
    /// Channel that is read.
    pub channel: u16,
    /// Rows below the symbol to code (negative: above).
    pub dy: i8,
    /// Columns to the right (negative: left).
    pub dx: i8,
    /// Each unit's factor on the signed value.
    pub signed: [i16; UNITS],
    /// Each unit's factor on the magnitude.
    pub magnitude: [i16; UNITS],
}

/// A network with one hidden layer: `unit = max(0, bias + sum of weight x symbol)`, and two sums of weight x unit, from which thresholds tell magnitude and
/// signed value. Units are computed modulo 2^16 and sums of them modulo 2^32, so that the order of terms means nothing; whoever makes a network sees to
/// it that they stay in range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Symbols that its units read.
    pub inputs: Vec<Input>,
    /// The units' constant terms.
    pub bias: [i16; UNITS],
    /// Each unit's factor for the magnitude, and for the signed value.
    pub outputs: [[i16; UNITS]; 2],
}

/// Two linear predictors: of the magnitude, from magnitudes, and of the signed value, from signed values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Linear {
    terms: Vec<Term>,
    predictors: [Predictor; 2],
}

/// A tap of one of the predictors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Term {
    predictor: usize,
    tap: Tap,
}

impl Linear {
    /// From the predictors of magnitude and signed value.
    pub fn new(predictors: [Predictor; 2]) -> Self {
        let terms = predictors.iter().enumerate().flat_map(|(predictor, p)| p.taps.iter().map(move |&tap| Term { predictor, tap }));
        Self { terms: terms.collect(), predictors }
    }

    /// The predictors of magnitude and signed value.
    pub fn predictors(&self) -> &[Predictor; 2] {
        &self.predictors
    }
}

/// Sums that symbols add to, and the estimates of magnitude and signed value that follow from them.
pub(crate) trait Sums {
    /// The sums of one position.
    type Sum: Copy;
    /// What reads a symbol.
    type Reader: Copy;

    /// Sums that nothing was added to.
    fn bias(&self) -> Self::Sum;
    fn readers(&self) -> &[Self::Reader];
    /// Channel, rows below, columns to the right.
    fn place(reader: &Self::Reader) -> (u16, i8, i8);
    /// Adds what a symbol says to the sums of the position that reads it.
    fn add(reader: &Self::Reader, sum: &mut Self::Sum, says: Says);
    fn estimate(&self, sum: &Self::Sum) -> [i32; 2];
}

impl Sums for Linear {
    type Sum = [i32; 2];
    type Reader = Term;

    fn bias(&self) -> [i32; 2] {
        [self.predictors[0].bias, self.predictors[1].bias]
    }

    fn readers(&self) -> &[Term] {
        &self.terms
    }

    fn place(Term { tap, .. }: &Term) -> (u16, i8, i8) {
        (tap.channel, tap.dy, tap.dx)
    }

    #[inline(always)]
    fn add(Term { predictor, tap }: &Term, sum: &mut [i32; 2], says: Says) {
        sum[*predictor] += i32::from(tap.weight) * i32::from([says.magnitude, says.signed][*predictor]);
    }

    #[inline(always)]
    fn estimate(&self, sum: &[i32; 2]) -> [i32; 2] {
        *sum
    }
}

impl Sums for Network {
    type Sum = [i16; UNITS];
    type Reader = Input;

    fn bias(&self) -> [i16; UNITS] {
        self.bias
    }

    fn readers(&self) -> &[Input] {
        &self.inputs
    }

    fn place(input: &Input) -> (u16, i8, i8) {
        (input.channel, input.dy, input.dx)
    }

    #[inline(always)]
    fn add(input: &Input, sum: &mut [i16; UNITS], says: Says) {
        // copies, and indices: this way compilers compute eight units at once
        let (mut new, signed, magnitude) = (*sum, input.signed, input.magnitude);
        for unit in 0..UNITS {
            let terms = signed[unit].wrapping_mul(says.signed).wrapping_add(magnitude[unit].wrapping_mul(says.magnitude));
            new[unit] = new[unit].wrapping_add(terms);
        }
        *sum = new;
    }

    #[inline(always)]
    fn estimate(&self, sum: &[i16; UNITS]) -> [i32; 2] {
        let (mut units, mut estimates) = (*sum, [0i32; 2]);
        units.iter_mut().for_each(|unit| *unit = (*unit).max(0));
        for (estimate, weights) in estimates.iter_mut().zip(&self.outputs) {
            for unit in 0..UNITS {
                *estimate = estimate.wrapping_add(i32::from(weights[unit]) * i32::from(units[unit]));
            }
        }
        estimates
    }
}

/// How magnitude and signed value are estimated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Estimator {
    /// By a weighted sum each.
    Linear(Linear),
    /// By a network.
    Network(Box<Network>),
}

impl Default for Estimator {
    fn default() -> Self {
        Self::Linear(Linear::default())
    }
}

impl From<[Predictor; 2]> for Estimator {
    fn from(predictors: [Predictor; 2]) -> Self {
        Self::Linear(Linear::new(predictors))
    }
}

impl From<Network> for Estimator {
    fn from(network: Network) -> Self {
        Self::Network(Box::new(network))
    }
}

impl Estimator {
    /// What it reads: channel, rows below, columns to the right.
    pub fn reads(&self) -> impl Iterator<Item = (u16, i8, i8)> {
        let (terms, inputs) = match self {
            Self::Linear(linear) => (&linear.terms[..], &[][..]),
            Self::Network(network) => (&[][..], &network.inputs[..]),
        };
        terms.iter().map(Linear::place).chain(inputs.iter().map(Network::place))
    }

    pub(crate) fn check(&self) -> Result<(), CodecError> {
        let far = |(_, dy, dx): (u16, i8, i8)| usize::from(dy.unsigned_abs().max(dx.unsigned_abs())) > REACH;
        let unfit = match self {
            Self::Linear(linear) => linear.predictors.iter().any(|p| p.taps.len() > MAX_TAPS || p.bias.unsigned_abs() > MAX_BIAS),
            Self::Network(network) => network.inputs.len() > MAX_TAPS,
        };
        if unfit || self.reads().any(far) {
            let why = "a predictor or network has more than 64 taps, reads farther than 2 positions or has a huge bias";
            return Err(CodecError::tables(why));
        }
        Ok(())
    }
}
