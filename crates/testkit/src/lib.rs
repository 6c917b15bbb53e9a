//! Helpers of the tests: where things are, child processes that end with the test, free ports.
//!
//! A helper that lacks what it needs panics with what to do: a test must not pass because it could not run.

pub mod browser;
mod envoy;
mod pki;
mod postgres;
mod specification;

pub use envoy::Envoy;
pub use pki::{Authority, Signed};
pub use postgres::Postgres;
pub use specification::check_metrics;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository's root exists")
}

/// Says that a test cannot run here. Under `CI` that is a failure: what guards the product must have what it needs.
///
/// # Panics
/// If the environment variable `CI` is set.
pub fn skipped(what: &str) {
    assert!(std::env::var_os("CI").is_none(), "cannot run, and CI must not skip it: {what}");
    eprintln!("SKIPPED: {what}");
}

/// Folder of an unpacked third-party package.
pub fn third_party(package: &str) -> PathBuf {
    let folder = root().join("third_party").join(package);
    assert!(folder.exists(), "{} is missing: run `make setup`", folder.display());
    folder.canonicalize().expect("checked above")
}

/// Folder with imported backbones and labels.
pub fn backbones() -> PathBuf {
    let folder = root().join("data/backbones");
    assert!(folder.join("labels.json").exists(), "{} is missing: run `make setup`", folder.display());
    folder
}

/// The default bundle.
pub fn bundle() -> PathBuf {
    root().join("bundles/lite0-patch-stem")
}

/// The 20 ImageNet photos of foolbox, in order of name.
pub fn demo_photos() -> Vec<PathBuf> {
    let folder = third_party("foolbox").join("foolbox/data");
    let entries = std::fs::read_dir(folder).expect("foolbox/data");
    let mut files: Vec<PathBuf> = entries.filter_map(Result::ok).map(|e| e.path()).collect();
    files.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("imagenet_")));
    files.sort();
    assert_eq!(files.len(), 20, "foolbox holds 20 ImageNet photos");
    files
}

/// The first file with this extension below `folder`.
pub fn find_file(folder: &Path, extension: &str) -> PathBuf {
    let mut pending = vec![folder.to_path_buf()];
    while let Some(next) = pending.pop() {
        for entry in std::fs::read_dir(&next).expect("readable folder").filter_map(Result::ok) {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                return path;
            }
        }
    }
    panic!("no .{extension} file below {}", folder.display());
}

/// Path of a binary of this workspace, built up to date in the profile of the running test.
pub fn binary(package: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let target = std::env::current_exe().expect("test binary");
    let profile = target.ancestors().find(|p| p.ends_with("deps")).and_then(Path::parent).expect("target folder");
    BUILT.get_or_init(|| {
        // the whole workspace, as `make build` does: another selection would compile other features
        if std::env::var_os("ISTHMUS_BINARIES").is_some_and(|v| v == "built") {
            return; // `make test` has just built them
        }
        let release: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo).args(["build", "--workspace"]).args(release).current_dir(root()).status();
        assert!(status.is_ok_and(|s| s.success()), "cargo build --workspace failed");
    });
    profile.join(package)
}

/// A child process that is killed when dropped.
pub struct Process {
    child: Child,
}

impl From<Child> for Process {
    fn from(child: Child) -> Self {
        Self { child }
    }
}

impl Process {
    /// Starts a program and waits for the first line that it prints; its errors go to the test's.
    pub fn spawn(command: &mut Command) -> (Self, String) {
        let (process, line) = Self::start(command);
        (process, line.expect("the program says that it is ready (its error is above)"))
    }

    /// Starts a program and waits for the first line that it prints, `None` if it ends without one.
    pub fn start(command: &mut Command) -> (Self, Option<String>) {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("piped");
        let process = Self { child };
        let mut lines = BufReader::new(stdout).lines();
        let line = lines.next().and_then(Result::ok);
        // a program that prints more must not find its standard output closed
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        (process, line)
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name, for example `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(status.is_ok_and(|s| s.success()), "kill -{name} {}", self.id());
    }

    /// Waits at most `limit` for the end; the exit code, or `None` if killed by a signal.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < limit {
            if let Some(status) = self.child.try_wait().expect("child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("process {} still runs after {limit:?}", self.id());
    }

    /// Memory in kB under `key` of /proc/PID/status, for example `VmHWM`.
    pub fn memory_kb(&self, key: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("process status");
        let line = text.lines().find(|l| l.starts_with(key)).expect("key in process status");
        line.split_whitespace().nth(1).and_then(|v| v.parse().ok()).expect("a number of kB")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running offload-server on ports of the system's choice.
pub struct Server {
    /// The process.
    pub process: Process,
    /// gRPC address.
    pub address: SocketAddr,
    /// Admin address.
    pub admin: SocketAddr,
}

impl Server {
    /// Starts the real binary with the default bundle and `extra` flags, and waits until it serves.
    pub fn start(extra: &[&str]) -> Self {
        let admin = free_port();
        let mut command = Command::new(binary("offload-server"));
        command.arg("--bundle").arg(bundle()).args(extra);
        Self::spawn(&mut command, admin, &backbones())
    }

    /// As [`Server::start`], with the bundles and whatever else a configuration file names, and these backbones.
    pub fn configured(config: &Path, backbones: &Path) -> Self {
        let mut command = Command::new(binary("offload-server"));
        Self::spawn(command.arg("--config").arg(config), free_port(), backbones)
    }

    /// As [`Server::configured`] with the repository's backbones and these environment variables.
    pub fn with_environment(config: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(binary("offload-server"));
        command.arg("--config").arg(config).envs(variables.iter().copied());
        Self::spawn(&mut command, free_port(), &backbones())
    }

    fn spawn(command: &mut Command, admin: SocketAddr, backbones: &Path) -> Self {
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", &admin.to_string()]).arg("--backbones").arg(backbones);
        let (process, line) = Process::spawn(command);
        let address = line.strip_prefix("listening on ").and_then(|a| a.parse().ok()).expect("an address");
        Self { process, address, admin }
    }

    /// URL for clients.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The metrics page.
    pub fn metrics(&self) -> String {
        http_get(self.admin, "/metrics")
    }
}

/// A free loopback port that nothing is given by the system.
///
/// Below the ephemeral ports, which start at 32768: one of those, free a moment ago, may by now be another test's or the
/// source of a connection.
pub fn free_port() -> SocketAddr {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    (0..PORTS)
        .map(|_| std::process::id().wrapping_mul(61).wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % PORTS)
        .map(|port| SocketAddr::from(([127, 0, 0, 1], 10_000 + port as u16)))
        .find(|address| std::net::TcpListener::bind(address).is_ok())
        .expect("a free port")
}

/// Ports that [`free_port`] chooses from.
const PORTS: u32 = 20_000;

/// Body of a plain HTTP GET.
///
/// # Panics
/// If it does not succeed.
pub fn http_get(address: SocketAddr, path: &str) -> String {
    http_body(address, path).expect("an answer of the admin listener")
}

/// As [`http_get`], or `None` if it does not succeed.
pub fn http_body(address: SocketAddr, path: &str) -> Option<String> {
    use std::io::{Read, Write};
    let limit = Duration::from_secs(5);
    let mut stream = std::net::TcpStream::connect_timeout(&address, limit).ok()?;
    stream.set_read_timeout(Some(limit)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
}
