//! Logs and metrics. docs/metrics.md specifies every metric; a test compares it with what is exported.

use std::io::IsTerminal;
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::config::LogFormat;
use crate::error::AggregatorError;
use crate::round::{Phase, Record};

const SECONDS: [f64; 12] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 3600.0];

/// Installs the recorder of this process.
///
/// # Errors
/// If another recorder is installed.
pub fn install_metrics() -> Result<PrometheusHandle, AggregatorError> {
    let failed = |e: metrics_exporter_prometheus::BuildError| AggregatorError::Config(format!("metrics: {e}"));
    let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS).map_err(failed)?;
    let handle = builder.install_recorder().map_err(failed)?;
    describe_counter!("isthmus_rounds_total", "Rounds that ended, by how");
    describe_counter!("isthmus_reports_total", "Reports stored");
    describe_counter!("isthmus_reports_refused_total", "Reports refused, by reason");
    describe_counter!("isthmus_report_bytes_total", "Bytes of reports' bodies received");
    describe_counter!("isthmus_peer_bytes_total", "Bytes of computations, by direction");
    describe_counter!("isthmus_attempts_total", "Attempts at computing a round, by how they ended");
    describe_histogram!("isthmus_compute_seconds", "An attempt that succeeded");
    describe_gauge!("isthmus_rounds_under_way", "Rounds that are neither done nor aborted");
    counter!("isthmus_reports_total").increment(0);
    gauge!("isthmus_rounds_under_way").set(0.0);
    Ok(handle)
}

/// Starts logging to standard error; `RUST_LOG` filters (default `info`).
pub fn install_logs(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    // a second call keeps the first subscriber
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

pub(crate) fn phase(before: &Record, after: &Record) {
    if after.phase.is_final() && !before.phase.is_final() {
        counter!("isthmus_rounds_total", "outcome" => if after.phase == Phase::Done { "done" } else { "aborted" }).increment(1);
    }
}

pub(crate) fn under_way(rounds: usize) {
    gauge!("isthmus_rounds_under_way").set(rounds as f64);
}

pub(crate) fn report_stored() {
    counter!("isthmus_reports_total").increment(1);
}

pub(crate) fn report_refused(error: &AggregatorError) {
    counter!("isthmus_reports_refused_total", "reason" => error.kind()).increment(1);
}

pub(crate) fn body_bytes(bytes: usize) {
    counter!("isthmus_report_bytes_total").increment(bytes as u64);
}

pub(crate) fn peer_bytes(direction: &'static str, bytes: usize) {
    counter!("isthmus_peer_bytes_total", "direction" => direction).increment(bytes as u64);
}

pub(crate) fn attempt(succeeded: Option<Duration>) {
    counter!("isthmus_attempts_total", "outcome" => if succeeded.is_some() { "done" } else { "failed" }).increment(1);
    if let Some(took) = succeeded {
        histogram!("isthmus_compute_seconds").record(took);
    }
}
