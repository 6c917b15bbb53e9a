//! When requests are meant to be sent.

use std::path::Path;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::HarnessError;

/// Fastest rate of requests that is believed.
pub const MAX_RATE: f64 = 100_000.0;
/// Longest schedule.
const MAX_ENTRIES: usize = 1 << 20;

/// The pattern of requests.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrivals {
    /// So many under way at all times.
    Closed(usize),
    /// So many a second, evenly.
    Constant(f64),
    /// So many a second on average, independent of each other.
    Poisson(f64),
    /// At these times since the beginning; then again.
    Schedule(Vec<Duration>),
}

impl Arrivals {
    /// Reads a schedule: a time in milliseconds a line, rising from zero or later; the last one is also the length of a round.
    ///
    /// # Errors
    /// Names the line that is wrong.
    pub fn schedule(path: &Path) -> Result<Self, HarnessError> {
        let text = std::fs::read_to_string(path).map_err(|cause| HarnessError::Io { path: path.into(), cause })?;
        let mut times: Vec<Duration> = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty() && !l.starts_with('#')) {
            let bad = |why: &str| HarnessError::data(format!("{}: line {}", path.display(), i + 1), why);
            let ms: f64 = line.trim().parse().map_err(|_| bad("a time in milliseconds is needed"))?;
            if !(0.0..=86_400_000.0).contains(&ms) {
                return Err(bad("times are 0 to 86400000 ms"));
            }
            let time = Duration::from_secs_f64(ms / 1e3);
            if times.last().is_some_and(|l| *l > time) {
                return Err(bad("times must not fall"));
            }
            if times.len() == MAX_ENTRIES {
                return Err(bad("at most 1048576 times"));
            }
            times.push(time);
        }
        if times.last().is_none_or(Duration::is_zero) {
            return Err(HarnessError::data(path.display().to_string(), "holds no time above zero"));
        }
        Ok(Self::Schedule(times))
    }

    /// Name for tables.
    pub fn name(&self) -> String {
        match self {
            Self::Closed(n) => format!("{n} under way"),
            Self::Constant(r) => format!("{r:.1}/s"),
            Self::Poisson(r) => format!("{r:.1}/s Poisson"),
            Self::Schedule(t) => format!("schedule of {}", t.len()),
        }
    }

    /// Intended times since the beginning; `None` for a closed loop, where an answer is what sends the next.
    pub fn times(&self, seed: u64) -> Option<Box<dyn Iterator<Item = Duration> + Send>> {
        match self {
            Self::Closed(_) => None,
            Self::Constant(rate) => {
                let gap = 1.0 / rate;
                Some(Box::new((0u64..).map(move |i| Duration::from_secs_f64(i as f64 * gap))))
            }
            Self::Poisson(rate) => {
                let (rate, mut rng, mut at) = (*rate, ChaCha8Rng::seed_from_u64(seed), 0.0);
                Some(Box::new(std::iter::repeat_with(move || {
                    at += -(1.0 - rng.random::<f64>()).ln() / rate;
                    Duration::from_secs_f64(at)
                })))
            }
            Self::Schedule(times) => {
                let (times, length) = (times.clone(), times.last().copied().unwrap_or(Duration::from_secs(1)));
                Some(Box::new((0u32..).flat_map(move |round| times.clone().into_iter().map(move |t| t + length * round))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rates_are_kept_and_poisson_is_seeded_and_irregular() {
        let of = |a: Arrivals, seed| a.times(seed).unwrap().take(4000).collect::<Vec<_>>();
        assert_eq!(of(Arrivals::Constant(50.0), 0)[100], Duration::from_secs(2));
        let poisson = of(Arrivals::Poisson(100.0), 7);
        assert_eq!(poisson, of(Arrivals::Poisson(100.0), 7));
        assert!((poisson[3999].as_secs_f64() / 40.0 - 1.0).abs() < 0.05);
        // gaps of a Poisson process: as much spread as mean
        let gaps: Vec<f64> = poisson.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.1, "{deviation} {mean}");
    }

    #[test]
    fn schedules_repeat_and_bad_lines_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("s");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Arrivals::schedule(&file)
        };
        let times: Vec<u128> = read("# ms\n0\n10\n30\n").unwrap().times(0).unwrap().take(6).map(|d| d.as_millis()).collect();
        assert_eq!(times, [0, 10, 30, 30, 40, 60]);
        for (text, why) in [("5\nx\n", "line 2"), ("5\n4\n", "must not fall"), ("", "no time"), ("-1\n", "0 to")] {
            assert!(read(text).unwrap_err().to_string().contains(why), "{text:?}");
        }
    }
}
