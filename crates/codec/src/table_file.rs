//! The file of a bundle's tables (all little-endian):
//!
//! magic `ISTB`, version u8 (3), levels u8, channels u16; then per level the number of coded channels u16 (n), the coding order
//! (u16 x n; channels that are not in it are silent: all their symbols are zero) and per channel: gain f32, inverse f32, median f32, thresholds on the magnitude u8 (m), on the signed value u8 (s); if
//! m + s > 0: predictors of magnitude and signed value, each bias i32, taps u8, then per tap channel u16, dy i8,
//! dx i8, weight i16; thresholds i32 x m; i32 x s for each of the m + 1 bins; then (m + 1)(s + 1) distributions:
//! offset i32, symbol count u16 (without escape), widths u16 x (count + 1), where the last is the escape
//! symbol's. The file's SHA-256 is in the manifest. Version 2 has no n: all channels are coded.
//!
//! The file of a bundle's refinements: magic `ISTR`, version u8 (1), steps u8, channels u16 (c); then per step: factors u16 x c, the number of
//! coded channels u16 (n), the coding order (u16 x n, from c on: what is refined is known, and has the numbers before), and per channel as above.

use crate::CodecError;
use crate::contexts::{Contexts, MAX_CUTS, Predictor, Tap};
use crate::distribution::Distribution;
use crate::pmf;
use crate::refinement::{MAX_STEPS, Refinement, Refinements};
use crate::tables::{ChannelTable, LevelTables, Tables};

