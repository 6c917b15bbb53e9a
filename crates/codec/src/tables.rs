//! Quantiser and entropy tables of a bundle: for each quality level and latent channel a gain, its
//! inverse, a median, and the integer widths of the symbols.
//!
//! File format (all little-endian): magic `ISTB`, version u8, levels u8, channels u16, then per level and
//! channel: gain f32, inverse f32, median f32, offset i32, symbol count u16 (without escape), widths u16 x
//! (count + 1), where the last is the escape symbol's. The file's SHA-256 is in the manifest.

use constriction::stream::model::ContiguousCategoricalEntropyModel;

use crate::CodecError;
use crate::pmf::{PRECISION, TOTAL};

const MAGIC: &[u8; 4] = b"ISTB";
const VERSION: u8 = 1;
/// Longest table of one channel.
pub const MAX_SYMBOLS: usize = 4096;
/// Largest offset and symbol magnitude.
pub const MAX_MAGNITUDE: i32 = 1 << 15;

/// Categorical model over table indices.
pub(crate) type Model = ContiguousCategoricalEntropyModel<u16, Vec<u16>, PRECISION>;

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
    /// Symbol of table index 0.
    pub offset: i32,
    widths: Vec<u32>,
    pub(crate) model: Model,
}

impl ChannelTable {
    /// Builds a table; the last of `widths` is the escape symbol's.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if a value is not finite, out of range, or the widths are not a
    /// complete distribution.
    pub fn new(gain: f32, inverse: f32, median: f32, offset: i32, widths: Vec<u32>) -> Result<Self, CodecError> {
        if ![gain, inverse, median].iter().all(|v| v.is_finite()) || gain <= 0.0 || inverse <= 0.0 {
            return Err(CodecError::tables("gain, inverse and median must be finite, gains positive"));
        }
        if offset.unsigned_abs() > MAX_MAGNITUDE.unsigned_abs() {
            return Err(CodecError::tables(format!("offset {offset} is out of range")));
        }
        if widths.len() < 2 || widths.len() > MAX_SYMBOLS + 1 || widths.iter().any(|&w| w == 0 || w >= TOTAL) {
            return Err(CodecError::tables("a table needs 1 to 4096 symbols and an escape, each with a positive width"));
        }
        let narrow: Vec<u16> = widths.iter().map(|&w| w as u16).collect();
        if widths.iter().map(|&w| u64::from(w)).sum::<u64>() != u64::from(TOTAL) {
            return Err(CodecError::tables("the widths of a table do not sum to 65536"));
        }
        let model = Model::from_nonzero_fixed_point_probabilities(&narrow, false)
            .map_err(|()| CodecError::tables("the widths of a table are no distribution"))?;
        Ok(Self { gain, inverse, median, offset, widths, model })
    }

    /// Table index of the escape symbol.
    pub fn escape(&self) -> usize {
        self.widths.len() - 1
    }

    /// Ideal code length of `symbol` in bits under the integer widths (escapes with their nibbles).
    pub fn ideal_bits(&self, symbol: i32) -> f64 {
        let bits = |w: u32| PRECISION as f64 - f64::from(w).log2();
        let value = i64::from(symbol) - i64::from(self.offset);
        match usize::try_from(value).ok().filter(|&v| v < self.escape()) {
            Some(index) => bits(self.widths[index]),
            None => {
                let nibbles = crate::coder::escape_nibbles(crate::coder::escape_raw(value, self.escape()));
                bits(self.widths[self.escape()]) + 4.0 * (1 + nibbles) as f64
            }
        }
    }
}

/// Tables of all channels at one quality level.
#[derive(Debug, Clone)]
pub struct LevelTables {
    /// One per latent channel.
    pub channels: Vec<ChannelTable>,
}

impl LevelTables {
    /// Rounds a latent (channel-major, `shape.symbols()` values) to symbols.
    ///
    /// # Errors
    /// [`CodecError::BadLatent`] if the length does not fit or a value is not finite.
    pub fn quantise(&self, latent: &[f32], shape: LatentShape) -> Result<Vec<i32>, CodecError> {
        self.check(latent.len(), shape)?;
        let mut symbols = Vec::with_capacity(latent.len());
        for (table, plane) in self.channels.iter().zip(latent.chunks_exact(shape.positions())) {
            for &y in plane {
                let step = (y * table.gain - table.median).round_ties_even();
                if !step.is_finite() {
                    return Err(CodecError::BadLatent("a value is not finite".into()));
                }
                symbols.push((step as i32).clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE));
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
        for (table, plane) in self.channels.iter().zip(symbols.chunks_exact(shape.positions())) {
            out.extend(plane.iter().map(|&s| (s as f32 + table.median) * table.inverse));
        }
        Ok(())
    }

    fn check(&self, len: usize, shape: LatentShape) -> Result<(), CodecError> {
        if self.channels.len() != usize::from(shape.channels) || len != shape.symbols() || len == 0 {
            let why = format!("{len} values and {} channel tables for a latent of {shape}", self.channels.len());
            return Err(CodecError::BadLatent(why));
        }
        Ok(())
    }
}

/// Tables of every quality level.
#[derive(Debug, Clone)]
pub struct Tables {
    /// Level q (from 1) is `levels[q - 1]`: level 1 makes the smallest streams.
    pub levels: Vec<LevelTables>,
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(|| CodecError::tables("the file ends early"))?;
        self.0 = rest;
        Ok(*head)
    }
}

impl Tables {
    /// The level `quality` (from 1).
    ///
    /// # Errors
    /// [`CodecError::UnknownQuality`] if there is no such level.
    pub fn level(&self, quality: u8) -> Result<&LevelTables, CodecError> {
        let levels = self.levels.len() as u8;
        let index = usize::from(quality).checked_sub(1);
        index.and_then(|i| self.levels.get(i)).ok_or(CodecError::UnknownQuality { level: quality, levels })
    }

    /// Reads a table file.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] says what is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader(bytes);
        if &r.take::<4>()? != MAGIC || r.take::<1>()? != [VERSION] {
            return Err(CodecError::tables("wrong magic or version"));
        }
        let [levels] = r.take::<1>()?;
        let channels = u16::from_le_bytes(r.take()?);
        if levels == 0 || channels == 0 {
            return Err(CodecError::tables("no levels or no channels"));
        }
        let mut out = Vec::new();
        for _ in 0..levels {
            let mut tables = Vec::new();
            for _ in 0..channels {
                let [gain, inverse, median] = [r.take()?, r.take()?, r.take()?].map(f32::from_le_bytes);
                let offset = i32::from_le_bytes(r.take()?);
                let count = u16::from_le_bytes(r.take()?);
                let mut widths = Vec::new();
                for _ in 0..=count {
                    widths.push(u32::from(u16::from_le_bytes(r.take()?)));
                }
                tables.push(ChannelTable::new(gain, inverse, median, offset, widths)?);
            }
            out.push(LevelTables { channels: tables });
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
        for table in self.levels.iter().flat_map(|l| &l.channels) {
            for value in [table.gain, table.inverse, table.median] {
                out.extend(value.to_le_bytes());
            }
            out.extend(table.offset.to_le_bytes());
            out.extend((table.escape() as u16).to_le_bytes());
            out.extend(table.widths.iter().flat_map(|&w| (w as u16).to_le_bytes()));
        }
        out
    }
}
