//! OpenTelemetry: spans of client and server meet in one trace, at a collector that speaks OTLP.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use isthmus_testkit::{Server, binary, bundle, demo_photos};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Spans by the name of the service that sent them.
type Spans = Arc<Mutex<BTreeMap<String, Vec<Span>>>>;

struct Collector(Spans);

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|a| a.key == key)?.value.clone()?;
    match value {
        AnyValue { value: Some(Value::StringValue(text)) } => Some(text),
        AnyValue { value: Some(Value::IntValue(n)) } => Some(n.to_string()),
        AnyValue { value: Some(Value::DoubleValue(n)) } => Some(n.to_string()),
        _ => None,
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap();
        for from in request.into_inner().resource_spans {
            let service = text(&from.resource.unwrap_or_default().attributes, "service.name").unwrap_or_default();
            spans.entry(service).or_default().extend(from.scope_spans.into_iter().flat_map(|s| s.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_of_client_and_server_are_one_trace() {
    let spans = Spans::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let collector = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(Collector(spans.clone()));
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("server.toml");
    std::fs::write(&config, format!("bundles = [{:?}]\n", bundle())).unwrap();
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "100")];
    let mut server = Server::with_environment(&config, &variables);
    let Some(mut command) = client(&server) else { return };
    let classified = tokio::task::spawn_blocking(move || command.envs(variables_of(&collector)).output().unwrap()).await.unwrap();
    assert!(classified.status.success(), "{}", String::from_utf8_lossy(&classified.stderr));
    // the client sends what it has before it ends; the server's are flushed when it stops
    server.process.signal("TERM");
    let ended = tokio::task::spawn_blocking(move || server.process.wait(Duration::from_secs(30))).await.unwrap();
    assert_eq!(ended, Some(0));
    let began = Instant::now();
    let (client, server) = loop {
        let found = spans.lock().unwrap().clone();
        match (found.get("edge-client"), found.get("offload-server")) {
            (Some(client), Some(server)) => break (client.clone(), server.clone()),
            _ => assert!(began.elapsed() < Duration::from_secs(10), "spans of {:?} only", found.keys()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let asked = client.iter().find(|s| s.name == "infer").unwrap_or_else(|| panic!("{client:?}"));
    let call = server.iter().find(|s| s.trace_id == asked.trace_id && s.name.ends_with("/Infer"));
    let call = call.unwrap_or_else(|| panic!("no call in trace of {asked:?}: {server:?}"));
    assert_eq!(call.parent_span_id, asked.span_id, "the call is the client's child");
    let infer = server.iter().find(|s| s.name == "infer" && s.trace_id == asked.trace_id).unwrap();
    assert_eq!(infer.parent_span_id, call.span_id);
    for (key, expected) in
        [("model", None), ("kind", Some("bitstream")), ("batch_size", Some("1")), ("network_ms", None), ("queue_ms", None)]
    {
        let found = text(&infer.attributes, key);
        assert!(found.is_some() && expected.is_none_or(|e| found.as_deref() == Some(e)), "{key}: {found:?}");
    }
    let within = |outer: &Span, inner: &Span| outer.start_time_unix_nano <= inner.start_time_unix_nano;
    assert!(within(asked, call) && within(call, infer));
}

/// A client with the feature `otel` that classifies a photo: `make build` builds it beside the plain one.
fn client(server: &Server) -> Option<Command> {
    let binary = binary("edge-client-train");
    if !binary.exists() {
        isthmus_testkit::skipped("a client that sends spans: `make build`");
        return None;
    }
    let mut command = Command::new(binary);
    command.arg("classify").arg(&demo_photos()[0]).args(["--server", &server.url()]).arg("--bundle").arg(bundle());
    Some(command)
}

fn variables_of(collector: &str) -> [(&'static str, String); 1] {
    [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.to_owned())]
}

#[test]
fn a_collector_that_is_away_costs_nothing_and_a_wrong_address_is_named() {
    let away = isthmus_testkit::free_port();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("server.toml");
    std::fs::write(&config, format!("bundles = [{:?}]\n", bundle())).unwrap();
    let collector = format!("http://{away}");
    let server = Server::with_environment(&config, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &collector)]);
    let classify = |collector: &str| {
        let command = client(&server).map(|mut c| c.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector).output().unwrap());
        command.unwrap()
    };
    if client(&server).is_none() {
        return;
    }
    let began = Instant::now();
    let classified = classify(&collector);
    assert!(classified.status.success(), "{}", String::from_utf8_lossy(&classified.stderr));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let wrong = classify("not an address");
    assert!(!wrong.status.success() && String::from_utf8_lossy(&wrong.stderr).contains("OTEL_EXPORTER_OTLP_ENDPOINT"));
}
