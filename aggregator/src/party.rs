//! What all services of a party share: its keys, its store, its rounds, its neighbours.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use isthmus_federate::RoundPlan;
use isthmus_federate::round::task_id;
use isthmus_proto::aggregator_v1::{PeerRound, ReportHeader, Round};
use isthmus_secagg::report::{KEY_BYTES, ReportId as ReportTranscript, hash};
use prost::Message;
use tokio::sync::{Notify, watch};

use crate::compute::inbox::Inbox;
use crate::config::Config;
use crate::error::AggregatorError;
use crate::keys::{PublicParty, SecretParty, from_hex};
use crate::peer::client::PeerLink;
use crate::round::{Phase, Record};
use crate::store::{Added, Change, NewReport, ReportId, Store};
use crate::telemetry;

/// Milliseconds since 1970.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// An attempt at computing a round.
pub struct Attempt {
    /// Its number.
    pub epoch: u64,
    /// Messages of the next party.
    pub inbox: Inbox,
}

/// Reports of an open round that are on their way to the other parties (party 0).
#[derive(Default)]
pub struct Forwarding {
    /// Stored by the party with this number.
    pub stored: [HashSet<ReportId>; 3],
    /// Refused by another party: left out.
    pub refused: HashSet<ReportId>,
}

/// A round at this party.
pub struct Cell {
    /// The configuration.
    pub plan: Arc<RoundPlan>,
    /// The state, as stored. Changed through [`Party::change`].
    record: watch::Sender<Record>,
    changing: tokio::sync::Mutex<()>,
    /// The attempt under way.
    pub attempt: watch::Sender<Option<Arc<Attempt>>>,
    /// Reports that are stored here.
    pub reports: watch::Sender<u32>,
    /// What other parties have (party 0).
    pub forwarding: Mutex<Forwarding>,
    /// A report reached another party, or was refused.
    pub forwarded: Notify,
}

impl Cell {
    fn new(plan: RoundPlan, record: Record, reports: u32) -> Self {
        Self {
            plan: Arc::new(plan),
            record: watch::Sender::new(record),
            changing: tokio::sync::Mutex::new(()),
            attempt: watch::Sender::new(None),
            reports: watch::Sender::new(reports),
            forwarding: Mutex::default(),
            forwarded: Notify::new(),
        }
    }

    /// The state.
    pub fn record(&self) -> Record {
        self.record.borrow().clone()
    }

    /// Waits until the state is as wanted.
    pub async fn until(&self, wanted: impl FnMut(&Record) -> bool) {
        // the sender lives as long as this does
        let _ = self.record.subscribe().wait_for(wanted).await;
    }

    /// What other parties have.
    pub fn forwarding(&self) -> MutexGuard<'_, Forwarding> {
        self.forwarding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether every party has stored the report.
    pub fn is_complete(&self, id: &ReportId) -> bool {
        let forwarding = self.forwarding();
        (1..usize::from(self.plan.parties())).all(|p| forwarding.stored[p].contains(id))
    }

    /// Reports that every party has stored.
    pub fn complete(&self) -> usize {
        let forwarding = self.forwarding();
        match self.plan.parties() {
            3 => forwarding.stored[1].intersection(&forwarding.stored[2]).count(),
            _ => forwarding.stored[1].len(),
        }
    }

    /// As operators see it.
    pub fn round(&self) -> Round {
        let record = self.record();
        Round {
            round: record.round,
            state: record.phase.wire().into(),
            reason: record.reason,
            config: Bytes::copy_from_slice(self.plan.bytes()),
            reports: *self.reports.borrow(),
            clients: record.clients,
            kept: record.kept,
            epoch: record.epoch,
            created_ms: record.created_ms,
            sealed_ms: record.sealed_ms,
            done_ms: record.done_ms,
            score: record.score,
        }
    }

    /// As other parties see it.
    pub fn peer_round(&self) -> PeerRound {
        let record = self.record();
        PeerRound {
            state: record.phase.wire().into(),
            epoch: record.epoch,
            opened: record.opened,
            reason: record.reason,
            set_hash: record.set_hash.map(|h| Bytes::copy_from_slice(&h)).unwrap_or_default(),
            computing: self.attempt.borrow().as_ref().is_some_and(|a| !a.inbox.is_closed()),
        }
    }

    /// Ends the attempt under way, if there is one.
    pub fn end_attempt(&self, why: &str) {
        if let Some(attempt) = self.attempt.borrow().as_ref() {
            attempt.inbox.close(why);
        }
    }
}

