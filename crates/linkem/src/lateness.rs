//! How late the emulator itself is: a packet that should have arrived at t was handed over at t + lateness.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::error::LinkError;

/// Longest lateness told apart.
const CEILING: Duration = Duration::from_secs(60);
/// A run is invalid if the 99th percentile exceeds this share of the one-way delay.
pub const VALID_SHARE: f64 = 0.1;

/// Collects lateness from all drivers of a link; clones share everything.
#[derive(Debug, Clone)]
pub struct Lateness {
    micros: Arc<Mutex<Histogram<u64>>>,
}

/// Percentiles in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LatenessSummary {
    /// Packets.
    pub packets: u64,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Largest.
    pub max_us: u64,
}

impl Lateness {
    /// Nothing recorded yet.
    ///
    /// # Errors
    /// If the histogram library refuses the bounds.
    pub fn new() -> Result<Self, LinkError> {
        let histogram = Histogram::new_with_bounds(1, CEILING.as_micros() as u64, 3);
        let histogram = histogram.map_err(|e| LinkError::new("lateness", e.to_string()))?;
        Ok(Self { micros: Arc::new(Mutex::new(histogram)) })
    }

    /// Notes that something due at `due` was handed over at `now`.
    pub fn record(&self, due: Duration, now: Duration) {
        let late = now.saturating_sub(due).as_micros() as u64;
        self.micros.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(late);
    }

    /// Percentiles so far.
    pub fn summary(&self) -> LatenessSummary {
        let h = self.micros.lock().unwrap_or_else(PoisonError::into_inner);
        LatenessSummary { packets: h.len(), p50_us: h.value_at_quantile(0.5), p99_us: h.value_at_quantile(0.99), max_us: h.max() }
    }
}

impl LatenessSummary {
    /// True if the emulator kept up well enough for a link of this one-way delay.
    pub fn valid_for(&self, one_way_delay: Duration) -> bool {
        self.p99_us as f64 <= VALID_SHARE * one_way_delay.as_micros() as f64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_run_is_valid_while_lateness_is_a_small_share_of_the_delay() {
        let lateness = Lateness::new().unwrap();
        let ms = Duration::from_millis;
        for i in 0..100 {
            lateness.record(ms(10), ms(10) + Duration::from_micros(i * 10));
        }
        lateness.record(ms(10), ms(5)); // early is not late
        let s = lateness.summary();
        assert_eq!(s.packets, 101);
        assert!((450..=510).contains(&s.p50_us) && (970..=1000).contains(&s.p99_us), "{s:?}");
        assert!(s.valid_for(ms(20)) && !s.valid_for(ms(5)));
    }
}
