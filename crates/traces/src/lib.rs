//! OpenTelemetry spans of client and server, joined over gRPC by W3C trace context (`traceparent`).
//!
//! Nothing is collected unless an OTLP collector is named, by `OTEL_EXPORTER_OTLP_ENDPOINT` (or the one for traces alone). The standard
//! variables `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*` are the SDK's own. Spans wait in a
//! bounded queue; what does not fit is dropped.

use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig};
use opentelemetry_otlp::{SpanExporter, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, Tracer};
use tonic::metadata::{Ascii, MetadataKey, MetadataMap};
use tracing::Span;
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::registry::LookupSpan;

/// PEM file of the authority that the collector's certificate comes from.
const CERTIFICATES: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"];
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// The collector could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("OTEL_EXPORTER_OTLP_ENDPOINT: {0}")]
pub struct TraceError(String);

/// The first of these variables that is set.
fn first(names: &[&str]) -> Option<String> {
    names.iter().filter_map(|name| std::env::var(name).ok()).find(|value| !value.is_empty())
}

/// For a collector behind `https`: the public authorities, and the one that the environment names.
fn tls() -> Result<Option<ClientTlsConfig>, TraceError> {
    if !first(&ENDPOINTS).is_some_and(|endpoint| endpoint.starts_with("https:")) {
        return Ok(None);
    }
    let mut tls = ClientTlsConfig::new().with_webpki_roots();
    if let Some(path) = first(&CERTIFICATES) {
        let pem = std::fs::read_to_string(&path).map_err(|e| TraceError(format!("{}: {path}: {e}", CERTIFICATES[1])))?;
        tls = tls.ca_certificate(Certificate::from_pem(pem));
    }
    Ok(Some(tls))
}

/// Sends spans to a collector; what waits is sent when it is dropped.
pub struct Traces {
    provider: SdkTracerProvider,
    service: &'static str,
}

impl Traces {
    /// As the environment says; none if it names no collector. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the collector's address makes no sense.
    pub fn from_environment(service: &'static str) -> Result<Option<Self>, TraceError> {
        if !ENDPOINTS.iter().any(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty())) {
            return Ok(None);
        }
        let mut exporter = SpanExporter::builder().with_tonic();
        if let Some(tls) = tls()? {
            exporter = exporter.with_tls_config(tls);
        }
        let exporter = exporter.build().map_err(|e| TraceError(e.to_string()))?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name(service);
        }
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
        Ok(Some(Self { provider, service }))
    }

    /// Takes spans of `tracing` in.
    pub fn layer<S>(&self) -> OpenTelemetryLayer<S, Tracer>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        tracing_opentelemetry::layer().with_tracer(self.provider.tracer(self.service))
    }
}

impl Traces {
    /// Sends what waits, without blocking a runtime that the exporter needs for it.
    pub async fn finish(self) {
        let ended = tokio::task::spawn_blocking(move || drop(self)).await;
        if let Err(error) = ended {
            tracing::debug!(%error, "spans were lost");
        }
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // bounded by the exporter's own time limit; a collector that is gone must not keep the process
        if let Err(error) = self.provider.shutdown() {
            tracing::debug!(%error, "spans were lost");
        }
    }
}

struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// Makes `span` part of the trace that the caller named, if it named one.
pub fn join(span: &Span, headers: &http::HeaderMap) {
    let context = TraceContextPropagator::new().extract(&Headers(headers));
    if context.span().span_context().is_valid() {
        // an error says that no collector was named: then there is no trace to be part of
        let _ = span.set_parent(context);
    }
}

struct Outgoing<'a>(&'a mut MetadataMap);

impl Injector for Outgoing<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (key.parse::<MetadataKey<Ascii>>(), value.parse()) {
            self.0.insert(key, value);
        }
    }
}

/// Names the current span to the server, if spans are collected.
pub fn name_to_server(metadata: &mut MetadataMap) {
    let context = Span::current().context();
    if context.span().span_context().is_valid() {
        TraceContextPropagator::new().inject_context(&context, &mut Outgoing(metadata));
    }
}
