//! `aggregator train`.

use std::path::PathBuf;

use aggregator::local::set_up;
use aggregator::train::config::{Kind, Parties};
use aggregator::train::{TrainConfig, run};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::local::{one_ended, spawn};

#[derive(clap::Args)]
pub struct Args {
    /// TOML file; configs/federated.toml explains every key.
    config: PathBuf,
    /// Another number of rounds.
    #[arg(long)]
    rounds: Option<u64>,
    /// Print a JSON object for each round.
    #[arg(long)]
    json: bool,
}

pub async fn run_loop(args: Args) -> Result<()> {
    let mut config = TrainConfig::open(&args.config)?;
    config.rounds = args.rounds.unwrap_or(config.rounds);
    // before anything starts: a folder without data is the commonest mistake
    let scorer = isthmus_federate::train::learner(&config.training.task, &config.sources())?;
    let mut parties = Vec::new();
    let trial = match (&config.parties, config.aggregation.kind) {
        (Parties::Local(folder), Kind::Secure) => {
            let trial = set_up(folder, 0, 1, config.aggregation.min_clients)?;
            for party in &trial.configs {
                parties.push(spawn(party, "warn").await?);
            }
            eprintln!(
                "status page: http://{}/\njoin:        edge-client-train federate --task {} --url {} --ca {} --key {}/0.key --credential {}/0.credential --data {}",
                trial.status,
                config.training.task,
                trial.url,
                trial.certificate.display(),
                trial.clients.display(),
                trial.clients.display(),
                config.data.display()
            );
            Some(trial)
        }
        _ => None,
    };
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} clients trained") {
        bar.set_style(style);
    }
    let line = |p: &aggregator::train::Progress, task: &str| {
        if args.json {
            println!("{}", serde_json::json!({ "task": task, "progress": p }));
            return;
        }
        bar.suspend(|| {
            println!(
                "round {:>3}  {} {:>5.1} %{}  clients {:>4} (kept {})  report {:>7} B  norm {:.2} (clipped {:.0} %)  trained in {:.1} s, summed in {:.2} s",
                p.round,
                if p.bytes.is_some() { "agreement" } else { "accuracy" },
                100.0 * p.accuracy,
                p.bytes.map_or_else(String::new, |b| format!(" at {b:.0} B")),
                p.clients,
                p.kept,
                p.report_bytes,
                p.norm,
                100.0 * p.clipped,
                p.train_s,
                p.round_s
            );
        });
    };
    let step = |round: u64, done: usize, of: usize| {
        if of == 0 {
            bar.set_style(ProgressStyle::default_spinner());
            bar.set_message(format!("round {round} is open: {done} reports of clients"));
            return;
        }
        bar.set_message(format!("round {round}"));
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    };
    let mut term = signal(SignalKind::terminate())?;
    let trained = tokio::select! {
        trained = run(&config, scorer, trial.as_ref(), line, step) => trained,
        ended = one_ended(&mut parties) => return ended,
        () = interrupted(&mut term) => {
            bar.finish_and_clear();
            eprintln!("interrupted; the same command goes on after round {}", done(&config));
            std::process::exit(130);
        }
    };
    bar.finish_and_clear();
    for party in parties {
        party.stop().await?;
    }
    let checkpoint = trained?;
    if let Some(last) = checkpoint.history.last() {
        eprintln!(
            "{} rounds, {:.2} % of {} test examples right; model in {}",
            checkpoint.done,
            100.0 * last.accuracy,
            last.examples,
            config.out.display()
        );
    }
    Ok(())
}

async fn interrupted(term: &mut Signal) {
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
}

/// Rounds in the checkpoint.
fn done(config: &TrainConfig) -> u64 {
    let text = std::fs::read_to_string(config.out.join("state.json")).unwrap_or_default();
    serde_json::from_str::<serde_json::Value>(&text).ok().and_then(|v| v["done"].as_u64()).unwrap_or(0)
}
