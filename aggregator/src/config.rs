//! Configuration of a party: a TOML file.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::AggregatorError;

const MAX_WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Everything that can be set. configs/aggregator.toml explains each key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the task; the same at all parties.
    pub task: String,
    /// Which of the parties this is: 0, 1 or 2.
    pub party: u8,
    /// Listener for clients and operators (party 0).
    pub listen: SocketAddr,
    /// Listener for the other parties.
    pub peer_listen: SocketAddr,
    /// Status page and metrics; none if empty.
    pub admin_listen: Option<SocketAddr>,
    /// This party's store, if it is a file.
    pub data: PathBuf,
    /// This party's store, if it is a PostgreSQL database: URL without a password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgres: Option<String>,
    /// PEM of the authority of the database's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgres_ca: Option<PathBuf>,
    /// With a database: another replica takes over so long after this one was last heard.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// Folder with this party's keys.
    pub keys: PathBuf,
    /// Public descriptions of all parties, in order.
    pub parties: Vec<PathBuf>,
    /// Public keys of the authorities that enrol clients, in hexadecimal digits.
    pub authorities: Vec<String>,
    /// Clients that no longer count, by public key.
    pub revoked: Vec<String>,
    /// SHA-256 of operators' tokens.
    pub operators: Vec<String>,
    /// A round with fewer clients is never opened.
    pub min_clients: u32,
    /// Largest round.
    pub max_clients: u32,
    /// Longest update.
    pub max_dim: u32,
    /// Most rounds that are neither done nor aborted.
    pub max_rounds: usize,
    /// Most open connections of each listener.
    pub max_connections: usize,
    /// Bodies that are being received, together, in bytes.
    pub max_upload_bytes: usize,
    /// A client that sends nothing for so long is given up.
    #[serde(with = "humantime_serde")]
    pub upload_idle: Duration,
    /// Uploads that a client may begin in a minute.
    pub uploads_per_minute: u32,
    /// Answers of other parties take at most so long.
    #[serde(with = "humantime_serde")]
    pub peer_timeout: Duration,
    /// On SIGTERM, calls in flight have this long.
    #[serde(with = "humantime_serde")]
    pub drain_limit: Duration,
    /// Allow clients without TLS, on a network you trust.
    pub insecure: bool,
    /// `text` or `json`.
    pub log_format: LogFormat,
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
        let local = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        Self {
            task: "example".into(),
            party: 0,
            listen: local(50061),
            peer_listen: local(50071),
            admin_listen: Some(local(9465)),
            data: "party0.redb".into(),
            postgres: None,
            postgres_ca: None,
            lease: Duration::from_secs(10),
            keys: "keys".into(),
            parties: ["party0.toml", "party1.toml", "party2.toml"].map(PathBuf::from).to_vec(),
            authorities: vec![],
            revoked: vec![],
            operators: vec![],
            min_clients: 10,
            max_clients: 10_000,
            max_dim: 1 << 26,
            max_rounds: 4,
            max_connections: 4096,
            max_upload_bytes: 256 << 20,
            upload_idle: Duration::from_secs(10),
            uploads_per_minute: 30,
            peer_timeout: Duration::from_secs(10),
            drain_limit: Duration::from_secs(10),
            insecure: false,
            log_format: LogFormat::Text,
        }
    }
}

impl Config {
    /// Reads a TOML file; paths in it are relative to its folder, missing keys keep their defaults.
    ///
    /// # Errors
    /// Names the file and the key that is wrong.
    pub fn open(path: &Path) -> Result<Self, AggregatorError> {
        let text = std::fs::read_to_string(path).map_err(|cause| AggregatorError::Io { path: path.into(), cause })?;
        let mut config: Self = toml::from_str(&text).map_err(|e| AggregatorError::Config(format!("{}: {e}", path.display())))?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        for relative in [&mut config.data, &mut config.keys].into_iter().chain(&mut config.parties).chain(&mut config.postgres_ca) {
            *relative = folder.join(&*relative);
        }
        config.check()?;
        Ok(config)
    }

    /// Checks what belongs together.
    ///
    /// # Errors
    /// [`AggregatorError::Config`] says what is wrong.
    pub fn check(&self) -> Result<(), AggregatorError> {
        let bad = |why: &str| Err(AggregatorError::Config(why.into()));
        if self.party > 2 {
            return bad("party: 0, 1 or 2");
        }
        if !(2..=3).contains(&self.parties.len()) || usize::from(self.party) >= self.parties.len() {
            return bad("parties: the descriptions of all three parties in order (two, if every round is MODE_ADDITIVE_2)");
        }
        if self.authorities.is_empty() {
            return bad("authorities: at least one (`aggregator keys authority` makes one)");
        }
        if self.party == 0 && self.operators.is_empty() {
            return bad("operators: party 0 needs the SHA-256 of at least one token (`aggregator keys operator` makes one)");
        }
        if self.min_clients < 2 || self.min_clients > self.max_clients || self.max_clients > isthmus_federate::round::MAX_CLIENTS {
            return bad("2 <= min_clients <= max_clients <= 131072");
        }
        if self.max_rounds == 0 || self.max_connections == 0 || self.uploads_per_minute == 0 || self.max_upload_bytes < 1 << 20 {
            return bad("max_rounds, max_connections and uploads_per_minute must be positive, max_upload_bytes at least 1 MiB");
        }
        if [self.upload_idle, self.peer_timeout, self.drain_limit].iter().any(|d| d.is_zero() || *d > MAX_WAIT) {
            return bad("upload_idle, peer_timeout and drain_limit must be positive and at most a week");
        }
        if self.lease < Duration::from_secs(1) || self.lease > Duration::from_secs(300) {
            return bad("lease: from 1s to 5m");
        }
        if self.postgres_ca.is_some() && self.postgres.is_none() {
            return bad("postgres_ca is of use with postgres only");
        }
        Ok(())
    }
}
