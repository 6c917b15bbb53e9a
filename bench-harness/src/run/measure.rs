//! The measuring loop.

use std::path::Path;
use std::time::{Duration, Instant};

use edge_client::{Client, Encoder, InferOptions, open_bundle};
use indicatif::{ProgressBar, ProgressStyle};
use linkem::{LatenessSummary, LinkConfig};
use serde::{Deserialize, Serialize};

use crate::codecs::Codec;
use crate::error::HarnessError;
use crate::photos::{Photo, PhotoSet};
use crate::run::config::Prepared;
use crate::run::emulation::{Emulation, ServerProcess};
use crate::run::strategy::Strategy;
use crate::stats::argmax;

/// Everything a report needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// When it began (RFC 3339, UTC).
    pub began: String,
    /// Machine and kernel.
    pub machine: String,
    /// Bundle name and version.
    pub bundle: String,
    /// Photos used.
    pub photos: usize,
    /// Rounds counted.
    pub rounds: usize,
    /// Seed.
    pub seed: u64,
    /// One entry per link.
    pub links: Vec<LinkResults>,
}

/// Results over one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkResults {
    /// Name in the catalogue.
    pub name: String,
    /// What it stands for.
    pub about: String,
    /// Uplink rate in Mbit/s, where it is constant.
    pub uplink_mbit_per_s: Option<f64>,
    /// `packet` or `stream`.
    pub emulation: String,
    /// TCP's congestion control; that of the host's loopback at stream level, where it does not matter.
    pub congestion_control: Option<String>,
    /// How late the emulator was.
    pub lateness: Lateness,
    /// False if the emulator was too late for the link's delay: do not use these numbers.
    pub valid: bool,
    /// One row per strategy and setting.
    pub rows: Vec<Row>,
}

/// Lateness of the emulator in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Lateness {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Largest.
    pub max_us: u64,
}

impl From<LatenessSummary> for Lateness {
    fn from(s: LatenessSummary) -> Self {
        Self { p50_us: s.p50_us, p99_us: s.p99_us, max_us: s.max_us }
    }
}

/// One strategy over one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Strategy and setting.
    pub strategy: String,
    /// Requests answered.
    pub n: usize,
    /// Requests that failed or came too late.
    pub failed: usize,
    /// Mean payload bytes.
    pub bytes: f64,
    /// Share of answers that equal those to the lossless photo.
    pub agreement: f64,
    /// Photo in memory to answer in memory, milliseconds.
    pub latency_ms: Percentiles,
    /// Every one of them, rising.
    pub latencies_ms: Vec<f64>,
    /// Encoding on the device, milliseconds (median).
    pub encode_ms: f64,
    /// In the server, milliseconds (median).
    pub server_ms: f64,
    /// Predicted median, where the rate is constant: encode + round trip + bits / uplink rate + server.
    pub predicted_ms: Option<f64>,
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

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(index.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_default()
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// One answered request.
struct Sample {
    latency: f64,
    encode: f64,
    server: f64,
    bytes: usize,
    agrees: bool,
}

/// Runs everything; progress on standard error.
///
/// # Errors
/// If the server does not start, a link cannot be made, or every request of a strategy's first round fails.
pub async fn run(prepared: &Prepared, server: &Path) -> Result<Results, HarnessError> {
    let config = &prepared.config;
    let bundle = open_bundle(&config.bundle)?;
    let (name, side) = (format!("{} {}", bundle.manifest.name, bundle.manifest.version), bundle.manifest.input.size);
    let strategies = config.strategies.all(bundle.levels())?;
    let mut photos = PhotoSet::open(&config.photos, side)?.photos;
    photos.truncate(config.most_photos);
    let mut encoder = Encoder::new(bundle, 1)?;
    let mut links = Vec::new();
    for (i, (link, named)) in prepared.links.iter().enumerate() {
        let began = Instant::now();
        let emulation =
            Emulation::start(config.emulation, &named.link, &prepared.folder, config.seed + i as u64, &config.congestion_control)?;
        let process = ServerProcess::start(server, &config.bundle, &emulation)?;
        let mut client = emulation.connect(process.address).await?;
        let bar = ProgressBar::new(((config.rounds + 1) * photos.len() * strategies.len()) as u64);
        if let Ok(style) = ProgressStyle::with_template("{msg:12} {bar:30} {pos}/{len} requests, {eta} left") {
            bar.set_style(style);
        }
        bar.set_message(format!("{link} ({})", emulation.name()));
        let mut session = Session { encoder: &mut encoder, client: &mut client, deadline: config.deadline };
        let reference = session.reference(&photos).await?;
        let mut samples: Vec<Vec<Sample>> = strategies.iter().map(|_| Vec::new()).collect();
        let mut failed = vec![0; strategies.len()];
        for round in 0..=config.rounds {
            for (photo, &wanted) in photos.iter().zip(&reference) {
                // strategies take turns on each photo, so that whatever else the machine does meets all of them
                for (s, strategy) in strategies.iter().enumerate() {
                    let sample = session.one(*strategy, photo, wanted).await;
                    bar.inc(1);
                    match sample {
                        Ok(sample) if round > 0 => samples[s].push(sample),
                        Ok(_) => {}
                        Err(_) if round > 0 => failed[s] += 1,
                        Err(_) => {}
                    }
                }
            }
        }
        bar.finish_and_clear();
        let rows = strategies.iter().zip(&samples).zip(&failed).map(|((s, samples), &f)| row(*s, samples, f, &named.link)).collect();
        let lateness = emulation.lateness();
        let packets = emulation.name() == linkem::driver::packet::EMULATION;
        links.push(LinkResults {
            name: link.clone(),
            about: named.about.clone(),
            uplink_mbit_per_s: named.link.up.mbit_per_s,
            emulation: emulation.name().into(),
            congestion_control: packets.then(|| config.congestion_control.clone()),
            valid: lateness.valid_for(named.link.up.delay.min(named.link.down.delay)),
            lateness: lateness.into(),
            rows,
        });
        eprintln!("{link}: {} requests in {:.0} s", strategies.len() * photos.len() * config.rounds, began.elapsed().as_secs_f64());
    }
    Ok(Results {
        began: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
        machine: machine(),
        bundle: name,
        photos: photos.len(),
        rounds: config.rounds,
        seed: config.seed,
        links,
    })
}

struct Session<'a> {
    encoder: &'a mut Encoder,
    client: &'a mut Client,
    deadline: Duration,
}

