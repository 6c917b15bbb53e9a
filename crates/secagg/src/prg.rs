//! Pseudo-random streams: AES-256 in counter mode, keyed by HKDF-SHA256 with one label for each purpose.
//!
//! A stream's key depends on everything that says what it is for, so that no two purposes, rounds, reports, blocks, levels or
//! epochs share a byte of it. docs/secure-aggregation.md specifies labels and layouts.

use aes::Aes256;
use ctr::Ctr128LE;
use ctr::cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use hkdf::Hkdf;
use rand::CryptoRng;
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Bytes of a word.
const WORD_BYTES: usize = 8;

/// 32 secret bytes; wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Seed([u8; 32]);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(..)")
    }
}

impl Seed {
    /// From bytes that the caller wipes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// From the generator.
    pub fn random(rng: &mut impl CryptoRng) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The bytes, to be sealed or derived from.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Which report a share belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReportContext {
    /// The training task.
    pub task: [u8; 32],
    /// Its round.
    pub round: u64,
    /// Drawn by the client.
    pub report: [u8; 16],
}

/// A stream of words.
pub struct Stream(Ctr128LE<Aes256>);

impl Stream {
    /// Keyed by `seed` for the purpose `label`, told apart by `fields`.
    fn new(seed: &Seed, label: &[u8], fields: &[&[u8]]) -> Self {
        let mut key = [0; 32];
        let info: Vec<&[u8]> = std::iter::once(label).chain(fields.iter().copied()).collect();
        // fails only for keys of more than 255 hashes
        let expanded = Hkdf::<Sha256>::new(None, seed.expose()).expand_multi_info(&info, &mut key);
        debug_assert!(expanded.is_ok());
        let stream = Self(Ctr128LE::new(&key.into(), &[0; 16].into()));
        key.zeroize();
        stream
    }

    /// Share `index` of a report.
    pub fn share(seed: &Seed, report: &ReportContext, index: u8) -> Self {
        let round = report.round.to_le_bytes();
        Self::new(seed, b"isthmus/v1/share", &[&report.task, &round, &report.report, &[index]])
    }

    /// Signs of the public rotation of block `block`.
    pub fn rotation(seed: &Seed, block: u32) -> Self {
        Self::new(seed, b"isthmus/v1/rotation", &[&block.to_le_bytes()])
    }

    /// Pairwise zero-sharing of one level of one block.
    pub fn zero(seed: &Seed, at: &LevelContext) -> Self {
        let (round, block, level) = (at.round.to_le_bytes(), at.block.to_le_bytes(), at.level.to_le_bytes());
        Self::new(seed, b"isthmus/v1/zero", &[&at.task, &round, &at.epoch.to_le_bytes(), &block, &level])
    }

    /// Goes to word `word`.
    pub fn seek(&mut self, word: usize) {
        self.0.seek(word as u64 * WORD_BYTES as u64);
    }

    /// The next words.
    pub fn fill(&mut self, words: &mut [u64]) {
        words.fill(0);
        self.xor(words);
    }

    /// XORs the next words in.
    pub fn xor(&mut self, words: &mut [u64]) {
        let mut bytes = [0; 512 * WORD_BYTES];
        for words in words.chunks_mut(512) {
            let bytes = &mut bytes[..words.len() * WORD_BYTES];
            bytes.fill(0);
            self.0.apply_keystream(bytes);
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<WORD_BYTES>().0) {
                *word ^= u64::from_le_bytes(*bytes);
            }
        }
        bytes.zeroize();
    }
}

/// Where in a round's computation a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LevelContext {
    /// The training task.
    pub task: [u8; 32],
    /// Its round.
    pub round: u64,
    /// Attempt at computing the round: a new one for every restart.
    pub epoch: u64,
    /// Block of coordinates.
    pub block: u32,
    /// Level of the block.
    pub level: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: ReportContext = ReportContext { task: [1; 32], round: 2, report: [3; 16] };
    const LEVEL: LevelContext = LevelContext { task: [1; 32], round: 2, epoch: 3, block: 4, level: 5 };

    fn words(mut stream: Stream) -> [u64; 4] {
        let mut words = [0; 4];
        stream.fill(&mut words);
        words
    }

    #[test]
    fn threat_reused_seeds_every_field_gives_another_stream() {
        let seed = Seed::from_bytes([7; 32]);
        let share = |change: fn(&mut ReportContext)| {
            let mut report = REPORT;
            change(&mut report);
            words(Stream::share(&seed, &report, 0))
        };
        let zero = |change: fn(&mut LevelContext)| {
            let mut level = LEVEL;
            change(&mut level);
            words(Stream::zero(&seed, &level))
        };
        let all = [
            share(|_| ()),
            share(|r| r.task[31] = 0),
            share(|r| r.round = 3),
            share(|r| r.report[0] = 0),
            words(Stream::share(&seed, &REPORT, 1)),
            words(Stream::share(&Seed::from_bytes([8; 32]), &REPORT, 0)),
            zero(|_| ()),
            zero(|l| l.task[0] = 0),
            zero(|l| l.round = 1),
            zero(|l| l.epoch = 4),
            zero(|l| l.block = 5),
            zero(|l| l.level = 4),
            words(Stream::rotation(&seed, 0)),
            words(Stream::rotation(&seed, 1)),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{i}");
        }
    }

    #[test]
    fn seeking_is_reading_on() {
        let seed = Seed::from_bytes([7; 32]);
        let mut all = vec![0; 3000];
        Stream::share(&seed, &REPORT, 0).fill(&mut all);
        for at in [0, 1, 2, 511, 512, 513, 2999] {
            let mut stream = Stream::share(&seed, &REPORT, 0);
            stream.seek(at);
            let mut rest = vec![0; 3000 - at];
            stream.fill(&mut rest);
            assert_eq!(rest, all[at..], "{at}");
        }
    }

    #[test]
    fn threat_secrets_are_not_printed() {
        assert_eq!(format!("{:?}", Seed::from_bytes([171; 32])), "Seed(..)");
    }
}
