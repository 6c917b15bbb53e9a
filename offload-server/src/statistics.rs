//! What a version of a model has done since it was first loaded (loading it anew changes nothing), as the Open Inference Protocol's
//! statistics want it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Events and their time in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// Events.
    pub count: u64,
    /// Their time.
    pub time: Duration,
}

impl Sum {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }
}

/// Where a request's time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Decoding of its payload.
    pub decode: Duration,
    /// Waiting for the decode pool and for its batch.
    pub queue: Duration,
    /// Its batch in the network.
    pub network: Duration,
    /// Requests in that batch.
    pub batch_size: usize,
    /// From arrival to answer.
    pub total: Duration,
}

/// Sums over all requests.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Answered.
    pub success: Sum,
    /// Failed after they had reached the model.
    pub fail: Sum,
    /// Waiting of the answered.
    pub queue: Sum,
    /// Decoding of the answered.
    pub input: Sum,
    /// Network time of the answered.
    pub infer: Sum,
    /// Batches, by size.
    pub batches: BTreeMap<usize, Sum>,
    /// Of the last answer, in milliseconds since 1970.
    pub last_ms: u64,
}

/// Totals that many threads add to.
#[derive(Debug, Default)]
pub struct Statistics(Mutex<Totals>);

impl Statistics {
    fn totals(&self) -> MutexGuard<'_, Totals> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request, of however many photos, has its answer.
    pub fn answered(&self, times: &Times) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut totals = self.totals();
        totals.success.add(times.total);
        totals.queue.add(times.queue);
        totals.input.add(times.decode);
        totals.infer.add(times.network);
        totals.last_ms = now.as_millis() as u64;
    }

    /// A request failed.
    pub fn failed(&self, total: Duration) {
        self.totals().fail.add(total);
    }

    /// A batch was computed.
    pub fn executed(&self, size: usize, network: Duration) {
        self.totals().batches.entry(size).or_default().add(network);
    }

    /// All of it.
    pub fn read(&self) -> Totals {
        self.totals().clone()
    }
}
