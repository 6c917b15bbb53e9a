//! A round's state at one party. Every change is stored before anything is done because of it.

use isthmus_proto::aggregator_v1::State;
use serde::{Deserialize, Serialize};

use crate::error::AggregatorError;

/// How far a round is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Configured; clients do not know it yet.
    Created,
    /// Takes reports.
    Open,
    /// Takes no more; the set is being agreed on.
    Sealing,
    /// The set is fixed; its bits are being counted.
    Computing,
    /// This party's shares of the result are stored; the missing one is being fetched.
    Revealing,
    /// The result is known.
    Done,
    /// Ended without one.
    Aborted,
}

impl Phase {
    /// Nothing more will happen.
    pub fn is_final(self) -> bool {
        self >= Self::Done
    }

    /// Name in metrics and pages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Open => "open",
            Self::Sealing => "sealing",
            Self::Computing => "computing",
            Self::Revealing => "revealing",
            Self::Done => "done",
            Self::Aborted => "aborted",
        }
    }

    /// As on the wire.
    pub fn wire(self) -> State {
        match self {
            Self::Created => State::Created,
            Self::Open => State::Open,
            Self::Sealing => State::Sealing,
            Self::Computing => State::Computing,
            Self::Revealing => State::Revealing,
            Self::Done => State::Done,
            Self::Aborted => State::Aborted,
        }
    }
}

/// What a party remembers of a round, beside its configuration, its reports and its shares of the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The round.
    pub round: u64,
    /// How far it is.
    pub phase: Phase,
    /// Why it was aborted.
    pub reason: String,
    /// Attempts at computing that were started.
    pub epoch: u64,
    /// A share of the result has left this party, in this epoch: no other may be computed.
    pub opened: bool,
    /// Hash of the sealed set and the configuration.
    pub set_hash: Option<[u8; 32]>,
    /// Reports in the set.
    pub clients: u32,
    /// After filtering.
    pub kept: u32,
    /// Complete reports at which party 0 seals.
    pub target: u32,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// When the set was fixed.
    pub sealed_ms: u64,
    /// When the round ended.
    pub done_ms: u64,
    /// How well the model did afterwards, if somebody noted it.
    #[serde(default)]
    pub score: Option<f64>,
}

impl Record {
    /// A new round.
    pub fn new(round: u64, target: u32, now_ms: u64) -> Self {
        Self {
            round,
            phase: Phase::Created,
            reason: String::new(),
            epoch: 0,
            opened: false,
            set_hash: None,
            clients: 0,
            kept: 0,
            target,
            created_ms: now_ms,
            sealed_ms: 0,
            done_ms: 0,
            score: None,
        }
    }

    /// Fails unless the round is in `phase`.
    ///
    /// # Errors
    /// [`AggregatorError::State`] says where it is.
    pub fn expect(&self, phase: Phase) -> Result<(), AggregatorError> {
        if self.phase == phase { Ok(()) } else { Err(self.wrong(phase.name())) }
    }

    /// The error of a call that needs another state.
    pub fn wrong(&self, wanted: &str) -> AggregatorError {
        let why = if self.reason.is_empty() { String::new() } else { format!(" ({})", self.reason) };
        AggregatorError::State(format!("round {} is {}{why}, not {wanted}", self.round, self.phase.name()))
    }

    /// Uploads end.
    ///
    /// # Errors
    /// If the round is not open (or sealing already).
    pub fn seal(&mut self) -> Result<(), AggregatorError> {
        if self.phase != Phase::Sealing {
            self.expect(Phase::Open)?;
            self.phase = Phase::Sealing;
        }
        Ok(())
    }

    /// The set is fixed.
    ///
    /// # Errors
    /// If the round is not sealing, or another set was committed.
    pub fn commit(&mut self, set_hash: [u8; 32], clients: u32, now_ms: u64) -> Result<(), AggregatorError> {
        if let Some(committed) = self.set_hash {
            return if committed == set_hash { Ok(()) } else { Err(self.wrong("open to another set")) };
        }
        self.expect(Phase::Sealing)?;
        (self.phase, self.set_hash, self.clients, self.kept, self.sealed_ms) = (Phase::Computing, Some(set_hash), clients, clients, now_ms);
        Ok(())
    }

