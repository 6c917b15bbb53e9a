//! Logs and metrics. docs/metrics.md specifies every metric; a test compares it with what is exported.

use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use isthmus_traces::Traces;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tonic::codegen::http;
use tracing::{Level, Span};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::LogFormat;
use crate::features::FeatureMap;
use crate::model::Stage;
use crate::tenants::Tenant;
use crate::{ServerError, error};

const SECONDS: [f64; 14] = [0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
const BYTES: [f64; 10] = [500.0, 1e3, 2e3, 4e3, 8e3, 16e3, 64e3, 256e3, 1e6, 8e6];
const RATIO: [f64; 9] = [0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0];
const BATCH: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

/// What a request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container.
    Bitstream,
    /// An image file.
    Image,
    /// Values of a layer.
    Features(FeatureMap),
    /// RGB values of an image of this size.
    Pixels {
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
    },
    /// What the network takes, as floats.
    Normalised,
}

impl Kind {
    /// Value of the `payload` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Bitstream => "bitstream",
            Self::Image => "image",
            Self::Features(_) => "features",
            Self::Pixels { .. } | Self::Normalised => "pixels",
        }
    }
}

/// What ended a stream of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    /// The client, which had asked for everything.
    Done,
    /// The client, with answers outstanding or the transport's help.
    Left,
    /// The server's shutdown.
    Draining,
    /// It was as old as a connection may be.
    Age,
    /// Nothing came.
    Idle,
    /// Its answers were not read.
    Unread,
    /// An unreadable message, or an answer that failed.
    Failed,
}

impl StreamEnd {
    const ALL: [Self; 7] = [Self::Done, Self::Left, Self::Draining, Self::Age, Self::Idle, Self::Unread, Self::Failed];

    fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Left => "left",
            Self::Draining => "draining",
            Self::Age => "age",
            Self::Idle => "idle",
            Self::Unread => "unread",
            Self::Failed => "failed",
        }
    }
}

/// Installs the recorder of this process; a second call finds the first one's place taken.
///
/// # Errors
/// If another recorder is installed.
pub fn install_metrics() -> Result<PrometheusHandle, ServerError> {
    let failed = |e: metrics_exporter_prometheus::BuildError| ServerError::Config(format!("metrics: {e}"));
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_bytes".into()), &BYTES))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Full("isthmus_batch_size".into()), &BATCH))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Full("isthmus_cost_ratio".into()), &RATIO))
        .map_err(failed)?;
    let handle = builder.install_recorder().map_err(failed)?;
    describe_counter!("isthmus_requests_total", "Requests answered, by payload and gRPC code");
    describe_counter!("isthmus_tenant_requests_total", "Requests by configured tenant and gRPC code");
    describe_counter!("isthmus_refused_total", "Requests that failed, by reason");
    describe_counter!("isthmus_dropped_total", "Requests dropped before they cost anything, by reason");
    describe_histogram!("isthmus_request_bytes", "Payload bytes of a request");
    describe_histogram!("isthmus_request_seconds", "Time from arrival to answer");
    describe_histogram!("isthmus_entropy_decode_seconds", "Entropy decoding of a container");
    describe_histogram!("isthmus_image_decode_seconds", "Decoding and resizing of an image");
    describe_histogram!("isthmus_features_decode_seconds", "Unpacking of raw features");
    describe_histogram!("isthmus_queue_seconds", "Waiting for the decode pool and the batch");
    describe_counter!("isthmus_batches_total", "Batches computed, by why they were closed");
    describe_histogram!("isthmus_cost_ratio", "Measured over predicted time of a batch");
    describe_histogram!("isthmus_batch_size", "Requests computed together");
    describe_histogram!("isthmus_network_seconds", "A batch in the network, by stage");
    describe_counter!("isthmus_failed_calls_total", "Calls that ended with an error before any message was sent, by gRPC code");
    describe_counter!("isthmus_connections_refused_total", "Connections closed at once because too many were open");
    describe_gauge!("isthmus_decodings", "Decodings on the pool");
    gauge!("isthmus_decodings").set(0.0);
    describe_gauge!("isthmus_in_flight", "Requests between arrival and answer");
    describe_gauge!("isthmus_queue_length", "Decoded requests that wait for a model's network");
    describe_gauge!("isthmus_model_loaded", "1 for a version of a model that is loaded, 0 for one that was");
    describe_counter!("isthmus_model_requests_total", "Requests that reached a loaded model, by gRPC code");
    describe_counter!("isthmus_model_loads_total", "Attempts at loading a model, by outcome");
    describe_counter!("isthmus_streams_ended_total", "Streams of requests that ended, by who or what ended them");
    // autoscalers and alerts take a series that is not there for no data
    counter!("isthmus_connections_refused_total").increment(0);
    for reason in ["overload", "full", "closed", "cancelled", "deadline", "decode"] {
        counter!("isthmus_dropped_total", "reason" => reason).increment(0);
    }
    for by in StreamEnd::ALL {
        counter!("isthmus_streams_ended_total", "by" => by.label()).increment(0);
    }
    Ok(handle)
}

