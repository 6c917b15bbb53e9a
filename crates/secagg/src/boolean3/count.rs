//! One party's side of counting a block of coordinates over all clients.
//!
//! A column holds bits of one weight, 64 coordinates a word, one row for each client. 3:2 compressors turn the rows of a column
//! into one digit and half as many rows of the next; a compressor needs one AND, (x ^ z)(y ^ z) ^ z, and all ANDs of a column are
//! independent because digits are linear. So n clients cost n - (ones in n) ANDs in floor(log2 n) levels, one message each.

use zeroize::Zeroize;

use crate::boolean3::Party;
use crate::error::{SecAggError, expect_size};
use crate::prg::{LevelContext, Seed, Stream};

/// Words of a row that are worked on together: a column's rows of this width fit the caches.
const TILE: usize = 32;

/// Shares of the same words: s_i and s_(i+1).
#[derive(Default, Zeroize)]
struct Pair {
    own: Vec<u64>,
    next: Vec<u64>,
}

/// The keys of the zero-sharing that a party has with its neighbours, and where in which round it stands.
pub struct ZeroKeys {
    /// Shared with the previous party.
    pub own: Seed,
    /// Shared with the next party.
    pub next: Seed,
    /// The training task.
    pub task: [u8; 32],
    /// Its round.
    pub round: u64,
    /// Attempt; a restarted computation must take a new one.
    pub epoch: u64,
}

/// Counting one block.
///
/// [`Self::send`] and [`Self::receive`] alternate until `send` gives nothing; then [`Self::opening`] and [`Self::open`]. A value is
/// used up as it goes, so no stream of the zero-sharing can be used for two inputs within an attempt.
pub struct BlockCount {
    block: u32,
    level: u32,
    words: usize,
    rows: usize,
    column: Pair,
    digits: Pair,
    waiting: bool,
}

/// Digits of the counts, weight 1 first, in words of 64 coordinates.
pub struct Opened {
    words: usize,
    digits: Vec<u64>,
}

impl BlockCount {
    /// Block number `block` of `words` words; `own` and `next` hold one row of shares for each client, one after the other.
    ///
    /// # Errors
    /// If there are no rows or their sizes differ.
    pub fn new(block: u32, words: usize, own: Vec<u64>, next: Vec<u64>) -> Result<Self, SecAggError> {
        expect_size("words of shares", own.len(), next.len())?;
        if words == 0 || own.is_empty() || !own.len().is_multiple_of(words) {
            return Err(SecAggError::Config(format!("{} words of shares are no rows of {words}", own.len())));
        }
        let rows = own.len() / words;
        Ok(Self { block, level: 0, words, rows, column: Pair { own, next }, digits: Pair::default(), waiting: false })
    }

    /// Message of the next level, for the previous party; none when all levels are done.
    ///
    /// # Errors
    /// If the last level's answer is missing.
    pub fn send(&mut self, keys: &ZeroKeys) -> Result<Option<Vec<u64>>, SecAggError> {
        if self.waiting {
            return Err(SecAggError::Order("the last level's message has not been received"));
        }
        if self.rows == 0 {
            return Ok(None);
        }
        let (words, pairs) = (self.words, self.rows / 2);
        let mut message = vec![0; pairs * words];
        let mut carries = Pair { own: vec![0; pairs * words], next: vec![0; pairs * words] };
        let mut digit = Pair { own: self.column.own[..words].to_vec(), next: self.column.next[..words].to_vec() };
        let at = LevelContext { task: keys.task, round: keys.round, epoch: keys.epoch, block: self.block, level: self.level };
        if pairs > 0 {
            Stream::zero(&keys.own, &at).xor(&mut message);
            Stream::zero(&keys.next, &at).xor(&mut message);
        }
        for tile in (0..words).step_by(TILE) {
            let width = TILE.min(words - tile);
            let row = |r: usize| r * words + tile..r * words + tile + width;
            let (s_own, s_next) = (&mut digit.own[tile..tile + width], &mut digit.next[tile..tile + width]);
            for pair in 0..pairs {
                let (y, z, to) = (row(2 * pair + 1), row(2 * pair + 2), row(pair));
                let (z_own, z_next) = if 2 * pair + 2 < self.rows {
                    (&self.column.own[z.clone()], &self.column.next[z])
                } else {
                    (&ZEROS[..width], &ZEROS[..width])
                };
                let inputs = s_own.iter_mut().zip(s_next.iter_mut()).zip(&self.column.own[y.clone()]).zip(&self.column.next[y]).zip(z_own);
                let outputs = message[to.clone()].iter_mut().zip(&mut carries.own[to.clone()]).zip(&mut carries.next[to]);
                for ((((((xo, xn), yo), yn), zo), zn), ((m, co), cn)) in inputs.zip(z_next).zip(outputs) {
                    let (uo, un, vo, vn) = (*xo ^ zo, *xn ^ zn, yo ^ zo, yn ^ zn);
                    *m ^= (uo & vo) ^ (uo & vn) ^ (un & vo);
                    *co = *m ^ zo;
                    *cn = *zn;
                    *xo ^= vo;
                    *xn ^= vn;
                }
            }
        }
        self.digits.own.append(&mut digit.own);
        self.digits.next.append(&mut digit.next);
        self.column.zeroize();
        (self.column, self.rows) = (carries, pairs);
        self.level += 1;
        self.waiting = pairs > 0;
        Ok(if pairs > 0 { Some(message) } else { None })
    }

