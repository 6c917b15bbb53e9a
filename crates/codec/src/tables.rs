//! What a bundle's quality levels consist of: for each latent channel a gain, its inverse, a median, and the
//! integer distributions of its symbols.

use crate::CodecError;
use crate::contexts::{Contexts, Field};
use crate::distribution::{Distribution, MAX_MAGNITUDE};
use crate::quality::Quality;

/// Factor on the gain of a silent channel where a network would otherwise round it.
const DORMANT: f32 = 1e-3;
/// Largest median of a silent channel that stands for next to nothing, in quantisation steps.
const STILL: f32 = 0.1;

/// Shape of a latent: channels, height, width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LatentShape {
    /// Channels.
    pub channels: u16,
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

impl LatentShape {
    /// Positions per channel.
    pub fn positions(self) -> usize {
        usize::from(self.height) * usize::from(self.width)
    }

    /// Symbols in all.
    pub fn symbols(self) -> usize {
        usize::from(self.channels) * self.positions()
    }
}

impl std::fmt::Display for LatentShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {} x {}", self.channels, self.height, self.width)
    }
}

/// Everything needed to quantise and code one latent channel at one quality level.
#[derive(Debug, Clone)]
pub struct ChannelTable {
    /// Encoder-side factor: `symbol = round_half_even(y * gain - median)`.
    pub gain: f32,
    /// Decoder-side factor: `y_hat = (symbol + median) * inverse`.
    pub inverse: f32,
    /// Median of the density, in quantisation steps.
    pub median: f32,
    /// Distributions of the symbols.
    pub contexts: Contexts,
}

impl ChannelTable {
    /// A channel with one static distribution; the last of `widths` is the escape symbol's.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if a value is not finite, out of range, or the widths are not a
    /// complete distribution.
    pub fn new(gain: f32, inverse: f32, median: f32, offset: i32, widths: Vec<u32>) -> Result<Self, CodecError> {
        Self::with_contexts(gain, inverse, median, Contexts::none(Distribution::new(offset, widths)?))
    }

    /// A channel whose distributions depend on earlier symbols.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if a value is not finite or a gain not positive.
    pub fn with_contexts(gain: f32, inverse: f32, median: f32, contexts: Contexts) -> Result<Self, CodecError> {
        if ![gain, inverse, median].iter().all(|v| v.is_finite()) || gain <= 0.0 || inverse <= 0.0 {
            return Err(CodecError::tables("gain, inverse and median must be finite, gains positive"));
        }
        Ok(Self { gain, inverse, median, contexts })
    }
}

/// Tables of all channels at one quality level.
#[derive(Debug, Clone)]
pub struct LevelTables {
    /// One per latent channel.
    pub channels: Vec<ChannelTable>,
    order: Vec<u16>,
    /// So many of the first channels are known before: see [`Self::with_given`].
    given: usize,
    /// Channels whose symbols are coded; the others' are zero.
    coded: Vec<bool>,
    /// Channels that predictors read.
    read: Vec<bool>,
}

impl LevelTables {
    /// Channels coded in the order of their numbers.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if contexts read what is coded later.
    pub fn new(channels: Vec<ChannelTable>) -> Result<Self, CodecError> {
        let order = (0..channels.len().min(usize::from(u16::MAX)) as u16).collect();
        Self::in_order(channels, order)
    }

    /// Channels coded in the given order. Those that it leaves out are silent: their symbols are zero whatever the encoder
    /// says, and cost neither bits nor time.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if the order names a channel twice or one that is not there, or contexts read what is not coded before.
    pub fn in_order(channels: Vec<ChannelTable>, order: Vec<u16>) -> Result<Self, CodecError> {
        Self::with_given(channels, order, 0)
    }

    /// As [`Self::in_order`], where both sides know the first `given` channels already: they are not coded, but contexts read them, all around a symbol.
    ///
    /// # Errors
    /// As [`Self::in_order`].
    pub fn with_given(channels: Vec<ChannelTable>, order: Vec<u16>, given: usize) -> Result<Self, CodecError> {
        let mut coded = vec![false; channels.len()];
        for &c in &order {
            let table = channels.get(usize::from(c)).filter(|_| !coded[usize::from(c)] && usize::from(c) >= given);
            let table =
                table.ok_or_else(|| CodecError::tables(format!("the coding order names channel {c} twice, or there is none such")))?;
            let known = |other| usize::from(other) < given || coded.get(usize::from(other)).copied().unwrap_or(false);
            table.contexts.check_causal(c, known)?;
            coded[usize::from(c)] = true;
        }
        let mut read = vec![false; channels.len()];
        for (channel, ..) in channels.iter().flat_map(|c| c.contexts.estimator().reads()) {
            if let Some(read) = read.get_mut(usize::from(channel)) {
                *read = true;
            }
        }
        Ok(Self { channels, order, given, coded, read })
    }

