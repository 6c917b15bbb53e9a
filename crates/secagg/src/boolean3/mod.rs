//! Mode B: three parties with replicated XOR shares count set bits exactly.
//!
//! A client splits its bits b into s0, s1, s2 with b = s0 ^ s1 ^ s2; party i holds s_i and s_(i+1). Any bits are a valid input, so a
//! client moves each count by at most one and no range proof is needed. One party alone sees uniform bits only; two together see
//! everything. ANDs are those of Araki et al. (CCS 2016): one bit sent per party. The counting circuit is ours.

pub mod count;
pub mod share;

use crate::error::SecAggError;

pub use count::{BlockCount, Opened};
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