    /// Takes the next party's message of the level just sent.
    ///
    /// # Errors
    /// If none is due, or it has another size.
    pub fn receive(&mut self, message: &[u64]) -> Result<(), SecAggError> {
        if !self.waiting {
            return Err(SecAggError::Order("no message is due"));
        }
        expect_size("words of a level", self.column.next.len(), message.len())?;
        self.column.next.iter_mut().zip(message).for_each(|(c, m)| *c ^= m);
        self.waiting = false;
        Ok(())
    }

    /// What the next party lacks to open the counts. Sending it is what makes the result known.
    ///
    /// # Errors
    /// If levels are missing.
    pub fn opening(&self) -> Result<&[u64], SecAggError> {
        if self.waiting || self.rows > 0 {
            return Err(SecAggError::Order("levels are missing"));
        }
        Ok(&self.digits.own)
    }

    /// Opens with the previous party's message.
    ///
    /// # Errors
    /// If levels are missing or the message has another size.
    pub fn open(mut self, message: &[u64]) -> Result<Opened, SecAggError> {
        expect_size("words of an opening", self.opening()?.len(), message.len())?;
        let mut digits = std::mem::take(&mut self.digits.own);
        for ((d, next), m) in digits.iter_mut().zip(&self.digits.next).zip(message) {
            *d ^= next ^ m;
        }
        Ok(Opened { words: self.words, digits })
    }
}

impl Drop for BlockCount {
    fn drop(&mut self) {
        self.column.zeroize();
        self.digits.zeroize();
    }
}

static ZEROS: [u64; TILE] = [0; TILE];

impl Opened {
    /// Counts of the first `len` coordinates.
    ///
    /// # Errors
    /// If the block has fewer.
    pub fn counts(&self, len: usize) -> Result<Vec<u32>, SecAggError> {
        if len > self.words * 64 {
            return Err(SecAggError::Size { what: "coordinates of the block", expected: len, found: self.words * 64 });
        }
        let mut counts = vec![0u32; self.words * 64];
        for (weight, digit) in self.digits.chunks_exact(self.words).enumerate() {
            for (word, counts) in digit.iter().zip(counts.as_chunks_mut::<64>().0) {
                for (j, c) in counts.iter_mut().enumerate() {
                    *c |= ((word >> j & 1) as u32) << weight;
                }
            }
        }
        counts.truncate(len);
        Ok(counts)
    }
}

/// Messages of all levels in words, for `rows` clients in a block of `words` words.
pub fn level_sizes(rows: usize, words: usize) -> Vec<usize> {
    std::iter::successors(Some(rows / 2), |r| Some(r / 2)).take_while(|r| *r > 0).map(|r| r * words).collect()
}

/// Party `party`'s keys from the three pairwise ones, where `pairwise[i]` is shared by parties i - 1 and i.
pub fn zero_keys(pairwise: &[Seed; 3], party: Party, task: [u8; 32], round: u64, epoch: u64) -> ZeroKeys {
    let own = pairwise[usize::from(party.index())].clone();
    let next = pairwise[usize::from(party.next().index())].clone();
    ZeroKeys { own, next, task, round, epoch }
}
