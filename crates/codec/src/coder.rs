//! Entropy coding of symbols with asymmetric numeral systems (constriction's `AnsCoder`: 32-bit words,
//! 64-bit state) under the integer tables: one per channel, or one of several chosen by earlier symbols.
//!
//! A symbol outside its table is an escape: the escape entry, then the number of nibbles of
//! the folded overflow, then these nibbles, least significant first, each uniform over 16. ANS is a
//! stack, so everything is pushed in reverse and the decoder reads forward. Decoding never trusts the
//! stream: escapes are bounded and the coder must end exactly empty.

use constriction::Stack;
use constriction::backends::{BoundedReadWords, Cursor};
use constriction::stream::model::UniformModel;
use constriction::stream::stack::{AnsCoder, DefaultAnsCoder};
use constriction::stream::{Code, Decode, Encode};

use crate::CodecError;
use crate::contexts::{Contexts, Field};
use crate::distribution::{Distribution, Lookup, MAX_MAGNITUDE};
use crate::estimator::{Estimator, Sums};
use crate::pmf::PRECISION;
use crate::tables::{LatentShape, LevelTables};

/// Nibbles of the largest escape that a clamped symbol can need.
const MAX_NIBBLES: usize = 6;

/// Reads the words of a payload. Small and copied where a function that is rarely called needs it: its state stays in registers.
type Reader<'a> = AnsCoder<u32, u64, Cursor<u32, &'a [u32]>>;

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
fn pop<const MANY: bool>(coder: &mut Reader<'_>, distribution: &Distribution) -> Result<i32, CodecError> {
    let index = coder.decode_symbol(Lookup::<MANY>(distribution)).map_err(|_| garbage())?;
    if index < distribution.escape() {
        return Ok(index as i32 + distribution.offset);
    }
    let (symbol, rest) = pop_escaped(coder.clone(), distribution)?;
    *coder = rest;
    Ok(symbol)
}

/// The next symbol; none where the words that it needs are missing.
#[inline(always)]
fn next<const PART: bool, const MANY: bool>(coder: &mut Reader<'_>, distribution: &Distribution) -> Result<Option<i32>, CodecError> {
    if !PART {
        return pop::<MANY>(coder, distribution).map(Some);
    }
    if starves(coder) {
        return Ok(None);
    }
    let symbol = pop::<MANY>(coder, distribution);
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
fn pop_escaped<'a>(mut coder: Reader<'a>, distribution: &Distribution) -> Result<(i32, Reader<'a>), CodecError> {
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
    let value = if raw & 1 == 1 { -(raw >> 1) - 1 } else { (raw >> 1) + distribution.escape() as i64 };
    let symbol = value + i64::from(distribution.offset);
    if symbol.unsigned_abs() > u64::from(MAX_MAGNITUDE.unsigned_abs()) {
        return Err(CodecError::malformed("a symbol is out of range"));
    }
    Ok((symbol as i32, coder))
}

