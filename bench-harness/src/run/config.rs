//! What to run: configs/quick.toml is a commented sample.

use std::path::{Path, PathBuf};
use std::time::Duration;

use linkem::catalogue::{Catalogue, NamedLink};
use serde::{Deserialize, Serialize};

use crate::error::HarnessError;
use crate::run::strategy::StrategyConfig;

/// A run. Paths are relative to the file's folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Bundle folder.
    pub bundle: PathBuf,
    /// Folder with photos.
    pub photos: PathBuf,
    /// Most photos used; those first in order of name.
    pub most_photos: usize,
    /// File of named links.
    pub catalogue: PathBuf,
    /// Links to run over, by name.
    pub links: Vec<String>,
    /// `auto` (packet level if possible, else stream level), `packet` or `stream`.
    #[serde(default)]
    pub emulation: EmulationKind,
    /// TCP congestion control at packet level.
    #[serde(default = "cubic")]
    pub congestion_control: String,
    /// Rounds over all photos and strategies, after one that is not counted.
    pub rounds: usize,
    /// Limit of each request.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// What is compared.
    pub strategies: StrategyConfig,
}

fn cubic() -> String {
    "cubic".into()
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
        let bad = |why: &str| Err(HarnessError::data(name.clone(), why));
        if config.rounds == 0 || config.most_photos == 0 {
            return bad("rounds and most_photos must be positive");
        }
        if config.links.is_empty() {
            return bad("links: name at least one");
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(600)).contains(&config.deadline) {
            return bad("deadline: use 10ms to 10m");
        }
        config.strategies.check().map_err(|why| HarnessError::data(name.clone(), why))?;
        let beside = |p: &Path| path.parent().unwrap_or(Path::new(".")).join(p);
        (config.bundle, config.photos, config.catalogue) = (beside(&config.bundle), beside(&config.photos), beside(&config.catalogue));
        let catalogue = Catalogue::open(&config.catalogue).map_err(|e| HarnessError::data(e.key, e.why))?;
        let link = |n: &String| Ok((n.clone(), catalogue.link(n).map_err(|e| HarnessError::data(name.clone(), e.to_string()))?.clone()));
        let links = config.links.iter().map(link).collect::<Result<_, HarnessError>>()?;
        let folder = config.catalogue.parent().unwrap_or(Path::new(".")).to_owned();
        Ok(Prepared { config, links, folder })
    }
}
