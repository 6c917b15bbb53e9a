//! Messages of the next party that have come, until a block wants them.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use isthmus_secagg::Seed;

use super::{BLOCK_SHARES, WINDOW};
use crate::error::AggregatorError;

/// Neighbours are at most a level or two ahead in each block under way; more is no honest party.
const MOST_MESSAGES: usize = 4 * WINDOW;

#[derive(Default)]
struct Inner {
    seed: Option<Seed>,
    messages: HashMap<(u32, u32), Vec<u64>>,
    closed: Option<String>,
}

/// Messages of one attempt. Memory is bounded by [`MOST_MESSAGES`] times the largest message.
#[derive(Default)]
pub struct Inbox {
    inner: Mutex<Inner>,
    came: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next party's seed of the zero-sharing, once.
    ///
    /// # Errors
    /// If there is one already: a second stream of the same attempt.
    pub fn hello(&self, seed: Seed) -> Result<(), AggregatorError> {
        let mut inner = self.lock();
        if inner.seed.is_some() {
            return Err(AggregatorError::State("this attempt's exchange has begun already".into()));
        }
        inner.seed = Some(seed);
        self.came.notify_all();
        Ok(())
    }

    /// A message.
    ///
    /// # Errors
    /// If it is too large, comes twice, or too many are waiting.
    pub fn put(&self, block: u32, level: u32, words: Vec<u64>) -> Result<(), AggregatorError> {
        let mut inner = self.lock();
        if words.len() > BLOCK_SHARES || inner.messages.len() >= MOST_MESSAGES {
            return Err(AggregatorError::Busy("more messages of a computation than an honest party sends"));
        }
        if inner.messages.insert((block, level), words).is_some() {
            return Err(AggregatorError::Conflict("a message of a computation came twice"));
        }
        self.came.notify_all();
        Ok(())
    }

    /// Nothing more will come; who waits gets `why`.
    pub fn close(&self, why: &str) {
        let mut inner = self.lock();
        inner.closed.get_or_insert_with(|| why.to_owned());
        self.came.notify_all();
    }

    /// Whether the attempt ended.
    pub fn is_closed(&self) -> bool {
        self.lock().closed.is_some()
    }

    fn wait<T>(&self, limit: Duration, mut take: impl FnMut(&mut Inner) -> Option<T>) -> Result<T, String> {
        let until = Instant::now() + limit;
        let mut inner = self.lock();
        loop {
            if let Some(found) = take(&mut inner) {
                return Ok(found);
            }
            if let Some(why) = &inner.closed {
                return Err(why.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("the next party did not answer within {limit:?}"));
            }
            inner = self.came.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the seed.
    ///
    /// # Errors
    /// If it does not come within `limit`, or the attempt ends.
    pub fn seed(&self, limit: Duration) -> Result<Seed, String> {
        self.wait(limit, |inner| inner.seed.clone())
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// If it does not come within `limit`, or the attempt ends.
    pub fn take(&self, block: u32, level: u32, limit: Duration) -> Result<Vec<u64>, String> {
        self.wait(limit, |inner| inner.messages.remove(&(block, level)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_come_once() {
        let inbox = Inbox::default();
        inbox.put(1, 0, vec![7]).unwrap();
        assert!(inbox.put(1, 0, vec![8]).is_err(), "twice");
        assert!(inbox.put(2, 0, vec![0; BLOCK_SHARES + 1]).is_err(), "too large");
        assert_eq!(inbox.take(1, 0, Duration::ZERO).unwrap(), [8]);
        assert!(inbox.take(1, 0, Duration::from_millis(5)).unwrap_err().contains("did not answer"));
        for block in 0..MOST_MESSAGES as u32 {
            inbox.put(block, 1, vec![]).unwrap();
        }
        assert!(inbox.put(999, 1, vec![]).is_err(), "too many");
        inbox.hello(Seed::from_bytes([1; 32])).unwrap();
        assert!(inbox.hello(Seed::from_bytes([2; 32])).is_err());
        inbox.close("gone");
        assert_eq!(inbox.take(1, 9, Duration::from_secs(9)).unwrap_err(), "gone");
        assert!(inbox.seed(Duration::ZERO).is_ok());
    }
}
