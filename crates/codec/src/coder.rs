//! Entropy coding of symbols with asymmetric numeral systems (constriction's `AnsCoder`: 32-bit words,
//! 64-bit state) under the integer tables: one per channel, or one of several chosen by earlier symbols.
//!
//! A symbol outside its table is an escape: the escape entry, then the number of nibbles of
//! the folded overflow, then these nibbles, least significant first, each uniform over 16. ANS is a
//! stack, so everything is pushed in reverse and the decoder reads forward. Decoding never trusts the
//! stream: escapes are bounded and the coder must end exactly empty.

use constriction::stream::model::UniformModel;
use constriction::stream::stack::DefaultAnsCoder;
use constriction::stream::{Code, Decode, Encode};

use crate::CodecError;
use crate::contexts::Field;
use crate::distribution::{Distribution, MAX_MAGNITUDE, ModeFirst};
use crate::pmf::PRECISION;
use crate::tables::{LatentShape, LevelTables};

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

fn push(coder: &mut DefaultAnsCoder, distribution: &Distribution, symbol: i32) -> Result<(), CodecError> {
    let failed = |_| CodecError::BadLatent("a symbol has no code".into());
    let escape = distribution.escape();
    let value = i64::from(symbol) - i64::from(distribution.offset);
    let index = match usize::try_from(value) {
        Ok(index) if index < escape => index,
        _ => {
            let nibble = uniform();
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
    coder.encode_symbol(index, distribution.model.as_view()).map_err(failed)
}

#[inline(always)]
fn pop(coder: &mut DefaultAnsCoder, distribution: &Distribution) -> Result<i32, CodecError> {
    let index = coder.decode_symbol(ModeFirst(distribution)).map_err(|_| garbage())?;
    let escape = distribution.escape();
    let value = if index < escape { index as i64 } else { pop_escaped(coder, escape)? };
    let symbol = value + i64::from(distribution.offset);
    if symbol.unsigned_abs() > u64::from(MAX_MAGNITUDE.unsigned_abs()) {
        return Err(CodecError::malformed("a symbol is out of range"));
    }
    Ok(symbol as i32)
}

/// The next symbol; none where the words that it needs are missing.
#[inline(always)]
fn next<const PART: bool>(coder: &mut DefaultAnsCoder, distribution: &Distribution) -> Result<Option<i32>, CodecError> {
    if !PART {
        return pop(coder, distribution).map(Some);
    }
    if starves(coder) {
        return Ok(None);
    }
    let symbol = pop(coder, distribution);
    // the rest of an escape may have been missing
    let whole = |s: i32| usize::try_from(i64::from(s) - i64::from(distribution.offset)).is_ok_and(|i| i < distribution.escape());
    match symbol {
        _ if !starves(coder) => symbol.map(Some),
        Ok(symbol) if whole(symbol) => Ok(Some(symbol)),
        _ => Ok(None),
    }
}

#[cold]
fn garbage() -> CodecError {
    CodecError::malformed("the payload does not decode")
}

#[cold]
fn pop_escaped(coder: &mut DefaultAnsCoder, escape: usize) -> Result<i64, CodecError> {
    let nibble = uniform();
    let count = coder.decode_symbol(nibble).map_err(|_| garbage())?;
    if count > MAX_NIBBLES {
        return Err(CodecError::malformed("an escape is longer than any symbol"));
    }
    let mut raw = 0i64;
    for n in 0..count {
        let digit = coder.decode_symbol(nibble).map_err(|_| garbage())?;
        raw |= (digit as i64) << (4 * n);
    }
    Ok(if raw & 1 == 1 { -(raw >> 1) - 1 } else { (raw >> 1) + escape as i64 })
}

fn check(symbols: &[i32], level: &LevelTables, shape: LatentShape) -> Result<(), CodecError> {
    if symbols.len() != shape.symbols() || level.channels.len() != usize::from(shape.channels) || symbols.is_empty() {
        return Err(CodecError::BadLatent(format!("{} symbols for a latent of {shape}", symbols.len())));
    }
    match symbols.iter().find(|s| s.unsigned_abs() > MAX_MAGNITUDE.unsigned_abs()) {
        Some(symbol) => Err(CodecError::BadLatent(format!("symbol {symbol} is out of range"))),
        None => Ok(()),
    }
}

/// Calls `each` with every symbol and its distribution: channels in coding order, or in reverse with all positions
/// reversed too.
fn visit<E>(
    symbols: &[i32],
    level: &LevelTables,
    shape: LatentShape,
    reverse: bool,
    mut each: impl FnMut(i32, &Distribution) -> Result<(), E>,
) -> Result<(), E> {
    let field = level.field(symbols, shape);
    let positions = shape.positions();
    let in_turn: &mut dyn Iterator<Item = &u16> = if reverse { &mut level.order().iter().rev() } else { &mut level.order().iter() };
    for channel in in_turn.map(|&c| usize::from(c)) {
        let contexts = &level.channels[channel].contexts;
        let bins = field.as_ref().filter(|_| !contexts.is_static()).map(|f| f.bins(contexts));
        let plane = &symbols[channel * positions..][..positions];
        for i in 0..positions {
            let at = if reverse { positions - 1 - i } else { i };
            each(plane[at], &contexts.distributions()[bins.as_ref().map_or(0, |b| b[at])])?;
        }
    }
    Ok(())
}

/// Codes `symbols` (channel-major). The payload's length is a multiple of 4 bytes.
///
/// # Errors
/// [`CodecError::BadLatent`] if the number of symbols does not fit `shape` or a symbol is out of range.
pub fn encode(symbols: &[i32], level: &LevelTables, shape: LatentShape) -> Result<Vec<u8>, CodecError> {
    check(symbols, level, shape)?;
    let mut coder = DefaultAnsCoder::new();
    visit(symbols, level, shape, true, |symbol, distribution| push(&mut coder, distribution, symbol))?;
    let words = coder.into_compressed().unwrap_or_else(|never| match never {});
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

/// What the end of a payload holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Channel-major; zero where nothing is known.
    pub symbols: Vec<i32>,
    /// How many are known: the first ones in coding order.
    pub known: usize,
}

/// Decodes as much as the last bytes of a payload allow. A decoder takes the words of a payload from its end, and channels come in the level's coding
/// order: who sends the words from the last to the first sends a stream of which every prefix decodes.
///
/// # Errors
/// [`CodecError::Malformed`] if they are not the end of what [`encode`] makes.
pub fn decode_end(end: &[u8], level: &LevelTables, shape: LatentShape) -> Result<Part, CodecError> {
    if end.len() < 8 {
        return Ok(Part { symbols: vec![0; shape.symbols()], known: 0 });
    }
    let (symbols, known, _) = decode_words::<true>(end, level, shape)?;
    Ok(Part { symbols, known })
}

/// Decodes a payload made by [`encode`].
///
/// # Errors
/// [`CodecError::Malformed`] if the payload is not exactly what the encoder makes.
pub fn decode(payload: &[u8], level: &LevelTables, shape: LatentShape) -> Result<Vec<i32>, CodecError> {
    let (symbols, _, ended) = decode_words::<false>(payload, level, shape)?;
    if !ended {
        return Err(CodecError::malformed("bytes are left after the last symbol"));
    }
    Ok(symbols)
}

/// True if the coder would have to read a word that is not there.
fn starves(coder: &DefaultAnsCoder) -> bool {
    coder.bulk().is_empty() && coder.state() < 1 << 32
}

/// Symbols, how many of them are known if `PART` (words are missing before those of `payload`), and whether the coder is empty.
fn decode_words<const PART: bool>(payload: &[u8], level: &LevelTables, shape: LatentShape) -> Result<(Vec<i32>, usize, bool), CodecError> {
    if !payload.len().is_multiple_of(4) || level.channels.len() != usize::from(shape.channels) {
        return Err(CodecError::malformed("the payload's length is no multiple of 4"));
    }
    if shape.symbols() == 0 {
        return Err(CodecError::malformed("the latent is empty"));
    }
    let words: Vec<u32> = payload.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    let mut coder = DefaultAnsCoder::from_compressed(words).map_err(|_| CodecError::malformed("the payload ends in a zero word"))?;
    let positions = shape.positions();
    let mut symbols = vec![0; shape.symbols()];
    let mut field = (!level.is_static()).then(|| Field::new(shape));
    let mut known = 0;
    for &channel in level.order() {
        let contexts = &level.channels[usize::from(channel)].contexts;
        let plane = &mut symbols[usize::from(channel) * positions..][..positions];
        match field.as_mut().filter(|_| !contexts.is_static()) {
            None => {
                let distribution = &contexts.distributions()[0];
                for symbol in plane.iter_mut() {
                    let Some(value) = next::<PART>(&mut coder, distribution)? else { return Ok((symbols, known, false)) };
                    *symbol = value;
                    known += usize::from(PART);
                }
            }
            Some(field) => {
                let [magnitude, signed] = field.estimate_others(contexts, channel);
                let own = field.own_taps(contexts, channel);
                for (y, row) in plane.chunks_exact_mut(shape.width.into()).enumerate() {
                    let start = field.index(channel.into(), y, 0);
                    for (x, symbol) in row.iter_mut().enumerate() {
                        let at = field.place(y, x);
                        let bin = field.complete(contexts, &own, [magnitude[at], signed[at]], start + x);
                        let distribution = &contexts.distributions()[bin];
                        let Some(value) = next::<PART>(&mut coder, distribution)? else { return Ok((symbols, known, false)) };
                        *symbol = value;
                        known += usize::from(PART);
                        field.put(start + x, *symbol);
                    }
                }
            }
        }
        // predictors of later channels may read this one even if its own table is static; a new field is zero
        if let Some(field) = field.as_mut().filter(|_| contexts.is_static()) {
            plane.iter().enumerate().filter(|(_, s)| **s != 0).for_each(|(at, &s)| field.set(channel.into(), at, s));
        }
    }
    Ok((symbols, known, coder.is_empty()))
}

/// Ideal code length of `symbols` in bits under the integer tables.
///
/// # Errors
/// [`CodecError::BadLatent`] as in [`encode`].
pub fn ideal_bits(symbols: &[i32], level: &LevelTables, shape: LatentShape) -> Result<f64, CodecError> {
    check(symbols, level, shape)?;
    let mut bits = 0.0;
    visit(symbols, level, shape, false, |symbol, distribution| {
        bits += distribution.ideal_bits(symbol);
        Ok::<_, CodecError>(())
    })?;
    Ok(bits)
}
