//! The rate of the deployed entropy coder as something that can be differentiated.
//!
//! Each symbol is coded with the distribution that its context picks (`isthmus_codec::contexts`). Here that distribution's code
//! lengths at the two neighbouring symbols are interpolated, so that a latent knows which way is cheaper. Distributions are adapted
//! by exponential tilting: per channel and level, `p(s) -> p(s)^exp(scale) * exp(shift * s)`, normalised: two numbers that narrow or
//! widen and move all of a channel's distributions.

use isthmus_codec::{Contexts, Distribution, LatentShape, LevelTables, pmf};
use tch::{Kind, Tensor};

use crate::error::FederateError;
use crate::train::torch;

/// Symbols farther out count like this one.
const REACH: i64 = 40;
/// Bits of an escape beside its symbol: a few nibbles.
const ESCAPE_BITS: f64 = 8.0;

/// Code lengths of one level.
pub struct Rate<'a> {
    level: &'a LevelTables,
    shape: LatentShape,
    /// Natural logarithms of probabilities (channels, bins, symbols).
    log: Tensor,
    bins: i64,
}

fn log_probability(d: &Distribution, symbol: i64) -> f32 {
    let widths = d.widths();
    let log = |w: u32| (f64::from(w) / f64::from(pmf::TOTAL)).ln();
    let inside = usize::try_from(symbol - i64::from(d.offset)).ok().filter(|i| *i < d.escape());
    inside.map_or_else(|| log(widths[d.escape()]) - ESCAPE_BITS * std::f64::consts::LN_2, |i| log(widths[i])) as f32
}

impl<'a> Rate<'a> {
    /// Of a bundle's level.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn new(level: &'a LevelTables, shape: LatentShape) -> Result<Self, FederateError> {
        let of = |c: &'a isthmus_codec::ChannelTable| c.contexts.distributions();
        let bins = level.channels.iter().map(|c| of(c).len()).max().unwrap_or(1);
        let mut log = Vec::with_capacity(level.channels.len() * bins * (2 * REACH + 1) as usize);
        for channel in &level.channels {
            for bin in 0..bins {
                // channels with fewer bins never ask for the rest
                let distribution = &of(channel)[bin.min(of(channel).len() - 1)];
                log.extend((-REACH..=REACH).map(|s| log_probability(distribution, s)));
            }
        }
        let log = Tensor::f_from_slice(&log).and_then(|t| t.f_view([-1, bins as i64, 2 * REACH + 1])).map_err(torch)?;
        Ok(Self { level, shape, log, bins: bins as i64 })
    }

    /// Bits of each sample: `steps` (N, C, H, W) in quantisation steps from the median, tilted by `scale` and `shift` (C).
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn bits(&self, steps: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor, FederateError> {
        let n = steps.size()[0];
        let symbols = Vec::<f32>::try_from(steps.detach().round().contiguous().view(-1)).map_err(torch)?;
        let mut bins: Vec<i64> = Vec::with_capacity(symbols.len());
        for sample in symbols.chunks_exact(self.shape.symbols()) {
            let whole: Vec<i32> = sample.iter().map(|s| *s as i32).collect();
            bins.extend(self.level.bins(&whole, self.shape)?.into_iter().map(|b| b as i64));
        }
        let values = Tensor::arange_start(-REACH, REACH + 1, (Kind::Float, tch::Device::Cpu));
        let tilted = scale.exp().view([-1, 1, 1]) * &self.log + shift.view([-1, 1, 1]) * values;
        let log = &tilted - tilted.logsumexp([2i64].as_slice(), true);
        let channels = Tensor::arange(self.log.size()[0], (Kind::Int64, tch::Device::Cpu)).view([1, -1, 1]);
        let bins = Tensor::f_from_slice(&bins).and_then(|t| t.f_view([n, self.log.size()[0], -1])).map_err(torch)?;
        let steps = steps.reshape([n, self.log.size()[0], -1]).clamp((1 - REACH) as f64, (REACH - 1) as f64);
        let below = steps.detach().floor();
        let place = (channels * self.bins + bins) * (2 * REACH + 1) + below.to_kind(Kind::Int64) + REACH;
        let flat = log.reshape([-1]);
        let at = |offset: i64| flat.index_select(0, &(&place + offset).view(-1)).view_as(&steps);
        let share = &steps - &below;
        let nats: Tensor = at(0) * (1.0 - &share) + at(1) * share;
        Ok(nats.neg().sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float) / std::f64::consts::LN_2)
    }
}

/// A distribution tilted as above, as integer widths over the same symbols.
fn tilted(d: &Distribution, scale: f64, shift: f64) -> Result<Distribution, FederateError> {
    let power = scale.exp();
    let log = |w: u32| power * (f64::from(w) / f64::from(pmf::TOTAL)).ln();
    let mut logs: Vec<f64> = d.widths()[..d.escape()].iter().zip(d.offset..).map(|(w, s)| log(*w) + shift * f64::from(s)).collect();
    logs.push(log(d.widths()[d.escape()]));
    let most = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logs.iter().map(|l| (l - most).exp()).sum();
    let mut masses: Vec<f64> = logs.iter().map(|l| (l - most).exp() / total).collect();
    let escape = masses.pop().unwrap_or_default();
    Ok(Distribution::new(d.offset, pmf::quantise(&masses, escape)?)?)
}

/// All of a channel's distributions, tilted.
///
/// # Errors
/// If the numbers are out of all proportion.
pub fn tilt(contexts: &Contexts, scale: f64, shift: f64) -> Result<Contexts, FederateError> {
    let distributions = contexts.distributions().iter().map(|d| tilted(d, scale, shift)).collect::<Result<_, _>>()?;
    Ok(contexts.with_distributions(distributions)?)
}
