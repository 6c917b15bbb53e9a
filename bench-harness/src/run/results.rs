//! What a run found: everything that a report needs.

use linkem::{LatenessSummary, LinkConfig};
use serde::{Deserialize, Serialize};

use crate::run::config::RunConfig;
use crate::stats::Interval;

/// Everything a report needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// When it began (RFC 3339, UTC).
    pub began: String,
    /// Machine and kernel.
    pub machine: String,
    /// Version, and revision if the run was in a checkout.
    pub revision: String,
    /// Bundle name and version.
    pub bundle: String,
    /// Rounds counted.
    pub rounds: usize,
    /// Seed.
    pub seed: u64,
    /// The device computed so many times as long as this machine.
    pub device_slowdown: f64,
    /// The scenario file as it was run; absent in results of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenario: Option<RunConfig>,
    /// Agreement and bytes of each strategy, without a link.
    pub agreement: Vec<AgreementRow>,
    /// Latency over each link.
    pub links: Vec<LinkResults>,
    /// Links that vary.
    pub timelines: Vec<TimelineResults>,
    /// Links that are shared.
    pub throughput: Vec<ThroughputResults>,
}

/// A strategy against the lossless photo.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgreementRow {
    /// Strategy and setting.
    pub strategy: String,
    /// Without the setting.
    pub family: String,
    /// True if the network sees every pixel as it was.
    pub lossless: bool,
    /// Crops.
    pub n: usize,
    /// Mean payload bytes.
    pub bytes: f64,
    /// Share of answers that equal those to the lossless photo; 95 % interval over photos.
    pub agreement: Interval,
}

/// The emulator's part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Emulator {
    /// `packet` or `stream`.
    pub level: String,
    /// TCP's congestion control; absent at stream level, where it does not matter.
    pub congestion_control: Option<String>,
    /// Lateness, median, microseconds.
    pub late_p50_us: u64,
    /// 99th percentile.
    pub late_p99_us: u64,
    /// Largest.
    pub late_max_us: u64,
    /// False if it was too late for the link's delay: do not use these numbers.
    pub valid: bool,
    /// What the link's description asks for and a byte stream cannot show.
    #[serde(default)]
    pub ignored: Vec<String>,
}

impl Emulator {
    /// What was left out, as a half sentence.
    pub fn left_out(&self) -> String {
        if self.ignored.is_empty() {
            String::new()
        } else {
            format!("; the link's {} cannot be shown at this level and was left out", self.ignored.join(", "))
        }
    }

    /// Of a link that has carried its traffic.
    pub fn new(level: &str, congestion_control: Option<String>, s: LatenessSummary, link: &LinkConfig) -> Self {
        Self {
            level: level.into(),
            congestion_control,
            late_p50_us: s.p50_us,
            late_p99_us: s.p99_us,
            late_max_us: s.max_us,
            valid: s.valid_for(link.up.delay.min(link.down.delay)),
            ignored: Vec::new(),
        }
    }
}

/// Latency over one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkResults {
    /// Name in the catalogue.
    pub name: String,
    /// What it stands for.
    pub about: String,
    /// Uplink rate in Mbit/s, where it is constant.
    pub uplink_mbit_per_s: Option<f64>,
    /// The whole description; absent in results of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkConfig>,
    /// The emulator.
    pub emulator: Emulator,
    /// One row per strategy and setting.
    pub rows: Vec<Row>,
}

/// One strategy over one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Strategy and setting.
    pub strategy: String,
    /// Without the setting.
    pub family: String,
    /// Requests answered.
    pub n: usize,
    /// Requests that failed or came too late.
    pub failed: usize,
    /// Mean payload bytes.
    pub bytes: f64,
    /// Share of these answers that equal those to the lossless photo.
    pub agreement: f64,
    /// Photo in memory to answer in memory, milliseconds.
    pub latency_ms: Percentiles,
    /// Every one of them, rising.
    pub latencies_ms: Vec<f64>,
    /// Of the device, milliseconds (median).
    pub encode_ms: f64,
    /// In the server, milliseconds (median).
    pub server_ms: f64,
    /// Predicted median, where the rate is constant.
    pub predicted_ms: Option<f64>,
    /// If the client chose: agreement that its options have on the held-out photos, weighted by how often it took them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub believed_agreement: Option<f64>,
    /// What was chosen how often, if the client chose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<(String, usize)>,
}

/// Of a distribution.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 95th.
    pub p95: f64,
    /// 99th.
    pub p99: f64,
}

impl Percentiles {
    /// Of rising values.
    pub fn of(sorted: &[f64]) -> Self {
        Self { p50: percentile(sorted, 0.5), p95: percentile(sorted, 0.95), p99: percentile(sorted, 0.99) }
    }
}

/// The value of nearest rank.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(index.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_default()
}

/// `values`, rising.
pub fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Strategies over one link that varies, each from its beginning.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TimelineResults {
    /// Name in the catalogue.
    pub name: String,
    /// What it stands for.
    pub about: String,
    /// The whole description; absent in results of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkConfig>,
    /// From photo to answer.
    pub deadline_ms: f64,
    /// From photo to photo.
    pub period_ms: f64,
    /// One per strategy.
    pub rows: Vec<TimelineRow>,
}

/// One strategy over a link that varies.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TimelineRow {
    /// Strategy and setting.
    pub strategy: String,
    /// The emulator during this strategy.
    pub emulator: Emulator,
    /// Photos.
    pub n: usize,
    /// Share answered within the deadline.
    pub in_time: f64,
    /// Share answered within the deadline and as the lossless photo would be.
    pub in_time_and_agreeing: f64,
    /// Mean latency, too late or unanswered counted as the deadline.
    pub mean_latency_ms: f64,
    /// Mean payload bytes.
    pub bytes: f64,
    /// In order of time.
    pub samples: Vec<TimelineSample>,
}

/// One photo.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TimelineSample {
    /// Since the beginning of the link.
    pub at_s: f64,
    /// None if it was not answered in time.
    pub latency_ms: Option<f64>,
    /// How it was sent or computed.
    pub choice: String,
}

/// Clients sharing one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ThroughputResults {
    /// Name in the catalogue.
    pub name: String,
    /// What it stands for.
    pub about: String,
    /// The whole description; absent in results of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkConfig>,
    /// The emulator.
    pub emulator: Emulator,
    /// One per strategy and number of clients.
    pub rows: Vec<ThroughputRow>,
}

/// A number of clients with one strategy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ThroughputRow {
    /// Strategy and setting.
    pub strategy: String,
    /// Clients.
    pub clients: usize,
    /// Answers.
    pub n: usize,
    /// Failures.
    pub failed: usize,
    /// Answers per second, of all clients together.
    pub per_second: f64,
    /// Of single photos.
    pub latency_ms: Percentiles,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.95), percentile(&values, 0.99)), (50.0, 95.0, 99.0));
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
