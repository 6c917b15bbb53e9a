//! `aggregator party`.

use std::path::PathBuf;
use std::sync::Arc;

use aggregator::store::Store;
use aggregator::store::postgres::{Access, PostgresStore};
use aggregator::store::redb::RedbStore;
use aggregator::{Config, start, telemetry};
use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
pub struct Args {
    /// TOML file; configs/aggregator.toml explains every key.
    #[arg(long, env = "ISTHMUS_AGGREGATOR_CONFIG")]
    config: PathBuf,
    /// End when standard input does: for programs that start a party and must not leave one behind, however they end.
    #[arg(long)]
    while_stdin: bool,
    /// Print the configuration that would be used, and stop.
    #[arg(long)]
    print_config: bool,
    /// Ask the party that runs on this machine with this configuration whether it is ready, and stop: exit status 0 if so.
    #[arg(long, conflicts_with = "print_config")]
    probe: bool,
}

pub async fn run(args: Args) -> Result<()> {
    let config = Config::open(&args.config)?;
    if args.print_config {
        use std::io::Write;
        return Ok(std::io::stdout().write_all(toml::to_string(&config).context("configuration")?.as_bytes())?);
    }
    if args.probe {
        let admin = config.admin_listen.context("admin_listen is not set: there is nobody to ask")?;
        return isthmus_listen::admin::probe(admin).with_context(|| format!("admin listener {admin}"));
    }
    telemetry::install_logs(config.log_format);
    let metrics = telemetry::install_metrics()?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // replicas stand by here until the lease is theirs
    let store = tokio::select! {
        store = open_store(&config) => store?,
        _ = term.recv() => return Ok(()),
        _ = int.recv() => return Ok(()),
        () = input_ended(), if args.while_stdin => return Ok(()),
    };
    let mut running = start(config, store.clone(), metrics).await?;
    // for scripts that let the system choose the ports
    println!(
        "serving clients on {}, parties on {}, status on {}",
        running.address.map_or("-".into(), |a| a.to_string()),
        running.peer_address,
        running.admin_address.map_or("-".into(), |a| a.to_string())
    );
    tokio::select! {
        ended = running.ended() => return Ok(ended?),
        lost = store.lost() => return Err(lost.into()),
        _ = term.recv() => tracing::info!("SIGTERM: finishing what is in flight"),
        _ = int.recv() => tracing::info!("interrupted: finishing what is in flight"),
        () = input_ended(), if args.while_stdin => tracing::info!("standard input ended: finishing what is in flight"),
    }
    tokio::select! {
        stopped = running.stop() => stopped?,
        _ = int.recv() => anyhow::bail!("interrupted again: stopped at once"),
        _ = term.recv() => anyhow::bail!("SIGTERM again: stopped at once"),
    }
    store.release().await;
    Ok(())
}

/// The file, or the database once this replica holds its lease.
async fn open_store(config: &Config) -> Result<Arc<dyn Store>> {
    let Some(url) = &config.postgres else { return Ok(Arc::new(RedbStore::open(&config.data)?)) };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let access = Access {
        url,
        password: std::env::var("PGPASSWORD").ok(),
        authority: config.postgres_ca.as_deref(),
        insecure: config.insecure,
        owner: &format!("party {} of {}", config.party, config.task),
        replica: &format!("{} {}", host.trim(), std::process::id()),
        lease: config.lease,
    };
    Ok(Arc::new(PostgresStore::open(access).await?))
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
