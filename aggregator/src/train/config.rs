//! What to train, by whom, how.

use std::path::{Path, PathBuf};
use std::time::Duration;

use isthmus_federate::train::attack::Attack;
use isthmus_federate::train::partition::Split;
use isthmus_federate::train::{Sources, Training};
use serde::{Deserialize, Serialize};

use crate::error::AggregatorError;

/// configs/federated.toml explains each key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder with the task's data.
    pub data: PathBuf,
    /// The deployed bundle (task `bundle`).
    #[serde(default)]
    pub bundle: Option<PathBuf>,
    /// Folder with imported backbones (task `bundle`).
    #[serde(default)]
    pub backbones: Option<PathBuf>,
    /// Folder for checkpoints and history.
    pub out: PathBuf,
    /// Rounds in all.
    pub rounds: u64,
    /// Of everything that is drawn here.
    #[serde(default)]
    pub seed: u64,
    /// What clients are asked to do.
    pub training: Training,
    /// The clients.
    pub fleet: Fleet,
    /// How updates are summed.
    pub aggregation: Aggregation,
    /// The three parties.
    pub parties: Parties,
    /// Simulated clients that send poisoned updates (experiments).
    #[serde(default)]
    pub attack: Option<Attackers>,
}

/// The clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Simulated in this process; each has its own part of the data.
    pub simulated: usize,
    /// Of these take part in a round, drawn at random; 0: all.
    #[serde(default)]
    pub per_round: usize,
    /// How the clients' data differ.
    #[serde(default)]
    pub split: Split,
    /// After the simulated clients, so long is waited for others (`edge-client federate`).
    #[serde(default, with = "humantime_serde")]
    pub linger: Duration,
    /// Parts into which the data is divided, if others than the simulated clients have some too; 0: as many as are simulated.
    #[serde(default)]
    pub parts: usize,
}

/// How updates are summed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregation {
    /// `secure`, or `float32`: plain averaging in this process, for comparison.
    pub kind: Kind,
    /// How updates are spread before rounding.
    #[serde(default)]
    pub transform: Spread,
    /// Longest update in the first round.
    pub norm: f32,
    /// Share of clients whose updates are to be shorter than the limit; it follows them (Andrew et al. 2021). 0: it stays.
    #[serde(default)]
    pub norm_quantile: f64,
    /// The mean is multiplied by this.
    #[serde(default = "one")]
    pub server_rate: f64,
    /// A round with fewer clients has no result.
    #[serde(default = "two")]
    pub min_clients: u32,
    /// So many clients are left out, those that agree least with the last round's mean; 0: none.
    #[serde(default)]
    pub drop: u32,
    /// Time for uploads.
    #[serde(with = "humantime_serde")]
    pub upload: Duration,
    /// Time for computing.
    #[serde(with = "humantime_serde")]
    pub compute: Duration,
}

/// How updates are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// By three parties, a bit a coordinate.
    Secure,
    /// In the clear.
    Float32,
}

/// How updates are spread before rounding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// Randomised Hadamard transform.
    #[default]
    Hadamard,
    /// Kashin's representation.
    Kashin,
}

/// The three parties: started here, or running elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Parties {
    /// Folder for a trial on this machine; the parties are started here and end with this process.
    Local(PathBuf),
    /// Party 0 of running parties.
    Remote(Remote),
}

/// Where party 0 is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// Its listener for clients.
    pub url: String,
    /// Certificate to trust instead of the public ones.
    pub certificate: Option<PathBuf>,
    /// File with the operator's token.
    pub token: PathBuf,
    /// Key that enrols the simulated clients; needed if there are any.
    pub authority: Option<PathBuf>,
}

/// Simulated clients that send poisoned updates.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attackers {
    /// What they send.
    pub kind: Attack,
    /// Share of the simulated clients.
    pub share: f64,
}

fn one() -> f64 {
    1.0
}

fn two() -> u32 {
    2
}

impl TrainConfig {
    /// Reads and checks a file; paths in it are relative to its folder.
    ///
    /// # Errors
    /// Names the file and the key that is wrong.
    pub fn open(path: &Path) -> Result<Self, AggregatorError> {
        let text = std::fs::read_to_string(path).map_err(|cause| AggregatorError::Io { path: path.into(), cause })?;
        let bad = |why: String| AggregatorError::Config(format!("{}: {why}", path.display()));
        let mut config: Self = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
        config.check().map_err(bad)?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let join = |p: &mut PathBuf| *p = folder.join(&*p);
        join(&mut config.data);
        join(&mut config.out);
        [&mut config.bundle, &mut config.backbones].into_iter().flatten().for_each(join);
        match &mut config.parties {
            Parties::Local(trial) => join(trial),
            Parties::Remote(remote) => {
                join(&mut remote.token);
                [&mut remote.certificate, &mut remote.authority].into_iter().flatten().for_each(join);
            }
        }
        if let (Some(fit), Some(bundle)) = (&mut config.training.bundle, &config.bundle) {
            fit.name_bundle(bundle)?;
        }
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let (fleet, sum) = (&self.fleet, &self.aggregation);
        self.training.check().map_err(|e| e.to_string())?;
        if self.rounds == 0 || self.rounds > 1_000_000 {
            return Err("rounds: 1 to 1000000".into());
        }
        if fleet.per_round > fleet.simulated || (fleet.parts > 0 && fleet.parts < fleet.simulated) {
            return Err("fleet: per_round is at most simulated, parts at least".into());
        }
        if sum.kind == Kind::Float32 && fleet.simulated == 0 {
            return Err("aggregation.kind = \"float32\" needs simulated clients".into());
        }
        if sum.kind == Kind::Secure && fleet.simulated > 0 && fleet.linger.is_zero() && (self.per_round() as u32) < sum.min_clients {
            let why = "clients take part and fleet.linger leaves no time for others: no round could reach aggregation.min_clients";
            return Err(format!("{} simulated {why} = {}", self.per_round(), sum.min_clients));
        }
        let positive = |v: f64| v.is_finite() && v > 0.0;
        if !(positive(f64::from(sum.norm)) && positive(sum.server_rate) && (0.0..1.0).contains(&sum.norm_quantile)) {
            return Err("aggregation: norm and server_rate are above 0, norm_quantile is from 0 to 1".into());
        }
        if sum.drop > 0 && sum.drop >= sum.min_clients {
            return Err("aggregation.drop must be below min_clients".into());
        }
        if sum.upload.is_zero() || sum.compute.is_zero() {
            return Err("aggregation: upload and compute take time".into());
        }
        if self.attack.is_some_and(|a| !(0.0..=0.5).contains(&a.share)) {
            return Err("attack.share: 0 to 0.5".into());
        }
        if let Parties::Remote(remote) = &self.parties
            && fleet.simulated > 0
            && remote.authority.is_none()
            && sum.kind == Kind::Secure
        {
            return Err("parties.remote.authority: needed to enrol simulated clients".into());
        }
        Ok(())
    }

    /// Where the task's data are.
    pub fn sources(&self) -> Sources {
        Sources { data: self.data.clone(), bundle: self.bundle.clone(), backbones: self.backbones.clone() }
    }

    /// Simulated clients of a round.
    pub fn per_round(&self) -> usize {
        if self.fleet.per_round == 0 { self.fleet.simulated } else { self.fleet.per_round }
    }
}
