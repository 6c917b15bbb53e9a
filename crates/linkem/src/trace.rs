//! Traces of delivery opportunities in Mahimahi's format, and a generator of driving traces.

use std::path::Path;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::LinkError;

/// Bytes that one opportunity delivers.
pub const OPPORTUNITY_BYTES: u64 = 1500;
const MAX_LINES: usize = 10_000_000;

/// Times in milliseconds at which 1500 bytes get through; repeated with the period of its last time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    times: Vec<u64>,
}

impl Trace {
    /// From times that do not fall.
    ///
    /// # Errors
    /// If there are none, they fall, or the last is zero.
    pub fn new(times: Vec<u64>) -> Result<Self, LinkError> {
        let bad = |why: &str| Err(LinkError::new("trace", why));
        if times.last().is_none_or(|&t| t == 0) {
            return bad("needs at least one time above 0 ms");
        }
        if times.windows(2).any(|w| w[0] > w[1]) {
            return bad("times must not fall");
        }
        Ok(Self { times })
    }

    /// Reads a file with one time in milliseconds a line.
    ///
    /// # Errors
    /// Names the file, and the line that is wrong.
    pub fn open(path: &Path) -> Result<Self, LinkError> {
        let name = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| LinkError::new("trace", format!("{name}: {e}")))?;
        let mut times = Vec::new();
        for (i, line) in text.lines().map(str::trim).enumerate().filter(|(_, l)| !l.is_empty() && !l.starts_with('#')) {
            let time = line.parse().map_err(|_| LinkError::new("trace", format!("{name}:{}: {line:?} is no time in ms", i + 1)))?;
            times.push(time);
            if times.len() > MAX_LINES {
                return Err(LinkError::new("trace", format!("{name}: more than {MAX_LINES} lines")));
            }
        }
        Self::new(times).map_err(|e| LinkError::new(e.key, format!("{name}: {}", e.why)))
    }

    /// The file's text.
    pub fn text(&self) -> String {
        self.times.iter().fold(String::new(), |text, t| text + &t.to_string() + "\n")
    }

    fn period(&self) -> u64 {
        self.times.last().copied().unwrap_or(1)
    }

    /// Time of opportunity `index`, counted over all repetitions.
    pub fn time(&self, index: u64) -> Duration {
        let n = self.times.len() as u64;
        Duration::from_millis(index / n * self.period() + self.times[(index % n) as usize])
    }

    /// Index of the first opportunity at or after `time`.
    pub fn first_at(&self, time: Duration) -> u64 {
        let ms = u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX / 2);
        let n = self.times.len() as u64;
        // the last opportunity of a repetition falls on its end
        let round = ms.saturating_sub(1) / self.period();
        round * n + self.times.partition_point(|&t| t < ms - round * self.period()) as u64
    }

    /// Mean rate in Mbit/s.
    pub fn mbit_per_s(&self) -> f64 {
        (self.times.len() as u64 * OPPORTUNITY_BYTES * 8) as f64 / (self.period() as f64 * 1e3)
    }
}

/// A cellular link from a moving car, as a Markov chain over states of reception. Our own model, not a recording: every
/// `dwell` the chain stays or moves to a neighbouring state; the rate of a state is its share of `peak_mbit_per_s`, varied
/// by up to a fifth. The lowest state is a gap in coverage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driving {
    /// Rate of the best state.
    pub peak_mbit_per_s: f64,
    /// Length before it repeats.
    #[serde(with = "humantime_serde", default = "minute")]
    pub length: Duration,
    /// Time between moves.
    #[serde(with = "humantime_serde", default = "half_second")]
    pub dwell: Duration,
    /// Of the generator.
    #[serde(default)]
    pub seed: u64,
}

fn minute() -> Duration {
    Duration::from_secs(60)
}

fn half_second() -> Duration {
    Duration::from_millis(500)
}

/// Shares of the peak rate, worst first.
const STATES: [f64; 6] = [0.0, 0.04, 0.12, 0.3, 0.6, 1.0];
/// Chance of staying, and of a move being upwards.
const STAY: f64 = 0.6;
const UPWARDS: f64 = 0.55;

impl Driving {
    /// The trace.
    ///
    /// # Errors
    /// If rate or times are out of range.
    pub fn trace(&self) -> Result<Trace, LinkError> {
        if !(0.1..=crate::config::MAX_MBIT_PER_S).contains(&self.peak_mbit_per_s) {
            return Err(LinkError::new("driving.peak_mbit_per_s", "use 0.1 to 1000"));
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&self.length) {
            return Err(LinkError::new("driving.length", "use 1s to 1h"));
        }
        if !(Duration::from_millis(10)..=self.length).contains(&self.dwell) {
            return Err(LinkError::new("driving.dwell", "use 10ms to the length"));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let (length, dwell) = (self.length.as_millis() as u64, self.dwell.as_millis() as u64);
        let (mut state, mut share, mut credit, mut times) = (STATES.len() / 2, 0.0, 0.0, Vec::new());
        for ms in 1..=length {
            if ms % dwell == 1 || dwell == 1 {
                if !rng.random_bool(STAY) {
                    state = if rng.random_bool(UPWARDS) { (state + 1).min(STATES.len() - 1) } else { state.saturating_sub(1) };
                }
                share = STATES[state] * rng.random_range(0.8..=1.0);
            }
            credit += share * self.peak_mbit_per_s * 1e3 / 8.0;
            while credit >= OPPORTUNITY_BYTES as f64 {
                credit -= OPPORTUNITY_BYTES as f64;
                times.push(ms);
            }
        }
        if times.last() != Some(&length) {
            times.push(length); // fixes the period
        }
        Trace::new(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opportunities_repeat_with_the_last_time_as_period() {
        let trace = Trace::new(vec![2, 3, 5]).unwrap();
        let times: Vec<u128> = (0..6).map(|i| trace.time(i).as_millis()).collect();
        assert_eq!(times, [2, 3, 5, 7, 8, 10]);
        for (ms, index) in [(0, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 3), (10, 5), (11, 6)] {
            assert_eq!(trace.first_at(Duration::from_millis(ms)), index, "{ms} ms");
        }
    }

    #[test]
    fn driving_is_seeded_varies_and_stays_below_its_peak() {
        let model = Driving { peak_mbit_per_s: 12.0, length: minute(), dwell: half_second(), seed: 7 };
        let trace = model.trace().unwrap();
        assert_eq!(trace, model.trace().unwrap());
        assert_ne!(trace, Driving { seed: 8, ..model.clone() }.trace().unwrap());
        assert!((1.0..11.0).contains(&trace.mbit_per_s()), "{}", trace.mbit_per_s());
        let text = trace.text();
        assert_eq!(text.lines().count(), trace.times.len());
        assert!(Driving { peak_mbit_per_s: 0.0, ..model }.trace().is_err());
    }
}
