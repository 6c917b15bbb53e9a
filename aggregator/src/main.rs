//! `aggregator`: one of three parties that sum a fleet's updates without seeing any.

mod commands;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Federated rounds with secure aggregation: three parties that do not trust each other.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a party.
    Party(commands::party::Args),
    /// Make keys, tokens and credentials.
    #[command(subcommand)]
    Keys(commands::keys::Args),
    /// Create and follow rounds (operators).
    Round(commands::round::Args),
    /// Make everything for a trial on this machine and run three parties until Ctrl-C.
    Local(commands::local::Args),
    /// Train a model by federated rounds.
    #[cfg(feature = "train")]
    Train(commands::train::Args),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    #[cfg(feature = "train")]
    if matches!(cli.command, Command::Train(_)) {
        // threads that spin without bound stall each other where cores are shared with other processes
        if let Err(e) = isthmus_nets::process::with_environment(&[isthmus_nets::process::BOUNDED_SPINNING]) {
            eprintln!("aggregator: {e}");
        }
    }
    match run(cli) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("aggregator: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Party(args) => commands::party::run(args).await,
        Command::Keys(args) => commands::keys::run(args),
        Command::Round(args) => commands::round::run(args).await,
        Command::Local(args) => commands::local::run(args).await,
        #[cfg(feature = "train")]
        Command::Train(args) => commands::train::run_loop(args).await,
    }
}