/// Changes the filter of the installed subscriber.
type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static FILTER: OnceLock<(SetFilter, Mutex<String>)> = OnceLock::new();

/// Starts logging to standard error, `RUST_LOG` filters (default `info`), and sending spans to `traces`.
///
/// # Errors
/// If `RUST_LOG` is no filter.
pub fn install_logs(format: LogFormat, traces: Option<&Traces>) -> Result<(), ServerError> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) => EnvFilter::builder().parse(&text).map_err(|e| ServerError::Config(format!("RUST_LOG={text:?}: {e}")))?,
        Err(_) => "info".into(),
    };
    let text = Mutex::new(filter.to_string());
    let (filter, handle) = tracing_subscriber::reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    // what a request does is a trace, whatever the logs say
    let spans = Targets::new().with_target("offload_server", Level::DEBUG);
    let spans = traces.map(|t| t.layer().with_filter(spans));
    // a second call (tests) keeps the first subscriber
    if tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans).try_init().is_ok() {
        let set: SetFilter = Box::new(move |f| handle.reload(f).map_err(|e| e.to_string()));
        let _ = FILTER.set((set, text));
    }
    Ok(())
}

/// The span of a call, part of its caller's trace if that has one.
pub fn call(request: &http::Request<()>) -> Span {
    let span = tracing::debug_span!("call", otel.name = request.uri().path(), otel.kind = "server", rpc.system = "grpc");
    if !span.is_disabled() {
        isthmus_traces::join(&span, request.headers());
    }
    span
}

/// Which events are logged from now on, as in `RUST_LOG`.
///
/// # Errors
/// [`ServerError::Invalid`] if it makes no sense.
pub fn set_log_filter(text: &str) -> Result<(), ServerError> {
    let wrong = |e: String| ServerError::Invalid(format!("log filter: {e}"));
    let filter = EnvFilter::builder().parse(text).map_err(|e| wrong(e.to_string()))?;
    let (set, current) = FILTER.get().ok_or_else(|| wrong("logging was set up elsewhere".into()))?;
    let shown = filter.to_string();
    set(filter).map_err(wrong)?;
    *current.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    Ok(())
}