    /// The same tables with `channels` silent: see [`Self::in_order`].
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if the contexts of others read them.
    pub fn silenced(self, channels: &[u16]) -> Result<Self, CodecError> {
        let order = self.order.into_iter().filter(|c| !channels.contains(c)).collect();
        Self::with_given(self.channels, order, self.given)
    }

    /// How many of the first channels both sides know before.
    pub fn given(&self) -> usize {
        self.given
    }

    /// Order in which the channels are coded; silent ones are not in it.
    pub fn order(&self) -> &[u16] {
        &self.order
    }

    /// True if no distribution depends on earlier symbols.
    pub fn is_static(&self) -> bool {
        self.order.iter().filter_map(|&c| self.channels.get(usize::from(c))).all(|c| c.contexts.is_static())
    }

    /// True if symbols of `channel` are coded.
    pub fn is_coded(&self, channel: u16) -> bool {
        self.coded.get(usize::from(channel)).copied().unwrap_or(false)
    }

    /// Silent channels, in the order of their numbers.
    pub fn silent(&self) -> impl Iterator<Item = u16> {
        (0u16..).zip(&self.coded).skip(self.given).filter(|(_, coded)| !**coded).map(|(channel, _)| channel)
    }

    /// Encoder-side factors by channel, for a network that rounds all of them: next to nothing for silent ones that stand for next to nothing ([`Self::is_still`]), so that
    /// their symbols are zero there too. Others' gains are what makes of a latent the constant that they stand for.
    pub fn gains(&self) -> Vec<f32> {
        (0u16..)
            .zip(&self.channels)
            .map(|(c, t)| if !self.is_coded(c) && Self::is_still(t.median) { t.gain * DORMANT } else { t.gain })
            .collect()
    }

    /// Whether a channel that is silent stands for next to nothing, given its median.
    pub fn is_still(median: f32) -> bool {
        median.abs() <= STILL
    }

    /// True if some distribution depends on symbols of `channel`.
    pub(crate) fn is_read(&self, channel: u16) -> bool {
        self.read.get(usize::from(channel)).copied().unwrap_or(false)
    }

    /// Symbols (channel-major) as predictors see them; nothing is noted where all tables are static.
    pub(crate) fn field(&self, symbols: &[i32], shape: LatentShape) -> Option<Field> {
        (!self.is_static()).then(|| {
            let mut field = Field::new(shape);
            let planes = (0..shape.channels).zip(symbols.chunks_exact(shape.positions()));
            for (channel, plane) in planes.filter(|(channel, _)| self.is_read(*channel)) {
                field.note(channel, plane);
            }
            field
        })
    }

    /// Rounds a latent (channel-major, `shape.symbols()` values) to symbols.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the length does not fit or a value is not finite.
    pub fn quantise(&self, latent: &[f32], shape: LatentShape) -> Result<Vec<i32>, CodecError> {
        Level::of(self).quantise(latent, shape)
    }

    /// De-quantises symbols into the decoder's input, appended to `out`.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the length does not fit.
    pub fn dequantise_into(&self, symbols: &[i32], shape: LatentShape, out: &mut Vec<f32>) -> Result<(), CodecError> {
        Level::of(self).dequantise_into(symbols, shape, out)
    }

    /// Number of the distribution that codes each symbol (channel-major), in the order of its channel's distributions.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the length does not fit.
    pub fn bins(&self, symbols: &[i32], shape: LatentShape) -> Result<Vec<usize>, CodecError> {
        self.check(symbols.len(), shape)?;
        let field = self.field(symbols, shape);
        let of = |c: &ChannelTable| match &field {
            Some(field) if !c.contexts.is_static() => field.bins(&c.contexts),
            _ => vec![0; shape.positions()],
        };
        Ok(self.channels.iter().flat_map(of).collect())
    }

    fn check(&self, len: usize, shape: LatentShape) -> Result<(), CodecError> {
        if self.channels.len() != usize::from(shape.channels) || len != shape.symbols() || len == 0 {
            let why = format!("{len} values and {} channel tables for a latent of {shape}", self.channels.len());
            return Err(CodecError::BadLatent(why));
        }
        Ok(())
    }
}

/// Quantisation of one latent channel; see [`ChannelTable`].
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// As of [`ChannelTable::gain`].
    pub gain: f32,
    /// As of [`ChannelTable::inverse`].
    pub inverse: f32,
    /// As of [`ChannelTable::median`].
    pub median: f32,
}

