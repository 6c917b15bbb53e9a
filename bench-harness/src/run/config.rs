//! What to run: configs/quick.toml is a commented sample.

use std::path::{Path, PathBuf};
use std::time::Duration;

use linkem::catalogue::{Catalogue, NamedLink};
use linkem::driver::namespace::missing;
use serde::{Deserialize, Serialize};

use crate::error::HarnessError;
use crate::run::strategy::{Strategy, StrategyConfig};

/// Longest time for one request.
const CONGESTION_CONTROLS: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";
const LONGEST: Duration = Duration::from_secs(600);
/// Most clients at once.
const MOST_CLIENTS: usize = 256;

/// A run. Paths are relative to the file's folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Bundle folder.
    pub bundle: PathBuf,
    /// Folder with imported backbones.
    pub backbones: PathBuf,
    /// Folder with photos for agreement and latency.
    pub photos: PathBuf,
    /// Most photos that agreement is measured on; those first in order of name.
    pub most_photos: usize,
    /// File of named links.
    pub catalogue: PathBuf,
    /// Links to measure latency over, by name.
    pub links: Vec<String>,
    /// Most photos sent over each link.
    pub most_sent: usize,
    /// Rounds over these photos and all strategies, after one that is not counted.
    pub rounds: usize,
    /// Limit of each request.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// `auto` (packet level if possible, else stream level), `packet` or `stream`.
    #[serde(default)]
    pub emulation: EmulationKind,
    /// TCP congestion control at packet level.
    #[serde(default = "cubic")]
    pub congestion_control: String,
    /// The device computes so many times as long as this machine.
    #[serde(default = "one")]
    pub device_slowdown: f64,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// What is compared.
    pub strategies: StrategyConfig,
    /// Photos at a steady pace over links that vary.
    pub timeline: Option<TimelineConfig>,
    /// Several clients that share a link.
    pub throughput: Option<ThroughputConfig>,
}

/// Photos at a steady pace; each strategy has the link from its beginning.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimelineConfig {
    /// Links by name.
    pub links: Vec<String>,
    /// How long.
    #[serde(with = "humantime_serde")]
    pub length: Duration,
    /// From photo to photo; the next waits for the one before.
    #[serde(with = "humantime_serde")]
    pub period: Duration,
    /// From photo to answer.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// What is compared.
    pub strategies: StrategyConfig,
}

/// Clients that send one photo after the other, all over one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThroughputConfig {
    /// Links by name.
    pub links: Vec<String>,
    /// Numbers of clients.
    pub clients: Vec<usize>,
    /// How long, for each number and strategy.
    #[serde(with = "humantime_serde")]
    pub length: Duration,
    /// What is compared; `local` and `auto` make no sense here.
    pub strategies: StrategyConfig,
}

fn cubic() -> String {
    "cubic".into()
}

fn one() -> f64 {
    1.0
}

/// Level of emulation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmulationKind {
    /// Packets if this process may, else streams.
    #[default]
    Auto,
    /// Network namespaces and a user-space router; needs root.
    Packet,
    /// Shaped byte streams.
    Stream,
}

/// A run whose files have been read.
pub struct Prepared {
    /// The description.
    pub config: RunConfig,
    /// The links in order.
    pub links: Vec<(String, NamedLink)>,
    /// Those of the time lines.
    pub timeline_links: Vec<(String, NamedLink)>,
    /// Those of the throughput.
    pub throughput_links: Vec<(String, NamedLink)>,
    /// Where the links' trace files are.
    pub folder: PathBuf,
}

impl RunConfig {
    /// Reads and checks a file and the links it names, before anything starts.
    ///
    /// # Errors
    /// Names the file and the key that is wrong.
    pub fn open(path: &Path) -> Result<Prepared, HarnessError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|cause| HarnessError::Io { path: path.into(), cause })?;
        let mut config: Self = toml::from_str(&text).map_err(|e| HarnessError::data(name.clone(), e.to_string()))?;
        config.check().map_err(|why| HarnessError::data(name.clone(), why))?;
        let beside = |p: &mut PathBuf| *p = path.parent().unwrap_or(Path::new(".")).join(&*p);
        [&mut config.bundle, &mut config.backbones, &mut config.photos, &mut config.catalogue].into_iter().for_each(beside);
        let catalogue = Catalogue::open(&config.catalogue).map_err(|e| HarnessError::data(e.key, e.why))?;
        let named = |links: &[String]| {
            let link =
                |n: &String| Ok((n.clone(), catalogue.link(n).map_err(|e| HarnessError::data(name.clone(), e.to_string()))?.clone()));
            links.iter().map(link).collect::<Result<Vec<_>, HarnessError>>()
        };
        let links = named(&config.links)?;
        let timeline_links = named(config.timeline.as_ref().map_or(&[], |t| &t.links))?;
        let throughput_links = named(config.throughput.as_ref().map_or(&[], |t| &t.links))?;
        let folder = config.catalogue.parent().unwrap_or(Path::new(".")).to_owned();
        Ok(Prepared { config, links, timeline_links, throughput_links, folder })
    }

    fn check(&self) -> Result<(), String> {
        if self.rounds == 0 || self.most_photos == 0 || self.most_sent == 0 {
            return Err("rounds, most_photos and most_sent must be positive".into());
        }
        if self.links.is_empty() {
            return Err("links: name at least one".into());
        }
        if !(1.0..=1000.0).contains(&self.device_slowdown) {
            return Err("device_slowdown: use 1 to 1000".into());
        }
        if self.emulation == EmulationKind::Packet
            && let Some(why) = missing()
        {
            return Err(format!("emulation = \"packet\": {why}"));
        }
        // at packet level it is pinned; it must exist wherever the run may be repeated
        let known = std::fs::read_to_string(CONGESTION_CONTROLS).unwrap_or_default();
        if !known.split_whitespace().any(|name| name == self.congestion_control) {
            return Err(format!(
                "congestion_control: {:?} is not known to this kernel; there are {}",
                self.congestion_control,
                known.trim()
            ));
        }
        let limit = |key: &str, d: Duration| {
            let fits = (Duration::from_millis(10)..=LONGEST).contains(&d);
            if fits { Ok(()) } else { Err(format!("{key}: use 10ms to 10m")) }
        };
        limit("deadline", self.deadline)?;
        if let Some(t) = &self.timeline {
            for (key, d) in [("length", t.length), ("period", t.period), ("deadline", t.deadline)] {
                limit(&format!("timeline.{key}"), d)?;
            }
        }
        if let Some(t) = &self.throughput {
            limit("throughput.length", t.length)?;
            if t.clients.is_empty() || t.clients.iter().any(|&n| n == 0 || n > MOST_CLIENTS) {
                return Err(format!("throughput.clients: use 1 to {MOST_CLIENTS}"));
            }
            if t.strategies.local || !t.strategies.auto.is_empty() {
                return Err("throughput.strategies: local and auto make no sense here".into());
            }
        }
        Ok(())
    }

    /// Every strategy that the run names, each once; `levels` are the bundle's.
    ///
    /// # Errors
    /// If a strategy cannot be had.
    pub fn strategies(&self, levels: u8) -> Result<Vec<Strategy>, HarnessError> {
        let mut all = self.strategies.all(levels)?;
        let more = [self.timeline.as_ref().map(|t| &t.strategies), self.throughput.as_ref().map(|t| &t.strategies)];
        for strategy in more.into_iter().flatten().map(|s| s.all(levels)).collect::<Result<Vec<_>, _>>()?.concat() {
            if !all.contains(&strategy) {
                all.push(strategy);
            }
        }
        Ok(all)
    }
}
