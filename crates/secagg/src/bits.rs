//! Packed bit vectors: bit j is bit j mod 8, least significant first, of byte j / 8.

use crate::error::{SecAggError, expect_size};

/// Bits of a word.
pub const WORD: usize = 64;

/// A vector of bits in words of 64, least significant first; bits after the last are zero.
#[derive(Clone, PartialEq, Eq)]
pub struct Bits {
    len: usize,
    words: Vec<u64>,
}

impl std::fmt::Debug for Bits {
    /// The length alone: the bits may be a share.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bits({})", self.len)
    }
}

impl Bits {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self { len, words: vec![0; len.div_ceil(WORD)] }
    }

    /// From words.
    ///
    /// # Errors
    /// If there are too many or too few, or bits after the last are set.
    pub fn from_words(len: usize, words: Vec<u64>) -> Result<Self, SecAggError> {
        expect_size("words", len.div_ceil(WORD), words.len())?;
        let bits = Self { len, words };
        if bits.words.last().is_some_and(|last| last & !bits.last_mask() != 0) {
            return Err(SecAggError::Padding);
        }
        Ok(bits)
    }

    /// From bytes as on the wire.
    ///
    /// # Errors
    /// If there are too many or too few, or bits after the last are set.
    pub fn from_bytes(len: usize, bytes: &[u8]) -> Result<Self, SecAggError> {
        expect_size("bytes", len.div_ceil(8), bytes.len())?;
        let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
        Self::from_words(len, bytes.chunks(8).map(word).collect())
    }

    /// As on the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = le_bytes(&self.words);
        bytes.truncate(self.len.div_ceil(8));
        bytes
    }

    /// Bits.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Words, the last one padded with zeros.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Bit `j`; false after the end.
    pub fn get(&self, j: usize) -> bool {
        self.words.get(j / WORD).is_some_and(|w| w >> (j % WORD) & 1 == 1)
    }

    /// Sets bits word by word: `word(k)` gives bits 64 k to 64 k + 63.
    pub fn fill(len: usize, word: impl FnMut(usize) -> u64) -> Self {
        let mut bits = Self { len, words: (0..len.div_ceil(WORD)).map(word).collect() };
        let mask = bits.last_mask();
        if let Some(last) = bits.words.last_mut() {
            *last &= mask;
        }
        bits
    }

    /// Bits that belong to the last word.
    fn last_mask(&self) -> u64 {
        match self.len % WORD {
            0 => u64::MAX,
            n => (1 << n) - 1,
        }
    }
}

/// Words as bytes, the lowest first. An iterator over bytes would be several times as slow.
pub fn le_bytes(words: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; 8 * words.len()];
    bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(b, w)| *b = w.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_words_agree_and_padding_is_checked() {
        for len in [0, 1, 7, 8, 9, 63, 64, 65, 129] {
            let bits = Bits::fill(len, |k| 0x9E37_79B9_7F4A_7C15u64.rotate_left(k as u32));
            let bytes = bits.to_bytes();
            assert_eq!(bytes.len(), len.div_ceil(8));
            assert_eq!(Bits::from_bytes(len, &bytes).unwrap(), bits);
            for j in 0..len {
                assert_eq!(bits.get(j), bytes[j / 8] >> (j % 8) & 1 == 1, "{len} {j}");
            }
            assert!(!bits.get(len));
            let mut long = bytes.clone();
            long.push(0);
            assert!(matches!(Bits::from_bytes(len, &long), Err(SecAggError::Size { .. })));
            if len % 8 != 0 {
                let mut dirty = bytes;
                *dirty.last_mut().unwrap() |= 0x80;
                assert_eq!(Bits::from_bytes(len, &dirty), Err(SecAggError::Padding));
            }
        }
    }
}
