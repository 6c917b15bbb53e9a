//! Splitting a client's bits and expanding a party's share.

use rand::CryptoRng;

use crate::bits::Bits;
use crate::boolean3::Party;
use crate::error::{SecAggError, expect_size};
use crate::prg::{ReportContext, Seed, Stream};

/// What a client sends: two seeds, each sealed for the two parties that hold it, and a masked vector for parties 1 and 2.
pub struct Upload {
    /// Seed of s0: parties 0 and 2.
    pub k0: Seed,
    /// Seed of s1: parties 0 and 1.
    pub k1: Seed,
    /// b ^ s0 ^ s1, uniform by itself: parties 1 and 2.
    pub s2: Bits,
}

impl Upload {
    /// Splits `bits`.
    pub fn split(bits: &Bits, report: &ReportContext, rng: &mut impl CryptoRng) -> Self {
        let (k0, k1) = (Seed::random(rng), Seed::random(rng));
        let mut words = bits.words().to_vec();
        Stream::share(&k0, report, 0).xor(&mut words);
        Stream::share(&k1, report, 1).xor(&mut words);
        let s2 = Bits::fill(bits.len(), |k| words[k]);
        Self { k0, k1, s2 }
    }

    /// What `party` gets.
    pub fn part(&self, party: Party) -> PartyShare {
        match party.index() {
            0 => PartyShare::Zero { k0: self.k0.clone(), k1: self.k1.clone() },
            1 => PartyShare::One { k1: self.k1.clone(), s2: self.s2.clone() },
            _ => PartyShare::Two { s2: self.s2.clone(), k0: self.k0.clone() },
        }
    }
}

/// One client's share as one party stores it.
pub enum PartyShare {
    /// Party 0.
    Zero {
        /// Seed of s0.
        k0: Seed,
        /// Seed of s1.
        k1: Seed,
    },
    /// Party 1.
    One {
        /// Seed of s1.
        k1: Seed,
        /// The masked vector.
        s2: Bits,
    },
    /// Party 2.
    Two {
        /// The masked vector.
        s2: Bits,
        /// Seed of s0.
        k0: Seed,
    },
}

impl PartyShare {
    /// Words `from..from + own.len()` of the two shares that the party holds: s_i into `own`, s_(i+1) into `next`.
    ///
    /// # Errors
    /// If the slices differ in length or reach past the end of the vector.
    pub fn expand(&self, report: &ReportContext, from: usize, own: &mut [u64], next: &mut [u64]) -> Result<(), SecAggError> {
        expect_size("words", own.len(), next.len())?;
        let seeded = |seed: &Seed, index: u8, words: &mut [u64]| {
            let mut stream = Stream::share(seed, report, index);
            stream.seek(from);
            stream.fill(words);
        };
        let stored = |s2: &Bits, words: &mut [u64]| {
            let end = from + words.len();
            let part = s2.words().get(from..end).ok_or(SecAggError::Size { what: "words", expected: end, found: s2.words().len() })?;
            words.copy_from_slice(part);
            Ok(())
        };
        match self {
            Self::Zero { k0, k1 } => {
                seeded(k0, 0, own);
                seeded(k1, 1, next);
                Ok(())
            }
            Self::One { k1, s2 } => {
                seeded(k1, 1, own);
                stored(s2, next)
            }
            Self::Two { s2, k0 } => {
                seeded(k0, 0, next);
                stored(s2, own)
            }
        }
    }
}
