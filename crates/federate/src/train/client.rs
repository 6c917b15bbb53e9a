//! A client's part in rounds: train, vote, remember what was sent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use isthmus_proto::aggregator_v1::ReportHeader;
use isthmus_secagg::quantise::norm;
use isthmus_secagg::{Bits, Quantiser};
use prost::Message;
use rand::CryptoRng;
use serde::{Deserialize, Serialize};

use super::{CLIPPED_BIT, Examples, Learner, Model, Training};
use crate::error::FederateError;
use crate::participant::{Found, Participant};
use crate::report::{Identity, Report, make};
use crate::round::RoundPlan;

/// Between two looks at whether a round is open.
const LOOK: Duration = Duration::from_secs(1);

/// An update as the bits of a report: coded coordinates, then the extra bits, of which the first says whether the update was
/// shortened.
///
/// # Errors
/// If the update has another length, or a value is not finite.
pub fn vote(plan: &RoundPlan, quantiser: &Quantiser, update: &[f32], rng: &mut impl CryptoRng) -> Result<Bits, FederateError> {
    let coded = quantiser.quantise(update, &plan.scale()?, rng)?;
    Ok(with_extra(plan, &coded, norm(update) > f64::from(plan.config().norm)))
}

/// Coded bits with the extra bits behind them.
pub fn with_extra(plan: &RoundPlan, coded: &Bits, clipped: bool) -> Bits {
    let place = plan.coded() + CLIPPED_BIT;
    let extra = |k: usize| if clipped && place < plan.bits() && place / 64 == k { 1 << (place % 64) } else { 0 };
    Bits::fill(plan.bits(), |k| coded.words().get(k).copied().unwrap_or(0) | extra(k))
}

/// What a client remembers between rounds, and over a crash: which round it has voted in, and the report if it is not known to
/// have arrived. A report is sealed and masked: the file holds no secret.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    voted: u64,
    header: Vec<u8>,
    body: Vec<u8>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// No round is open to this client.
    Waiting,
    /// A round was found; training begins.
    Training {
        /// The round.
        round: u64,
    },
    /// The report was stored.
    Voted {
        /// The round.
        round: u64,
        /// Bytes of the report.
        bytes: usize,
    },
    /// The round's time was over, or the report was refused.
    Missed {
        /// The round.
        round: u64,
        /// Why.
        why: String,
    },
}

/// A client that takes part in rounds as they come.
pub struct Session {
    participant: Participant,
    identity: Identity,
    own: Examples,
    memory: Memory,
    file: Option<PathBuf>,
}

impl Session {
    /// A client with its own examples; it remembers what it sent in `file`.
    ///
    /// # Errors
    /// If the file exists and holds something else.
    pub fn new(participant: Participant, identity: Identity, own: Examples, file: Option<PathBuf>) -> Result<Self, FederateError> {
        let memory = match &file {
            Some(path) if path.exists() => Self::remembered(path)?,
            _ => Memory::default(),
        };
        Ok(Self { participant, identity, own, memory, file })
    }

    fn remembered(path: &Path) -> Result<Memory, FederateError> {
        let bad = |e: String| FederateError::Invalid(format!("{}: {e}", path.display()));
        let text = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
        serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))
    }

    /// Written whole or not at all.
    fn remember(&self) -> Result<(), FederateError> {
        let Some(path) = &self.file else { return Ok(()) };
        let bad = |e: String| FederateError::Invalid(format!("{}: {e}", path.display()));
        let text = serde_json::to_vec(&self.memory).map_err(|e| bad(e.to_string()))?;
        let new = path.with_extension("new");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path)).map_err(|e| bad(e.to_string()))
    }

    /// Takes part in one round, if one is open: says what happened.
    ///
    /// # Errors
    /// If the coordinator cannot be reached, the file cannot be written, or training fails.
    pub async fn turn(
        &mut self,
        learner: &mut dyn Learner,
        rng: &mut (impl CryptoRng + Send),
        mut tell: impl FnMut(Event),
    ) -> Result<(), FederateError> {
        if !self.memory.header.is_empty() {
            // a crash came between writing this and its answer: the same report again counts once
            let header = ReportHeader::decode(Bytes::from(self.memory.header.clone()));
            let header = header.map_err(|e| FederateError::Invalid(format!("the remembered report: {e}")))?;
            let report = Report { header, body: self.memory.body.clone() };
            return self.send(&report, LOOK * 30, &mut tell).await;
        }
        let plan = match self.participant.round(&self.identity.key.public()).await? {
            Found::Round(plan) if plan.round() > self.memory.voted => plan,
            Found::Round(_) => {
                tell(Event::Waiting);
                tokio::time::sleep(LOOK / 4).await;
                return Ok(());
            }
            Found::Nothing(pause) => {
                tell(Event::Waiting);
                tokio::time::sleep(pause.min(LOOK)).await;
                return Ok(());
            }
        };
        let task = match (Training::parse(&plan.config().training), &plan.config().model) {
            (Ok(training), Some(named)) => Ok((training, named)),
            (Err(error), _) => Err(error.to_string()),
            (_, None) => Err("the round has no model".into()),
        };
        let (training, named) = match task {
            Ok(task) => task,
            Err(why) => {
                // somebody else's round: the next one may be for this client
                self.memory.voted = plan.round();
                tell(Event::Missed { round: plan.round(), why });
                return Ok(());
            }
        };
        tell(Event::Training { round: plan.round() });
        let model = Model::decode(&self.participant.model(named).await?)?;
        if model.dim() != plan.config().dim as usize {
            return Err(FederateError::Invalid(format!("a model of {} values in a round of {}", model.dim(), plan.config().dim)));
        }
        let update = learner.update(&model, &self.own, &training, rng.next_u64())?;
        let bits = vote(&plan, &plan.quantiser()?, &update, rng)?;
        let report = make(&plan, &bits, &self.identity, rng)?;
        self.memory = Memory { voted: plan.round(), header: report.header.encode_to_vec(), body: report.body.clone() };
        self.remember()?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let left = Duration::from_millis(plan.config().upload_until_ms.saturating_sub(now)).max(LOOK);
        self.send(&report, left, &mut tell).await
    }

    async fn send(&mut self, report: &Report, limit: Duration, tell: &mut impl FnMut(Event)) -> Result<(), FederateError> {
        let round = report.header.round;
        match self.participant.upload_until_stored(report, limit).await {
            Ok(_) => tell(Event::Voted { round, bytes: report.body.len() + report.header.encoded_len() }),
            Err(error) if error.is_transient() => return Err(error),
            Err(error) => tell(Event::Missed { round, why: error.to_string() }),
        }
        self.memory = Memory { voted: round, ..Memory::default() };
        self.remember()
    }

    /// The last round that this client has voted in.
    pub fn voted(&self) -> u64 {
        self.memory.voted
    }
}
