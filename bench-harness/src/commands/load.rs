//! `load`: its options, and what is printed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bench_harness::codecs::Codec;
use bench_harness::load::arrivals::{Arrivals, MAX_RATE};
use bench_harness::load::engine::Target;
use bench_harness::load::{Plan, Point, measure, search, table};
use bench_harness::photos::PhotoSet;
use clap::Args;
use edge_client::{Client, Encoder, Endpoint, Payload, open_bundle};

/// Most requests under way of a closed loop, and most connections.
const MOST: usize = 4096;

#[derive(Args)]
pub struct LoadArgs {
    /// Photo, or folder with photos, to encode and send in turn.
    photos: PathBuf,
    /// Server, http://HOST:PORT or https://HOST:PORT; several, separated by commas, are balanced by each client.
    #[arg(long, default_value = "http://127.0.0.1:50051", value_delimiter = ',')]
    server: Vec<String>,
    /// PEM file with the CA certificate of the server (default: the public CAs).
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Allow plain HTTP to another machine.
    #[arg(long)]
    insecure: bool,
    /// Bundle folder.
    #[arg(long, default_value = "bundles/lite0-patch-stem")]
    bundle: PathBuf,
    /// Quality level of the bundle (default: the middle one).
    #[arg(long)]
    quality: Option<u8>,
    /// Send image files instead: jpeg:50, webp:75, avif:50, png; or file: the photos' files as they are.
    #[arg(long, conflicts_with = "quality")]
    image: Option<String>,
    /// Closed loop: so many requests under way, or several such numbers: 1,2,4 or 1:16 (doubling).
    #[arg(long, default_value = "1", conflicts_with_all = ["rate", "schedule", "search"])]
    concurrency: String,
    /// Open loop: requests a second, one or several: 10,20,40.
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["schedule", "search"])]
    rate: Vec<f64>,
    /// Open loops are evenly spaced instead of Poisson.
    #[arg(long)]
    even: bool,
    /// Open loop: file with a time in milliseconds a line, repeated.
    #[arg(long, conflicts_with = "search")]
    schedule: Option<PathBuf>,
    /// Find the highest rate between two, LOW:HIGH, whose --percentile is within --objective.
    #[arg(long, requires = "objective")]
    search: Option<String>,
    /// Latency objective of --search.
    #[arg(long, value_parser = humantime::parse_duration)]
    objective: Option<Duration>,
    /// The percentile that counts for stability and search.
    #[arg(long, default_value_t = 99.0)]
    percentile: f64,
    /// Connections, used in turn.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Limit of each request.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Not counted at the beginning.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    warm_up: Duration,
    /// Length of a window; windows are repeated until three in a row agree.
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
    window: Duration,
    /// How much windows may differ, in percent.
    #[arg(long, default_value_t = 10.0)]
    stability: f64,
    /// Most windows.
    #[arg(long, default_value_t = 10)]
    most_windows: usize,
    /// Seed of Poisson arrivals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Also write CSV here.
    #[arg(long)]
    csv: Option<PathBuf>,
}

/// `1`, `1,2,4` or `1:16` (doubling).
fn numbers(text: &str) -> Result<Vec<usize>> {
    let parse = |t: &str| t.trim().parse::<usize>().ok().filter(|n| (1..=MOST).contains(n));
    let list = match text.split_once(':') {
        Some((from, to)) => match (parse(from), parse(to)) {
            (Some(from), Some(to)) if from <= to => {
                Some(std::iter::successors(Some(from), |n| Some(n * 2)).take_while(|n| *n <= to).collect())
            }
            _ => None,
        },
        None => text.split(',').map(parse).collect(),
    };
    list.with_context(|| format!("--concurrency {text}: write 4, or 1,2,4, or 1:16; 1 to {MOST}"))
}

fn check_rate(rate: f64) -> Result<f64> {
    ensure!(rate > 0.0 && rate <= MAX_RATE, "{rate} requests a second: use more than 0, at most {MAX_RATE}");
    Ok(rate)
}

