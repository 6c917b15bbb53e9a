//! Latencies of the last minute.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

const SLICE: Duration = Duration::from_secs(10);
const SLICES: usize = 6;
/// Longer ones count as this (microseconds).
const LONGEST: u64 = 600_000_000;

/// Percentiles in milliseconds.
#[derive(Debug, Default, Serialize)]
pub struct Percentiles {
    /// Answers in the last minute.
    pub count: u64,
    /// Half of them were sooner.
    pub p50: f64,
    /// Nine tenths were.
    pub p90: f64,
    /// 99 of a hundred were.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
}

/// Latencies of answers, in slices of ten seconds: memory does not grow with the load.
#[derive(Default)]
pub struct Latencies(Mutex<VecDeque<(Instant, Histogram<u64>)>>);

impl Latencies {
    fn slices(&self, now: Instant) -> MutexGuard<'_, VecDeque<(Instant, Histogram<u64>)>> {
        let mut slices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while slices.front().is_some_and(|(began, _)| now.saturating_duration_since(*began) >= SLICE * SLICES as u32) {
            slices.pop_front();
        }
        slices
    }

    /// An answer took so long.
    pub fn record(&self, took: Duration, now: Instant) {
        let mut slices = self.slices(now);
        if slices.back().is_none_or(|(began, _)| now.saturating_duration_since(*began) >= SLICE) {
            let Ok(histogram) = Histogram::new_with_bounds(1, LONGEST, 2) else { return };
            slices.push_back((now, histogram));
        }
        if let Some((_, histogram)) = slices.back_mut() {
            histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(LONGEST).clamp(1, LONGEST));
        }
    }

    /// Over the last minute.
    pub fn read(&self, now: Instant) -> Percentiles {
        let slices = self.slices(now);
        let Ok(mut all) = Histogram::<u64>::new_with_bounds(1, LONGEST, 2) else { return Percentiles::default() };
        for (_, slice) in slices.iter() {
            let _ = all.add(slice);
        }
        if all.is_empty() {
            return Percentiles::default();
        }
        let at = |q: f64| all.value_at_quantile(q) as f64 / 1000.0;
        Percentiles { count: all.len(), p50: at(0.5), p90: at(0.9), p99: at(0.99), max: all.max() as f64 / 1000.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_is_remembered() {
        let latencies = Latencies::default();
        let start = Instant::now();
        for i in 1..=100u64 {
            latencies.record(Duration::from_millis(i), start + Duration::from_millis(i * 100));
        }
        let read = latencies.read(start + Duration::from_secs(11));
        assert_eq!(read.count, 100);
        assert!((49.0..52.0).contains(&read.p50) && (98.0..101.0).contains(&read.p99) && read.max >= 99.0, "{read:?}");
        latencies.record(Duration::from_secs(2), start + Duration::from_secs(65));
        assert_eq!(latencies.read(start + Duration::from_secs(66)).count, 1);
        assert_eq!(latencies.read(start + Duration::from_secs(300)).count, 0);
    }
}