/// Which events are logged.
pub fn log_filter() -> String {
    FILTER.get().map(|(_, text)| text.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
}

/// Counts calls that the transport refused (too large a message, too many calls, too late) as well as those that
/// failed here: both end with a status and no message.
pub(crate) fn call_ended<B>(mut response: http::Response<B>) -> http::Response<B> {
    error::of_transport_headers(response.headers_mut());
    if let Some(status) = tonic::Status::from_header_map(response.headers()).filter(|s| s.code() != tonic::Code::Ok) {
        counter!("isthmus_failed_calls_total", "code" => format!("{:?}", status.code())).increment(1);
    }
    response
}

pub(crate) fn stream_ended(by: StreamEnd) {
    counter!("isthmus_streams_ended_total", "by" => by.label()).increment(1);
}

/// An attempt at loading a model.
pub(crate) fn load(model: &'static str, done: bool) {
    counter!("isthmus_model_loads_total", "model" => model, "outcome" => if done { "done" } else { "failed" }).increment(1);
}

pub(crate) fn connection_refused() {
    counter!("isthmus_connections_refused_total").increment(1);
}

pub(crate) fn dropped(reason: &'static str) {
    counter!("isthmus_dropped_total", "reason" => reason).increment(1);
}

/// Requests that wait for a model's network.
pub(crate) fn waiting(model: &'static str, change: f64) {
    gauge!("isthmus_queue_length", "model" => model).increment(change);
}

pub(crate) fn batch(model: &'static str, stage: Stage, size: usize, network: Duration, closed: &'static str) {
    let stage = match stage {
        Stage::Latent(_) => "latent",
        Stage::Pixels => "pixels",
        Stage::Features(_) => "features",
    };
    counter!("isthmus_batches_total", "model" => model, "closed" => closed).increment(1);
    histogram!("isthmus_batch_size", "model" => model).record(size as f64);
    histogram!("isthmus_network_seconds", "model" => model, "stage" => stage).record(network);
}

pub(crate) fn decoded(kind: Kind, took: Duration) {
    match kind {
        Kind::Bitstream => histogram!("isthmus_entropy_decode_seconds").record(took),
        Kind::Image | Kind::Pixels { .. } | Kind::Normalised => histogram!("isthmus_image_decode_seconds").record(took),
        Kind::Features(_) => histogram!("isthmus_features_decode_seconds").record(took),
    }
}

/// Measured time of a batch over the predicted one.
pub(crate) fn predicted(model: &'static str, ratio: f64) {
    histogram!("isthmus_cost_ratio", "model" => model).record(ratio);
}

pub(crate) fn tenant(name: &str, error: Option<&ServerError>) {
    let code = error.map_or(tonic::Code::Ok, ServerError::code);
    counter!("isthmus_tenant_requests_total", "tenant" => name.to_owned(), "code" => format!("{code:?}")).increment(1);
}

/// A request that failed before it had a payload to count: nobody's, or not this tenant's to make, or senseless.
pub(crate) fn refused(error: &ServerError, of: Option<&Tenant>) {
    counter!("isthmus_refused_total", "reason" => error.kind()).increment(1);
    if let Some(of) = of {
        tenant(&of.name, Some(error));
    }
}

/// A version of a model is loaded now, or not any more.
pub(crate) fn loaded(model: &'static str, version: u64, loaded: bool) {
    gauge!("isthmus_model_loaded", "model" => model, "version" => version.to_string()).set(f64::from(u8::from(loaded)));
}

pub(crate) fn queued(model: &'static str, waited: Duration) {
    histogram!("isthmus_queue_seconds", "model" => model).record(waited);
}

pub(crate) fn model(name: &'static str, error: Option<&ServerError>) {
    let code = error.map_or(tonic::Code::Ok, ServerError::code);
    counter!("isthmus_model_requests_total", "model" => name, "code" => format!("{code:?}")).increment(1);
}

pub(crate) fn answered(kind: Kind, bytes: usize, took: Duration, error: Option<&ServerError>) {
    let code = error.map_or(tonic::Code::Ok, ServerError::code);
    counter!("isthmus_requests_total", "payload" => kind.label(), "code" => format!("{code:?}")).increment(1);
    histogram!("isthmus_request_bytes", "payload" => kind.label()).record(bytes as f64);
    match error {
        None => histogram!("isthmus_request_seconds", "payload" => kind.label()).record(took),
        Some(error) => counter!("isthmus_refused_total", "reason" => error.kind()).increment(1),
    }
}

/// Counts a decoding on the pool while it lives.
pub(crate) struct Decoding;

impl Decoding {
    pub(crate) fn enter() -> Self {
        gauge!("isthmus_decodings").increment(1.0);
        Self
    }
}

impl Drop for Decoding {
    fn drop(&mut self) {
        gauge!("isthmus_decodings").decrement(1.0);
    }
}

/// Counts requests as in flight while it lives.
pub(crate) struct InFlight(f64);

impl InFlight {
    pub(crate) fn enter(n: usize) -> Self {
        let n = n as f64;
        gauge!("isthmus_in_flight").increment(n);
        Self(n)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!("isthmus_in_flight").decrement(self.0);
    }
}
