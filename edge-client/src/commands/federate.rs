//! `edge-client federate`: trains on this device's own data in rounds whose sums alone become known.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use isthmus_federate::Participant;
use isthmus_federate::identity::{make_signer, open_identity, open_signer};
use isthmus_federate::train::client::{Event, Session};
use isthmus_federate::train::partition::Split;
use isthmus_federate::train::{Sources, learner};
use rand::SeedableRng;
use rand::rngs::{OsRng, StdRng};

/// Time limit of a call.
const CALL: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_secs(1);
/// Failures in a row after which it gives up: about ten minutes.
const MOST_FAILURES: u32 = 120;
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    /// Party 0 of the aggregators.
    #[arg(long, env = "ISTHMUS_AGGREGATOR", default_value = "https://localhost:50061")]
    url: String,
    /// PEM certificate to trust instead of the public ones.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// This client's key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Make the key if it does not exist, print its public half for the fleet's authority, and stop.
    #[arg(long)]
    make_key: bool,
    /// The authority's word for the key.
    #[arg(long, value_name = "FILE", required_unless_present = "make_key")]
    credential: Option<PathBuf>,
    /// The task: fashion-mnist, shakespeare, or bundle (fit the deployed bundle to this device's own photos).
    #[arg(long, default_value = "fashion-mnist")]
    task: String,
    /// Folder with the task's data; for the task bundle, this device's photos.
    #[arg(long, value_name = "FOLDER", required_unless_present = "make_key")]
    data: Option<PathBuf>,
    /// The deployed bundle (task bundle).
    #[arg(long, env = "ISTHMUS_BUNDLE")]
    bundle: Option<PathBuf>,
    /// Folder with imported backbones (task bundle).
    #[arg(long, env = "ISTHMUS_BACKBONES")]
    backbones: Option<PathBuf>,
    /// Which part of the data this client has, from 0 on.
    #[arg(long, default_value_t = 0)]
    part: usize,
    /// Into how many parts the data are divided.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    of: u32,
    /// How the parts differ: iid, natural (as the data came), or dirichlet:CONCENTRATION.
    #[arg(long, default_value = "iid")]
    split: Split,
    /// Seed of the division.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Remembers what was sent, so that a crash never makes a second vote (default: the key's name with .sent).
    #[arg(long, value_name = "FILE")]
    memory: Option<PathBuf>,
    /// Stop after so many votes.
    #[arg(long)]
    rounds: Option<u64>,
}

pub async fn run(args: Args) -> Result<bool> {
    if args.make_key {
        let public = if args.key.exists() { open_signer(&args.key)?.public() } else { make_signer(&args.key)? };
        println!("{}", public.iter().map(|b| format!("{b:02x}")).collect::<String>());
        return Ok(true);
    }
    let (Some(credential), Some(data)) = (&args.credential, &args.data) else { bail!("--credential and --data are needed") };
    let identity = open_identity(&args.key, credential)?;
    let sources = Sources { data: data.clone(), bundle: args.bundle.clone(), backbones: args.backbones.clone() };
    let mut learner = learner(&args.task, &sources)?;
    let parts = learner.deal(args.of as usize, args.split, args.seed)?;
    let own = parts.into_iter().nth(args.part).with_context(|| format!("--part {} of --of {}: parts count from 0", args.part, args.of))?;
    let ca = args.ca.as_ref().map(|p| std::fs::read_to_string(p).with_context(|| p.display().to_string())).transpose()?;
    let participant = Participant::connect(&args.url, ca.as_deref(), CALL).await?;
    let memory = args.memory.unwrap_or_else(|| args.key.with_extension("sent"));
    eprintln!("{} examples; waiting for rounds at {} (Ctrl-C ends)", own.places.len(), args.url);
    let mut session = Session::new(participant, identity, own, Some(memory))?;
    let (mut votes, mut failures, mut waiting) = (0, 0, false);
    let tell = |event: Event, waiting: &mut bool, votes: &mut u64| {
        match &event {
            Event::Waiting if *waiting => {}
            Event::Waiting => eprintln!("no round is open"),
            Event::Training { round } => eprintln!("round {round}: training"),
            Event::Voted { round, bytes } => {
                *votes += 1;
                println!("round {round}: voted, {bytes} bytes");
            }
            Event::Missed { round, why } => eprintln!("round {round}: missed ({why})"),
        }
        *waiting = event == Event::Waiting;
    };
    while args.rounds.is_none_or(|most| votes < most) {
        let mut rng = StdRng::try_from_rng(&mut OsRng).context("random numbers of the system")?;
        let turn = session.turn(&mut *learner, &mut rng, |event| tell(event, &mut waiting, &mut votes));
        // Ctrl-C ends the process at once: what was sent is remembered before it is sent
        match turn.await {
            Ok(()) => failures = 0,
            Err(error) if error.is_transient() && failures < MOST_FAILURES => {
                if failures == 0 {
                    eprintln!("{error}; trying again");
                }
                failures += 1;
                tokio::time::sleep((PAUSE * failures).min(LONGEST_PAUSE)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}
