//! Learning together: tasks, clients' data, local training (needs libtorch).
//!
//! A round's `training` is TOML ([`Training`]); its model is a safetensors file ([`Model`]). A client starts from the model, trains
//! on its own data, and votes with the difference ([`client`]).

pub mod attack;
pub mod bundle;
pub mod client;
pub mod fashion;
pub mod model;
pub mod network;
pub mod partition;
pub mod shakespeare;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use model::Model;

use crate::error::FederateError;

/// Place of the extra bit that says whether a client's update was longer than the norm limit.
pub const CLIPPED_BIT: usize = 0;

/// What a client is asked to do in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Name of the task, for example `fashion-mnist`.
    pub task: String,
    /// Passes over the client's own data.
    pub epochs: u32,
    /// Examples of a step.
    pub batch_size: usize,
    /// Step size of the optimiser.
    pub learning_rate: f64,
    /// Of the task `bundle`: which bundle is fitted, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<bundle::Fit>,
}

impl Training {
    /// From a round's configuration.
    ///
    /// # Errors
    /// Says what makes no sense.
    pub fn parse(text: &str) -> Result<Self, FederateError> {
        let training: Self = toml::from_str(text).map_err(|e| FederateError::Invalid(format!("training: {e}")))?;
        training.check()?;
        Ok(training)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// Says what makes no sense.
    pub fn check(&self) -> Result<(), FederateError> {
        let fits = (1..=1000).contains(&self.epochs) && (1..=65_536).contains(&self.batch_size);
        if self.bundle.is_some() != (self.task == bundle::TASK) {
            return Err(FederateError::Invalid(format!("training.bundle: needed by the task {:?}, and by no other", bundle::TASK)));
        }
        let positive = |v: f64| v.is_finite() && v > 0.0;
        if self.bundle.as_ref().is_some_and(|f| !positive(f.rate) || !(f.kl == 0.0 || positive(f.kl))) {
            return Err(FederateError::Invalid("training.bundle: rate above 0, kl at least 0".into()));
        }
        if fits && positive(self.learning_rate) {
            return Ok(());
        }
        Err(FederateError::Invalid("training: epochs 1 to 1000, batch_size 1 to 65536, learning_rate above 0".into()))
    }

    /// As TOML.
    ///
    /// # Errors
    /// None for checked values.
    pub fn encode(&self) -> Result<String, FederateError> {
        toml::to_string(self).map_err(|e| FederateError::Invalid(format!("training: {e}")))
    }
}

/// How well a model does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Examples that it got right.
    pub right: usize,
    /// Of so many.
    pub of: usize,
    /// Mean bytes of a photo, where the task has photos.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<f64>,
}

impl Score {
    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.of.max(1) as f64
    }
}

/// A task with one client's data. Not shared between threads: networks are not.
pub trait Learner {
    /// A network that has learned nothing.
    ///
    /// # Errors
    /// If libtorch fails.
    fn initial(&mut self, seed: u64) -> Result<Model, FederateError>;

    /// What local training on the examples `own` changes: a vector as long as the model. The same `seed` gives the same.
    ///
    /// # Errors
    /// If the model is another task's, or libtorch fails.
    fn update(&mut self, model: &Model, own: &Examples, training: &Training, seed: u64) -> Result<Vec<f32>, FederateError>;

    /// How well the model does on the task's test examples, which no client has.
    ///
    /// # Errors
    /// If the model is another task's, or libtorch fails.
    fn score(&mut self, model: &Model) -> Result<Score, FederateError>;

    /// Parts of the training examples for `clients` clients.
    ///
    /// # Errors
    /// If there are too few examples, or the task has no such split.
    fn deal(&self, clients: usize, split: partition::Split, seed: u64) -> Result<Vec<Examples>, FederateError>;
}

/// A client's part of the training data.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Examples {
    /// Places in the task's data.
    pub places: Vec<usize>,
    /// Labels are replaced by 9 - label: an attacker's data (tests and experiments).
    pub flipped: bool,
}

/// Where a task's data are.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Folder with the examples.
    pub data: PathBuf,
    /// The deployed bundle (task `bundle`).
    pub bundle: Option<PathBuf>,
    /// Folder with imported backbones (task `bundle`).
    pub backbones: Option<PathBuf>,
}

/// A learner for a task.
///
/// # Errors
/// If the task is unknown or its data are missing.
pub fn learner(task: &str, sources: &Sources) -> Result<Box<dyn Learner>, FederateError> {
    match task {
        fashion::TASK => Ok(Box::new(fashion::Fashion::open(&sources.data)?)),
        shakespeare::TASK => Ok(Box::new(shakespeare::Shakespeare::open(&sources.data)?)),
        bundle::TASK => {
            let (Some(bundle), Some(backbones)) = (&sources.bundle, &sources.backbones) else {
                return Err(FederateError::Invalid("the task \"bundle\" needs a bundle and backbones".into()));
            };
            Ok(Box::new(bundle::Adaptation::open(&sources.data, bundle, backbones)?))
        }
        _ => {
            let known = [fashion::TASK, shakespeare::TASK, bundle::TASK].join(", ");
            Err(FederateError::Invalid(format!("training.task: {task:?} is unknown; there are {known}")))
        }
    }
}

pub(crate) fn torch(error: tch::TchError) -> FederateError {
    FederateError::Invalid(format!("libtorch: {error}"))
}
