//! Brings the parts together: listeners, health, reflection, shutdown.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use isthmus_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use isthmus_proto::offload_v1::offload_service_server::OffloadServiceServer;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::util::MapResponseLayer;

use crate::pipeline::Pipeline;
use crate::repository::Repository;
use crate::services::inference::Inference;
use crate::services::offload::Offload;
use crate::tenants::Tenants;
use crate::{Config, ServerError, status, telemetry};

/// A TLS handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(30);
const MAX_HEADERS: u32 = 16 << 10;
/// Of one connection.
const LEAST_STREAMS: u32 = 64;
/// Calls beside the requests in flight: health, Describe, reflection.
const SPARE_CALLS: usize = 16;

/// A started server.
pub struct Running {
    /// Address of the gRPC listener.
    pub address: SocketAddr,
    /// Address of the admin listener.
    pub admin_address: Option<SocketAddr>,
    draining: CancellationToken,
    served: JoinHandle<Result<(), ServerError>>,
    drain_limit: Duration,
    background: CancellationToken,
    idle: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Running {
    /// Stops taking requests, finishes what is in flight, and ends; at most `drain_limit` later.
    ///
    /// # Errors
    /// If the transport failed or the limit passed.
    pub async fn stop(self) -> Result<(), ServerError> {
        self.draining.cancel();
        let limit = self.drain_limit;
        let ended = tokio::time::timeout(limit, self.served).await;
        self.background.cancel();
        match ended {
            Ok(ended) => ended.map_err(|e| ServerError::Transport(e.to_string()))?,
            // health watches and idle connections have nothing to finish
            Err(_) if (self.idle)() => Ok(()),
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
    let loading = config.clone();
    // a thread of its own that ends: the OpenMP team of a living one would count against the network's, which
    // then waits passively and takes twice as long
    let (loaded, repository) = tokio::sync::oneshot::channel();
    let load = std::thread::Builder::new().name("load".into()).spawn(move || loaded.send(Repository::open(&loading)).map_err(drop));
    load.map_err(|e| ServerError::Transport(e.to_string()))?;
    let repository = repository.await.map_err(|_| ServerError::Transport("loading ended early".into()))??;
    let bind = |address: SocketAddr| async move {
        let in_use = |e: std::io::Error| ServerError::Transport(format!("cannot listen on {address}: {e}"));
        TcpListener::bind(address).await.map_err(in_use)
    };
    let listener = bind(config.listen).await?;
    let address = listener.local_addr().map_err(|e| ServerError::Transport(e.to_string()))?;
    let (draining, background) = (CancellationToken::new(), CancellationToken::new());
    tokio::spawn(isthmus_listen::admin::upkeep(metrics.clone(), background.clone()));
    let tenants = Tenants::new(&config.tenants)?;
    let pipeline = Arc::new(Pipeline::new(Arc::new(repository), &config, tenants.clone(), draining.clone()));
    let mut admin_address = None;
    if let Some(wanted) = config.admin_listen {
        let listener = bind(wanted).await?;
        admin_address = listener.local_addr().ok();
        tokio::spawn(status::serve(listener, pipeline.clone(), metrics, background.clone()));
    }
    let watched = pipeline.clone();
    let idle = Box::new(move || watched.is_idle());
    let inference = GrpcInferenceServiceServer::new(Inference::new(pipeline.clone(), &config))
        .max_decoding_message_size(config.max_request_bytes)
        .max_encoding_message_size(1 << 20);
    let offload =
        OffloadServiceServer::new(Offload(pipeline)).max_decoding_message_size(config.max_request_bytes).max_encoding_message_size(1 << 20);
    let known = tenants.clone();
    let inference = InterceptedService::new(inference, move |request| known.intercept(request));
    let offload = InterceptedService::new(offload, move |request| tenants.intercept(request));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<OffloadServiceServer<Offload>>().await;
    health.set_serving::<GrpcInferenceServiceServer<Inference>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(isthmus_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| ServerError::Transport(e.to_string()))?;
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        // until the response starts, so uploads that stall end too; streams have their own limits
        .timeout(config.max_deadline)
        // above what is taken: a call that has to wait in its client's transport for a place comes with a time limit that has
        // partly passed, which nobody here can see; better to refuse it at once
        .max_concurrent_streams(u32::try_from(2 * config.max_in_flight).unwrap_or(u32::MAX).max(LEAST_STREAMS))
        // counted before a message is read, so that half-sent ones are bounded too; refused with RESOURCE_EXHAUSTED
        .load_shed(true)
        .http2_max_header_list_size(MAX_HEADERS)
        .tcp_nodelay(true)
        .layer(MapResponseLayer::new(telemetry::call_ended))
        .layer(GlobalConcurrencyLimitLayer::new(config.max_in_flight + SPARE_CALLS));
    if let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) {
        let (cert, key) = (pem(cert, "CERTIFICATE")?, pem(key, "PRIVATE KEY")?);
        let mut tls = ServerTlsConfig::new().timeout(HANDSHAKE).identity(Identity::from_pem(cert, key));
        if let Some(path) = &config.tls_client_ca {
            tls = tls.client_ca_root(Certificate::from_pem(pem(path, "CERTIFICATE")?));
        }
        server = server.tls_config(tls).map_err(|e| ServerError::Config(format!("tls_cert, tls_key: {e}")))?;
    }
    let router = server.add_service(health_service).add_service(reflection).add_service(offload).add_service(inference);
    let stopping = draining.clone();
    let shutdown = async move {
        stopping.cancelled().await;
        // balancers look away before connections close
        health.set_not_serving::<OffloadServiceServer<Offload>>().await;
        health.set_not_serving::<GrpcInferenceServiceServer<Inference>>().await;
    };
    let incoming = isthmus_listen::at_most(config.max_connections, listener, telemetry::connection_refused);
    let served = tokio::spawn(async move {
        let served = router.serve_with_incoming_shutdown(incoming, shutdown).await;
        served.map_err(|e| ServerError::Transport(e.to_string()))
    });
    tracing::info!(%address, admin = ?admin_address, tls = config.tls_cert.is_some(), "serving");
    Ok(Running { address, admin_address, draining, served, drain_limit: config.drain_limit, background, idle })
}
