//! The file of a bundle's tables (all little-endian):
//!
//! magic `ISTB`, version u8 (4), levels u8, channels u16; then per level the number of coded channels u16 (n), the coding order
//! (u16 x n; channels that are not in it are silent: all their symbols are zero) and per channel: gain f32, inverse f32, median f32, thresholds on the magnitude u8 (m), on the signed value u8 (s); if
//! m + s > 0: units u8, and if that is 0, predictors of magnitude and signed value, each bias i32, taps u8, then per tap channel u16, dy i8,
//! dx i8, weight i16; if it is 16, the network: inputs u8, then per input channel u16, dy i8, dx i8, weights on the signed value i16 x 16, on the magnitude i16 x 16;
//! the units' biases i16 x 16, their weights on magnitude and on signed value i16 x 16 each; thresholds i32 x m; i32 x s for each of the m + 1 bins; then (m + 1)(s + 1) distributions:
//! offset i32, symbol count u16 (without escape), widths u16 x (count + 1), where the last is the escape
//! symbol's. The file's SHA-256 is in the manifest. Version 3 has no units (there are predictors), and is written where no channel has a network; version 2 has no n
//! either: all channels are coded.
//!
//! The file of a bundle's refinements: magic `ISTR`, version u8 (2), steps u8, channels u16 (c); then per step: factors u16 x c, the number of
//! coded channels u16 (n), the coding order (u16 x n, from c on: what is refined is known, and has the numbers before), and per channel as above; version 1 has no units.

use crate::CodecError;
use crate::contexts::{Contexts, MAX_CUTS};
use crate::distribution::Distribution;
use crate::estimator::{Estimator, Input, Network, Predictor, Tap, UNITS};
use crate::pmf;
use crate::refinement::{MAX_STEPS, Refinement, Refinements};
use crate::tables::{ChannelTable, LevelTables, Tables};

const MAGIC: &[u8; 4] = b"ISTB";
const REFINEMENTS_MAGIC: &[u8; 4] = b"ISTR";
const REFINEMENTS_VERSION: u8 = 2;
/// No networks.
const REFINEMENTS_VERSION_LINEAR: u8 = 1;
const VERSION: u8 = 4;
/// No networks.
const VERSION_LINEAR: u8 = 3;
/// All channels coded.
const VERSION_ALL_CODED: u8 = 2;

struct Reader<'a> {
    rest: &'a [u8],
    /// Whether channels say which kind of estimator they have.
    networks: bool,
}