const MAGIC: &[u8; 4] = b"ISTB";
const REFINEMENTS_MAGIC: &[u8; 4] = b"ISTR";
const REFINEMENTS_VERSION: u8 = 1;
const VERSION: u8 = 3;
/// All channels coded.
const VERSION_ALL_CODED: u8 = 2;

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(|| CodecError::tables("the file ends early"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn byte(&mut self) -> Result<u8, CodecError> {
        Ok(self.take::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, CodecError> {
        self.take().map(u16::from_le_bytes)
    }

    fn i32(&mut self) -> Result<i32, CodecError> {
        self.take().map(i32::from_le_bytes)
    }

    fn integers(&mut self, count: usize) -> Result<Vec<i32>, CodecError> {
        (0..count).map(|_| self.i32()).collect()
    }

    fn predictor(&mut self) -> Result<Predictor, CodecError> {
        let (bias, count) = (self.i32()?, self.byte()?);
        let tap = |r: &mut Self| {
            let (channel, [dy, dx]) = (r.u16()?, r.take()?.map(u8::cast_signed));
            Ok(Tap { channel, dy, dx, weight: i16::from_le_bytes(r.take()?) })
        };
        Ok(Predictor { bias, taps: (0..count).map(|_| tap(self)).collect::<Result<_, CodecError>>()? })
    }

    fn distribution(&mut self) -> Result<Distribution, CodecError> {
        let (offset, count) = (self.i32()?, self.u16()?);
        let widths = (0..=count).map(|_| self.u16().map(u32::from)).collect::<Result<_, _>>()?;
        Distribution::new(offset, widths)
    }

    /// A coding order of at most `channels` channels.
    fn order(&mut self, channels: u16, all: bool) -> Result<Vec<u16>, CodecError> {
        let coded = if all { channels } else { self.u16()? };
        if coded > channels {
            return Err(CodecError::tables(format!("{coded} of {channels} channels are coded")));
        }
        (0..coded).map(|_| self.u16()).collect()
    }

    fn end(&self) -> Result<(), CodecError> {
        if !self.0.is_empty() {
            return Err(CodecError::tables(format!("{} bytes follow the last table", self.0.len())));
        }
        Ok(())
    }

    fn channel(&mut self) -> Result<ChannelTable, CodecError> {
        let [gain, inverse, median] = [self.take()?, self.take()?, self.take()?].map(f32::from_le_bytes);
        let [cuts, signed_cuts] = self.take()?.map(usize::from);
        if cuts.max(signed_cuts) > MAX_CUTS {
            return Err(CodecError::tables("a channel has more than 31 thresholds"));
        }
        if cuts + signed_cuts == 0 {
            return ChannelTable::with_contexts(gain, inverse, median, Contexts::none(self.distribution()?));
        }
        let predictors = [self.predictor()?, self.predictor()?];
        let bins = cuts + 1;
        let cuts = self.integers(cuts)?;
        let signed = (0..bins).map(|_| self.integers(signed_cuts)).collect::<Result<Vec<_>, _>>()?;
        let distributions = (0..bins * (signed_cuts + 1)).map(|_| self.distribution()).collect::<Result<_, _>>()?;
        ChannelTable::with_contexts(gain, inverse, median, Contexts::new(predictors, cuts, signed, distributions)?)
    }
}

/// What channels have that are known before: nothing is coded with it.
pub(crate) fn known_channel() -> Result<ChannelTable, CodecError> {
    ChannelTable::new(1.0, 1.0, 0.0, 0, vec![pmf::TOTAL - 1, 1])
}

fn write_order(level: &LevelTables, out: &mut Vec<u8>) {
    out.extend((level.order().len() as u16).to_le_bytes());
    out.extend(level.order().iter().flat_map(|c| c.to_le_bytes()));
}

fn write_channel(table: &ChannelTable, out: &mut Vec<u8>) {
    for value in [table.gain, table.inverse, table.median] {
        out.extend(value.to_le_bytes());
    }
    let contexts = &table.contexts;
    let per_bin = contexts.signed_cuts().first().map_or(0, Vec::len);
    out.extend([contexts.cuts().len() as u8, per_bin as u8]);
    if contexts.cuts().len() + per_bin > 0 {
        for p in contexts.predictors() {
            out.extend(p.bias.to_le_bytes());
            out.push(p.taps.len() as u8);
            for t in &p.taps {
                out.extend(t.channel.to_le_bytes());
                out.extend([t.dy.cast_unsigned(), t.dx.cast_unsigned()]);
                out.extend(t.weight.to_le_bytes());
            }
        }
        let cuts = contexts.cuts().iter().chain(contexts.signed_cuts().iter().flatten());
        out.extend(cuts.flat_map(|c| c.to_le_bytes()));
    }
    for d in contexts.distributions() {
        out.extend(d.offset.to_le_bytes());
        out.extend((d.escape() as u16).to_le_bytes());
        out.extend(d.widths().iter().flat_map(|&w| (w as u16).to_le_bytes()));
    }
}

impl Tables {
    /// Reads a table file.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] says what is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader(bytes);
        if &r.take::<4>()? != MAGIC {
            return Err(CodecError::tables("wrong magic: not a table file"));
        }
        let version = r.byte()?;
        if ![VERSION_ALL_CODED, VERSION].contains(&version) {
            let why =
                format!("version {version}, this software reads {VERSION_ALL_CODED} and {VERSION}: update it, or export the bundle again");
            return Err(CodecError::tables(why));
        }
        let levels = r.byte()?;
        let channels = r.u16()?;
        if levels == 0 || channels == 0 {
            return Err(CodecError::tables("no levels or no channels"));
        }
        let mut out = Vec::new();
        for _ in 0..levels {
            let order = r.order(channels, version == VERSION_ALL_CODED)?;
            let tables = (0..channels).map(|_| r.channel()).collect::<Result<_, _>>()?;
            out.push(LevelTables::in_order(tables, order)?);
        }
        r.end()?;
        Ok(Self { levels: out })
    }

    /// Writes the table file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([VERSION, self.levels.len() as u8]);
        let channels = self.levels.first().map_or(0, |l| l.channels.len());
        out.extend((channels as u16).to_le_bytes());
        for level in &self.levels {
            write_order(level, &mut out);
            level.channels.iter().for_each(|table| write_channel(table, &mut out));
        }
        out
    }
}

impl Refinements {
    /// Reads a file of refinements.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] says what is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader(bytes);
        if &r.take::<4>()? != REFINEMENTS_MAGIC {
            return Err(CodecError::tables("wrong magic: not a file of refinements"));
        }
        let version = r.byte()?;
        if version != REFINEMENTS_VERSION {
            return Err(CodecError::tables(format!(
                "refinements of version {version}, this software reads {REFINEMENTS_VERSION}: update it"
            )));
        }
        let (steps, channels) = (r.byte()?, r.u16()?);
        if steps == 0 || usize::from(steps) > MAX_STEPS || channels == 0 {
            return Err(CodecError::tables(format!("{steps} refinements of {channels} channels; 1 to {MAX_STEPS} can be")));
        }
        let mut out = Vec::new();
        for _ in 0..steps {
            let factors = (0..channels).map(|_| r.u16()).collect::<Result<_, _>>()?;
            let order = r.order(channels, false)?;
            let known = (0..channels).map(|_| known_channel());
            let known = known.collect::<Result<Vec<_>, _>>()?;
            let tables = known.into_iter().map(Ok).chain((0..channels).map(|_| r.channel())).collect::<Result<_, _>>()?;
            out.push(Refinement::new(factors, LevelTables::with_given(tables, order, channels.into())?)?);
        }
        r.end()?;
        Self::new(out)
    }

    /// Writes the file of refinements.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = REFINEMENTS_MAGIC.to_vec();
        let channels = self.steps().first().map_or(0, |s| s.factors().len());
        out.extend([REFINEMENTS_VERSION, self.steps().len() as u8]);
        out.extend((channels as u16).to_le_bytes());
        for step in self.steps() {
            out.extend(step.factors().iter().flat_map(|f| f.to_le_bytes()));
            write_order(step.tables(), &mut out);
            step.finer().iter().for_each(|table| write_channel(table, &mut out));
        }
        out
    }
}
