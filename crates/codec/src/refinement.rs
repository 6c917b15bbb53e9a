//! What a finer quality says beyond a coarser one that is known already: a stream of level 1 and its refinements can end after any of them (scalable coding: Ohm, "Advances in Scalable Video Coding", Proc. IEEE 93(1), 2005). [`crate::progressive`] has its layout.
//!
//! The finer quantiser is nested in the coarser one: each channel's gain and median are an odd number of times the coarser one's, so that a coarser
//! symbol `s` stands for just the finer symbols `factor x s - (factor - 1) / 2` to `factor x s + (factor - 1) / 2`, and nothing is said twice. What is coded is
//! the difference to the middle one, with contexts that also read the coarser symbols all around.

use crate::CodecError;
use crate::coder;
use crate::distribution::MAX_MAGNITUDE;
use crate::tables::{ChannelTable, LatentShape, LevelTables};

/// Largest factor from one gain to the next.
pub const MAX_FACTOR: u16 = 255;

/// Most refinements of a bundle.
pub const MAX_STEPS: usize = 8;

/// The refinements of level 1, each of what comes out of the one before.
#[derive(Debug, Clone)]
pub struct Refinements {
    steps: Vec<Refinement>,
}

impl Refinements {
    /// One after the other.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if there are none, more than [`MAX_STEPS`], or their numbers of channels differ.
    pub fn new(steps: Vec<Refinement>) -> Result<Self, CodecError> {
        let channels = |s: &Refinement| s.factors.len();
        if steps.is_empty() || steps.len() > MAX_STEPS || steps.iter().any(|s| channels(s) != channels(&steps[0])) {
            return Err(CodecError::tables(format!("{} refinements; 1 to {MAX_STEPS} can be, of as many channels", steps.len())));
        }
        Ok(Self { steps })
    }

    /// The first one refines level 1.
    pub fn steps(&self) -> &[Refinement] {
        &self.steps
    }

    /// Checks that they refine `base`: the quantisers of what it codes are nested in its own, and so on.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if they are another level's.
    pub fn check(&self, base: &LevelTables) -> Result<(), CodecError> {
        let mut below: Vec<(f32, f32, bool)> = (0u16..).zip(&base.channels).map(|(c, t)| (t.gain, t.median, base.is_coded(c))).collect();
        for (number, step) in (1..).zip(&self.steps) {
            for ((channel, (gain, median, known)), (finer, factor)) in
                below.iter_mut().enumerate().zip(step.finer().iter().zip(&step.factors))
            {
                let factor = f32::from(*factor);
                let near = |a: f32, b: f32| (a - b).abs() <= 1e-4 * b.abs().max(1e-3);
                if *known && !(near(finer.gain, *gain * factor) && near(finer.median, *median * factor)) {
                    return Err(CodecError::tables(format!(
                        "refinement {number} does not fit the tables: channel {channel} is not nested in what it refines"
                    )));
                }
                *known |= step.codes(channel);
                (*gain, *median) = (finer.gain, finer.median);
            }
        }
        Ok(())
    }

    /// Latent channels.
    pub fn channels(&self) -> usize {
        self.steps.first().map_or(0, |s| s.factors.len())
    }
}

/// How a finer quality is coded where a coarser one is known.
#[derive(Debug, Clone)]
pub struct Refinement {
    factors: Vec<u16>,
    /// Gains and medians are the finer quality's in the last channels, unused in the first.
    tables: LevelTables,
}

impl Refinement {
    /// Odd factors by channel, and tables of twice as many channels: those of the coarser quality, which are known, then the differences. Gains,
    /// inverses and medians of the differences' channels are those of the finer quality.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if the numbers of channels do not fit or a factor is even or too large.
    pub fn new(factors: Vec<u16>, tables: LevelTables) -> Result<Self, CodecError> {
        if tables.channels.len() != 2 * factors.len() || tables.given() != factors.len() {
            return Err(CodecError::tables("a refinement needs tables for the known channels and as many differences"));
        }
        if factors.iter().any(|f| f % 2 == 0 || *f > MAX_FACTOR) {
            return Err(CodecError::tables(format!("a refinement's factors must be odd and at most {MAX_FACTOR}")));
        }
        Ok(Self { factors, tables })
    }

    /// From a gain to the finer one, by channel.
    pub fn factors(&self) -> &[u16] {
        &self.factors
    }

    /// Tables of the known channels, then of the differences.
    pub fn tables(&self) -> &LevelTables {
        &self.tables
    }

    /// The finer quality's quantisers.
    pub fn finer(&self) -> &[ChannelTable] {
        &self.tables.channels[self.factors.len()..]
    }

    /// Coarser symbols and differences, as the tables code them.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the numbers of symbols do not fit.
    pub fn planes(&self, coarser: &[i32], finer: &[i32], shape: LatentShape) -> Result<Vec<i32>, CodecError> {
        self.check(coarser, shape)?;
        self.check(finer, shape)?;
        let mut planes = coarser.to_vec();
        let pairs = coarser.chunks_exact(shape.positions()).zip(finer.chunks_exact(shape.positions()));
        for (factor, (coarser, finer)) in self.factors.iter().zip(pairs) {
            planes.extend(coarser.iter().zip(finer).map(|(&c, &f)| f.saturating_sub(c.saturating_mul((*factor).into()))));
        }
        Ok(planes)
    }

    /// Codes the differences from `coarser` to `finer` (channel-major).
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if symbols do not fit the shape or the tables.
    pub fn encode(&self, coarser: &[i32], finer: &[i32], shape: LatentShape) -> Result<Vec<u8>, CodecError> {
        coder::encode(&self.planes(coarser, finer, shape)?, &self.tables, twice(shape)?)
    }

