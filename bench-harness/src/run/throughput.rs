//! Several clients that share one link: answers per second.
//!
//! Each client stands for a device of its own, so encoding is done beforehand and its time is waited for: one machine could not
//! encode for all of them at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use edge_client::{InferOptions, Payload};
use linkem::catalogue::NamedLink;
use tokio::task::JoinSet;

use crate::error::HarnessError;
use crate::run::config::ThroughputConfig;
use crate::run::latency::backlog;
use crate::run::progress;
use crate::run::results::{Percentiles, ThroughputResults, ThroughputRow, sorted};
use crate::run::session::{Bench, Site, spread};
use crate::run::strategy::{Prepared, Strategy};

/// Most different photos sent.
const PHOTOS: usize = 8;

/// Measures every strategy with every number of clients over one link.
///
/// # Errors
/// If link or server do not start, or a client cannot connect.
pub async fn measure(
    bench: &mut Bench<'_>,
    (name, named): &(String, NamedLink),
    t: &ThroughputConfig,
    levels: u8,
) -> Result<ThroughputResults, HarnessError> {
    let config = &bench.prepared.config;
    let site = bench.site(&named.link, config.seed)?;
    let strategies = t.strategies.all(levels)?;
    let bar = progress(format!("{name}: shared by clients"), strategies.len() * t.clients.len());
    let mut rows = Vec::new();
    for strategy in strategies {
        let mut made = Vec::new();
        for p in spread(bench.photos.len(), PHOTOS) {
            let photo = &bench.photos[p];
            let began = Instant::now();
            if let Prepared::Send(payload) = bench.device.prepare(strategy, &photo.pixels)? {
                made.push((payload, began.elapsed().mul_f64(config.device_slowdown)));
            }
        }
        let made = Arc::new(made);
        for &clients in &t.clients {
            rows.push(share(&site, strategy, made.clone(), clients, t.length, config.deadline).await?);
            // what the queue still holds of requests that were given up must not delay the next row
            tokio::time::sleep(backlog(&named.link)).await;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let emulator = site.emulation.report(&named.link, &config.congestion_control);
    Ok(ThroughputResults { name: name.clone(), about: named.about.clone(), link: Some(named.link.clone()), emulator, rows })
}

/// Payloads, and how long the device takes for each.
type Made = Arc<Vec<(Payload, Duration)>>;

async fn share(
    site: &Site,
    strategy: Strategy,
    made: Made,
    clients: usize,
    length: Duration,
    deadline: Duration,
) -> Result<ThroughputRow, HarnessError> {
    let mut connections = Vec::new();
    for _ in 0..clients {
        connections.push(site.emulation.connect(site.process.address).await?);
    }
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for (c, mut client) in connections.into_iter().enumerate() {
        let made = made.clone();
        tasks.spawn(async move {
            let (mut latencies, mut failed) = (Vec::new(), 0);
            for (payload, encode) in made.iter().cycle().skip(c) {
                let left = length.saturating_sub(began.elapsed());
                if left.is_zero() {
                    break;
                }
                let start = Instant::now();
                tokio::time::sleep(*encode).await;
                let options = InferOptions { top_k: 1, deadline, ..InferOptions::default() };
                match tokio::time::timeout(left, client.infer(payload.clone(), &options)).await {
                    Ok(Ok(_)) => latencies.push(start.elapsed().as_secs_f64() * 1e3),
                    Ok(Err(_)) => failed += 1,
                    Err(_) => break, // the time is over
                }
            }
            (latencies, failed)
        });
    }
    let (mut all, mut failed) = (Vec::new(), 0);
    while let Some(done) = tasks.join_next().await {
        let (latencies, f): (Vec<f64>, usize) = done.map_err(|e| HarnessError::Backend(e.to_string()))?;
        all.extend(latencies);
        failed += f;
    }
    let latency = sorted(all.into_iter());
    let (n, seconds) = (latency.len(), began.elapsed().as_secs_f64());
    Ok(ThroughputRow {
        strategy: strategy.name(),
        clients,
        n,
        failed,
        per_second: n as f64 / seconds,
        latency_ms: Percentiles::of(&latency),
    })
}