impl Step {
    #[inline(always)]
    fn dequantise(&self, symbol: i32) -> f32 {
        (symbol as f32 + self.median) * self.inverse
    }
}

/// A quality: the tables that code it, which are a level's, and its own quantisation.
#[derive(Debug, Clone)]
pub struct Level<'a> {
    tables: &'a LevelTables,
    steps: Vec<Step>,
}

impl std::ops::Deref for Level<'_> {
    type Target = LevelTables;

    fn deref(&self) -> &LevelTables {
        self.tables
    }
}

impl<'a> Level<'a> {
    fn of(tables: &'a LevelTables) -> Self {
        let steps = tables.channels.iter().map(|c| Step { gain: c.gain, inverse: c.inverse, median: c.median }).collect();
        Self { tables, steps }
    }

    /// `share` of the way from `below` to `above`, coded with the nearer one's tables.
    fn between(below: &'a LevelTables, above: &'a LevelTables, share: f32) -> Self {
        let geometric = |a: f32, b: f32| a * (b / a).powf(share);
        let steps = below.channels.iter().zip(&above.channels).map(|(a, b)| Step {
            gain: geometric(a.gain, b.gain),
            inverse: geometric(a.inverse, b.inverse),
            median: a.median + (b.median - a.median) * share,
        });
        Self { tables: if share < 0.5 { below } else { above }, steps: steps.collect() }
    }

    /// Rounds a latent (channel-major, `shape.symbols()` values) to symbols; those of silent channels are zero.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the length does not fit or a value is not finite.
    pub fn quantise(&self, latent: &[f32], shape: LatentShape) -> Result<Vec<i32>, CodecError> {
        self.check(latent.len(), shape)?;
        let mut symbols = Vec::with_capacity(latent.len());
        for ((step, plane), channel) in self.steps.iter().zip(latent.chunks_exact(shape.positions())).zip(0..) {
            if !self.is_coded(channel) {
                symbols.resize(symbols.len() + plane.len(), 0);
                continue;
            }
            for &y in plane {
                let symbol = (y * step.gain - step.median).round_ties_even();
                if !symbol.is_finite() {
                    return Err(CodecError::BadLatent("a value is not finite".into()));
                }
                symbols.push((symbol as i32).clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE));
            }
        }
        Ok(symbols)
    }

    /// De-quantises symbols into the decoder's input, appended to `out`.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the length does not fit.
    pub fn dequantise_into(&self, symbols: &[i32], shape: LatentShape, out: &mut Vec<f32>) -> Result<(), CodecError> {
        self.check(symbols.len(), shape)?;
        out.reserve(symbols.len());
        for (step, plane) in self.steps.iter().zip(symbols.chunks_exact(shape.positions())) {
            out.extend(plane.iter().map(|&s| step.dequantise(s)));
        }
        Ok(())
    }

    /// The quality's own quantisers, by channel.
    pub fn quantisers(&self) -> impl Iterator<Item = Step> {
        self.steps.iter().copied()
    }

    /// What a symbol of zero stands for.
    pub(crate) fn of_zero(&self, channel: usize) -> f32 {
        self.steps.get(channel).map_or(0.0, |step| step.dequantise(0))
    }

    /// De-quantises the symbols of one channel.
    pub(crate) fn dequantise_plane(&self, channel: usize, symbols: &[i32], out: &mut [f32]) {
        if let Some(step) = self.steps.get(channel) {
            out.iter_mut().zip(symbols).for_each(|(value, &s)| *value = step.dequantise(s));
        }
    }
}

/// Tables of every quality level.
#[derive(Debug, Clone)]
pub struct Tables {
    /// Level q (from 1) is `levels[q - 1]`: level 1 makes the smallest streams.
    pub levels: Vec<LevelTables>,
}

impl Tables {
    /// The level `quality` (from 1), or what lies between two levels.
    ///
    /// # Errors
    /// [`CodecError::UnknownQuality`] if there is no such level.
    pub fn level(&self, quality: impl Into<Quality>) -> Result<Level<'_>, CodecError> {
        let quality = quality.into();
        let unknown = CodecError::UnknownQuality { level: quality, levels: self.levels.len() as u8 };
        let at = |level: u8| usize::from(level).checked_sub(1).and_then(|i| self.levels.get(i));
        let below = at(quality.level).ok_or_else(|| unknown.clone())?;
        if quality.is_level() {
            return Ok(Level::of(below));
        }
        let above = quality.level.checked_add(1).and_then(at).ok_or(unknown)?;
        Ok(Level::between(below, above, (quality.value() - f64::from(quality.level)) as f32))
    }
}
