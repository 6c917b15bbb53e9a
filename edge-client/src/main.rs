//! `edge-client`: encodes photos on the device and has a server finish the job.

mod commands;

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use isthmus_codec::Quality;
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Sends photos to an offload-server as small bitstreams and prints what they show.
///
/// ISTHMUS_LOG=debug logs every step and its time to standard error. Built with the feature otel, OTEL_EXPORTER_OTLP_ENDPOINT names an OpenTelemetry
/// collector that gets them as spans, joined with the server's.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Encode photos, send them, print the answers.
    Classify {
        /// JPEG, PNG or WebP files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        encoding: EncodingArgs,
        /// Send the files as they are and let the server run the whole network (no bundle needed).
        #[arg(long, conflicts_with_all = ["quality", "target_bytes", "max_bytes"])]
        whole_image: bool,
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        progressive: ProgressiveArgs,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Send the photos of a folder over one stream, at a steady rate.
    Stream {
        /// Folder with photos, sent in order of their names.
        folder: PathBuf,
        /// Photos per second.
        #[arg(long, default_value_t = 5.0)]
        fps: f64,
        /// Photos under way at once.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
        window: u16,
        /// Go through the folder this many times.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        repeat: u32,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        encoding: EncodingArgs,
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        progressive: ProgressiveArgs,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Encode a photo into a container file.
    Encode {
        /// JPEG, PNG or WebP file.
        file: PathBuf,
        /// Where to write the container (default: the photo's name with .isth, in the current folder).
        #[arg(short, long)]
        output: Option<PathBuf>,
        #[command(flatten)]
        encoding: EncodingArgs,
    },
    /// Print what a container file holds, as JSON; with a bundle, decode it too.
    Inspect {
        /// Container file.
        file: PathBuf,
        /// Bundle folder.
        #[arg(long, env = "ISTHMUS_BUNDLE")]
        bundle: Option<PathBuf>,
    },
    /// Check bundle, encoder, server and round trip, and say what is wrong.
    Doctor {
        #[command(flatten)]
        server: ServerArgs,
        /// Bundle folder.
        #[arg(long, env = "ISTHMUS_BUNDLE", default_value = DEFAULT_BUNDLE)]
        bundle: PathBuf,
        /// Time limit of each call.
        #[arg(long, default_value = "5s", value_parser = parse_deadline)]
        deadline: Duration,
        /// Print JSON lines.
        #[arg(long)]
        json: bool,
    },
    /// Take part in federated training: only sums over many clients ever become known.
    #[cfg(feature = "train")]
    Federate(commands::federate::Args),
}

const DEFAULT_BUNDLE: &str = "bundles/lite0-patch-stem";

/// A duration such as 500ms or 2s, at most an hour.
fn parse_deadline(text: &str) -> Result<Duration, String> {
    let limit = humantime::parse_duration(text).map_err(|_| "write a number and a unit, such as 500ms or 2s")?;
    let sensible = Duration::from_millis(1)..=Duration::from_secs(3600);
    if sensible.contains(&limit) { Ok(limit) } else { Err("between 1ms and 1h".into()) }
}

#[derive(Args)]
struct ServerArgs {
    /// Server, http://HOST:PORT or https://HOST:PORT; several, separated by commas, share the work (or stand in for each other).
    #[arg(long, env = "ISTHMUS_SERVER", default_value = "http://127.0.0.1:50051", value_delimiter = ',')]
    server: Vec<String>,
    /// PEM file with the CA certificate of the server (default: the public CAs).
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// File with the bearer token that this client is known by.
    #[arg(long, value_name = "FILE", env = "ISTHMUS_TOKEN_FILE")]
    token: Option<PathBuf>,
    /// PEM file with this client's certificate, where the server wants one.
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// PEM file with its private key.
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Allow plain HTTP to another machine.
    #[arg(long)]
    insecure: bool,
}

#[derive(Args)]
struct EncodingArgs {
    /// Bundle folder, or a folder of such folders: the newest version that the server has.
    #[arg(long, env = "ISTHMUS_BUNDLE", default_value = DEFAULT_BUNDLE)]
    bundle: PathBuf,
    /// Use only bundles signed with this key (64 hexadecimal digits; may be given several times).
    #[arg(long, value_name = "KEY", env = "ISTHMUS_TRUST", value_delimiter = ',')]
    trust: Vec<String>,
    /// Quality: a level, from 1 (fewest bytes), or a number between two, such as 2.5; default: the middle level. Content that takes more than twice
    /// the usual bytes (patterns unlike any photo) falls to a lower one, unless --max-bytes is given.
    #[arg(long)]
    quality: Option<Quality>,
    /// For each photo the highest quality with at most so many bytes (the lowest level, if none has).
    #[arg(long, value_name = "BYTES", conflicts_with = "quality")]
    target_bytes: Option<NonZeroUsize>,
    /// Never send more bytes for a photo: lower qualities are tried, and what is too long at the lowest is not sent.
    #[arg(long, value_name = "BYTES")]
    max_bytes: Option<NonZeroUsize>,
    /// Threads of the encoder, 1 to 256.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PolicyKind {
    /// Always the bundle at --quality.
    Fixed,
    /// For each photo what serves the goal best: a quality level, an image file, or the network on this device.
    Auto,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AimKind {
    /// In time, then the most agreement with the uncompressed network, then the fewest bytes.
    Agreement,
    /// In time, then the soonest.
    Latency,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LocalKind {
    /// Only where the link fails.
    Fallback,
    /// Whenever it serves the goal best.
    Choice,
    /// Never.
    Off,
}

#[derive(Args)]
struct PolicyArgs {
    /// How each photo is sent.
    #[arg(long, value_enum, default_value = "fixed")]
    policy: PolicyKind,
    /// What --policy auto works for, beside --deadline.
    #[arg(long, value_enum, default_value = "agreement")]
    aim: AimKind,
    /// With --policy auto, leave out options that agree less often with the uncompressed network (0 to 1).
    #[arg(long, default_value_t = 0.0, value_parser = parse_share)]
    least_agreement: f64,
    /// With --policy auto, when this device runs the whole network itself.
    #[arg(long, value_enum, default_value = "fallback")]
    local: LocalKind,
    /// The whole network for this device (ONNX, with labels.json beside it).
    #[arg(long, env = "ISTHMUS_LOCAL_MODEL", default_value = "data/backbones/efficientnet-lite0.onnx")]
    local_model: PathBuf,
}

#[derive(Args)]
struct ProgressiveArgs {
    /// Send the lowest quality of each photo, then refinements for as long as the server is not certain (the bundle must have them).
    #[arg(long, conflicts_with_all = ["quality", "target_bytes", "policy", "whole_image"])]
    progressive: bool,
    /// With --progressive, the probability of the best class from which on nothing more is sent (0 to 1).
    #[arg(long, default_value_t = 0.5, value_parser = parse_share, requires = "progressive")]
    certainty: f64,
}

impl ProgressiveArgs {
    /// The probability from which on nothing more is sent, if bitstreams are progressive.
    fn certainty(&self) -> Option<f32> {
        self.progressive.then_some(self.certainty as f32)
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|s| (0.0..=1.0).contains(s)).ok_or_else(|| "a number from 0 to 1".into())
}

#[derive(Args)]
struct AskArgs {
    /// Model to use (default: the server's).
    #[arg(long, default_value = "")]
    model: String,
    /// Labels per photo.
    #[arg(long, default_value_t = 3)]
    top_k: u32,
    /// Time limit per photo, from sending to answer, such as 500ms or 2s (1ms to 1h).
    #[arg(long, default_value = "10s", value_parser = parse_deadline)]
    deadline: Duration,
    /// Print JSON lines; the default when the output is a pipe or file.
    #[arg(long)]
    json: bool,
}

/// What is logged to standard error, if `ISTHMUS_LOG` names a level (error, warn, info, debug, trace).
fn lines<S: Subscriber + for<'a> LookupSpan<'a>>() -> Option<impl Layer<S>> {
    let level = std::env::var("ISTHMUS_LOG").ok().and_then(|l| l.parse::<Level>().ok())?;
    let lines = tracing_subscriber::fmt::layer().with_span_events(FmtSpan::CLOSE);
    Some(lines.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).with_filter(LevelFilter::from_level(level)))
}

/// Runs a command with logs, and with its spans sent to a collector if the environment names one.
#[cfg(feature = "otel")]
async fn observed(command: impl Future<Output = anyhow::Result<bool>>) -> anyhow::Result<bool> {
    let traces = isthmus_traces::Traces::from_environment("edge-client")?;
    let ours = tracing_subscriber::filter::Targets::new().with_target("edge_client", Level::DEBUG);
    let spans = traces.as_ref().map(|t| t.layer().with_filter(ours));
    tracing_subscriber::registry().with(lines()).with(spans).init();
    let done = command.await;
    if let Some(traces) = traces {
        traces.finish().await;
    }
    done
}

/// Runs a command with logs.
#[cfg(not(feature = "otel"))]
async fn observed(command: impl Future<Output = anyhow::Result<bool>>) -> anyhow::Result<bool> {
    tracing_subscriber::registry().with(lines()).init();
    command.await
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let run = || -> anyhow::Result<bool> {
        #[cfg(feature = "train")]
        if matches!(cli.command, Command::Federate(_)) {
            // threads that spin without bound stall each other where cores are shared with other processes
            isthmus_nets::process::with_environment(&[isthmus_nets::process::BOUNDED_SPINNING])?;
        }
        // one thread: a device has better uses for the others, and the encoder has its own pool
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(observed(async {
            match cli.command {
                Command::Classify { files, server, encoding, whole_image, policy, progressive, ask } => match policy.policy {
                    PolicyKind::Auto => commands::auto::classify(&files, &server, &encoding, whole_image, &policy, &ask).await,
                    PolicyKind::Fixed if progressive.progressive => {
                        let pace = commands::stream::Pace::ONE_BY_ONE;
                        commands::stream::run(&files, &pace, &server, &encoding, progressive.certainty(), &ask).await
                    }
                    PolicyKind::Fixed => commands::classify::run(&files, &server, &encoding, whole_image, &ask).await,
                },
                Command::Stream { folder, fps, repeat, server, encoding, policy, ask, .. } if policy.policy == PolicyKind::Auto => {
                    commands::auto::stream(&folder, fps, repeat, &server, &encoding, &policy, &ask).await
                }
                Command::Stream { folder, fps, window, repeat, server, encoding, progressive, ask, .. } => {
                    let pace = commands::stream::Pace { fps, window: window.into(), repeat };
                    let files = commands::stream::photos(&folder)?;
                    commands::stream::run(&files, &pace, &server, &encoding, progressive.certainty(), &ask).await
                }
                Command::Encode { file, output, encoding } => commands::files::encode(&file, output, &encoding),
                Command::Inspect { file, bundle } => commands::files::inspect(&file, bundle.as_deref()),
                Command::Doctor { server, bundle, deadline, json } => commands::doctor::run(&server, &bundle, deadline, json).await,
                #[cfg(feature = "train")]
                Command::Federate(args) => commands::federate::run(args).await,
            }
        }))
    };
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // whoever read the output has seen enough
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("edge-client: {e:#}");
            ExitCode::FAILURE
        }
    }
}
