//! `aggregator local`: three parties on this machine.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use aggregator::local::{Trial, set_up};
use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
pub struct Args {
    /// Folder for keys, configurations and state; made if it does not exist, used again if it does.
    folder: PathBuf,
    /// First of nine ports; 0: ports of the system's choice.
    #[arg(long, default_value_t = 50061)]
    port: u16,
    /// Clients to enrol; their keys go to FOLDER/clients.
    #[arg(long, default_value_t = 10)]
    clients: usize,
    /// A round with fewer clients is never opened.
    #[arg(long, default_value_t = 3)]
    min_clients: u32,
}

/// A party as a child process; killed when dropped.
pub struct PartyProcess {
    child: Child,
    /// Its input, which ends it; not the child's own, because waiting for a child closes that.
    input: Option<ChildStdin>,
}

/// Starts a party and waits until it serves.
///
/// `log` is its level of logging, unless the environment names another.
pub async fn spawn(config: &Path, log: &str) -> Result<PartyProcess> {
    let mut command = Command::new(std::env::current_exe()?);
    // the pipe to its input ends with this process, however that ends
    command.args(["party", "--while-stdin", "--config"]).arg(config).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    command.env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| log.into()));
    // Ctrl-C goes to this process alone, which ends the parties in order
    command.process_group(0);
    let mut child = command.spawn().context("starting a party")?;
    let mut lines = BufReader::new(child.stdout.take().context("a party's output")?).lines();
    let Some(line) = lines.next_line().await? else { bail!("the party of {} did not start (its error is above)", config.display()) };
    eprintln!("{line}");
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let input = child.stdin.take();
    Ok(PartyProcess { child, input })
}

impl PartyProcess {
    /// Waits for the end.
    pub async fn ended(&mut self) -> Result<()> {
        bail!("a party ended by itself: {} (its last words are above)", self.child.wait().await?)
    }

    /// Ends its input, which ends it, and waits.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.input.take());
        self.child.wait().await?;
        Ok(())
    }
}

/// Waits until one of the parties has ended; for ever, if there are none.
pub async fn one_ended(parties: &mut [PartyProcess]) -> Result<()> {
    let waiting = parties.iter_mut().map(|p| Box::pin(p.ended())).collect::<Vec<_>>();
    if waiting.is_empty() { std::future::pending().await } else { futures_util::future::select_all(waiting).await.0 }
}

pub async fn run(args: Args) -> Result<()> {
    let trial: Trial = set_up(&args.folder, args.port, args.clients, args.min_clients)?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut parties = Vec::new();
    for config in &trial.configs {
        parties.push(spawn(config, "info").await?);
    }
    println!(
        "operators: aggregator round --url {} --ca {} --token {} list\nclients:   {} (keys in {})\nstatus:    http://{}/\nCtrl-C ends all three.",
        trial.url,
        trial.certificate.display(),
        trial.token.display(),
        trial.url,
        trial.clients.display(),
        trial.status
    );
    let failed = tokio::select! {
        ended = one_ended(&mut parties) => ended,
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
    };
    for party in parties {
        party.stop().await?;
    }
    failed
}