fn payloads(args: &LoadArgs) -> Result<Vec<Payload>> {
    let mut encoder = Encoder::new(open_bundle(&args.bundle)?, 1)?;
    let quality = args.quality.unwrap_or_else(|| encoder.default_quality());
    encoder.bundle().tables.level(quality)?;
    let side = encoder.bundle().manifest.input.size;
    if args.image.as_deref() == Some("file") {
        let files = if args.photos.is_dir() { bench_harness::photos::files(&args.photos)? } else { vec![args.photos.clone()] };
        let read = |path: &PathBuf| Ok(Payload::Image(std::fs::read(path).with_context(|| path.display().to_string())?.into()));
        return files.iter().map(read).collect();
    }
    let set = if args.photos.is_dir() { PhotoSet::open(&args.photos, side)? } else { PhotoSet::one(&args.photos, side)? };
    let codec = match args.image.as_deref().map(|i| i.split_once(':').map_or((i, None), |(key, q)| (key, Some(q)))) {
        None => None,
        Some((key, quality)) => {
            let quality = quality.map(|q| q.parse().with_context(|| format!("--image {key}:{q}: the quality is no number"))).transpose()?;
            Some(Codec::new(key, quality)?)
        }
    };
    let of = |pixels: &isthmus_pixels::Rgb| -> Result<Payload> {
        Ok(match codec {
            Some(codec) => Payload::Image(codec.encode(pixels)?.into()),
            None => Payload::Bitstream(encoder.encode_rgb(pixels, quality)?.container.into()),
        })
    };
    set.photos.iter().map(|p| &p.pixels).map(of).collect()
}

pub async fn run(args: &LoadArgs) -> Result<()> {
    ensure!((0.0..=100.0).contains(&args.percentile), "--percentile: use 0 to 100");
    ensure!((1..=MOST).contains(&args.connections), "--connections: use 1 to {MOST}");
    ensure!(args.most_windows > 0 && args.stability > 0.0, "--most-windows and --stability must be positive");
    let sensible = Duration::from_millis(50)..=Duration::from_secs(600);
    ensure!(sensible.contains(&args.window), "--window: use 50ms to 10m");
    let concurrency = numbers(&args.concurrency)?;
    let range = match args.search.as_deref() {
        None => None,
        Some(text) => {
            let parse = |t: &str| t.trim().parse().ok().and_then(|r| check_rate(r).ok());
            match text.split_once(':').map(|(low, high)| (parse(low), parse(high))) {
                Some((Some(low), Some(high))) if low < high => Some((low, high)),
                _ => bail!("--search {text}: write LOW:HIGH, requests a second"),
            }
        }
    };
    let arrivals: Vec<Arrivals> = match (&args.schedule, args.rate.is_empty()) {
        (Some(path), _) => vec![Arrivals::schedule(path)?],
        (None, false) if args.even => args.rate.iter().map(|&r| Ok(Arrivals::Constant(check_rate(r)?))).collect::<Result<_>>()?,
        (None, false) => args.rate.iter().map(|&r| Ok(Arrivals::Poisson(check_rate(r)?))).collect::<Result<_>>()?,
        (None, true) => concurrency.into_iter().map(Arrivals::Closed).collect(),
    };
    let payloads = Arc::new(payloads(args)?);
    let ca = args.ca.as_ref().map(|p| std::fs::read(p).with_context(|| p.display().to_string())).transpose()?;
    let mut endpoints = Vec::new();
    for url in &args.server {
        let endpoint = Endpoint::new(url.trim())?.allow_insecure(args.insecure);
        endpoints.push(match &ca {
            Some(pem) => endpoint.with_ca(pem.clone()),
            None => endpoint,
        });
    }
    let mut clients = Vec::new();
    for _ in 0..args.connections {
        clients.push(Client::connect_any(&endpoints).await?);
    }
    let target = Target { clients, payloads, deadline: args.deadline };
    let plan = Plan {
        warm_up: args.warm_up,
        window: args.window,
        stability: args.stability / 100.0,
        most_windows: args.most_windows,
        percentile: args.percentile,
        seed: args.seed,
    };
    let progress = |p: &Point| eprintln!("{}: {:.1} answers/s, p{} {:.1} ms", p.load, p.per_second, args.percentile, p.percentile_ms);
    let mut points = Vec::new();
    let mut best = None;
    if let (Some(range), Some(objective)) = (range, args.objective) {
        (best, points) = search(&target, range, objective, args.even, &plan, progress).await?;
    } else {
        for arrivals in &arrivals {
            let point = measure(&target, arrivals, &plan).await?;
            progress(&point);
            points.push(point);
        }
    }
    if let Some(path) = &args.csv {
        std::fs::write(path, table::csv(&points)).with_context(|| path.display().to_string())?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&serde_json::json!({ "points": points, "best": best }))?);
    } else {
        println!("{}", table::markdown(&points));
        if let (Some(objective), Some(_)) = (args.objective, range) {
            match &best {
                Some(p) => println!("\nhighest rate with p{} within {objective:?}: {}", args.percentile, p.load),
                None => println!("\np{} is beyond {objective:?} (or requests fail) at the lowest rate already", args.percentile),
            }
        }
    }
    ensure!(points.iter().all(|p| p.n > 0), "no request was answered");
    Ok(())
}
