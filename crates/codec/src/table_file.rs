//! The file of a bundle's tables (all little-endian):
//!
//! magic `ISTB`, version u8 (3), levels u8, channels u16; then per level the number of coded channels u16 (n), the coding order
//! (u16 x n; channels that are not in it are silent: all their symbols are zero) and per channel: gain f32, inverse f32, median f32, thresholds on the magnitude u8 (m), on the signed value u8 (s); if
//! m + s > 0: predictors of magnitude and signed value, each bias i32, taps u8, then per tap channel u16, dy i8,
//! dx i8, weight i16; thresholds i32 x m; i32 x s for each of the m + 1 bins; then (m + 1)(s + 1) distributions:
//! offset i32, symbol count u16 (without escape), widths u16 x (count + 1), where the last is the escape
//! symbol's. The file's SHA-256 is in the manifest. Version 2 has no n: all channels are coded.

use crate::CodecError;
use crate::contexts::{Contexts, MAX_CUTS, Predictor, Tap};
use crate::distribution::Distribution;
use crate::tables::{ChannelTable, LevelTables, Tables};

const MAGIC: &[u8; 4] = b"ISTB";
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
            let coded = if version == VERSION_ALL_CODED { channels } else { r.u16()? };
            if coded > channels {
                return Err(CodecError::tables(format!("{coded} of {channels} channels are coded")));
            }
            let order = (0..coded).map(|_| r.u16()).collect::<Result<_, _>>()?;
            let tables = (0..channels).map(|_| r.channel()).collect::<Result<_, _>>()?;
            out.push(LevelTables::in_order(tables, order)?);
        }
        if !r.0.is_empty() {
            return Err(CodecError::tables(format!("{} bytes follow the last table", r.0.len())));
        }
        Ok(Self { levels: out })
    }

    /// Writes the table file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([VERSION, self.levels.len() as u8]);
        let channels = self.levels.first().map_or(0, |l| l.channels.len());
        out.extend((channels as u16).to_le_bytes());
        for level in &self.levels {
            out.extend((level.order().len() as u16).to_le_bytes());
            out.extend(level.order().iter().flat_map(|c| c.to_le_bytes()));
            level.channels.iter().for_each(|table| write_channel(table, &mut out));
        }
        out
    }
}