/// One of the parties.
pub struct Party {
    /// How it was configured.
    pub config: Config,
    /// Its own keys.
    pub keys: SecretParty,
    /// All parties.
    pub parties: Vec<PublicParty>,
    /// Connections to the other parties, by number.
    pub peers: Vec<Option<PeerLink>>,
    /// The task's identifier.
    pub task: [u8; 32],
    /// Its memory.
    pub store: Arc<dyn Store>,
    /// Milliseconds since 1970.
    pub clock: Clock,
    /// Public keys of the authorities.
    pub authorities: Vec<[u8; KEY_BYTES]>,
    revoked: HashSet<[u8; KEY_BYTES]>,
    cells: RwLock<BTreeMap<u64, Arc<Cell>>>,
    /// Counts changes of rounds.
    pub changes: watch::Sender<u64>,
    /// Rounds that need driving (party 0).
    pub work: Notify,
}

impl Party {
    /// Reads keys and rounds.
    ///
    /// # Errors
    /// If a key does not fit the parties' descriptions, or the store cannot be read.
    pub async fn open(config: Config, store: Arc<dyn Store>, clock: Clock) -> Result<Arc<Self>, AggregatorError> {
        let keys = SecretParty::open(&config.keys)?;
        let parties = config.parties.iter().map(|p| PublicParty::open(p)).collect::<Result<Vec<_>, _>>()?;
        let bad = |why: String| Err(AggregatorError::Config(why));
        for (i, (party, path)) in parties.iter().zip(&config.parties).enumerate() {
            if usize::from(party.party) != i {
                return bad(format!("{} describes party {}, not party {i}", path.display(), party.party));
            }
        }
        let own = &parties[usize::from(config.party)];
        if own.key()? != keys.envelope.public() || own.certificate != keys.certificate {
            return bad(format!(
                "{} is not the description of the keys in {}",
                config.parties[usize::from(config.party)].display(),
                config.keys.display()
            ));
        }
        let hexes = |what: &str, list: &[String]| list.iter().map(|k| from_hex::<32>(what, k)).collect::<Result<Vec<_>, _>>();
        let (authorities, revoked) = (hexes("authorities", &config.authorities)?, hexes("revoked", &config.revoked)?);
        let peers = parties
            .iter()
            .map(|p| if p.party == config.party { Ok(None) } else { PeerLink::new(p, &keys, config.peer_timeout).map(Some) })
            .collect::<Result<Vec<_>, _>>()?;
        let mut cells = BTreeMap::new();
        for (record, bytes) in store.rounds().await? {
            let reports = if record.phase.is_final() { record.clients } else { store.reports(record.round).await?.len() as u32 };
            let plan = RoundPlan::decode(&bytes)?;
            cells.insert(record.round, Arc::new(Cell::new(plan, record, reports)));
        }
        let task = task_id(&config.task);
        Ok(Arc::new(Self {
            revoked: revoked.into_iter().collect(),
            config,
            keys,
            parties,
            peers,
            task,
            store,
            clock,
            authorities,
            cells: RwLock::new(cells),
            changes: watch::Sender::new(0),
            work: Notify::new(),
        }))
    }

    /// This party's number.
    pub fn me(&self) -> u8 {
        self.config.party
    }

    /// Now.
    pub fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// A connection to another party.
    ///
    /// # Errors
    /// If there is no such party.
    pub fn peer(&self, party: u8) -> Result<&PeerLink, AggregatorError> {
        let link = self.peers.get(usize::from(party)).and_then(Option::as_ref);
        link.ok_or_else(|| AggregatorError::Invalid(format!("party {party} is no other party")))
    }

    /// All rounds, ascending.
    pub fn cells(&self) -> Vec<Arc<Cell>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// A round.
    ///
    /// # Errors
    /// If it is not known here.
    pub fn cell(&self, round: u64) -> Result<Arc<Cell>, AggregatorError> {
        let cells = self.cells.read().unwrap_or_else(PoisonError::into_inner);
        cells.get(&round).cloned().ok_or_else(|| AggregatorError::NotFound(format!("round {round} is not known here")))
    }

    /// Stores a new round.
    ///
    /// # Errors
    /// If it breaks this party's own rules, the number was used, or too many rounds are under way.
    pub async fn add_round(&self, plan: RoundPlan, record: Record) -> Result<Arc<Cell>, AggregatorError> {
        self.check_rules(&plan)?;
        let round = record.round;
        {
            let cells = self.cells.read().unwrap_or_else(PoisonError::into_inner);
            if cells.last_key_value().is_some_and(|(last, _)| *last >= round) {
                return Err(AggregatorError::State(format!("round {round} is not after the last one known here")));
            }
            if cells.values().filter(|c| !c.record.borrow().phase.is_final()).count() >= self.config.max_rounds {
                return Err(AggregatorError::Busy("too many rounds are under way"));
            }
        }
        let config = Some(Bytes::copy_from_slice(plan.bytes()));
        self.store.save(Change { config, ..Change::from(record.clone()) }).await?;
        let cell = Arc::new(Cell::new(plan, record, 0));
        self.cells.write().unwrap_or_else(PoisonError::into_inner).insert(round, cell.clone());
        self.changed(&cell);
        Ok(cell)
    }