    /// The finer symbols.
    ///
    /// # Errors
    /// [`CodecError::Malformed`] if the payload is not what [`Self::encode`] makes, [`CodecError::BadLatent`] if `coarser` does not fit.
    pub fn decode(&self, payload: &[u8], coarser: &[i32], shape: LatentShape) -> Result<Vec<i32>, CodecError> {
        self.check(coarser, shape)?;
        let positions = shape.positions();
        let mut finer = vec![0; coarser.len()];
        coder::decode_given(payload, &self.tables, twice(shape)?, coarser, |channel, plane| {
            if let Some(at) = channel.checked_sub(self.factors.len()) {
                finer[at * positions..][..positions].copy_from_slice(plane);
            }
        })?;
        for (factor, (finer, coarser)) in self.factors.iter().zip(finer.chunks_exact_mut(positions).zip(coarser.chunks_exact(positions))) {
            finer.iter_mut().zip(coarser).for_each(|(f, &c)| *f = f.saturating_add(c.saturating_mul((*factor).into())));
        }
        if finer.iter().any(|s| s.unsigned_abs() > MAX_MAGNITUDE.unsigned_abs()) {
            return Err(CodecError::malformed(format!("a refined symbol is beyond {MAX_MAGNITUDE}")));
        }
        Ok(finer)
    }

    /// De-quantises finer symbols into the decoder's input, appended to `out`.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if their number does not fit.
    pub fn dequantise_into(&self, finer: &[i32], shape: LatentShape, out: &mut Vec<f32>) -> Result<(), CodecError> {
        self.check(finer, shape)?;
        for (table, plane) in self.finer().iter().zip(finer.chunks_exact(shape.positions())) {
            out.extend(plane.iter().map(|&s| (s as f32 + table.median) * table.inverse));
        }
        Ok(())
    }

    /// True if differences of `channel` are coded.
    fn codes(&self, channel: usize) -> bool {
        u16::try_from(self.factors.len() + channel).is_ok_and(|c| self.tables.is_coded(c))
    }

    fn check(&self, symbols: &[i32], shape: LatentShape) -> Result<(), CodecError> {
        if symbols.len() != shape.symbols() || self.factors.len() != usize::from(shape.channels) || symbols.is_empty() {
            return Err(CodecError::BadLatent(format!("{} symbols for a latent of {shape}", symbols.len())));
        }
        Ok(())
    }
}

/// The known channels and the differences.
fn twice(shape: LatentShape) -> Result<LatentShape, CodecError> {
    let channels = shape.channels.checked_mul(2).ok_or_else(|| CodecError::tables("too many channels to be refined"))?;
    Ok(LatentShape { channels, ..shape })
}

/// The symbols of a level and of each of its refinements, coarsest first, all from the finest: nested whatever is lost to rounding.
///
/// # Errors
/// [`CodecError::BadLatent`] if the latent's length does not fit or a value is not finite.
pub fn quantise(base: &LevelTables, refinements: &[Refinement], latent: &[f32], shape: LatentShape) -> Result<Vec<Vec<i32>>, CodecError> {
    let mut all = vec![base.quantise(latent, shape)?];
    refinements.iter().try_for_each(|r| r.check(&all[0], shape))?;
    all.extend(refinements.iter().map(|_| vec![0; latent.len()]));
    let positions = shape.positions();
    for channel in 0..usize::from(shape.channels) {
        let coded = |step: usize| match step.checked_sub(1) {
            None => base.is_coded(channel as u16),
            Some(i) => refinements[i].codes(channel),
        };
        // symbols are bounded at every step, whatever the latent
        let product = |of: &[Refinement]| of.iter().map(|r| i32::from(r.factors[channel])).fold(1, i32::saturating_mul);
        let Some(first) = (0..all.len()).find(|&s| coded(s)) else { continue };
        let Some(last) = (1..all.len()).rev().find(|&s| coded(s)) else {
            // never refined: the level's own symbols stay what they are
            let most = MAX_MAGNITUDE / product(refinements);
            let coarsest = &mut all[0][channel * positions..][..positions];
            coarsest.iter_mut().for_each(|s| *s = (*s).clamp(-most, most));
            let mut symbols = coarsest.to_vec();
            for (finer, refinement) in all[1..].iter_mut().zip(refinements) {
                let factor = refinement.factors[channel].into();
                symbols.iter_mut().for_each(|s| *s = s.saturating_mul(factor));
                finer[channel * positions..][..positions].copy_from_slice(&symbols);
            }
            continue;
        };
        let table = &refinements[last - 1].finer()[channel];
        let most = (MAX_MAGNITUDE / product(&refinements[last..]) - product(&refinements[..last]) / 2).max(0);
        for (at, value) in (channel * positions..).zip(&latent[channel * positions..][..positions]) {
            let symbol = (value * table.gain - table.median).round_ties_even();
            if !symbol.is_finite() {
                return Err(CodecError::BadLatent("a value is not finite".into()));
            }
            all[last][at] = (symbol as i32).clamp(-most, most);
            for step in (0..last).rev() {
                let factor = i32::from(refinements[step].factors[channel]);
                let finer = all[step + 1][at];
                // to the nearest: a factor is odd, there are no ties
                all[step][at] = if step < first { 0 } else { (finer + finer.signum() * (factor / 2)) / factor };
            }
            // where a step says nothing of the channel its symbol follows from the coarser one; the next one that does makes up for it
            for step in first + 1..all.len() {
                if !coded(step) {
                    all[step][at] = all[step - 1][at].saturating_mul(refinements[step - 1].factors[channel].into());
                }
            }
        }
    }
    Ok(all)
}
