//! Straight-line Boolean circuits on shares, for one party; messages go through [`Exchange`].

use crate::boolean3::count::ZeroKeys;
use crate::boolean3::{BlockCount, Shares};
use crate::error::{SecAggError, expect_size};

/// How a party talks to its neighbours during a computation.
pub trait Exchange {
    /// Gives the previous party `message` and takes the next party's of the same level, which has the same length.
    ///
    /// # Errors
    /// If the neighbour does not answer in time, or with another size.
    fn exchange(&mut self, level: u32, message: Vec<u64>) -> Result<Vec<u64>, SecAggError>;
}

/// A circuit: hands out levels, so that no stream of the zero-sharing masks two messages.
pub struct Circuit<'a> {
    keys: &'a ZeroKeys,
    block: u32,
    level: u32,
    link: &'a mut dyn Exchange,
}

impl<'a> Circuit<'a> {
    /// For block number `block`, which no other circuit of this attempt has.
    pub fn new(keys: &'a ZeroKeys, block: u32, link: &'a mut dyn Exchange) -> Self {
        Self { keys, block, level: 0, link }
    }

    /// Levels used so far.
    pub fn levels(&self) -> u32 {
        self.level
    }

    /// x AND y, word by word.
    ///
    /// # Errors
    /// If their lengths differ, or as [`Exchange::exchange`].
    pub fn and(&mut self, x: &Shares, y: &Shares) -> Result<Shares, SecAggError> {
        expect_size("words", x.len(), y.len())?;
        if x.is_empty() {
            return Ok(Shares::default());
        }
        let mut own = vec![0; x.len()];
        self.keys.mask(self.block, self.level, &mut own);
        let inputs = x.own.iter().zip(&x.next).zip(y.own.iter().zip(&y.next));
        for (m, ((xo, xn), (yo, yn))) in own.iter_mut().zip(inputs) {
            *m ^= (xo & yo) ^ (xo & yn) ^ (xn & yo);
        }
        let next = self.exchange(own.clone())?;
        Ok(Shares { own, next })
    }

    /// The sum of rows of several weights, lowest first: digits of `words` words each, weight 1 first.
    ///
    /// # Errors
    /// If a column is no whole number of rows, or as [`Exchange::exchange`].
    pub fn sum(&mut self, words: usize, columns: Vec<Shares>) -> Result<Shares, SecAggError> {
        let mut count = BlockCount::from_columns(self.block, self.level, words, columns)?;
        while let Some(message) = count.send(self.keys)? {
            self.level = count.level() - 1;
            let answer = self.exchange(message)?;
            count.receive(&answer)?;
        }
        count.into_digits()
    }

    fn exchange(&mut self, message: Vec<u64>) -> Result<Vec<u64>, SecAggError> {
        let expected = message.len();
        let level = self.level;
        self.level += 1;
        let answer = self.link.exchange(level, message)?;
        expect_size("words of a level", expected, answer.len())?;
        Ok(answer)
    }
}