impl<'a> Reader<'a> {
    /// Reads what follows the magic and a version, one of `versions` (the newest first, and whether channels may have networks in it); the version comes too.
    fn open(bytes: &'a [u8], magic: &[u8; 4], what: &str, versions: &[(u8, bool)]) -> Result<(Self, u8), CodecError> {
        let mut reader = Self { rest: bytes, networks: false };
        if &reader.take::<4>()? != magic {
            return Err(CodecError::tables(format!("wrong magic: not a file of {what}")));
        }
        let version = reader.byte()?;
        let Some((_, networks)) = versions.iter().find(|(v, _)| *v == version) else {
            let known: Vec<String> = versions.iter().rev().map(|(v, _)| v.to_string()).collect();
            let why =
                format!("{what} of version {version}, this software reads {}: update it, or export the bundle again", known.join(", "));
            return Err(CodecError::tables(why));
        };
        reader.networks = *networks;
        Ok((reader, version))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| CodecError::tables("the file ends early"))?;
        self.rest = rest;
        Ok(*head)
    }

    fn array<const N: usize, const B: usize, T: Copy + Default>(&mut self, from: impl Fn([u8; B]) -> T) -> Result<[T; N], CodecError> {
        let mut out = [T::default(); N];
        for value in &mut out {
            *value = from(self.take()?);
        }
        Ok(out)
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

    fn network(&mut self) -> Result<Network, CodecError> {
        let count = self.byte()?;
        let input = |r: &mut Self| {
            let (channel, [dy, dx]) = (r.u16()?, r.take()?.map(u8::cast_signed));
            Ok(Input { channel, dy, dx, signed: r.array(i16::from_le_bytes)?, magnitude: r.array(i16::from_le_bytes)? })
        };
        let inputs = (0..count).map(|_| input(self)).collect::<Result<_, CodecError>>()?;
        let bias = self.array(i16::from_le_bytes)?;
        Ok(Network { inputs, bias, outputs: [self.array(i16::from_le_bytes)?, self.array(i16::from_le_bytes)?] })
    }

    fn estimator(&mut self) -> Result<Estimator, CodecError> {
        match if self.networks { self.byte()?.into() } else { 0 } {
            0 => Ok([self.predictor()?, self.predictor()?].into()),
            UNITS => Ok(self.network()?.into()),
            units => Err(CodecError::tables(format!("a network of {units} units; there are {UNITS}"))),
        }
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
        if !self.rest.is_empty() {
            return Err(CodecError::tables(format!("{} bytes follow the last table", self.rest.len())));
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
        let estimator = self.estimator()?;
        let bins = cuts + 1;
        let cuts = self.integers(cuts)?;
        let signed = (0..bins).map(|_| self.integers(signed_cuts)).collect::<Result<Vec<_>, _>>()?;
        let distributions = (0..bins * (signed_cuts + 1)).map(|_| self.distribution()).collect::<Result<_, _>>()?;
        ChannelTable::with_contexts(gain, inverse, median, Contexts::new(estimator, cuts, signed, distributions)?)
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

/// Whether a channel has a network.
fn any_network<'a>(tables: impl IntoIterator<Item = &'a ChannelTable>) -> bool {
    tables.into_iter().any(|t| matches!(t.contexts.estimator(), Estimator::Network(_)))
}

fn write_i16s(values: &[i16], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

fn write_estimator(estimator: &Estimator, networks: bool, out: &mut Vec<u8>) {
    match estimator {
        Estimator::Linear(linear) => {
            if networks {
                out.push(0);
            }
            for p in linear.predictors() {
                out.extend(p.bias.to_le_bytes());
                out.push(p.taps.len() as u8);
                for t in &p.taps {
                    out.extend(t.channel.to_le_bytes());
                    out.extend([t.dy.cast_unsigned(), t.dx.cast_unsigned()]);
                    out.extend(t.weight.to_le_bytes());
                }
            }
        }
        Estimator::Network(network) => {
            out.extend([UNITS as u8, network.inputs.len() as u8]);
            for i in &network.inputs {
                out.extend(i.channel.to_le_bytes());
                out.extend([i.dy.cast_unsigned(), i.dx.cast_unsigned()]);
                write_i16s(&i.signed, out);
                write_i16s(&i.magnitude, out);
            }
            write_i16s(&network.bias, out);
            network.outputs.iter().for_each(|weights| write_i16s(weights, out));
        }
    }
}

fn write_channel(table: &ChannelTable, networks: bool, out: &mut Vec<u8>) {
    for value in [table.gain, table.inverse, table.median] {
        out.extend(value.to_le_bytes());
    }
    let contexts = &table.contexts;
    let per_bin = contexts.signed_cuts().first().map_or(0, Vec::len);
    out.extend([contexts.cuts().len() as u8, per_bin as u8]);
    if contexts.cuts().len() + per_bin > 0 {
        write_estimator(contexts.estimator(), networks, out);
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
        let versions = [(VERSION, true), (VERSION_LINEAR, false), (VERSION_ALL_CODED, false)];
        let (mut r, version) = Reader::open(bytes, MAGIC, "tables", &versions)?;
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
        let networks = any_network(self.levels.iter().flat_map(|l| &l.channels));
        let mut out = MAGIC.to_vec();
        out.extend([if networks { VERSION } else { VERSION_LINEAR }, self.levels.len() as u8]);
        let channels = self.levels.first().map_or(0, |l| l.channels.len());
        out.extend((channels as u16).to_le_bytes());
        for level in &self.levels {
            write_order(level, &mut out);
            level.channels.iter().for_each(|table| write_channel(table, networks, &mut out));
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
        let versions = [(REFINEMENTS_VERSION, true), (REFINEMENTS_VERSION_LINEAR, false)];
        let (mut r, _) = Reader::open(bytes, REFINEMENTS_MAGIC, "refinements", &versions)?;
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
        let networks = any_network(self.steps().iter().flat_map(|s| s.finer()));
        let mut out = REFINEMENTS_MAGIC.to_vec();
        let channels = self.steps().first().map_or(0, |s| s.factors().len());
        out.extend([if networks { REFINEMENTS_VERSION } else { REFINEMENTS_VERSION_LINEAR }, self.steps().len() as u8]);
        out.extend((channels as u16).to_le_bytes());
        for step in self.steps() {
            out.extend(step.factors().iter().flat_map(|f| f.to_le_bytes()));
            write_order(step.tables(), &mut out);
            step.finer().iter().for_each(|table| write_channel(table, networks, &mut out));
        }
        out
    }
}
