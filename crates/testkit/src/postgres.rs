//! A database server of the test's own, from Debian's postgresql.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::free_port;

const LIMIT: Duration = Duration::from_secs(60);

/// A PostgreSQL server on a loopback port; it ends with this value.
pub struct Postgres {
    server: Child,
    port: u16,
    programs: PathBuf,
    _folder: tempfile::TempDir,
}

/// The newest installed server's programs.
fn programs() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql").ok()?.filter_map(|e| Some(e.ok()?.path().join("bin"))).collect();
    found.sort();
    found.into_iter().rfind(|p| p.join("postgres").exists())
}

/// The account that Debian's package makes: the server refuses to run as root.
fn account() -> Option<(u32, u32)> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    let mut fields = passwd.lines().find(|l| l.starts_with("postgres:"))?.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

impl Postgres {
    /// Starts a server with an empty database `postgres`; `None` if none is installed.
    ///
    /// # Panics
    /// If it is installed and does not start.
    pub fn start() -> Option<Self> {
        Self::with(None)
    }

    /// As [`Postgres::start`], with TLS demanded: PEM of certificate and key.
    ///
    /// # Panics
    /// If it is installed and does not start.
    pub fn with_tls(certificate: &str, key: &str) -> Option<Self> {
        Self::with(Some([("server.crt", certificate), ("server.key", key)]))
    }

    fn with(tls: Option<[(&str, &str); 2]>) -> Option<Self> {
        let (programs, (user, group)) = (programs()?, account()?);
        let folder = tempfile::tempdir().expect("temporary folder");
        let data = folder.path().join("data");
        std::fs::create_dir(&data).expect("data folder");
        let root = std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
        let program = |name: &str| {
            let path = programs.join(name);
            if !root {
                return Command::new(path);
            }
            let mut command = Command::new("setpriv");
            command.args([&format!("--reuid={user}"), &format!("--regid={group}"), "--clear-groups", "--"]).arg(path).current_dir("/");
            command
        };
        if root {
            for path in [folder.path(), &data] {
                chown(path, Some(user), Some(group)).expect("chown");
            }
        }
        let mut init = program("initdb");
        init.arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]);
        let init = init.stdout(Stdio::null()).status();
        assert!(init.is_ok_and(|s| s.success()), "initdb failed; its message is above");
        let port = free_port().port();
        for (name, text) in tls.iter().flatten() {
            let path = data.join(name);
            std::fs::write(&path, text).expect("a file of the server");
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("permissions");
            if root {
                chown(&path, Some(user), Some(group)).expect("chown");
            }
        }
        if tls.is_some() {
            // nothing but TLS over TCP
            std::fs::write(data.join("pg_hba.conf"), "hostssl all all all trust\n").expect("pg_hba.conf");
        }
        let mut server = program("postgres");
        server.args(if tls.is_some() { &["-c", "ssl=on"][..] } else { &[] });
        server.arg("-D").arg(&data).args(["-h", "127.0.0.1", "-p", &port.to_string(), "-c", "fsync=off"]);
        server.arg("-k").arg(folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = server.spawn().expect("postgres starts");
        let this = Self { server, port, programs: programs.clone(), _folder: folder };
        let began = Instant::now();
        while !this.psql("postgres", "select 1") {
            assert!(began.elapsed() < LIMIT, "the database server does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(this)
    }

    /// Makes a database and gives its URL.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn database(&self, name: &str) -> String {
        assert!(self.psql("postgres", &format!("create database {name}")), "create database {name}");
        format!("postgres://postgres@127.0.0.1:{}/{name}", self.port)
    }

    /// Runs a statement; false if it fails.
    pub fn psql(&self, database: &str, statement: &str) -> bool {
        let mut command = Command::new(Path::new(&self.programs).join("psql"));
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", "postgres", "-d", database, "-qtAc", statement]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGINT: connections are closed, the server's children end too
        let _ = Command::new("kill").args(["-INT", &self.server.id().to_string()]).status();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) && matches!(self.server.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