impl Session<'_> {
    /// The server's answers to the lossless photos.
    async fn reference(&mut self, photos: &[Photo]) -> Result<Vec<u32>, HarnessError> {
        let mut answers = Vec::new();
        for photo in photos {
            let payload = Strategy::Image(Codec::Png).encode(self.encoder, &photo.pixels)?;
            let options = InferOptions { logits: true, top_k: 1, deadline: Duration::from_secs(60), ..InferOptions::default() };
            let answer = self.client.infer(payload, &options).await?;
            answers.push(argmax(&answer.logits) as u32);
        }
        Ok(answers)
    }

    async fn one(&mut self, strategy: Strategy, photo: &Photo, wanted: u32) -> Result<Sample, HarnessError> {
        let options = InferOptions { top_k: 1, deadline: self.deadline, ..InferOptions::default() };
        let began = Instant::now();
        let payload = strategy.encode(self.encoder, &photo.pixels)?;
        let (encoded, bytes) = (began.elapsed(), payload.len());
        let answer = self.client.infer(payload, &options).await?;
        let latency = ms(began.elapsed());
        let server = answer.timing.unwrap_or_default().total_us as f64 / 1e3;
        let agrees = answer.labels.first().is_some_and(|l| l.index == wanted);
        Ok(Sample { latency, encode: ms(encoded), server, bytes, agrees })
    }
}

fn row(strategy: Strategy, samples: &[Sample], failed: usize, link: &LinkConfig) -> Row {
    let n = samples.len();
    let mean = |f: &dyn Fn(&Sample) -> f64| samples.iter().map(f).sum::<f64>() / n.max(1) as f64;
    let latency = sorted(samples.iter().map(|s| s.latency));
    let median = |f: fn(&Sample) -> f64| percentile(&sorted(samples.iter().map(f)), 0.5);
    let (bytes, encode, server) = (mean(&|s| s.bytes as f64), median(|s| s.encode), median(|s| s.server));
    let round_trip = ms(link.up.delay + link.down.delay);
    let predicted = link.up.mbit_per_s.filter(|_| link.up.outages.is_empty());
    Row {
        strategy: strategy.name(),
        n,
        failed,
        bytes,
        agreement: mean(&|s| f64::from(u8::from(s.agrees))),
        latency_ms: Percentiles { p50: percentile(&latency, 0.5), p95: percentile(&latency, 0.95), p99: percentile(&latency, 0.99) },
        latencies_ms: latency.iter().map(|l| (l * 1e3).round() / 1e3).collect(),
        encode_ms: encode,
        server_ms: server,
        predicted_ms: predicted.map(|mbit| encode + round_trip + bytes * 8.0 / (mbit * 1e3) + server),
    }
}

/// Processor, cores and kernel.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name")).map_or("", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {cores} cores, Linux {}", read("/proc/sys/kernel/osrelease").trim())
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
