//! Load on a server: closed and open loops, repeated until stable, and the highest rate within a latency objective.
//!
//! Latency counts from the moment at which a request was meant to be sent: a generator or server that falls behind cannot hide it
//! (coordinated omission).

pub mod arrivals;
pub mod engine;
pub mod table;

use std::time::Duration;

use serde::Serialize;

use crate::error::HarnessError;
use arrivals::Arrivals;
use engine::{Target, Window};

/// Windows that must agree.
const AGREEING: usize = 3;
/// A rate serves an objective only if no more than this share of its requests fails.
const FAILURES: f64 = 0.01;
/// And only if at least this share of the requests is answered while they come.
const FOLLOWS: f64 = 0.95;
/// A search ends when its bounds are this close.
const PRECISION: f64 = 0.03;

/// How long and how often to measure.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Not counted.
    pub warm_up: Duration,
    /// One window.
    pub window: Duration,
    /// Windows are repeated until three in a row differ by at most this share in rate and latency.
    pub stability: f64,
    /// Most windows.
    pub most_windows: usize,
    /// The percentile that counts, 0 to 100.
    pub percentile: f64,
    /// Of Poisson arrivals.
    pub seed: u64,
}

/// What one pattern of requests gave. Times in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// The pattern.
    pub load: String,
    /// Answers counted.
    pub n: u64,
    /// Answers a second.
    pub per_second: f64,
    /// Latency from the intended time.
    pub latency_ms: Summary,
    /// The percentile that counts, of latency.
    pub percentile_ms: f64,
    /// The generator's own lag.
    pub lag_ms: Summary,
    /// In the server.
    pub server_ms: Summary,
    /// Of that, waiting.
    pub queue_ms: Summary,
    /// Of the server's time, what is neither decoding nor the network's.
    pub serving_ms: Summary,
    /// The server's time without the network's: decoding and serving.
    pub server_overhead_ms: Summary,
    /// From sending to the answer, without the network's own time: transport, decoding, waiting, batching.
    pub overhead_ms: Summary,
    /// Mean requests computed together.
    pub batch_size: f64,
    /// Share of the wall time in which the server's network was not computing.
    pub outside_network: f64,
    /// Failures by kind.
    pub failed: std::collections::BTreeMap<String, u64>,
    /// Requests never sent because too many were under way.
    pub unsent: u64,
    /// Windows measured.
    pub windows: usize,
    /// True if the last three agreed.
    pub stable: bool,
}

/// Of a histogram, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Summary {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    fn of(h: &hdrhistogram::Histogram<u64>) -> Self {
        let at = |q| h.value_at_quantile(q) as f64 / 1e3;
        Self { mean: h.mean() / 1e3, p50: at(0.5), p95: at(0.95), p99: at(0.99), max: h.max() as f64 / 1e3 }
    }
}

/// True if all values lie within `share` of their mean.
fn agree(values: &[f64], share: f64) -> bool {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    values.iter().all(|v| (v - mean).abs() <= share * mean)
}

/// Measures one pattern: the last three windows together.
///
/// # Errors
/// If the histograms cannot be made.
pub async fn measure(target: &Target, arrivals: &Arrivals, plan: &Plan) -> Result<Point, HarnessError> {
    let (mut windows, mut count, mut stable): (Vec<Window>, usize, bool) = (Vec::new(), 0, false);
    engine::run(target, arrivals, plan.warm_up, plan.window, plan.seed, |window| {
        windows.push(window);
        count += 1;
        if windows.len() > AGREEING {
            windows.remove(0);
        }
        let rates: Vec<f64> = windows.iter().map(Window::per_second).collect();
        let tails: Vec<f64> = windows.iter().map(|w| w.latency.value_at_percentile(plan.percentile) as f64).collect();
        stable = windows.len() == AGREEING && agree(&rates, plan.stability) && agree(&tails, plan.stability);
        Ok(stable || count >= plan.most_windows)
    })
    .await?;
    let mut windows = windows.into_iter();
    let mut all = windows.next().ok_or_else(|| HarnessError::data("load", "no window was measured"))?;
    for window in windows {
        all.add(&window)?;
    }
    let n = all.latency.len();
    Ok(Point {
        load: arrivals.name(),
        n,
        per_second: all.per_second(),
        latency_ms: Summary::of(&all.latency),
        percentile_ms: all.latency.value_at_percentile(plan.percentile) as f64 / 1e3,
        lag_ms: Summary::of(&all.lag),
        server_ms: Summary::of(&all.server),
        queue_ms: Summary::of(&all.queue),
        serving_ms: Summary::of(&all.serving),
        server_overhead_ms: Summary::of(&all.server_overhead),
        overhead_ms: Summary::of(&all.overhead),
        batch_size: all.batches / n.max(1) as f64,
        outside_network: (1.0 - all.network / all.seconds.max(1e-9)).clamp(0.0, 1.0),
        unsent: all.unsent,
        failed: all.failed,
        windows: count,
        stable,
    })
}

/// The highest rate of Poisson (or, if `even`, evenly spaced) requests whose percentile is within `objective`, by bisection between
/// two rates; every rate tried is returned, in order, and the best of them first.
///
/// # Errors
/// As [`measure`].
pub async fn search(
    target: &Target,
    (mut low, mut high): (f64, f64),
    objective: Duration,
    even: bool,
    plan: &Plan,
    mut tried: impl FnMut(&Point),
) -> Result<(Option<Point>, Vec<Point>), HarnessError> {
    let (mut best, mut all) = (None, Vec::new());
    let mut rate = low;
    loop {
        let arrivals = if even { Arrivals::Constant(rate) } else { Arrivals::Poisson(rate) };
        let point = measure(target, &arrivals, plan).await?;
        tried(&point);
        let failed = point.failed.values().sum::<u64>() + point.unsent;
        let answered = point.n > 0 && failed as f64 <= FAILURES * (point.n + failed) as f64;
        // answers must keep up with the requests, as far as so few can tell
        let wanted = FOLLOWS * rate * point.n as f64 / point.per_second.max(1e-9);
        let follows = point.n as f64 + 3.0 * (point.n as f64).sqrt() >= wanted;
        let fits = answered && follows && point.percentile_ms <= objective.as_secs_f64() * 1e3;
        all.push(point.clone());
        match (fits, all.len()) {
            (false, 1) => return Ok((None, all)), // not even the lowest
            (true, _) => {
                low = rate;
                best = Some(point);
            }
            (false, _) => high = rate,
        }
        if low >= high || high / low < 1.0 + PRECISION {
            return Ok((best, all));
        }
        // the highest first: it may be within reach
        rate = if all.len() == 1 { high } else { (low * high).sqrt() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_agree_within_a_share_of_their_mean() {
        assert!(agree(&[100.0, 95.0, 105.0], 0.1));
        assert!(!agree(&[100.0, 80.0, 120.0], 0.1));
    }
}
