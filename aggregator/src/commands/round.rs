//! `aggregator round`: what operators do.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use isthmus_federate::operator::Operator;
use isthmus_proto::aggregator_v1::{CreateRoundRequest, Filter, Mode, Round, Transform};
use serde_json::json;

#[derive(clap::Args)]
pub struct Args {
    /// Party 0.
    #[arg(long, default_value = "https://localhost:50061", env = "ISTHMUS_AGGREGATOR", global = true)]
    url: String,
    /// PEM certificate to trust instead of the public ones (party 0's identity.pem).
    #[arg(long, env = "ISTHMUS_AGGREGATOR_CA", global = true)]
    ca: Option<PathBuf>,
    /// File with the operator's token.
    #[arg(long, env = "ISTHMUS_AGGREGATOR_TOKEN", global = true)]
    token: Option<PathBuf>,
    /// Time limit of a call.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, global = true)]
    timeout: Duration,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a round and open it to clients.
    Create(Create),
    /// Close a round to clients and compute it.
    Seal {
        /// The round.
        round: u64,
    },
    /// End a round without a result.
    Abort {
        /// The round.
        round: u64,
        /// Why; clients and parties see it.
        #[arg(long, default_value = "by an operator")]
        reason: String,
    },
    /// Show a round.
    Show {
        /// The round.
        round: u64,
    },
    /// List rounds.
    List {
        /// From this one on.
        #[arg(long, default_value_t = 0)]
        from: u64,
    },
    /// Follow rounds until Ctrl-C, a JSON object for each change.
    Watch,
    /// Fetch the counts of a round that is done: little-endian 32-bit numbers.
    Result {
        /// The round.
        round: u64,
        /// File for the counts.
        #[arg(long)]
        out: PathBuf,
        /// File for the mean update instead: little-endian 32-bit floating-point numbers.
        #[arg(long)]
        mean: bool,
    },
}

#[derive(clap::Args)]
struct Create {
    /// Coordinates of an update.
    #[arg(long)]
    dim: u32,
    /// Longest update (Euclidean); longer ones are shortened.
    #[arg(long)]
    norm: f32,
    /// How updates are spread before rounding.
    #[arg(long, value_enum, default_value_t = Spread::Hadamard)]
    transform: Spread,
    /// Parties: three with XOR shares, or two with additive ones.
    #[arg(long, value_enum, default_value_t = Sharing::Boolean3)]
    mode: Sharing,
    /// Bits after the coordinates, counted exactly.
    #[arg(long, default_value_t = 0)]
    extra_bits: u32,
    /// With fewer clients the round is aborted.
    #[arg(long, default_value_t = 10)]
    min_clients: u32,
    /// More clients are refused.
    #[arg(long, default_value_t = 1000)]
    max_clients: u32,
    /// Seal as soon as so many reports are complete (default: max-clients).
    #[arg(long, default_value_t = 0)]
    target_clients: u32,
    /// Time for uploads.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    upload: Duration,
    /// Time for computing after that.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    compute: Duration,
    /// Leave out this many clients, those that agree least with the result of --filter-reference.
    #[arg(long, requires = "filter_reference")]
    filter_drop: Option<u32>,
    /// An earlier round of the same dimension that is done.
    #[arg(long, requires = "filter_drop")]
    filter_reference: Option<u64>,
    /// Make known which clients were left out.
    #[arg(long, requires = "filter_drop")]
    reveal_flags: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Spread {
    Hadamard,
    Kashin,
}

#[derive(Clone, Copy, ValueEnum)]
enum Sharing {
    #[value(name = "boolean-3")]
    Boolean3,
    #[value(name = "additive-2")]
    Additive2,
}

impl Create {
    fn request(self) -> CreateRoundRequest {
        let filter = self.filter_drop.zip(self.filter_reference).map(|(drop, reference_round)| Filter {
            reference_round,
            drop,
            reveal_flags: self.reveal_flags,
            direction_hash: Default::default(),
        });
        let mode = match self.mode {
            Sharing::Boolean3 => Mode::Boolean3,
            Sharing::Additive2 => Mode::Additive2,
        };
        let transform = match self.transform {
            Spread::Hadamard => Transform::Hadamard,
            Spread::Kashin => Transform::Kashin,
        };
        CreateRoundRequest {
            mode: mode.into(),
            dim: self.dim,
            transform: transform.into(),
            norm: self.norm,
            extra_bits: self.extra_bits,
            min_clients: self.min_clients,
            max_clients: self.max_clients,
            target_clients: self.target_clients,
            upload_ms: self.upload.as_millis() as u64,
            compute_ms: self.compute.as_millis() as u64,
            filter,
            ..Default::default()
        }
    }
}

fn shown(round: &Round) -> serde_json::Value {
    let state = round.state().as_str_name().trim_start_matches("STATE_").to_lowercase();
    json!({
        "round": round.round, "state": state, "reason": round.reason, "reports": round.reports, "clients": round.clients,
        "kept": round.kept, "attempts": round.epoch, "created_ms": round.created_ms, "sealed_ms": round.sealed_ms, "done_ms": round.done_ms,
    })
}

fn print(value: &serde_json::Value) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{value}")?)
}

pub async fn run(args: Args) -> Result<()> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let ca = args.ca.as_ref().map(read).transpose()?;
    let Some(token) = &args.token else { bail!("operators need a token: --token FILE or ISTHMUS_AGGREGATOR_TOKEN") };
    let mut operator = Operator::connect(&args.url, ca.as_deref(), read(token)?.trim(), args.timeout).await?;
    match args.command {
        Command::Create(create) => print(&shown(&operator.create(create.request()).await?))?,
        Command::Seal { round } => print(&shown(&operator.seal(round).await?))?,
        Command::Abort { round, reason } => print(&shown(&operator.abort(round, &reason).await?))?,
        Command::Show { round } => print(&shown(&operator.round(round).await?))?,
        Command::List { from } => operator.list(from).await?.iter().try_for_each(|r| print(&shown(r)))?,
        Command::Watch => {
            let mut rounds = operator.watch().await?;
            while let Some(round) = rounds.message().await.map_err(|s| anyhow::anyhow!("{}", s.message()))? {
                print(&shown(&round))?;
            }
        }
        Command::Result { round, out, mean } => {
            let result = operator.result(round).await?;
            let bytes: Vec<u8> = if mean {
                result.mean()?.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect()
            } else {
                result.counts.iter().flat_map(|c| c.to_le_bytes()).collect()
            };
            std::fs::write(&out, bytes).with_context(|| out.display().to_string())?;
            print(&shown(&result.round))?;
        }
    }
    Ok(())
}
