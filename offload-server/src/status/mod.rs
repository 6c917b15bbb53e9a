//! The admin listener: status page, its data, Prometheus metrics, liveness.

mod latency;

use std::sync::Arc;
use std::time::Instant;

use isthmus_listen::admin;
pub use latency::{Latencies, Percentiles};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::pipeline::Pipeline;
use crate::registry::{Entry, Registry};

const PAGE: &str = include_str!("page.html");

/// What the page shows.
#[derive(Serialize)]
struct Status {
    version: &'static str,
    uptime_s: f64,
    draining: bool,
    in_flight: usize,
    max_in_flight: usize,
    latency: Percentiles,
    models: Vec<ShownModel>,
    tenants: Vec<ShownTenant>,
    counters: Vec<(String, f64)>,
}

#[derive(Serialize)]
struct ShownModel {
    name: &'static str,
    version: u64,
    device: String,
    bundles: Vec<String>,
    answered: u64,
    failed: u64,
    queue_s: f64,
    decode_s: f64,
    network_s: f64,
    batches: Vec<(usize, u64)>,
    waiting: usize,
}

#[derive(Serialize)]
struct ShownTenant {
    name: String,
    weight: f64,
    waiting: usize,
}

fn model(registry: &Registry, entry: &Entry) -> ShownModel {
    let totals = entry.statistics.read();
    let bundles = registry.bundles.iter().filter(|b| entry.stage(&b.hash).is_some());
    ShownModel {
        name: entry.name,
        version: entry.version,
        device: entry.device(),
        bundles: bundles.map(|b| format!("{} {}", b.manifest.name, b.manifest.version)).collect(),
        answered: totals.success.count,
        failed: totals.fail.count,
        queue_s: totals.queue.time.as_secs_f64(),
        decode_s: totals.input.time.as_secs_f64(),
        network_s: totals.batches.values().map(|b| b.time.as_secs_f64()).sum(),
        batches: totals.batches.iter().map(|(size, sum)| (*size, sum.count)).collect(),
        waiting: entry.batcher.waiting().values().sum(),
    }
}

fn status(pipeline: &Pipeline, started: Instant, metrics: &str) -> Status {
    let registry = pipeline.repository.current();
    let waiting: Vec<_> = registry.models.iter().map(|m| m.batcher.waiting()).collect();
    let of = |index: u32| waiting.iter().filter_map(|w| w.get(&index)).sum();
    let tenants = pipeline.tenants.all().map(|t| ShownTenant { name: t.name.clone(), weight: t.weight, waiting: of(t.index) });
    Status {
        version: env!("CARGO_PKG_VERSION"),
        uptime_s: started.elapsed().as_secs_f64(),
        draining: pipeline.leaving.is_cancelled(),
        in_flight: pipeline.in_flight(),
        max_in_flight: pipeline.max_in_flight(),
        latency: pipeline.latencies.read(Instant::now()),
        models: registry.models.iter().map(|m| model(&registry, m)).collect(),
        tenants: tenants.collect(),
        counters: admin::counters(metrics),
    }
}

/// Serves the admin listener until `stop`.
pub async fn serve(listener: TcpListener, pipeline: Arc<Pipeline>, metrics: PrometheusHandle, stop: CancellationToken) {
    let started = Instant::now();
    let watched = pipeline.clone();
    let ready = move || !watched.leaving.is_cancelled() && watched.repository.is_ready();
    admin::serve(listener, PAGE, move |metrics| status(&pipeline, started, metrics), ready, metrics, stop).await;
}
