//! Mode B: three parties with replicated XOR shares count set bits exactly.
//!
//! A client splits its bits b into s0, s1, s2 with b = s0 ^ s1 ^ s2; party i holds s_i and s_(i+1). Any bits are a valid input, so a
//! client moves each count by at most one and no range proof is needed. One party alone sees uniform bits only; two together see
//! everything. ANDs are those of Araki et al. (CCS 2016): one bit sent per party. The counting circuit is ours.

pub mod circuit;
pub mod count;
pub mod filter;
pub mod share;

use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::error::{SecAggError, expect_size};

pub use circuit::{Circuit, Exchange};
pub use count::{BlockCount, Opened, ZeroKeys};
pub use share::{PartyShare, Upload};

/// One of the three parties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Party(u8);

impl Party {
    /// All of them.
    pub const ALL: [Self; 3] = [Self(0), Self(1), Self(2)];

    /// Party 0, 1 or 2.
    ///
    /// # Errors
    /// For any other number.
    pub fn new(index: u8) -> Result<Self, SecAggError> {
        if index < 3 { Ok(Self(index)) } else { Err(SecAggError::Config(format!("there are parties 0, 1 and 2, not {index}"))) }
    }

    /// 0, 1 or 2.
    pub fn index(self) -> u8 {
        self.0
    }

    /// Party i + 1: gets opening messages.
    #[must_use]
    pub fn next(self) -> Self {
        Self((self.0 + 1) % 3)
    }

    /// Party i - 1: gets level messages.
    #[must_use]
    pub fn previous(self) -> Self {
        Self((self.0 + 2) % 3)
    }
}

/// One party's two shares of the same words: s_i and s_(i+1).
#[derive(Default, Clone, Zeroize, ZeroizeOnDrop)]
pub struct Shares {
    /// s_i.
    pub own: Vec<u64>,
    /// s_(i+1).
    pub next: Vec<u64>,
}

impl Shares {
    /// Shares of `words` words of zeros.
    pub fn zeros(words: usize) -> Self {
        Self { own: vec![0; words], next: vec![0; words] }
    }

    /// Words.
    pub fn len(&self) -> usize {
        self.own.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// XORs another value in.
    pub fn xor(&mut self, other: &Self) {
        self.own.iter_mut().zip(&other.own).for_each(|(a, b)| *a ^= b);
        self.next.iter_mut().zip(&other.next).for_each(|(a, b)| *a ^= b);
    }

    /// XORs words in that every party knows: they belong to s_0.
    pub fn xor_public(&mut self, party: Party, words: impl IntoIterator<Item = u64>) {
        let share = match party.index() {
            0 => &mut self.own,
            2 => &mut self.next,
            _ => return,
        };
        share.iter_mut().zip(words).for_each(|(a, b)| *a ^= b);
    }

    /// Applies `f`, which must be linear, to both shares.
    #[must_use]
    pub fn map(&self, mut f: impl FnMut(&[u64]) -> Vec<u64>) -> Self {
        Self { own: f(&self.own), next: f(&self.next) }
    }

    /// Words `range`.
    #[must_use]
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        Self { own: self.own[range.clone()].to_vec(), next: self.next[range].to_vec() }
    }

    /// Adds words at the end.
    pub fn append(&mut self, other: &Self) {
        self.own.extend_from_slice(&other.own);
        self.next.extend_from_slice(&other.next);
    }

    /// The values, with the share that this party lacks.
    ///
    /// # Errors
    /// If it has another size.
    pub fn open(&self, missing: &[u64]) -> Result<Vec<u64>, SecAggError> {
        expect_size("words of an opening", self.len(), missing.len())?;
        Ok(self.own.iter().zip(&self.next).zip(missing).map(|((a, b), c)| a ^ b ^ c).collect())
    }
}
