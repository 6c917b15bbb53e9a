//! Timings of the encoder and of a server under closed-loop load.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use edge_client::engine::RtenEngine;
use edge_client::{Client, Encoder, Endpoint, InferOptions, Payload, open_bundle};
use serde::Serialize;

use crate::error::HarnessError;

const MAX_WARM_UP: usize = 20;

/// Medians of one run, in microseconds.
#[derive(Debug, Serialize)]
pub struct EncodeTimes {
    /// Encodings timed.
    pub n: usize,
    /// Decoding, cropping, resizing, normalising.
    pub preprocess_us: u64,
    /// The encoder network.
    pub network_us: u64,
    /// Rounding and entropy coding.
    pub entropy_us: u64,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> HarnessError + '_ {
    move |cause| HarnessError::Io { path: path.into(), cause }
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Encodes the photos of a folder in turn and returns the medians of each stage.
///
/// # Errors
/// If the folder, bundle or graph is unusable.
pub fn encode(photos: &Path, bundle: &Path, graph: Option<&Path>, rounds: usize, threads: usize) -> Result<EncodeTimes, HarnessError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(photos).map_err(io(photos))?.filter_map(Result::ok) {
        let bytes = std::fs::read(entry.path()).map_err(io(photos))?;
        if isthmus_pixels::decode(&bytes).is_ok() {
            files.push(bytes);
        }
    }
    if files.is_empty() {
        return Err(HarnessError::data(photos.display().to_string(), "holds no photos"));
    }
    let bundle = open_bundle(bundle)?;
    let mut encoder = match graph {
        None => Encoder::new(bundle, threads)?,
        Some(path) => {
            let onnx = std::fs::read(path).map_err(io(path))?;
            let engine = RtenEngine::new(&onnx, bundle.manifest.input.size, threads)?;
            Encoder::with_engine(bundle, Box::new(engine))
        }
    };
    let quality = encoder.default_quality();
    let mut times = Vec::new();
    let warm_up = rounds.min(MAX_WARM_UP);
    for file in files.iter().cycle().take(warm_up + rounds) {
        times.push(encoder.encode(file, quality)?.timing);
    }
    let times = times.split_off(warm_up);
    let of = |f: fn(&edge_client::EncodeTiming) -> u64| median(times.iter().map(f).collect());
    Ok(EncodeTimes {
        n: times.len(),
        preprocess_us: of(|t| t.preprocess_us),
        network_us: of(|t| t.network_us),
        entropy_us: of(|t| t.entropy_us),
    })
}

/// What a closed loop measured.
#[derive(Debug, Serialize)]
pub struct Load {
    /// Requests answered.
    pub n: usize,
    /// Answers per second.
    pub per_second: f64,
    /// Median time from sending to answer, in microseconds.
    pub latency_us: u64,
    /// 99th percentile of it.
    pub latency_p99_us: u64,
    /// Mean requests computed together.
    pub batch_size: f64,
    /// Share of the wall time in which the network was not computing.
    pub outside_network: f64,
}

/// Sends one photo's container `requests` times with `concurrency` under way.
///
/// # Errors
/// If the photo cannot be encoded or a request fails.
pub async fn load(photo: &Path, server: &str, bundle: &Path, concurrency: usize, requests: usize) -> Result<Load, HarnessError> {
    let mut encoder = Encoder::new(open_bundle(bundle)?, 1)?;
    let quality = encoder.default_quality();
    let container = encoder.encode(&std::fs::read(photo).map_err(io(photo))?, quality)?.container;
    let payload = Payload::Bitstream(container.into());
    let client = Client::connect(&Endpoint::new(server)?).await?;
    rounds(&client, &payload, concurrency, requests.div_ceil(10)).await?;
    let start = Instant::now();
    let answers = rounds(&client, &payload, concurrency, requests).await?;
    let wall = start.elapsed();
    let mut latencies: Vec<u64> = answers.iter().map(|a| a.0.as_micros() as u64).collect();
    latencies.sort_unstable();
    // a batch's time is reported by each of its members
    let network: f64 = answers.iter().map(|a| a.1 as f64 / f64::from(a.2.max(1))).sum();
    let n = answers.len();
    Ok(Load {
        n,
        per_second: n as f64 / wall.as_secs_f64(),
        latency_us: latencies[n / 2],
        latency_p99_us: latencies[(n * 99 / 100).min(n - 1)],
        batch_size: answers.iter().map(|a| f64::from(a.2)).sum::<f64>() / n as f64,
        outside_network: (1.0 - network / wall.as_micros() as f64).max(0.0),
    })
}

/// (latency, microseconds in the network, batch size) of each answer.
type Answer = (Duration, u64, u32);

async fn rounds(client: &Client, payload: &Payload, concurrency: usize, requests: usize) -> Result<Vec<Answer>, HarnessError> {
    let left = Arc::new(AtomicUsize::new(requests.max(1)));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..concurrency.max(1) {
        let (mut client, payload, left) = (client.clone(), payload.clone(), left.clone());
        tasks.spawn(async move {
            let mut answers: Vec<Answer> = Vec::new();
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                let start = Instant::now();
                let timing = client.infer(payload.clone(), &InferOptions::default()).await?.timing.unwrap_or_default();
                answers.push((start.elapsed(), timing.network_us, timing.batch_size));
            }
            Ok::<_, HarnessError>(answers)
        });
    }
    let mut all = Vec::new();
    while let Some(done) = tasks.join_next().await {
        all.extend(done.map_err(|e| HarnessError::Backend(e.to_string()))??);
    }
    Ok(all)
}
