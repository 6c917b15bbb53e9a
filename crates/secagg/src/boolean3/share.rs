//! Splitting a client's bits and expanding a party's share.

use rand::CryptoRng;

use crate::bits::Bits;
use crate::boolean3::Party;
use crate::error::{SecAggError, expect_size};
use crate::prg::{ReportContext, Seed, Stream};

/// What a client sends: two seeds, each sealed for the two parties that hold it, and a masked vector for parties 0 and 2.
pub struct Upload {
    /// b ^ s1 ^ s2, uniform by itself: parties 0 and 2.
    pub s0: Bits,
    /// Seed of s1: parties 0 and 1.
    pub k1: Seed,
    /// Seed of s2: parties 1 and 2.
    pub k2: Seed,
}

impl Upload {
    /// Splits `bits`.
    pub fn split(bits: &Bits, report: &ReportContext, rng: &mut impl CryptoRng) -> Self {
        let (k1, k2) = (Seed::random(rng), Seed::random(rng));
        let mut words = bits.words().to_vec();
        Stream::share(&k1, report, 1).xor(&mut words);
        Stream::share(&k2, report, 2).xor(&mut words);
        let s0 = Bits::fill(bits.len(), |k| words[k]);
        Self { s0, k1, k2 }
    }

    /// What `party` gets.
    pub fn part(&self, party: Party) -> PartyShare {
        match party.index() {
            0 => PartyShare::Zero { s0: self.s0.clone(), k1: self.k1.clone() },
            1 => PartyShare::One { k1: self.k1.clone(), k2: self.k2.clone() },
            _ => PartyShare::Two { k2: self.k2.clone(), s0: self.s0.clone() },
        }
    }
}

/// One client's share as one party stores it.
pub enum PartyShare {
    /// Party 0.
    Zero {
        /// The masked vector.
        s0: Bits,
        /// Seed of s1.
        k1: Seed,
    },
    /// Party 1.
    One {
        /// Seed of s1.
        k1: Seed,
        /// Seed of s2.
        k2: Seed,
    },
    /// Party 2.
    Two {
        /// Seed of s2.
        k2: Seed,
        /// The masked vector.
        s0: Bits,
    },
}

impl PartyShare {
    /// Words `from..from + own.len()` of the two shares that the party holds: s_i into `own`, s_(i+1) into `next`.
    ///
    /// # Errors
    /// If the slices differ in length or reach past the end of the vector.
    pub fn expand(&self, report: &ReportContext, from: usize, own: &mut [u64], next: &mut [u64]) -> Result<(), SecAggError> {
        expect_size("words", own.len(), next.len())?;
        let stored = |s0: &Bits, words: &mut [u64]| {
            let end = from + words.len();
            let part = s0.words().get(from..end).ok_or(SecAggError::Size { what: "words", expected: end, found: s0.words().len() })?;
            words.copy_from_slice(part);
            Ok(())
        };
        match self {
            Self::Zero { s0, k1 } => {
                seeded(k1, report, 1, from, next);
                stored(s0, own)
            }
            Self::One { k1, k2 } => {
                seeded(k1, report, 1, from, own);
                seeded(k2, report, 2, from, next);
                Ok(())
            }
            Self::Two { k2, s0 } => {
                seeded(k2, report, 2, from, own);
                stored(s0, next)
            }
        }
    }
}

/// Words from `from` on of share `index`, whose seed is `seed`.
pub fn seeded(seed: &Seed, report: &ReportContext, index: u8, from: usize, words: &mut [u64]) {
    let mut stream = Stream::share(seed, report, index);
    stream.seek(from);
    stream.fill(words);
}
