//! `offload-server`: decodes bitstreams into a backbone's features and finishes the job.

mod memory;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use isthmus_nets::process::{BOUNDED_SPINNING, REUSED_HEAP, with_environment};
use isthmus_traces::Traces;
use offload_server::{Config, start, telemetry};
use tokio::signal::unix::{SignalKind, signal};

/// Answers bitstreams of edge clients (and whole images) over gRPC.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// TOML file; environment variables (ISTHMUS_SERVER_KEY, as ISTHMUS_SERVER_MAX_BATCH=8) override it, and flags those. configs/offload-server.toml explains every key.
    #[arg(long, env = "ISTHMUS_CONFIG")]
    config: Option<PathBuf>,
    /// Address of the gRPC listener.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// Address of the admin listener (metrics, health), or none.
    #[arg(long)]
    admin_listen: Option<Address>,
    /// Bundle folder; may be given several times.
    #[arg(long)]
    bundle: Vec<PathBuf>,
    /// Folder with NAME.safetensors and labels.json.
    #[arg(long)]
    backbones: Option<PathBuf>,
    /// Backbone to load; may be given several times, the first is the default.
    #[arg(long)]
    model: Vec<String>,
    /// auto, cpu or cuda:N.
    #[arg(long)]
    device: Option<String>,
    /// Threads of libtorch.
    #[arg(long)]
    threads: Option<usize>,
    /// Most requests computed together.
    #[arg(long)]
    max_batch: Option<usize>,
    /// PEM certificate chain.
    #[arg(long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM private key.
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Allow listening without TLS off loopback.
    #[arg(long)]
    insecure: bool,
    /// End when standard input does: for programs that start a server and must not leave one behind, however they end.
    #[arg(long)]
    while_stdin: bool,
    /// Print the configuration that would be used, and stop.
    #[arg(long)]
    print_config: bool,
    /// Print what each layer of the models costs on this machine (multiply-accumulates, bytes, roofline), and stop.
    #[arg(long, conflicts_with = "print_config")]
    profile: bool,
    /// Ask the server that runs on this machine with this configuration whether it is ready, and stop: exit status 0 if so.
    #[arg(long, conflicts_with_all = ["print_config", "profile"])]
    probe: bool,
}

impl Cli {
    fn config(self) -> Result<(Config, Instead, bool)> {
        let mut c = match &self.config {
            Some(path) => Config::open(path)?,
            None => Config::default(),
        };
        // variables that are not UTF-8 are none of ours
        c = c.with_environment(std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))))?;
        fn set<T>(target: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *target = value;
            }
        }
        set(&mut c.listen, self.listen);
        set(&mut c.admin_listen, self.admin_listen.map(|a| a.0));
        set(&mut c.bundles, (!self.bundle.is_empty()).then_some(self.bundle));
        set(&mut c.backbones, self.backbones);
        set(&mut c.models, (!self.model.is_empty()).then_some(self.model));
        set(&mut c.device, self.device);
        set(&mut c.network_threads, self.threads);
        set(&mut c.max_batch, self.max_batch);
        set(&mut c.tls_cert, self.tls_cert.map(Some));
        set(&mut c.tls_key, self.tls_key.map(Some));
        c.insecure |= self.insecure;
        c.check()?;
        let instead = match (self.print_config, self.profile, self.probe) {
            (true, ..) => Instead::Configuration,
            (_, true, _) => Instead::Profile,
            (.., true) => Instead::Probe,
            _ => Instead::Nothing,
        };
        Ok((c, instead, self.while_stdin))
    }
}

/// An address, or none.
#[derive(Clone, Copy)]
struct Address(Option<SocketAddr>);

impl std::str::FromStr for Address {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|address| Self(Some(address))) }
    }
}

/// What to do instead of serving.
enum Instead {
    Nothing,
    Configuration,
    Profile,
    Probe,
}

fn main() {
    let done = with_environment(&[BOUNDED_SPINNING, REUSED_HEAP]).map_err(anyhow::Error::from).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let done = runtime.block_on(run());
        // threads that read from a file system that hangs, say, are not waited for
        runtime.shutdown_background();
        done
    });
    if let Err(e) = &done {
        let _ = writeln!(std::io::stderr(), "offload-server: {e:#}");
    }
    let _ = std::io::stdout().flush();
    // at once: libtorch takes itself apart in destructors, which fail where a thread still computes
    signal_hook::low_level::exit(i32::from(done.is_err()))
}

async fn run() -> Result<()> {
    let (config, instead, while_stdin) = Cli::parse().config()?;
    let text = match instead {
        Instead::Nothing => None,
        Instead::Configuration => Some(toml::to_string(&config).context("configuration")?),
        Instead::Profile => Some(offload_server::profile::report(&config)?),
        Instead::Probe => {
            let admin = config.admin_listen.context("admin_listen is not set: there is nobody to ask")?;
            isthmus_listen::admin::probe(admin).with_context(|| format!("admin listener {admin}"))?;
            Some("ready\n".into())
        }
    };
    if let Some(text) = text {
        return Ok(std::io::stdout().write_all(text.as_bytes())?);
    }
    let traces = Traces::from_environment("offload-server")?;
    telemetry::install_logs(config.log_format, traces.as_ref())?;
    let metrics = telemetry::install_metrics()?;
    tokio::spawn(memory::watch());
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let input_end = tokio::spawn(async move {
        if !while_stdin {
            std::future::pending::<()>().await;
        }
        input_ended().await;
    });
    tokio::pin!(input_end);
    let mut running = tokio::select! {
        started = start(config, metrics) => started?,
        _ = term.recv() => return stopped_before("SIGTERM"),
        _ = int.recv() => return stopped_before("interrupted"),
        _ = &mut input_end => return stopped_before("standard input ended"),
    };
    // for scripts that let the system choose the port
    if let Err(error) = writeln!(std::io::stdout(), "listening on {}", running.address) {
        tracing::warn!(%error, address = %running.address, "standard output cannot be written; the address is here");
    }
    tokio::select! {
        ended = running.ended() => return Ok(ended?),
        _ = term.recv() => tracing::info!("SIGTERM: finishing what is in flight"),
        _ = &mut input_end => tracing::info!("standard input ended: finishing what is in flight"),
        _ = int.recv() => tracing::info!("interrupted: finishing what is in flight"),
    }
    tokio::select! {
        stopped = running.stop() => stopped?,
        _ = int.recv() => anyhow::bail!("interrupted again: stopped at once"),
        _ = term.recv() => anyhow::bail!("SIGTERM again: stopped at once"),
    }
    tracing::info!("stopped");
    Ok(())
}

/// Nothing was in flight: there is nothing to finish.
fn stopped_before(why: &str) -> Result<()> {
    tracing::info!("{why}: stopped before the models were loaded");
    Ok(())
}

/// Waits for the end of standard input, on a thread that nobody joins: reading cannot be cancelled.
async fn input_ended() {
    let (ended, wait) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        ended.send(())
    });
    let _ = wait.await;
}
