//! One integer distribution over symbols, with an escape for those outside of it.

use std::num::NonZeroU16;

use constriction::stream::model::{ContiguousCategoricalEntropyModel, DecoderModel, EntropyModel};

use crate::CodecError;
use crate::pmf::{PRECISION, TOTAL};

/// Longest table of one distribution.
pub const MAX_SYMBOLS: usize = 4096;
/// Largest offset and symbol magnitude.
pub const MAX_MAGNITUDE: i32 = 1 << 15;

/// Categorical model over table indices.
pub(crate) type Model = ContiguousCategoricalEntropyModel<u16, Vec<u16>, PRECISION>;

/// Integer widths of consecutive symbols and of the escape.
#[derive(Debug, Clone)]
pub struct Distribution {
    /// Symbol of table index 0.
    pub offset: i32,
    widths: Vec<u32>,
    pub(crate) model: Model,
    mode: Mode,
    /// Where the quantiles of symbols begin but for the first one's, filled up with the largest number.
    begins: Vec<[u16; LANES]>,
}

/// Quantiles that are compared at once.
const LANES: usize = 8;

/// The most probable table index: where its quantiles begin, and how many they are.
#[derive(Debug, Clone, Copy)]
struct Mode {
    index: usize,
    left: u16,
    width: NonZeroU16,
}

/// How a distribution's symbols are found: the mode is tried before anything is searched, since most symbols of a latent are their distribution's
/// mode; or, if `MANY` symbols are likely, those that begin at or below a quantile are counted: no branch has to be foreseen.
#[derive(Clone, Copy)]
pub(crate) struct Lookup<'a, const MANY: bool>(pub &'a Distribution);

impl<const MANY: bool> EntropyModel<PRECISION> for Lookup<'_, MANY> {
    type Symbol = usize;
    type Probability = u16;
}

impl<const MANY: bool> DecoderModel<PRECISION> for Lookup<'_, MANY> {
    #[inline(always)]
    fn quantile_function(&self, quantile: u16) -> (usize, u16, NonZeroU16) {
        if !MANY {
            let mode = &self.0.mode;
            if quantile.wrapping_sub(mode.left) < mode.width.get() {
                return (mode.index, mode.left, mode.width);
            }
            return self.0.model.quantile_function(quantile);
        }
        let mut counts = [0u16; LANES];
        for begins in &self.0.begins {
            for (count, &begin) in counts.iter_mut().zip(begins) {
                *count += u16::from(begin <= quantile);
            }
        }
        // the largest quantile, the last symbol's, also reaches what fills up
        let index = usize::from(counts.iter().sum::<u16>()).min(self.0.escape());
        let flat = self.0.begins.as_flattened();
        let left = index.checked_sub(1).map_or(0, |i| flat[i]);
        let width = NonZeroU16::new(self.0.widths[index] as u16).unwrap_or(NonZeroU16::MIN);
        (index, left, width)
    }
}

impl Distribution {
    /// Builds a table; the last of `widths` is the escape symbol's.
    ///
    /// # Errors
    /// [`CodecError::BadTables`] if the offset is out of range or the widths are not a complete distribution.
    pub fn new(offset: i32, widths: Vec<u32>) -> Result<Self, CodecError> {
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
        if i64::from(offset) + widths.len() as i64 - 2 > i64::from(MAX_MAGNITUDE) {
            return Err(CodecError::tables(format!("{} symbols from {offset} on: the last is out of range", widths.len() - 1)));
        }
        let model = Model::from_nonzero_fixed_point_probabilities(&narrow, false)
            .map_err(|()| CodecError::tables("the widths of a table are no distribution"))?;
        let most =
            narrow.iter().enumerate().max_by_key(|(_, width)| **width).and_then(|(index, width)| Some((index, NonZeroU16::new(*width)?)));
        let (index, width) = most.ok_or_else(|| CodecError::tables("a table is empty"))?;
        let mode = Mode { index, left: narrow[..index].iter().sum(), width };
        let mut ends: Vec<u16> = narrow
            .iter()
            .scan(0u16, |sum, w| {
                *sum = sum.wrapping_add(*w);
                Some(*sum)
            })
            .collect();
        ends.pop();
        let begins = ends.chunks(LANES).map(|c| std::array::from_fn(|i| c.get(i).copied().unwrap_or(u16::MAX))).collect();
        Ok(Self { offset, widths, model, mode, begins })
    }

    /// Widths of the symbols from `offset` on, the escape symbol's last.
    pub fn widths(&self) -> &[u32] {
        &self.widths
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