    /// What this party asks of a round, whoever proposes it.
    fn check_rules(&self, plan: &RoundPlan) -> Result<(), AggregatorError> {
        let (config, rules) = (plan.config(), &self.config);
        let bad = |why: String| Err(AggregatorError::Invalid(why));
        if plan.task() != self.task {
            return bad(format!("the round is of another task than {:?}", rules.task));
        }
        if config.min_clients < rules.min_clients {
            return bad(format!(
                "min_clients {} is below the {} that party {} asks for",
                config.min_clients, rules.min_clients, rules.party
            ));
        }
        if config.max_clients > rules.max_clients || config.dim > rules.max_dim {
            return bad(format!("party {} takes up to {} clients of {} coordinates", rules.party, rules.max_clients, rules.max_dim));
        }
        for (p, public) in self.parties.iter().enumerate().take(usize::from(plan.parties())) {
            if plan.envelope_key(p as u8) != Some(&public.key()?) {
                return bad(format!("the round names another envelope key for party {p} than its description"));
            }
        }
        if let Some(other) = plan.authorities().iter().find(|a| !self.authorities.contains(a)) {
            return bad(format!("authority {} is not one of party {}'s", hex::encode(other), rules.party));
        }
        Ok(())
    }

    /// Changes a round's state: stored first, then seen by others.
    ///
    /// # Errors
    /// What `f` refuses, or the store's failure; then nothing has changed.
    pub async fn change(
        &self,
        cell: &Cell,
        f: impl FnOnce(&mut Record) -> Result<Option<Change>, AggregatorError>,
    ) -> Result<Record, AggregatorError> {
        let _changing = cell.changing.lock().await;
        let before = cell.record();
        let mut record = before.clone();
        let extra = f(&mut record)?;
        if record == before && extra.is_none() {
            return Ok(record);
        }
        let change = Change { record: record.clone(), ..extra.unwrap_or_else(|| record.clone().into()) };
        self.store.save(change).await?;
        if record.phase != before.phase {
            tracing::info!(round = record.round, phase = record.phase.name(), epoch = record.epoch, reason = record.reason, "round");
            telemetry::phase(&before, &record);
        }
        if record.phase.is_final() {
            cell.end_attempt("the round has ended");
        }
        cell.record.send_replace(record.clone());
        self.changed(cell);
        Ok(record)
    }

    fn changed(&self, _: &Cell) {
        self.changes.send_modify(|n| *n += 1);
        self.work.notify_one();
    }

    /// Ends a round without a result.
    ///
    /// # Errors
    /// If a share of the result has left this party.
    pub async fn abort(&self, cell: &Cell, reason: &str) -> Result<Record, AggregatorError> {
        let now = self.now_ms();
        let record = self.change(cell, |record| record.abort(reason, now).map(|()| None)).await?;
        cell.end_attempt("the round was aborted");
        Ok(record)
    }

    /// Checks a report's header at an open round: its client, its signature, its place.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check_header(&self, cell: &Cell, header: &ReportHeader) -> Result<ReportTranscript, AggregatorError> {
        cell.record().expect(Phase::Open)?;
        let id = isthmus_federate::report::check(&cell.plan, header, self.now_ms() / 1000)?;
        if self.revoked.contains(&id.client) {
            return Err(AggregatorError::Unauthenticated("the client's enrolment was revoked"));
        }
        Ok(id)
    }

    /// Checks body and envelope of a report whose header was checked, and stores it.
    ///
    /// # Errors
    /// Says what is wrong; nothing is stored then.
    pub async fn add_report(
        &self,
        cell: &Cell,
        id: &ReportTranscript,
        header: &ReportHeader,
        body: Bytes,
    ) -> Result<Added, AggregatorError> {
        let me = self.me();
        if cell.plan.holds_body(me) {
            isthmus_federate::report::check_body(&cell.plan, id, &body)?;
        } else if !body.is_empty() {
            return Err(AggregatorError::Invalid(format!("party {me} takes no bodies")));
        }
        let envelope = header.envelopes.get(usize::from(me)).map(|e| &e[..]).unwrap_or_default();
        self.keys.envelope.open(id, me, envelope, cell.plan.seeds(me))?;
        let report = NewReport { round: id.round, id: id.report, client: id.client, header: header.encode_to_vec().into(), body };
        let added = self.store.add_report(report, cell.plan.config().max_clients).await?;
        if added == Added::New {
            cell.reports.send_modify(|n| *n += 1);
            self.changes.send_modify(|n| *n += 1);
            telemetry::report_stored();
        }
        Ok(added)
    }
}

/// Hash of a sealed set under a configuration.
pub fn set_hash(plan: &RoundPlan, set: &[ReportId]) -> [u8; 32] {
    hash(&[b"isthmus/v1/set", &plan.hash(), &set.concat()])
}
