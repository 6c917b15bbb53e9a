//! Configuration: a TOML file, overridden by flags.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ServerError;
use crate::tenants::{TenantConfig, Tenants};

const MAX_COUNT: usize = 1 << 16;
const MAX_REQUEST_BYTES: usize = 256 << 20;
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Everything that can be set. configs/offload-server.toml explains each key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the gRPC listener.
    pub listen: SocketAddr,
    /// Address of the admin listener (metrics, health); none if empty.
    pub admin_listen: Option<SocketAddr>,
    /// Bundle folders, or folders of such folders, one for each version.
    pub bundles: Vec<PathBuf>,
    /// Public keys (hexadecimal) of those who sign bundles; others' are refused. Empty: all bundles are used.
    pub trusted_bundle_keys: Vec<String>,
    /// Folder with backbones (NAME.safetensors) and labels.json.
    pub backbones: PathBuf,
    /// Backbones to load; the first is the default model.
    pub models: Vec<String>,
    /// Newest versions of each model that are loaded.
    pub model_versions: usize,
    /// Allow loading and unloading of models, and log settings, over gRPC.
    pub model_control: bool,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of libtorch; 0 is one per core.
    pub network_threads: usize,
    /// Copies of each model that compute at the same time; they share the threads.
    pub instances: usize,
    /// Most requests computed together.
    pub max_batch: usize,
    /// An incomplete batch waits so long for company.
    #[serde(with = "humantime_serde")]
    pub queue_delay: Duration,
    /// Sizes at which a batch waits no longer.
    pub preferred_batch_sizes: Vec<usize>,
    /// Levels of the request parameter `priority`, 1 being the most urgent; without it a request has the middle one.
    pub priority_levels: u8,
    /// Most requests waiting for the network.
    pub max_queue: usize,
    /// Entropy and image decodings at once; 0 is one per core.
    pub decode_workers: usize,
    /// Most requests between arrival and answer.
    pub max_in_flight: usize,
    /// Most requests of one stream under way.
    pub stream_window: usize,
    /// Most open streams.
    pub max_streams: usize,
    /// Most open connections.
    pub max_connections: usize,
    /// Largest request message in bytes.
    pub max_request_bytes: usize,
    /// Deadline of requests that set none, and upper limit of those that do.
    #[serde(with = "humantime_serde")]
    pub max_deadline: Duration,
    /// A stream ends when nothing moves on it for this long.
    #[serde(with = "humantime_serde")]
    pub stream_idle: Duration,
    /// On SIGTERM, requests in flight have this long.
    #[serde(with = "humantime_serde")]
    pub drain_limit: Duration,
    /// PEM certificate chain.
    pub tls_cert: Option<PathBuf>,
    /// PEM private key.
    pub tls_key: Option<PathBuf>,
    /// PEM certificates of those who sign client certificates; every client needs one then.
    pub tls_client_ca: Option<PathBuf>,
    /// Allow listening without TLS off loopback.
    pub insecure: bool,
    /// `text` or `json`.
    pub log_format: LogFormat,
    /// Who may ask, and how much; none: everybody.
    pub tenants: Vec<TenantConfig>,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 50051),
            admin_listen: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464)),
            bundles: vec!["bundles/lite0-patch-stem".into()],
            trusted_bundle_keys: vec![],
            backbones: "data/backbones".into(),
            models: vec!["efficientnet-lite0".into()],
            model_versions: 1,
            model_control: false,
            device: "auto".into(),
            network_threads: 0,
            instances: 1,
            max_batch: 16,
            queue_delay: Duration::ZERO,
            preferred_batch_sizes: vec![],
            priority_levels: 3,
            max_queue: 256,
            decode_workers: 0,
            max_in_flight: 128,
            stream_window: 32,
            max_streams: 256,
            max_connections: 1024,
            max_request_bytes: 8 << 20,
            max_deadline: Duration::from_secs(30),
            stream_idle: Duration::from_secs(60),
            drain_limit: Duration::from_secs(20),
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
            insecure: false,
            log_format: LogFormat::Text,
            tenants: vec![],
        }
    }
}

impl Config {
    /// Reads a TOML file; missing keys keep their defaults.
    ///
    /// # Errors
    /// Names the file and the key that is wrong.
    pub fn open(path: &Path) -> Result<Self, ServerError> {
        let text = std::fs::read_to_string(path).map_err(|cause| ServerError::Io { path: path.into(), cause })?;
        toml::from_str(&text).map_err(|e| ServerError::Config(format!("{}: {e}", path.display())))
    }

    /// Checks what belongs together.
    ///
    /// # Errors
    /// [`ServerError::Config`] says what is wrong.
    pub fn check(&self) -> Result<(), ServerError> {
        let bad = |why: &str| Err(ServerError::Config(why.into()));
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return bad("tls_cert and tls_key belong together");
        }
        if self.tls_client_ca.is_some() && self.tls_cert.is_none() {
            return bad("tls_client_ca needs tls_cert and tls_key");
        }
        if self.tls_client_ca.is_none() && self.tenants.iter().any(|t| t.certificate_sha256.is_some()) {
            return bad("tenants: certificate_sha256 needs tls_client_ca");
        }
        Tenants::new(&self.tenants)?;
        if !self.listen.ip().is_loopback() && self.tls_cert.is_none() && !self.insecure {
            return bad("listening off loopback needs tls_cert and tls_key (or insecure = true on a network you trust)");
        }
        if self.models.is_empty() {
            return bad("models: at least one is needed");
        }
        if !(1..=16).contains(&self.model_versions) {
            return bad("model_versions: 1 to 16");
        }
        if !(1..=64).contains(&self.instances) || self.instances > self.network_threads() {
            return bad("instances: 1 to 64, and at most one for each of network_threads");
        }
        if self.queue_delay > Duration::from_secs(10) || self.queue_delay >= self.max_deadline {
            return bad("queue_delay: at most 10 s, and below max_deadline");
        }
        if self.preferred_batch_sizes.iter().any(|n| *n == 0 || *n > self.max_batch) {
            return bad("preferred_batch_sizes: from 1 to max_batch");
        }
        if !(1..=16).contains(&self.priority_levels) {
            return bad("priority_levels: 1 to 16");
        }
        let positive = [self.max_batch, self.max_queue, self.max_in_flight, self.stream_window, self.max_streams, self.max_connections];
        if positive.contains(&0) || self.max_request_bytes < 1024 {
            return bad(
                "max_batch, max_queue, max_in_flight, stream_window, max_streams and max_connections must be positive, max_request_bytes at least 1024",
            );
        }
        if positive.iter().chain([&self.decode_workers, &self.network_threads]).any(|&n| n > MAX_COUNT)
            || self.max_request_bytes > MAX_REQUEST_BYTES
        {
            return bad("counts are at most 65536, max_request_bytes at most 256 MiB");
        }
        let limits = [self.max_deadline, self.stream_idle, self.drain_limit];
        if limits.iter().any(|d| d.is_zero() || *d > MAX_WAIT) {
            return bad("max_deadline, stream_idle and drain_limit must be positive and at most a day");
        }
        Ok(())
    }

    /// Decode workers, resolved.
    pub fn decode_workers(&self) -> usize {
        if self.decode_workers > 0 { self.decode_workers } else { cores() }
    }

    /// libtorch threads, resolved.
    pub fn network_threads(&self) -> usize {
        if self.network_threads > 0 { self.network_threads } else { cores() }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
