//! `bench-harness`: measurements through a real server.

mod commands;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bench_harness::photos::PhotoSet;
use bench_harness::remote::Remote;
use bench_harness::run::{Results, RunConfig, page, tables};
use bench_harness::{compare, report, timing};
use clap::{Parser, Subcommand};
use edge_client::{Client, Encoder, Endpoint, open_bundle};

/// Measures Isthmus against its rivals.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time the encoder on this machine, stage by stage; prints JSON.
    Encode {
        /// Folder with photos.
        photos: PathBuf,
        /// Bundle folder.
        #[arg(long, default_value = "bundles/lite0-patch-stem")]
        bundle: PathBuf,
        /// Time this encoder graph (ONNX) instead of the bundle's; just the network is then meaningful.
        #[arg(long)]
        graph: Option<PathBuf>,
        /// Encodings timed, after as many to warm up (at most 20).
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..))]
        rounds: u16,
        /// Threads of the encoder.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        threads: u16,
    },
    /// Load a server: closed loop (--concurrency), open loop (--rate, --schedule), or the highest rate within a latency objective
    /// (--search).
    Load(Box<commands::load::LoadArgs>),
    /// Check the link emulator on this machine: delay, rate, loss, steps, lateness. The packet level needs root.
    Validate(commands::validate::ValidateArgs),
    /// Measure end-to-end latency over emulated links; writes results.json, results.md and report.html.
    Run {
        /// Description of the run; configs/quick.toml is a commented sample.
        config: PathBuf,
        /// Folder for the results.
        #[arg(long, default_value = "data/run")]
        out: PathBuf,
        /// The offload-server to start (default: beside this program).
        #[arg(long)]
        server: Option<PathBuf>,
    },
    /// Write results.md and report.html of a finished run anew.
    Report {
        /// Folder with results.json.
        #[arg(default_value = "data/run")]
        folder: PathBuf,
    },
    /// Send photos at every quality level, and as WebP and JPEG, to one server; print bytes and agreement.
    Compare {
        /// Folders with photos (and optionally labels.json), one table each.
        #[arg(required = true)]
        photos: Vec<PathBuf>,
        /// Server, http://HOST:PORT or https://HOST:PORT.
        #[arg(long, default_value = "http://127.0.0.1:50051")]
        server: String,
        /// Bundle folder.
        #[arg(long, default_value = "bundles/lite0-patch-stem")]
        bundle: PathBuf,
        /// Time limit per request.
        #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
        deadline: Duration,
        /// Fewer codec settings.
        #[arg(long)]
        short: bool,
        /// Of each photo the first so many crops (files named PHOTO-CROP); absent: all.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
        crops: Option<u16>,
        /// Qualities from one level to the next: 1 for the levels alone, 2 with those halfway.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
        each_level: u8,
        /// Folder for results as JSON, Markdown and plots.
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

fn main() -> std::process::ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench-harness: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(command: Command) -> Result<()> {
    match command {
        Command::Encode { photos, bundle, graph, rounds, threads } => {
            let timed = timing::encode(&photos, &bundle, graph.as_deref(), rounds.into(), threads.into())?;
            println!("{}", serde_json::to_string(&timed)?);
        }
        Command::Load(args) => commands::load::run(&args).await?,
        Command::Validate(args) => commands::validate::run(&args).await?,
        Command::Run { config, out, server } => {
            let prepared = RunConfig::open(&config)?;
            let beside = std::env::current_exe()?.with_file_name("offload-server");
            std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
            let results = bench_harness::run::run(&prepared, &server.unwrap_or(beside)).await?;
            std::fs::write(out.join("results.json"), serde_json::to_string_pretty(&results)?)?;
            write_report(&results, &out)?;
        }
        Command::Report { folder } => {
            let path = folder.join("results.json");
            let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
            let results: Results = serde_json::from_slice(&text).with_context(|| format!("{}: no results of a run", path.display()))?;
            write_report(&results, &folder)?;
        }
        Command::Compare { photos, server, bundle, deadline, short, crops, each_level, out } => {
            let mut encoder = Encoder::new(open_bundle(&bundle)?, 1)?;
            let side = encoder.bundle().manifest.input.size;
            let mut sets = photos.iter().map(|p| PhotoSet::open_readable(p, side)).collect::<Result<Vec<_>, _>>()?;
            sets.iter_mut().for_each(|set| set.keep_of_each(crops.map_or(usize::MAX, usize::from)));
            let mut client = Client::connect(&Endpoint::new(&server)?).await?;
            client.describe(Some(&encoder.bundle().hash), deadline).await?;
            let mut backend = Remote::new(client, deadline);
            if let Some(folder) = &out {
                report::prepare(folder)?;
            }
            let plan = compare::Plan { each_level, ..if short { compare::Plan::short() } else { compare::Plan::default() } };
            for set in &sets {
                let comparison = compare::run(set, &mut encoder, &mut backend, &plan).await?;
                println!("{}", report::table(&comparison));
                if let Some(folder) = &out {
                    report::write(&comparison, folder)?;
                }
            }
        }
    }
    Ok(())
}

fn write_report(results: &Results, out: &Path) -> Result<()> {
    let text = tables::markdown(results);
    std::fs::write(out.join("results.md"), &text)?;
    std::fs::write(out.join("report.html"), page::html(results)?)?;
    println!("{text}\nresults and report.html in {}", out.display());
    Ok(())
}
