//! Network namespaces that clean up after themselves, also when this process is killed.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps them.
const FOLDER: &str = "/run/netns";
const PREFIX: &str = "isthmus";

/// A network namespace of this process's making, with loopback up.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// Deletes the namespace when its standard input closes, which happens however this process ends.
    janitor: Child,
}

/// Runs a program to its end.
///
/// # Errors
/// With what it wrote to standard error.
pub fn run(program: &str, args: &[&str]) -> io::Result<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|e| io::Error::new(e.kind(), format!("{program}: {e} (Debian: apt-get install iproute2)")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(format!("{program} {}: {why}", args.join(" "))))
}

/// Why packet-level emulation cannot work here; `None` if it can.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Some("/dev/net/tun is not there (modprobe tun)".into());
    }
    match Namespace::new("probe") {
        Ok(_) => None,
        Err(e) => Some(e.to_string()),
    }
}

impl Namespace {
    /// Makes a namespace whose name ends in `role`.
    ///
    /// # Errors
    /// If `ip` is missing or refuses (root is needed).
    pub fn new(role: &str) -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}-{}-{}-{role}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // the janitor first: nothing may be left if this process dies in between; its own session, so that
        // Ctrl-C in the terminal does not end it before its work
        let script =
            format!("cat >/dev/null; ip netns pids {name} 2>/dev/null | xargs -r kill -9 2>/dev/null; ip netns del {name} 2>/dev/null");
        let janitor = Command::new("setsid").args(["sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let janitor = janitor.map_err(|e| io::Error::new(e.kind(), format!("setsid: {e} (Debian: apt-get install util-linux)")))?;
        let namespace = Self { name, janitor };
        run("ip", &["netns", "add", &namespace.name])?;
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// With what it wrote to standard error.
    pub fn ip(&self, args: &[&str]) -> io::Result<String> {
        run("ip", &[&["-n", &self.name], args].concat())
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs `f` on a thread of its own inside the namespace; what it opens stays there.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        let file = File::open(PathBuf::from(FOLDER).join(&self.name))?;
        let inside = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok::<T, rustix::io::Errno>(f())
            });
            thread.join()
        });
        Ok(inside.map_err(|_| io::Error::other("a thread inside the namespace panicked"))??)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}
