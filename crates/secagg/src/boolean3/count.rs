//! One party's side of counting a block of coordinates over all clients.
//!
//! A column holds bits of one weight, 64 coordinates a word, one row for each client. 3:2 compressors turn the rows of a column
//! into one digit and half as many rows of the next; a compressor needs one AND, (x ^ z)(y ^ z) ^ z, and all ANDs of a column are
//! independent because digits are linear. So n clients cost n - (ones in n) ANDs in floor(log2 n) levels, one message each.
//!
//! Rows of higher weights may be given too: then the counter adds numbers instead of bits.

use std::collections::VecDeque;

use crate::boolean3::{Party, Shares};
use crate::error::{SecAggError, expect_size};
use crate::prg::{LevelContext, Seed, Stream};

/// Words of a row that are worked on together: a column's rows of this width fit the caches.
const TILE: usize = 32;

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

impl ZeroKeys {
    /// XORs this party's part of a sharing of zero into `message`. Each block and level may be used once.
    pub(crate) fn mask(&self, block: u32, level: u32, message: &mut [u64]) {
        let at = LevelContext { task: self.task, round: self.round, epoch: self.epoch, block, level };
        Stream::zero(&self.own, &at).xor(message);
        Stream::zero(&self.next, &at).xor(message);
    }
}

/// Counting one block.
///
/// [`Self::send`] and [`Self::receive`] alternate until `send` gives nothing; then [`Self::opening`] and [`Self::open`]. A value is
/// used up as it goes, so no stream of the zero-sharing can be used for two inputs within an attempt.
pub struct BlockCount {
    block: u32,
    level: u32,
    words: usize,
    /// Rows of the weights that are not digits yet, lowest first.
    columns: VecDeque<Shares>,
    digits: Shares,
    /// Words of the message that is due.
    due: Option<usize>,
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
        if own.is_empty() {
            return Err(SecAggError::Config("there are no rows to count".into()));
        }
        Self::from_columns(block, 0, words, vec![Shares { own, next }])
    }

    /// The sum of rows of several weights, lowest first; the block's streams before `level` are used already.
    ///
    /// # Errors
    /// If a column holds no whole number of rows of `words` words, or its two shares differ in size.
    pub fn from_columns(block: u32, level: u32, words: usize, columns: Vec<Shares>) -> Result<Self, SecAggError> {
        for column in &columns {
            expect_size("words of shares", column.own.len(), column.next.len())?;
            if words == 0 || !column.own.len().is_multiple_of(words) {
                return Err(SecAggError::Config(format!("{} words of shares are no rows of {words}", column.own.len())));
            }
        }
        Ok(Self { block, level, words, columns: columns.into(), digits: Shares::default(), due: None })
    }

    /// Levels of this block whose streams are used.
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Message of the next level, for the previous party; none when all levels are done.
    ///
    /// # Errors
    /// If the last level's answer is missing.
    pub fn send(&mut self, keys: &ZeroKeys) -> Result<Option<Vec<u64>>, SecAggError> {
        if self.due.is_some() {
            return Err(SecAggError::Order("the last level's message has not been received"));
        }
        while let Some(column) = self.columns.pop_front() {
            let pairs = (column.own.len() / self.words) / 2;
            let mut message = vec![0; pairs * self.words];
            if pairs > 0 {
                keys.mask(self.block, self.level, &mut message);
                self.level += 1;
            }
            let mut carries = self.compress(&column, &mut message);
            if pairs == 0 {
                continue;
            }
            self.due = Some(message.len());
            // carries first, so that the answer belongs to the front
            if let Some(mut given) = self.columns.pop_front() {
                carries.own.append(&mut given.own);
                carries.next.append(&mut given.next);
            }
            self.columns.push_front(carries);
            return Ok(Some(message));
        }
        Ok(None)
    }

    /// Adds the column's digit; its carries and this party's part of their ANDs.
    fn compress(&mut self, column: &Shares, message: &mut [u64]) -> Shares {
        let words = self.words;
        let (rows, pairs) = (column.own.len() / words, message.len() / words);
        let mut carries = Shares::zeros(message.len());
        let mut digit = if rows == 0 {
            Shares::zeros(words)
        } else {
            Shares { own: column.own[..words].to_vec(), next: column.next[..words].to_vec() }
        };
        for tile in (0..words).step_by(TILE) {
            let width = TILE.min(words - tile);
            let row = |r: usize| r * words + tile..r * words + tile + width;
            let (s_own, s_next) = (&mut digit.own[tile..tile + width], &mut digit.next[tile..tile + width]);
            for pair in 0..pairs {
                let (y, z, to) = (row(2 * pair + 1), row(2 * pair + 2), row(pair));
                let (z_own, z_next) =
                    if 2 * pair + 2 < rows { (&column.own[z.clone()], &column.next[z]) } else { (&ZEROS[..width], &ZEROS[..width]) };
                let inputs = s_own.iter_mut().zip(s_next.iter_mut()).zip(&column.own[y.clone()]).zip(&column.next[y]).zip(z_own);
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
        carries
    }

    /// Takes the next party's message of the level just sent.
    ///
    /// # Errors
    /// If none is due, or it has another size.
    pub fn receive(&mut self, message: &[u64]) -> Result<(), SecAggError> {
        let (Some(due), Some(carries)) = (self.due, self.columns.front_mut()) else {
            return Err(SecAggError::Order("no message is due"));
        };
        expect_size("words of a level", due, message.len())?;
        carries.next.iter_mut().zip(message).for_each(|(c, m)| *c ^= m);
        self.due = None;
        Ok(())
    }

    /// The digits, weight 1 first, `words` words each.
    ///
    /// # Errors
    /// If levels are missing.
    pub fn into_digits(mut self) -> Result<Shares, SecAggError> {
        self.opening()?;
        Ok(std::mem::take(&mut self.digits))
    }

    /// What the next party lacks to open the counts. Sending it is what makes the result known.
    ///
    /// # Errors
    /// If levels are missing.
    pub fn opening(&self) -> Result<&[u64], SecAggError> {
        if self.due.is_some() || !self.columns.is_empty() {
            return Err(SecAggError::Order("levels are missing"));
        }
        Ok(&self.digits.own)
    }

    /// Opens with the previous party's message.
    ///
    /// # Errors
    /// If levels are missing or the message has another size.
    pub fn open(self, message: &[u64]) -> Result<Opened, SecAggError> {
        let words = self.words;
        Ok(Opened { words, digits: self.into_digits()?.open(message)? })
    }
}

static ZEROS: [u64; TILE] = [0; TILE];

impl Opened {
    /// From opened digits of `words` words each.
    ///
    /// # Errors
    /// If they are no whole number of digits, or more than a count has.
    pub fn new(words: usize, digits: Vec<u64>) -> Result<Self, SecAggError> {
        if words == 0 || !digits.len().is_multiple_of(words) || digits.len() / words > 32 {
            return Err(SecAggError::Config(format!("{} words are no digits of {words}", digits.len())));
        }
        Ok(Self { words, digits })
    }

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
