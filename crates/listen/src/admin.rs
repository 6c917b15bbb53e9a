//! The admin listener of a server: status page, its data, Prometheus metrics, liveness.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Bounds, Counted, Places, not_accepted};

const METRICS_UPKEEP: Duration = Duration::from_secs(5);
const PROBE_LIMIT: Duration = Duration::from_secs(2);
const PROBE_BYTES: u64 = 4096;
/// A page may run what it holds and ask its own server, nothing else.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";

/// Open connections, in all and of one address, and how long one may be without an answer: for operators' browsers and probes, which ask at once and
/// are answered at once. Whoever sends a question byte by byte has no longer.
const CONNECTIONS: usize = 64;
const OF_ONE: usize = CONNECTIONS / 2;
const IDLE: Duration = Duration::from_secs(30);

/// The listener's connections, as many as may be open; others are closed at once.
struct Bounded {
    listener: TcpListener,
    places: Places,
}

impl axum::serve::Listener for Bounded {
    type Io = Counted;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Counted, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    if let Some(connection) = self.places.admit(stream, Some(IDLE)) {
                        return (connection, address);
                    }
                }
                Err(error) => not_accepted(&error).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Serves `page` at `/`, what `status` makes of the rendered metrics at `/status.json`, `/metrics`, `/healthz` and, as `ready` says,
/// `/readyz`, until `stop`.
pub async fn serve<S: Serialize>(
    listener: TcpListener,
    page: &'static str,
    status: impl Fn(&str) -> S + Clone + Send + Sync + 'static,
    ready: impl Fn() -> bool + Clone + Send + Sync + 'static,
    metrics: PrometheusHandle,
    stop: CancellationToken,
) {
    let readiness = move || {
        let answer = if ready() { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") };
        std::future::ready(answer)
    };
    let page = move || async move { ([(CONTENT_TYPE, "text/html; charset=utf-8"), (CONTENT_SECURITY_POLICY, POLICY)], page) };
    let rendered = metrics.clone();
    let data = move || {
        let json = serde_json::to_string(&status(&rendered.render()));
        std::future::ready(match json {
            Ok(json) => ([(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")], json).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        })
    };
    let router = Router::new()
        .route("/", get(page))
        .route("/status.json", get(data))
        .route("/metrics", get(move || std::future::ready(metrics.render())))
        .route("/readyz", get(readiness))
        .route("/healthz", get(|| std::future::ready("ok\n")));
    let bounded = Bounded { listener, places: Places::new(Bounds { most: CONNECTIONS, each_peer: OF_ONE }) };
    let served = axum::serve(bounded, router).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "admin listener failed");
    }
}

/// Asks a server's admin listener on this machine whether it is ready: for health checks in containers, which hold no other program.
///
/// # Errors
/// If it is not, or nothing answers in time.
pub fn probe(listener: SocketAddr) -> io::Result<()> {
    let ip = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(ip, listener.port()), PROBE_LIMIT)?;
    stream.set_read_timeout(Some(PROBE_LIMIT))?;
    stream.set_write_timeout(Some(PROBE_LIMIT))?;
    write!(stream, "GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(PROBE_BYTES).read_to_end(&mut answer)?;
    let status = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
    if status.contains(" 200 ") { Ok(()) } else { Err(io::Error::other(format!("not ready ({status})"))) }
}

/// Names and values of the counters in rendered metrics.
pub fn counters(metrics: &str) -> Vec<(String, f64)> {
    let lines = metrics.lines().filter(|l| !l.starts_with('#') && l.contains("_total"));
    lines.filter_map(|l| l.rsplit_once(' ')).filter_map(|(name, v)| Some((name.to_owned(), v.parse().ok()?))).collect()
}

/// Histograms collect samples until someone drains them; nobody may ever scrape. Runs until `stop`.
pub async fn upkeep(metrics: PrometheusHandle, stop: CancellationToken) {
    let mut tick = tokio::time::interval(METRICS_UPKEEP);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        metrics.run_upkeep();
    }
}