    /// A new attempt begins.
    ///
    /// # Errors
    /// If no set is committed, a share of the result has left this party already, or the epoch was used.
    pub fn attempt(&mut self, epoch: u64) -> Result<(), AggregatorError> {
        if self.opened {
            return Err(AggregatorError::State(format!(
                "round {} was opened in epoch {}: it cannot be computed again",
                self.round, self.epoch
            )));
        }
        if !matches!(self.phase, Phase::Computing | Phase::Revealing) {
            return Err(self.wrong("computing"));
        }
        if epoch <= self.epoch {
            return Err(AggregatorError::State(format!("epoch {epoch} of round {} was used already (up to {})", self.round, self.epoch)));
        }
        (self.phase, self.epoch) = (Phase::Computing, epoch);
        Ok(())
    }

    /// The counting of `epoch` is complete.
    ///
    /// # Errors
    /// If another attempt has begun.
    pub fn reveal(&mut self, epoch: u64) -> Result<(), AggregatorError> {
        self.expect(Phase::Computing)?;
        if epoch != self.epoch {
            return Err(AggregatorError::State(format!("epoch {epoch} of round {} was replaced by {}", self.round, self.epoch)));
        }
        self.phase = Phase::Revealing;
        Ok(())
    }

    /// Both other parties have finished `epoch`: their result will be taken.
    ///
    /// # Errors
    /// If the round is not computing, or a later epoch was started here.
    pub fn adopt(&mut self, epoch: u64) -> Result<(), AggregatorError> {
        self.expect(Phase::Computing)?;
        if epoch < self.epoch {
            return Err(AggregatorError::State(format!("epoch {epoch} of round {} was replaced by {}", self.round, self.epoch)));
        }
        self.epoch = epoch;
        Ok(())
    }

    /// A share is about to leave.
    ///
    /// # Errors
    /// If this party has none of that epoch and set.
    pub fn open(&mut self, epoch: u64, set_hash: &[u8]) -> Result<(), AggregatorError> {
        if !matches!(self.phase, Phase::Revealing | Phase::Done) || epoch != self.epoch || self.set_hash.is_none_or(|h| h[..] != *set_hash)
        {
            return Err(AggregatorError::State(format!(
                "round {} is {} in epoch {}: there is no share of epoch {epoch} of that set",
                self.round,
                self.phase.name(),
                self.epoch
            )));
        }
        self.opened = true;
        Ok(())
    }

    /// The result is known.
    pub fn finish(&mut self, kept: u32, now_ms: u64) {
        (self.phase, self.opened, self.kept, self.done_ms) = (Phase::Done, true, kept, now_ms);
    }

    /// Ends the round without a result.
    ///
    /// # Errors
    /// If a share of the result has left this party, or the round is done.
    pub fn abort(&mut self, reason: &str, now_ms: u64) -> Result<(), AggregatorError> {
        if self.phase == Phase::Aborted {
            return Ok(());
        }
        if self.opened || self.phase == Phase::Done {
            return Err(AggregatorError::State(format!("round {} was opened already: it cannot be aborted", self.round)));
        }
        (self.phase, self.reason, self.done_ms) = (Phase::Aborted, reason.chars().take(200).collect(), now_ms);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn computing() -> Record {
        let mut record = Record::new(1, 2, 0);
        record.phase = Phase::Open;
        record.seal().unwrap();
        record.commit([1; 32], 2, 5).unwrap();
        record
    }

    #[test]
    fn a_round_is_opened_in_one_epoch_only() {
        let mut record = computing();
        assert!(record.attempt(0).is_err());
        record.attempt(1).unwrap();
        assert!(record.open(1, &[1; 32]).is_err(), "nothing is there to be opened");
        record.reveal(1).unwrap();
        assert!(record.open(2, &[1; 32]).is_err() && record.open(1, &[2; 32]).is_err());
        record.attempt(2).unwrap();
        assert!(record.open(1, &[1; 32]).is_err(), "the first attempt is void");
        assert!(record.reveal(1).is_err(), "a late end of the first attempt");
        record.reveal(2).unwrap();
        record.open(2, &[1; 32]).unwrap();
        assert!(record.attempt(3).is_err() && record.abort("late", 9).is_err());
        record.open(2, &[1; 32]).unwrap();
        record.finish(2, 9);
        assert!(record.attempt(3).is_err() && record.abort("late", 9).is_err());
        record.open(2, &[1; 32]).unwrap();
    }

    #[test]
    fn the_set_is_fixed_once() {
        let mut record = computing();
        record.commit([1; 32], 2, 6).unwrap();
        assert!(record.commit([2; 32], 2, 6).is_err() && record.seal().is_err());
        let mut aborted = Record::new(2, 2, 0);
        aborted.abort("nobody came", 1).unwrap();
        assert!(aborted.seal().is_err() && aborted.commit([1; 32], 2, 3).is_err() && aborted.attempt(1).is_err());
        assert!(aborted.wrong("open").to_string().contains("nobody came"));
    }
}
