//! Entropy coding of symbols with asymmetric numeral systems (constriction's `AnsCoder`: 32-bit words,
//! 64-bit state) under the static integer tables.
//!
//! A symbol outside its channel's table is an escape: the escape entry, then the number of nibbles of
//! the folded overflow, then these nibbles, least significant first, each uniform over 16. ANS is a
//! stack, so everything is pushed in reverse and the decoder reads forward. Decoding never trusts the
//! stream: escapes are bounded and the coder must end exactly empty.

use constriction::stream::model::UniformModel;
use constriction::stream::stack::DefaultAnsCoder;
use constriction::stream::{Decode, Encode};

use crate::CodecError;
use crate::pmf::PRECISION;
use crate::tables::{LatentShape, LevelTables, MAX_MAGNITUDE};

/// Nibbles of the largest escape that a clamped symbol can need.
const MAX_NIBBLES: usize = 6;

/// Folds a value outside `0..escape` to an unsigned number (odd below, even above).
pub(crate) fn escape_raw(value: i64, escape: usize) -> u32 {
    let escape = escape as i64;
    let raw = if value < 0 { -2 * value - 1 } else { 2 * (value - escape) };
    raw as u32
}

/// Nibbles needed for `raw`; zero needs none beside the count.
pub(crate) fn escape_nibbles(raw: u32) -> usize {
    (32 - raw.leading_zeros()).div_ceil(4) as usize
}

fn uniform() -> UniformModel<u16, PRECISION> {
    UniformModel::new(16)
}

/// Codes `symbols` (channel-major). The payload's length is a multiple of 4 bytes.
///
/// # Errors
/// [`CodecError::BadLatent`] if the number of symbols does not fit `shape` or a symbol is out of range.
pub fn encode(symbols: &[i32], level: &LevelTables, shape: LatentShape) -> Result<Vec<u8>, CodecError> {
    if symbols.len() != shape.symbols() || level.channels.len() != usize::from(shape.channels) || symbols.is_empty() {
        return Err(CodecError::BadLatent(format!("{} symbols for a latent of {shape}", symbols.len())));
    }
    let failed = |_| CodecError::BadLatent("a symbol has no code".into());
    let nibble = uniform();
    let mut coder = DefaultAnsCoder::new();
    for (table, plane) in level.channels.iter().zip(symbols.chunks_exact(shape.positions())).rev() {
        let escape = table.escape();
        let model = table.model.as_view();
        for &symbol in plane.iter().rev() {
            if symbol.unsigned_abs() > MAX_MAGNITUDE.unsigned_abs() {
                return Err(CodecError::BadLatent(format!("symbol {symbol} is out of range")));
            }
            let value = i64::from(symbol) - i64::from(table.offset);
            let index = match usize::try_from(value) {
                Ok(index) if index < escape => index,
                _ => {
                    let raw = escape_raw(value, escape);
                    let count = escape_nibbles(raw);
                    for n in (0..count).rev() {
                        let digit = (raw >> (4 * n)) as u16 & 0xf;
                        coder.encode_symbol(digit as usize, nibble).map_err(failed)?;
                    }
                    coder.encode_symbol(count, nibble).map_err(failed)?;
                    escape
                }
            };
            coder.encode_symbol(index, model).map_err(failed)?;
        }
    }
    let words = coder.into_compressed().unwrap_or_else(|never| match never {});
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

/// Decodes a payload made by [`encode`].
///
/// # Errors
/// [`CodecError::Malformed`] if the payload is not exactly what the encoder makes.
pub fn decode(payload: &[u8], level: &LevelTables, shape: LatentShape) -> Result<Vec<i32>, CodecError> {
    if !payload.len().is_multiple_of(4) || level.channels.len() != usize::from(shape.channels) {
        return Err(CodecError::malformed("the payload's length is no multiple of 4"));
    }
    let words: Vec<u32> = payload.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    let mut coder = DefaultAnsCoder::from_compressed(words).map_err(|_| CodecError::malformed("the payload ends in a zero word"))?;
    let garbage = || CodecError::malformed("the payload does not decode");
    let nibble = uniform();
    let mut symbols = Vec::with_capacity(shape.symbols());
    for table in &level.channels {
        let escape = table.escape();
        let model = table.model.as_view();
        for _ in 0..shape.positions() {
            let index = coder.decode_symbol(model).map_err(|_| garbage())?;
            let value = if index < escape {
                index as i64
            } else {
                let count = coder.decode_symbol(nibble).map_err(|_| garbage())?;
                if count > MAX_NIBBLES {
                    return Err(CodecError::malformed("an escape is longer than any symbol"));
                }
                let mut raw = 0i64;
                for n in 0..count {
                    let digit = coder.decode_symbol(nibble).map_err(|_| garbage())?;
                    raw |= (digit as i64) << (4 * n);
                }
                if raw & 1 == 1 { -(raw >> 1) - 1 } else { (raw >> 1) + escape as i64 }
            };
            let symbol = value + i64::from(table.offset);
            if symbol.unsigned_abs() > u64::from(MAX_MAGNITUDE.unsigned_abs()) {
                return Err(CodecError::malformed("a symbol is out of range"));
            }
            symbols.push(symbol as i32);
        }
    }
    if !coder.is_empty() {
        return Err(CodecError::malformed("bytes are left after the last symbol"));
    }
    Ok(symbols)
}

/// Ideal code length of `symbols` in bits under the integer tables.
pub fn ideal_bits(symbols: &[i32], level: &LevelTables, shape: LatentShape) -> f64 {
    let planes = level.channels.iter().zip(symbols.chunks_exact(shape.positions().max(1)));
    planes.flat_map(|(table, plane)| plane.iter().map(|&s| table.ideal_bits(s))).sum()
}
