//! Brings the parts together: listeners, health, reflection, shutdown.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_listen::Bounds;
use isthmus_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use isthmus_proto::offload_v1::offload_service_server::OffloadServiceServer;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::util::MapResponseLayer;

use crate::limits::{CallLimits, OPEN_BYTES, OPEN_TIME, PerMethod, Within};
use crate::pipeline::Pipeline;
use crate::receiving::Receiving;
use crate::repository::Repository;
use crate::services::inference::Inference;
use crate::services::offload::Offload;
use crate::tenants::{Capacity, Tenants};
use crate::{Config, ServerError, status, telemetry};

/// A TLS handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
const MAX_HEADERS: u32 = 16 << 10;
/// Batches that nobody waits for any more are finished within this, or abandoned.
const WORK_END: Duration = Duration::from_secs(5);
/// When nothing has come or gone for so long while draining, nothing will.
const QUIET: Duration = Duration::from_secs(1);
/// Of one connection.
const LEAST_STREAMS: u32 = 64;
/// Different ages of connections.
const AGES: u32 = 8;

/// A started server.
pub struct Running {
    /// Address of the gRPC listener.
    pub address: SocketAddr,
    /// Address of the admin listener.
    pub admin_address: Option<SocketAddr>,
    pipeline: Arc<Pipeline>,
    health: HealthReporter,
    served: JoinHandle<Result<(), ServerError>>,
    drain_delay: Duration,
    drain_limit: Duration,
    background: CancellationToken,
}