fn check(symbols: &[i32], level: &LevelTables, shape: LatentShape) -> Result<(), CodecError> {
    if symbols.len() != shape.symbols() || level.channels.len() != usize::from(shape.channels) || symbols.is_empty() {
        return Err(CodecError::BadLatent(format!("{} symbols for a latent of {shape}", symbols.len())));
    }
    if let Some(symbol) = symbols.iter().find(|s| s.unsigned_abs() > MAX_MAGNITUDE.unsigned_abs()) {
        return Err(CodecError::BadLatent(format!("symbol {symbol} is out of range")));
    }
    let positions = shape.positions();
    match level.silent().find(|&c| symbols[usize::from(c) * positions..][..positions].iter().any(|&s| s != 0)) {
        Some(channel) => Err(CodecError::BadLatent(format!("channel {channel} is silent, but has symbols other than zero"))),
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
    let mut symbols = vec![0; shape.symbols()];
    let (known, _) = decode_words::<true>(end, level, shape, &[], gather(&mut symbols, shape))?;
    Ok(Part { symbols, known })
}

/// Decodes a payload made by [`encode`].
///
/// # Errors
/// [`CodecError::Malformed`] if the payload is not exactly what the encoder makes.
pub fn decode(payload: &[u8], level: &LevelTables, shape: LatentShape) -> Result<Vec<i32>, CodecError> {
    let mut symbols = vec![0; shape.symbols()];
    decode_planes(payload, level, shape, gather(&mut symbols, shape))?;
    Ok(symbols)
}

/// As [`decode`], handing over the symbols of one channel after the other, in the level's coding order: nothing has to be held but one plane.
///
/// # Errors
/// As [`decode`]; what was handed over before means nothing then.
pub fn decode_planes(payload: &[u8], level: &LevelTables, shape: LatentShape, each: impl FnMut(usize, &[i32])) -> Result<(), CodecError> {
    decode_given(payload, level, shape, &[], each)
}

/// As [`decode_planes`], where the symbols of the first channels are `given`.
pub(crate) fn decode_given(
    payload: &[u8],
    level: &LevelTables,
    shape: LatentShape,
    given: &[i32],
    each: impl FnMut(usize, &[i32]),
) -> Result<(), CodecError> {
    let (_, ended) = decode_words::<false>(payload, level, shape, given, each)?;
    if !ended {
        return Err(CodecError::malformed("bytes are left after the last symbol"));
    }
    Ok(())
}

/// Writes planes where they belong.
fn gather(symbols: &mut [i32], shape: LatentShape) -> impl FnMut(usize, &[i32]) {
    let positions = shape.positions();
    move |channel, plane| symbols[channel * positions..][..positions].copy_from_slice(plane)
}

/// True if the coder would have to read a word that is not there.
fn starves(coder: &Reader<'_>) -> bool {
    BoundedReadWords::<u32, Stack>::is_exhausted(coder.bulk()) && coder.state() < 1 << 32
}

/// Hands over planes; how many symbols are known if `PART` (words are missing before those of `payload`), and whether the coder is empty.
fn decode_words<const PART: bool>(
    payload: &[u8],
    level: &LevelTables,
    shape: LatentShape,
    given: &[i32],
    mut each: impl FnMut(usize, &[i32]),
) -> Result<(usize, bool), CodecError> {
    if given.len() != level.given() * shape.positions() {
        return Err(CodecError::BadLatent(format!("{} symbols are given, {} channels are to be", given.len(), level.given())));
    }
    if !payload.len().is_multiple_of(4) || level.channels.len() != usize::from(shape.channels) {
        return Err(CodecError::malformed("the payload's length is no multiple of 4"));
    }
    if shape.symbols() == 0 {
        return Err(CodecError::malformed("the latent is empty"));
    }
    let words: Vec<u32> = payload.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    let mut coder = Reader::from_compressed_slice(&words).map_err(|_| CodecError::malformed("the payload ends in a zero word"))?;
    let mut plane = vec![0; shape.positions()];
    let mut field = (!level.is_static()).then(|| Field::new(shape));
    if let Some(field) = field.as_mut() {
        let planes = (0u16..).zip(given.chunks_exact(shape.positions()));
        planes.filter(|(channel, _)| level.is_read(*channel)).for_each(|(channel, plane)| field.note(channel, plane));
    }
    let mut known = 0;
    for &channel in level.order() {
        let contexts = &level.channels[usize::from(channel)].contexts;
        let new = match field.as_mut().filter(|_| !contexts.is_static()) {
            None => decode_static::<PART>(&mut coder, &contexts.distributions()[0], &mut plane)?,
            Some(field) => decode_in_context::<PART>(&mut coder, (channel, contexts), field, &mut plane)?,
        };
        plane[new..].fill(0);
        each(channel.into(), &plane);
        known += new;
        if new < plane.len() {
            return Ok((known, false));
        }
        if let Some(field) = field.as_mut().filter(|_| level.is_read(channel)) {
            field.note(channel, &plane);
        }
    }
    Ok((known, coder.is_empty()))
}

/// Symbols of one channel that have one distribution; how many are known.
fn decode_static<const PART: bool>(coder: &mut Reader<'_>, distribution: &Distribution, plane: &mut [i32]) -> Result<usize, CodecError> {
    // a copy stays in registers
    let mut reader = coder.clone();
    for (at, symbol) in plane.iter_mut().enumerate() {
        let Some(value) = next::<PART, false>(&mut reader, distribution)? else { return Ok(at) };
        *symbol = value;
    }
    *coder = reader;
    Ok(plane.len())
}

/// Symbols of one channel whose distributions depend on earlier ones; how many are known.
fn decode_in_context<const PART: bool>(
    coder: &mut Reader<'_>,
    (channel, contexts): (u16, &Contexts),
    field: &Field,
    plane: &mut [i32],
) -> Result<usize, CodecError> {
    match contexts.estimator() {
        Estimator::Linear(linear) => decode_estimated::<PART, _>(coder, (channel, contexts), linear, field, plane),
        Estimator::Network(network) => decode_estimated::<PART, _>(coder, (channel, contexts), network.as_ref(), field, plane),
    }
}

/// As above, with what estimates them.
fn decode_estimated<const PART: bool, S: Sums>(
    coder: &mut Reader<'_>,
    (channel, contexts): (u16, &Contexts),
    sums: &S,
    field: &Field,
    plane: &mut [i32],
) -> Result<usize, CodecError> {
    let mut reader = coder.clone();
    let mut decoding = field.decoding(contexts, sums, channel);
    let width = field.width();
    for (y, row) in plane.chunks_exact_mut(width).enumerate() {
        for (x, symbol) in row.iter_mut().enumerate() {
            let Some(value) = next::<PART, true>(&mut reader, decoding.distribution(y, x))? else { return Ok(y * width + x) };
            *symbol = value;
            decoding.put(y, x, value);
        }
    }
    *coder = reader;
    Ok(plane.len())
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
