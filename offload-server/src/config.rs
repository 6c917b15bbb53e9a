//! Configuration: a TOML file, overridden by the environment, overridden by flags.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use isthmus_codec::Trust;
use isthmus_nets::BackboneKind;
use serde::{Deserialize, Serialize};

use crate::ServerError;
use crate::placement::Placement;
use crate::tenants::{Capacity, TenantConfig, Tenants};

/// What the names of environment variables begin with.
const ENVIRONMENT: &str = "ISTHMUS_SERVER_";
const MAX_BATCH: usize = 1024;
const LEAST_TIME: Duration = Duration::from_millis(1);
const MAX_COUNT: usize = 1 << 16;
const MAX_RECEIVED: usize = 64 << 30;
/// Threads for each core: more only wait for each other.
const MOST_THREADS: usize = 16;
const LEAST_IMAGE: u64 = 4096;
const MAX_MESSAGE_BYTES: usize = 256 << 20;
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Everything that can be set. configs/offload-server.toml explains each key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the gRPC listener.
    pub listen: SocketAddr,
    /// Address of the admin listener (metrics, health), or `none`.
    #[serde(with = "address_or_none")]
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
    /// Where copies of models run; none: as `device` and `instances` say.
    pub placements: Vec<Placement>,
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
    /// Most predicted work waiting for it.
    #[serde(with = "humantime_serde")]
    pub max_queue_cost: Duration,
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
    /// Of them, from one address (a proxy has one for all its clients).
    pub max_connections_per_peer: usize,
    /// Most bytes of messages that are being received, or are answered one by one.
    pub max_received_bytes: usize,
    /// Largest request message in bytes.
    pub max_request_bytes: usize,
    /// Largest message of a stream of requests in bytes.
    pub max_stream_message_bytes: usize,
    /// Largest image in pixels, whatever its file's size: decoding takes up to 11 bytes for each.
    pub max_image_pixels: u64,
    /// Largest answer in bytes.
    pub max_response_bytes: usize,
    /// Deadline of requests that set none, and upper limit of those that do.
    #[serde(with = "humantime_serde")]
    pub max_deadline: Duration,
    /// A stream ends when nothing moves on it for this long.
    #[serde(with = "humantime_serde")]
    pub stream_idle: Duration,
    /// A connection that was silent for so long is asked whether it is still there.
    #[serde(with = "humantime_serde")]
    pub keepalive_interval: Duration,
    /// It is closed if it does not answer for so long.
    #[serde(with = "humantime_serde")]
    pub keepalive_timeout: Duration,
    /// A connection is asked to end after about this long (spread by a tenth either way), so that clients spread over a fleet that grew;
    /// zero: never.
    #[serde(with = "humantime_serde")]
    pub max_connection_age: Duration,
    /// On SIGTERM, health says no for this long before connections are asked to end: balancers look elsewhere meanwhile.
    #[serde(with = "humantime_serde")]
    pub drain_delay: Duration,
    /// Requests in flight have this long afterwards.
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
            placements: vec![],
            max_batch: 8,
            queue_delay: Duration::ZERO,
            preferred_batch_sizes: vec![],
            priority_levels: 3,
            max_queue: 256,
            max_queue_cost: Duration::from_secs(30),
            decode_workers: 0,
            max_in_flight: 128,
            stream_window: 32,
            max_streams: 256,
            max_connections: 1024,
            max_connections_per_peer: 512,
            max_received_bytes: 256 << 20,
            max_request_bytes: 8 << 20,
            max_stream_message_bytes: 2 << 20,
            max_image_pixels: 16 << 20,
            max_response_bytes: 1 << 20,
            max_deadline: Duration::from_secs(30),
            stream_idle: Duration::from_secs(60),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(20),
            max_connection_age: Duration::ZERO,
            drain_delay: Duration::ZERO,
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

    /// Overrides keys by environment variables: `ISTHMUS_SERVER_` and the key in capitals, with a value as in the file (strings without quotes too). Empty ones are as good
    /// as none: that is what Compose and shells make of a variable that is not set.
    ///
    /// # Errors
    /// Names the variable that is wrong.
    pub fn with_environment(self, variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, ServerError> {
        let failed = |e: toml::ser::Error| ServerError::Config(e.to_string());
        let mut config = self;
        for (name, value) in variables {
            let Some(key) = name.strip_prefix(ENVIRONMENT).filter(|_| !value.is_empty()) else { continue };
            let parsed = toml::from_str::<toml::Table>(&format!("value = {value}")).ok().and_then(|mut t| t.remove("value"));
            let mut table = toml::Table::try_from(&config).map_err(failed)?;
            table.insert(key.to_lowercase(), parsed.unwrap_or(toml::Value::String(value)));
            config = table.try_into().map_err(|e| ServerError::Config(format!("{name}: {}", e.to_string().trim())))?;
        }
        Ok(config)
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
        Tenants::new(&self.tenants, Capacity::of(self))?;
        if let Some(t) = self.tenants.iter().find(|t| t.most_urgent.is_some_and(|most| most > self.priority_levels)) {
            return bad(&format!("tenant {:?}: most_urgent is at most priority_levels, {}", t.name, self.priority_levels));
        }
        for model in &self.models {
            crate::placement::instances(self, model)?;
        }
        if !self.listen.ip().is_loopback() && self.tls_cert.is_none() && !self.insecure {
            return bad("listening off loopback needs tls_cert and tls_key (or insecure = true on a network you trust)");
        }
        if self.admin_listen == Some(self.listen) && self.listen.port() != 0 {
            return bad("listen and admin_listen are the same address");
        }
        if self.models.is_empty() {
            return bad("models: at least one is needed");
        }
        if let Some(model) = self.models.iter().enumerate().find(|(i, m)| self.models[..*i].contains(m)) {
            return bad(&format!("models: {:?} is named twice", model.1));
        }
        if let Some(model) = self.models.iter().find(|m| BackboneKind::from_name(m).is_none()) {
            let known = BackboneKind::ALL.map(BackboneKind::name).join(", ");
            return bad(&format!("models: {model:?} is unknown; known: {known}"));
        }
        Trust::keys(self.trusted_bundle_keys.iter().map(String::as_str))
            .map_err(|e| ServerError::Config(format!("trusted_bundle_keys: {e}")))?;
        if !(1..=16).contains(&self.model_versions) {
            return bad("model_versions: 1 to 16");
        }
        if !(1..=64).contains(&self.instances) || self.instances > self.network_threads() {
            return bad("instances: 1 to 64, and at most one for each of network_threads");
        }
        let too_many = |p: &Placement| !(1..=64).contains(&p.instances) || p.threads > self.network_threads();
        if self.placements.iter().any(too_many) {
            return bad("placements: instances from 1 to 64, threads at most network_threads");
        }
        if let Some(model) = self.placements.iter().filter_map(|p| p.model.as_ref()).find(|m| BackboneKind::from_name(m).is_none()) {
            return bad(&format!("placements: model {model:?} is unknown"));
        }
        if let Some(model) =
            self.placements.iter().filter_map(|p| p.model.as_ref()).find(|m| !self.model_control && !self.models.contains(m))
        {
            return bad(&format!("placements: model {model:?} is not among models, and nobody can load it without model_control"));
        }
        if self.queue_delay > Duration::from_secs(10) || (self.queue_delay >= self.max_deadline && !self.max_deadline.is_zero()) {
            return bad("queue_delay: at most 10 s, and below max_deadline");
        }
        if self.preferred_batch_sizes.iter().any(|n| *n == 0 || *n > self.max_batch) {
            return bad("preferred_batch_sizes: from 1 to max_batch");
        }
        if self.max_batch > MAX_BATCH {
            return bad(&format!("max_batch: at most {MAX_BATCH}; a photo of a batch takes some 20 MB while it is computed"));
        }
        if [self.max_deadline, self.keepalive_timeout].iter().any(|d| *d < LEAST_TIME) {
            return bad("max_deadline and keepalive_timeout: at least 1ms");
        }
        if !(1..=16).contains(&self.priority_levels) {
            return bad("priority_levels: 1 to 16");
        }
        let connections = [self.max_connections, self.max_connections_per_peer];
        let positive = [self.max_batch, self.max_queue, self.max_in_flight, self.stream_window, self.max_streams];
        let positive = [&positive[..], &connections].concat();
        if positive.contains(&0) {
            let names = "max_batch, max_queue, max_in_flight, stream_window, max_streams, max_connections and max_connections_per_peer";
            return bad(&format!("{names} must be positive"));
        }
        if positive.iter().chain([&self.decode_workers, &self.network_threads]).any(|&n| n > MAX_COUNT) {
            return bad("counts are at most 65536");
        }
        let cores = cores();
        if self.network_threads() > MOST_THREADS * cores || self.decode_workers() > MOST_THREADS * cores {
            return bad(&format!("network_threads and decode_workers: at most {MOST_THREADS} for each of the {cores} cores"));
        }
        if self.max_image_pixels < LEAST_IMAGE {
            return bad("max_image_pixels: at least 4096");
        }
        if self.max_received_bytes < 2 * self.max_request_bytes.max(self.max_stream_message_bytes) || self.max_received_bytes > MAX_RECEIVED
        {
            return bad("max_received_bytes: at least twice the largest message, at most 64 GiB");
        }
        let sizes = [self.max_request_bytes, self.max_stream_message_bytes, self.max_response_bytes];
        if sizes.iter().any(|n| !(1024..=MAX_MESSAGE_BYTES).contains(n)) {
            return bad("max_request_bytes, max_stream_message_bytes and max_response_bytes: from 1024 to 256 MiB");
        }
        if !self.max_connection_age.is_zero() && self.max_connection_age < Duration::from_secs(1) {
            return bad("max_connection_age: 0 for none, or at least a second");
        }
        if self.drain_delay > MAX_WAIT || self.max_connection_age > MAX_WAIT {
            return bad("drain_delay and max_connection_age are at most a day");
        }
        let limits =
            [self.max_deadline, self.stream_idle, self.drain_limit, self.max_queue_cost, self.keepalive_interval, self.keepalive_timeout];
        if limits.iter().any(|d| d.is_zero() || *d > MAX_WAIT) {
            return bad(
                "max_deadline, stream_idle, drain_limit, max_queue_cost, keepalive_interval and keepalive_timeout must be positive and at most a day",
            );
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

/// An address, or the word `none`: a key that is left out keeps its default.
mod address_or_none {
    use std::net::SocketAddr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    const NONE: &str = "none";

    pub fn serialize<S: Serializer>(address: &Option<SocketAddr>, serializer: S) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => serializer.collect_str(address),
            None => serializer.serialize_str(NONE),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == NONE {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|_| D::Error::custom(format!("{text:?} is neither ADDRESS:PORT nor \"none\"")))
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