impl Running {
    /// Ends in this order: health and readiness say no, and balancers have `drain_delay` to look elsewhere while everything is still answered; the
    /// listener closes and connections and streams take nothing new; what is in flight is finished, for at most `drain_limit`; the admin
    /// listener ends.
    ///
    /// # Errors
    /// If the transport failed or the limit passed.
    pub async fn stop(self) -> Result<(), ServerError> {
        self.pipeline.leaving.cancel();
        self.health.set_not_serving::<OffloadServiceServer<Offload>>().await;
        self.health.set_not_serving::<GrpcInferenceServiceServer<Inference>>().await;
        // the server as a whole, for probes that name no service
        self.health.set_service_status("", ServingStatus::NotServing).await;
        tokio::time::sleep(self.drain_delay).await;
        self.pipeline.draining.cancel();
        let limit = self.drain_limit;
        let pipeline = self.pipeline.clone();
        // health watches, reflection and idle connections have nothing to finish, and would not end
        let quiet = async {
            let mut since = Instant::now();
            while since.elapsed() < QUIET {
                tokio::time::sleep(QUIET / 20).await;
                if !pipeline.is_quiet() {
                    since = Instant::now();
                }
            }
        };
        let ended = tokio::select! {
            ended = tokio::time::timeout(limit, self.served) => ended,
            () = quiet => Ok(Ok(Ok(()))),
        };
        self.background.cancel();
        // batches of those that left, too, are finished if that is soon
        let began = Instant::now();
        let at_work = self.pipeline.repository.close();
        while at_work.iter().any(|w| w.strong_count() > 0) && began.elapsed() < WORK_END {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        match ended {
            Ok(ended) => ended.map_err(|e| ServerError::Transport(e.to_string()))?,
            Err(_) => Err(ServerError::Transport(format!("requests were still in flight after {limit:?}"))),
        }
    }

    /// Ends when the listener does (which it does by itself only on failure).
    ///
    /// # Errors
    /// What made it end.
    pub async fn ended(&mut self) -> Result<(), ServerError> {
        let ended = (&mut self.served).await;
        ended.map_err(|e| ServerError::Transport(e.to_string()))?
    }
}

/// Ages that connections may reach; each server has one, and connections go to them in turn. tonic knows no jitter, and those that came
/// together, when a fleet started or a server died, would come back together for ever (gRPC proposal A9: a tenth to either side).
fn connection_ages(age: Duration) -> Vec<Option<Duration>> {
    if age.is_zero() {
        return vec![None];
    }
    (0..AGES).map(|i| Some(age.mul_f64(0.9 + 0.2 * f64::from(i) / f64::from(AGES - 1)))).collect()
}

/// An error with what caused it.
fn reasons(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |e| e.source()).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A PEM file that holds something of the wanted kind.
fn pem(path: &Path, kind: &str) -> Result<String, ServerError> {
    let text = std::fs::read_to_string(path).map_err(|cause| ServerError::Io { path: path.into(), cause })?;
    if text.lines().any(|l| l.starts_with("-----BEGIN ") && l.contains(kind)) {
        return Ok(text);
    }
    Err(ServerError::Config(format!("{} holds no PEM {kind} (a line -----BEGIN ... {kind}-----)", path.display())))
}

/// Loads models and bundles, binds the listeners, and serves.
///
/// # Errors
/// Names what is wrong: configuration, a file, an address in use.
pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Running, ServerError> {
    config.check()?;
    let tls = tls(&config)?;
    let server = match &tls {
        // what is wrong with them is told before models load
        Some(tls) => {
            let wrong = |e| ServerError::Config(format!("tls_cert, tls_key, tls_client_ca: {}", reasons(&e)));
            Server::builder().tls_config(tls.clone()).map_err(wrong)?
        }
        None => Server::builder(),
    };
    let bind = |address: SocketAddr| async move {
        let in_use = |e: std::io::Error| ServerError::Transport(format!("cannot listen on {address}: {e}"));
        TcpListener::bind(address).await.map_err(in_use)
    };
    // loading takes seconds: what is taken already is told before; nobody is to connect meanwhile
    for address in std::iter::once(config.listen).chain(config.admin_listen) {
        drop(bind(address).await?);
    }
    let loading = config.clone();
    // a thread of its own that ends: the OpenMP team of a living one would count against the network's, which
    // then waits passively and takes twice as long
    let (loaded, repository) = tokio::sync::oneshot::channel();
    let load = std::thread::Builder::new().name("load".into()).spawn(move || loaded.send(Repository::open(&loading)).map_err(drop));
    load.map_err(|e| ServerError::Transport(e.to_string()))?;
    let repository = repository.await.map_err(|_| ServerError::Transport("loading ended early".into()))??;
    let listener = bind(config.listen).await?;
    let address = listener.local_addr().map_err(|e| ServerError::Transport(e.to_string()))?;
    let background = CancellationToken::new();
    tokio::spawn(isthmus_listen::admin::upkeep(metrics.clone(), background.clone()));
    let tenants = Tenants::new(&config.tenants, Capacity::of(&config))?;
    let without = if config.tenants.is_empty() { 0 } else { tenants.without_places() };
    if without > 0 {
        tracing::warn!(
            without,
            "so many tenants have no place of their own: max_in_flight, max_streams and max_received_bytes are small for them"
        );
    }
    let pipeline = Arc::new(Pipeline::new(Arc::new(repository), &config, tenants.clone()));
    let draining = pipeline.draining.clone();
    let mut admin_address = None;
    if let Some(wanted) = config.admin_listen {
        let listener = bind(wanted).await?;
        admin_address = listener.local_addr().ok();
        tokio::spawn(status::serve(listener, pipeline.clone(), metrics, background.clone()));
    }
    let limits = CallLimits {
        unary: config.max_request_bytes,
        stream: config.max_stream_message_bytes,
        answers: config.max_response_bytes,
        time: config.max_deadline,
    };
    let service = Inference::new(pipeline.clone(), &config);
    let inference = PerMethod::new(&limits, |most, answers, streams| {
        let server = GrpcInferenceServiceServer::new(service.clone()).max_decoding_message_size(most).max_encoding_message_size(answers);
        let (known, server) = (tenants.clone(), Receiving::new(server, streams, pipeline.open.clone(), config.stream_idle));
        InterceptedService::new(server, move |request| known.intercept(request))
    });
    let service = Offload(pipeline.clone());
    let offload = PerMethod::new(&limits, |most, answers, streams| {
        let server = OffloadServiceServer::new(service.clone()).max_decoding_message_size(most).max_encoding_message_size(answers);
        let (known, server) = (tenants.clone(), Receiving::new(server, streams, pipeline.open.clone(), config.stream_idle));
        InterceptedService::new(server, move |request| known.intercept(request))
    });
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<OffloadServiceServer<Offload>>().await;
    health.set_serving::<GrpcInferenceServiceServer<Inference>>().await;
    watch_readiness(&pipeline, &health);
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(isthmus_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(<OffloadServiceServer<Offload> as NamedService>::NAME)
            .with_service_name(<GrpcInferenceServiceServer<Inference> as NamedService>::NAME)
            .with_service_name("grpc.health.v1.Health")
            .with_service_name("grpc.reflection.v1.ServerReflection")
            .with_service_name("grpc.reflection.v1alpha.ServerReflection")
    };
    // nobody has to be known for health and reflection: their questions are small, and soon there
    let health_service = Within::new(health_service.max_decoding_message_size(OPEN_BYTES), OPEN_TIME);
    let reflection = described().build_v1().map_err(|e| ServerError::Transport(e.to_string()))?;
    let reflection = Within::new(reflection.max_decoding_message_size(OPEN_BYTES), OPEN_TIME);
    // what older tools ask for
    let older_reflection = described().build_v1alpha().map_err(|e| ServerError::Transport(e.to_string()))?;
    let older_reflection = Within::new(older_reflection.max_decoding_message_size(OPEN_BYTES), OPEN_TIME);
    let server = server
        .http2_keepalive_interval(Some(config.keepalive_interval))
        .http2_keepalive_timeout(Some(config.keepalive_timeout))
        // above what is taken: a call that has to wait in its client's transport for a place comes with a time limit that has
        // partly passed, which nobody here can see; better to refuse it at once
        .max_concurrent_streams(u32::try_from(2 * config.max_in_flight).unwrap_or(u32::MAX).max(LEAST_STREAMS))
        .http2_max_header_list_size(MAX_HEADERS)
        .tcp_nodelay(true)
        .trace_fn(telemetry::call)
        .layer(MapResponseLayer::new(telemetry::call_ended));
    let bounds = Bounds { most: isthmus_listen::places(config.max_connections), each_peer: config.max_connections_per_peer };
    let incoming = isthmus_listen::bounded(bounds, listener, telemetry::connection_refused);
    let ages = connection_ages(config.max_connection_age);
    let lanes = isthmus_listen::in_turn(incoming, ages.len(), draining.clone());
    let mut servers = JoinSet::new();
    for (age, incoming) in ages.into_iter().zip(lanes) {
        let mut server = server.clone();
        if let Some(age) = age {
            // not tonic's grace: with it, connections are cut off without having been asked to end. Streams end by themselves
            server = server.max_connection_age(age);
        }
        let router = server.add_service(health_service.clone()).add_service(reflection.clone()).add_service(older_reflection.clone());
        let router = router.add_service(offload.clone()).add_service(inference.clone());
        servers.spawn(router.serve_with_incoming_shutdown(incoming, draining.clone().cancelled_owned()));
    }
    let served = tokio::spawn(async move {
        while let Some(ended) = servers.join_next().await {
            ended.map_err(|e| ServerError::Transport(e.to_string()))?.map_err(|e| ServerError::Transport(e.to_string()))?;
        }
        Ok(())
    });
    tracing::info!(%address, admin = ?admin_address, tls = config.tls_cert.is_some(), "serving");
    let (drain_delay, drain_limit) = (config.drain_delay, config.drain_limit);
    Ok(Running { address, admin_address, pipeline, health, served, drain_delay, drain_limit, background })
}

/// Keeps gRPC health at what readiness says, until the server leaves: balancers are to pass by a server whose models were unloaded or are missing.
fn watch_readiness(pipeline: &Arc<Pipeline>, health: &HealthReporter) {
    let (mut ready, leaving, health) = (pipeline.repository.readiness(), pipeline.leaving.clone(), health.clone());
    // also what it is now
    ready.mark_changed();
    tokio::spawn(async move {
        while let Some(Ok(())) = leaving.run_until_cancelled(ready.changed()).await {
            let status = if *ready.borrow_and_update() { ServingStatus::Serving } else { ServingStatus::NotServing };
            let services =
                [<OffloadServiceServer<Offload> as NamedService>::NAME, <GrpcInferenceServiceServer<Inference> as NamedService>::NAME, ""];
            for service in services {
                health.set_service_status(service, status).await;
            }
        }
    });
}

/// Certificate, key and the clients' authority, if the configuration names any.
fn tls(config: &Config) -> Result<Option<ServerTlsConfig>, ServerError> {
    let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) else { return Ok(None) };
    let (cert, key) = (pem(cert, "CERTIFICATE")?, pem(key, "PRIVATE KEY")?);
    let mut tls = ServerTlsConfig::new().timeout(HANDSHAKE).identity(Identity::from_pem(cert, key));
    if let Some(path) = &config.tls_client_ca {
        tls = tls.client_ca_root(Certificate::from_pem(pem(path, "CERTIFICATE")?));
    }
    Ok(Some(tls))
}
