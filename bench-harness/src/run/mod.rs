//! End-to-end measurements over emulated links: real client, real server, every strategy over the same link.
//!
//! A run has up to four parts: agreement of each strategy with the lossless photo (no link), latency over fixed links
//! ([`latency`]), photos at a steady pace over links that vary ([`timeline`]), clients that share a link ([`throughput`]).

pub mod agreement;
pub mod config;
pub mod emulation;
pub mod headline;
pub mod latency;
pub mod page;
pub mod results;
pub mod session;
pub mod strategy;
pub mod tables;
pub mod throughput;
pub mod timeline;

use std::path::Path;

use edge_client::{Encoder, open_bundle};
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::HarnessError;
use crate::photos::PhotoSet;
use config::Prepared;
pub use config::RunConfig;
pub use results::Results;
use session::Bench;
use strategy::Device;

/// Runs everything; progress on standard error.
///
/// # Errors
/// If the server does not start or a link cannot be made.
pub async fn run(prepared: &Prepared, server: &Path) -> Result<Results, HarnessError> {
    let config = &prepared.config;
    let began = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let bundle = open_bundle(&config.bundle)?;
    let name = format!("{} {}", bundle.manifest.name, bundle.manifest.version);
    let (side, levels) = (bundle.manifest.input.size, bundle.levels());
    let strategies = config.strategies(levels)?;
    let mut photos = PhotoSet::open(&config.photos, side)?.photos;
    photos.truncate(config.most_photos);
    let device = Device::open(Encoder::new(bundle, 1)?, &config.backbones, &strategies)?;
    let mut bench = Bench { prepared, server, device, photos, reference: Vec::new() };
    let agreement = agreement::measure(&mut bench, &strategies).await?;
    let mut links = Vec::new();
    for (i, link) in prepared.links.iter().enumerate() {
        links.push(latency::measure(&mut bench, link, config.seed + i as u64, levels).await?);
    }
    let (mut timelines, mut throughput) = (Vec::new(), Vec::new());
    if let Some(t) = &config.timeline {
        for link in &prepared.timeline_links {
            timelines.push(timeline::measure(&mut bench, link, t, levels).await?);
        }
    }
    if let Some(t) = &config.throughput {
        for link in &prepared.throughput_links {
            throughput.push(throughput::measure(&mut bench, link, t, levels).await?);
        }
    }
    Ok(Results {
        began,
        machine: machine(),
        revision: revision(),
        bundle: name,
        rounds: config.rounds,
        seed: config.seed,
        device_slowdown: config.device_slowdown,
        scenario: Some(config.clone()),
        agreement,
        links,
        timelines,
        throughput,
    })
}

/// A progress bar for so many requests.
fn progress(what: String, total: usize) -> ProgressBar {
    let bar = ProgressBar::new(total as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:32} {bar:30} {pos}/{len}, {eta} left") {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

/// Processor, cores and kernel.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name")).map_or("", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {cores} cores, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}

/// Version, and the checkout's revision if there is one here.
pub fn revision() -> String {
    let git = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).stderr(std::process::Stdio::null()).output();
    let found = git.ok().filter(|o| o.status.success()).map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    format!("{}{}", env!("CARGO_PKG_VERSION"), found.map_or_else(String::new, |r| format!(", {r}")))
}
