//! Brings the parts together: listeners, health, reflection, shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isthmus_listen::Bounds;
use isthmus_proto::aggregator_v1::client_service_server::ClientServiceServer;
use isthmus_proto::aggregator_v1::peer_service_server::PeerServiceServer;
use isthmus_proto::aggregator_v1::round_service_server::RoundServiceServer;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::client_service::Clients;
use crate::config::Config;
use crate::error::AggregatorError;
use crate::party::{Clock, Party};
use crate::peer::client::MAX_MESSAGE;
use crate::peer::service::Peers;
use crate::round_service::Operators;
use crate::store::Store;
use crate::{coordinator, status};

/// A TLS handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(20);
const MAX_HEADERS: u32 = 16 << 10;
const STREAM_WINDOW: u32 = 8 << 20;
/// Of one connection of a client.
const CLIENT_STREAMS: u32 = 256;
/// A client's message: a chunk with its frame.
const CLIENT_MESSAGE: usize = (1 << 20) + (64 << 10);

/// The system's clock.
pub fn system_clock() -> Clock {
    Arc::new(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64))
}

/// A started party.
pub struct Running {
    /// Listener for clients and operators (party 0).
    pub address: Option<SocketAddr>,
    /// Listener for the other parties.
    pub peer_address: SocketAddr,
    /// Status page and metrics.
    pub admin_address: Option<SocketAddr>,
    stop: CancellationToken,
    served: Vec<JoinHandle<Result<(), AggregatorError>>>,
    drain_limit: Duration,
}

impl Running {
    /// Stops taking calls, finishes those under way for at most `drain_limit`, and ends. What is not finished is taken up at the
    /// next start.
    ///
    /// # Errors
    /// If a listener failed.
    pub async fn stop(mut self) -> Result<(), AggregatorError> {
        self.stop.cancel();
        let _ = tokio::time::timeout(self.drain_limit, self.ended()).await;
        Ok(())
    }

    /// Ends when a listener does.
    ///
    /// # Errors
    /// What made it end.
    pub async fn ended(&mut self) -> Result<(), AggregatorError> {
        let (ended, _, _) = futures_util::future::select_all(&mut self.served).await;
        ended.map_err(|e| AggregatorError::Transport(e.to_string()))?
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), AggregatorError> {
    let failed = |e: std::io::Error| AggregatorError::Transport(format!("cannot listen on {address}: {e}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_header_list_size(MAX_HEADERS)
        .tcp_nodelay(true)
}

/// Reads keys and store, binds the listeners, serves, and takes up the rounds that are under way.
///
/// # Errors
/// Names what is wrong: configuration, a file, an address in use.
pub async fn start(config: Config, store: Arc<dyn Store>, metrics: PrometheusHandle) -> Result<Running, AggregatorError> {
    config.check()?;
    let party = Party::open(config, store, system_clock()).await?;
    let config = &party.config;
    let stop = CancellationToken::new();
    tokio::spawn(isthmus_listen::admin::upkeep(metrics.clone(), stop.clone()));
    // a fleet may sit behind one address
    let bounds = Bounds { most: isthmus_listen::places(config.max_connections), each_peer: config.max_connections };
    let mut served = Vec::new();
    let identity = || Identity::from_pem(&party.keys.certificate, party.keys.tls_key.as_str());
    let tls_failed = |e: tonic::transport::Error| AggregatorError::Config(format!("keys: {e}"));

    let others: String = party.parties.iter().filter(|p| p.party != config.party).map(|p| p.certificate.as_str()).collect();
    let tls = ServerTlsConfig::new().timeout(HANDSHAKE).identity(identity()).client_ca_root(Certificate::from_pem(others));
    let peers = PeerServiceServer::new(Peers(party.clone())).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
    let (listener, peer_address) = bind(config.peer_listen).await?;
    let windows = server().initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(2 * STREAM_WINDOW);
    let router = windows.tls_config(tls).map_err(tls_failed)?.add_service(peers);
    let incoming = isthmus_listen::bounded(bounds, listener, || ());
    let stopping = stop.clone();
    served.push(tokio::spawn(async move {
        let served = router.serve_with_incoming_shutdown(incoming, stopping.cancelled_owned()).await;
        served.map_err(|e| AggregatorError::Transport(e.to_string()))
    }));

    let mut address = None;
    if config.party == 0 {
        let (listener, local) = bind(config.listen).await?;
        address = Some(local);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<ClientServiceServer<Clients>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(isthmus_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|e| AggregatorError::Transport(e.to_string()))?;
        let clients = ClientServiceServer::new(Clients::new(party.clone())).max_decoding_message_size(CLIENT_MESSAGE);
        let operators = RoundServiceServer::new(Operators(party.clone())).max_decoding_message_size(CLIENT_MESSAGE);
        let mut server = server().max_concurrent_streams(CLIENT_STREAMS);
        if !config.insecure {
            server = server.tls_config(ServerTlsConfig::new().timeout(HANDSHAKE).identity(identity())).map_err(tls_failed)?;
        }
        let router = server.add_service(health_service).add_service(reflection).add_service(clients).add_service(operators);
        let incoming = isthmus_listen::bounded(bounds, listener, || ());
        let stopping = stop.clone();
        let shutdown = async move {
            stopping.cancelled().await;
            health.set_not_serving::<ClientServiceServer<Clients>>().await;
        };
        served.push(tokio::spawn(async move {
            let served = router.serve_with_incoming_shutdown(incoming, shutdown).await;
            served.map_err(|e| AggregatorError::Transport(e.to_string()))
        }));
    }

    let mut admin_address = None;
    if let Some(wanted) = config.admin_listen {
        let (listener, local) = bind(wanted).await?;
        admin_address = Some(local);
        tokio::spawn(status::serve(listener, party.clone(), metrics, stop.clone()));
    }
    tokio::spawn(coordinator::run(party.clone(), stop.clone()));
    tracing::info!(party = config.party, clients = ?address, peers = %peer_address, admin = ?admin_address, "serving");
    Ok(Running { address, peer_address, admin_address, stop, served, drain_limit: config.drain_limit })
}
