//! One integer distribution over symbols, with an escape for those outside of it.

use constriction::stream::model::ContiguousCategoricalEntropyModel;

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
        let model = Model::from_nonzero_fixed_point_probabilities(&narrow, false)
            .map_err(|()| CodecError::tables("the widths of a table are no distribution"))?;
        Ok(Self { offset, widths, model })
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
