//! Attempts at computing a sealed round, and opening its result.
//!
//! Written before done: the set before an attempt, the epoch before its first message, the shares of the result before they are
//! asked for, `opened` before one leaves. Once a share has left, no other epoch is ever computed, so a round is opened once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_federate::RoundPlan;
use isthmus_federate::report::check;
use isthmus_federate::round::direction_hash;
use isthmus_proto::aggregator_v1::{Level, LevelHello, LevelMessage, Mode, PeerRound, ReportHeader, State, level_message};
use isthmus_secagg::boolean3::share::seeded;
use isthmus_secagg::boolean3::{Exchange, Party as Role, Shares, ZeroKeys};
use isthmus_secagg::report::ReportId as Transcript;
use isthmus_secagg::{ReportContext, SecAggError, Seed, additive2, le_bytes};
use prost::Message;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::engine::{Counting, Rows, open_additive, opening_words, read_opened};
use super::{MAX_WIDTH, WINDOW};
use crate::error::AggregatorError;
use crate::keys::random_seed;
use crate::party::{Attempt, Cell, Party, set_hash};
use crate::round::Phase;
use crate::store::{CHUNK_BYTES, Change, Opening, ReportId, Store};
use crate::telemetry;

/// Waiting for a neighbour's message, in time limits of a call.
const LEVEL_LIMITS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// So long after its time limit, a party gives up fetching the missing share.
const GRACE_MS: u64 = 10 * 60 * 1000;

/// Fixes the set of a round: once, at least as large as the configuration asks, and of reports that are all here.
///
/// # Errors
/// If another set was fixed, or this one breaks a rule.
pub async fn commit(party: &Party, cell: &Cell, set: Vec<ReportId>) -> Result<(), AggregatorError> {
    let least = cell.plan.config().min_clients as usize;
    if set.len() < least {
        return Err(AggregatorError::Invalid(format!("a set of {} reports; the round needs {least}", set.len())));
    }
    if cell.record().phase == Phase::Sealing {
        let here = party.store.reports(cell.plan.round()).await?;
        if let Some(missing) = set.iter().find(|id| here.binary_search(id).is_err()) {
            return Err(AggregatorError::Invalid(format!("report {} of the set is not here", hex::encode(missing))));
        }
    }
    let (hash, now) = (set_hash(&cell.plan, &set), party.now_ms());
    let committed = party.change(cell, |record| {
        if record.set_hash == Some(hash) {
            return Ok(None);
        }
        record.commit(hash, set.len() as u32, now)?;
        Ok(Some(Change { set: Some(set), ..Change::from(record.clone()) }))
    });
    committed.await.map(drop)
}

/// Starts an attempt in the background.
///
/// # Errors
/// If the round was opened, the epoch was used, or no set is fixed.
pub async fn start(party: &Arc<Party>, cell: &Arc<Cell>, epoch: u64) -> Result<(), AggregatorError> {
    party.change(cell, |record| record.attempt(epoch).map(|()| None)).await?;
    cell.end_attempt("another attempt was started");
    let attempt = Arc::new(Attempt { epoch, inbox: Default::default() });
    cell.attempt.send_replace(Some(attempt.clone()));
    let (party, cell) = (party.clone(), cell.clone());
    tokio::spawn(async move {
        let began = Instant::now();
        let computed = match compute(&party, &cell, &attempt).await {
            Ok(opening) => {
                let opening = Opening { epoch, ..opening };
                let stored = party.change(&cell, |record| {
                    record.reveal(epoch)?;
                    Ok(Some(Change { opening: Some(opening), ..Change::from(record.clone()) }))
                });
                stored.await.map(drop)
            }
            Err(error) => Err(error),
        };
        telemetry::attempt(computed.is_ok().then(|| began.elapsed()));
        match computed {
            Ok(()) => {
                attempt.inbox.close("the attempt is complete");
                reveal(&party, &cell).await;
            }
            Err(error) => {
                tracing::warn!(round = cell.plan.round(), epoch, %error, "the attempt failed");
                attempt.inbox.close(&error.to_string());
            }
        }
    });
    Ok(())
}

/// The committed set with its headers, checked again: the store is not trusted with what was signed.
async fn headers(party: &Party, plan: &RoundPlan) -> Result<(Vec<ReportId>, Vec<(Transcript, ReportHeader)>), AggregatorError> {
    let set = party.store.set(plan.round()).await?;
    let mut headers = Vec::with_capacity(set.len());
    for id in &set {
        let stored = party.store.header(plan.round(), *id).await?;
        let bytes = stored.ok_or_else(|| AggregatorError::Store(format!("the header of report {} is missing", hex::encode(id))))?;
        let header = ReportHeader::decode(bytes).map_err(|e| AggregatorError::Store(e.to_string()))?;
        // an expired credential was valid when the report came
        let transcript = check(plan, &header, 0)?;
        headers.push((transcript, header));
    }
    Ok((set, headers))
}

/// Seeds of every client of the set, from their envelopes.
fn open_envelopes(
    party: &Party,
    plan: &RoundPlan,
    headers: &[(Transcript, ReportHeader)],
) -> Result<Vec<(ReportContext, Vec<Seed>)>, AggregatorError> {
    let me = party.me();
    let open = |(id, header): &(Transcript, ReportHeader)| {
        let envelope = header.envelopes.get(usize::from(me)).map(|e| &e[..]).unwrap_or_default();
        let seeds = party.keys.envelope.open(id, me, envelope, plan.seeds(me))?;
        Ok((ReportContext { task: plan.task(), round: plan.round(), report: id.report }, seeds))
    };
    headers.iter().map(open).collect()
}

async fn compute(party: &Arc<Party>, cell: &Cell, attempt: &Arc<Attempt>) -> Result<Opening, AggregatorError> {
    let plan = cell.plan.clone();
    let (set, headers) = headers(party, &plan).await?;
    if plan.config().mode() == Mode::Additive2 {
        return add_up(party, &plan, &set, &headers).await;
    }
    let direction = direction(party, &plan).await?;
    let limit = party.config.peer_timeout * LEVEL_LIMITS;
    let own_seed = Seed::from_bytes(random_seed()?);
    let (send, receive) = mpsc::channel(WINDOW);
    let hello = LevelHello {
        round: plan.round(),
        set_hash: set_hash(&plan, &set).to_vec().into(),
        epoch: attempt.epoch,
        zero_seed: own_seed.expose().to_vec().into(),
    };
    let gone = |_| AggregatorError::Transport("the exchange ended early".into());
    send.send(LevelMessage { part: Some(level_message::Part::Hello(hello)) }).await.map_err(gone)?;
    let (sender, outgoing) = (party.clone(), attempt.clone());
    let previous = (party.me() + 2) % 3;
    let sending = tokio::spawn(async move {
        let sent = match sender.peer(previous) {
            Ok(link) => link.exchange_levels(ReceiverStream::new(receive)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = sent {
            outgoing.inbox.close(&error.to_string());
        }
    });
    let (worker, inbox, handle) = (party.clone(), attempt.clone(), Handle::current());
    let counted = tokio::task::spawn_blocking(move || {
        let next = inbox.inbox.seed(limit).map_err(SecAggError::Link)?;
        let keys = ZeroKeys { own: own_seed, next, task: plan.task(), round: plan.round(), epoch: inbox.epoch };
        let role = Role::new(worker.me())?;
        let seeds = open_envelopes(&worker, &plan, &headers)?;
        let rows = StoredRows { store: &*worker.store, handle, plan: &plan, role, set: &set, seeds: &seeds };
        let counting = Counting { plan: &plan, party: role, clients: set.len(), direction: direction.as_deref(), keys: &keys };
        counting.run(&rows, |block| Link { block, limit, send: send.clone(), attempt: &inbox })
    });
    let shares = counted.await.map_err(|e| AggregatorError::Transport(e.to_string()))??;
    // the neighbour must have it all before this side counts as done
    sending.await.map_err(|e| AggregatorError::Transport(e.to_string()))?;
    Ok(Opening { epoch: attempt.epoch, own: le_bytes(&shares.own).into(), next: le_bytes(&shares.next).into() })
}

/// Mode A: the sum of this party's residues, two in a word.
async fn add_up(
    party: &Party,
    plan: &RoundPlan,
    set: &[ReportId],
    headers: &[(Transcript, ReportHeader)],
) -> Result<Opening, AggregatorError> {
    let mut sum = additive2::Sum::new(plan.bits(), plan.config().max_clients)?;
    for (id, (context, seeds)) in set.iter().zip(open_envelopes(party, plan, headers)?) {
        match seeds.first() {
            Some(seed) => sum.add_seed(seed, &context),
            None => {
                let body = party.store.body(plan.round(), *id).await?;
                let body = body.ok_or_else(|| AggregatorError::Store(format!("the body of report {} is missing", hex::encode(id))))?;
                sum.add_residues(&body)?;
            }
        }
        tokio::task::yield_now().await;
    }
    let mut own: Vec<u8> = sum.residues().iter().flat_map(|r| r.to_le_bytes()).collect();
    own.resize(plan.bits().div_ceil(2) * 8, 0);
    Ok(Opening { epoch: 0, own: own.into(), next: Bytes::new() })
}

/// The filter's direction: the signs of the mean of an earlier round, in this round's coordinates.
///
/// # Errors
/// If that round has no result here, or another one than party 0's.
pub async fn direction(party: &Party, plan: &RoundPlan) -> Result<Option<Vec<u64>>, AggregatorError> {
    let Some(filter) = plan.filter() else { return Ok(None) };
    let direction = reference(party, plan, filter.reference_round).await?;
    if direction_hash(&direction)[..] != filter.direction_hash[..] {
        return Err(AggregatorError::State(format!("the result of round {} is another one here than at party 0", filter.reference_round)));
    }
    Ok(Some(direction))
}

/// The signs of the mean of round `reference` in `plan`'s coordinates.
///
/// # Errors
/// If that round has no result here, or another dimension.
pub async fn reference(party: &Party, plan: &RoundPlan, reference: u64) -> Result<Vec<u64>, AggregatorError> {
    let earlier = party.cell(reference)?;
    let outcome = party.store.outcome(reference).await?.ok_or_else(|| earlier.record().wrong("done"))?;
    let (kept, plan) = (earlier.record().kept, plan.clone());
    let signs = tokio::task::spawn_blocking(move || {
        if earlier.plan.config().dim != plan.config().dim {
            return Err(AggregatorError::Invalid(format!("filter: round {reference} has another dimension")));
        }
        let counts: Vec<u32> = outcome.counts.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect();
        Ok(plan.direction(&earlier.plan.mean(&counts, kept)?)?)
    });
    signs.await.map_err(|e| AggregatorError::Transport(e.to_string()))?
}

/// The way to the neighbours for one block.
struct Link<'a> {
    block: u32,
    limit: Duration,
    send: mpsc::Sender<LevelMessage>,
    attempt: &'a Attempt,
}

impl Exchange for Link<'_> {
    fn exchange(&mut self, level: u32, message: Vec<u64>) -> Result<Vec<u64>, SecAggError> {
        let words: Bytes = le_bytes(&message).into();
        telemetry::peer_bytes("sent", words.len());
        let message = LevelMessage { part: Some(level_message::Part::Level(Level { block: self.block, level, words })) };
        let sent = self.send.blocking_send(message);
        let answer = self.attempt.inbox.take(self.block, level, self.limit).map_err(SecAggError::Link)?;
        sent.map_err(|_| SecAggError::Link("the previous party is gone".into()))?;
        Ok(answer)
    }
}

/// Shares from the store and from envelopes.
struct StoredRows<'a> {
    store: &'a dyn Store,
    handle: Handle,
    plan: &'a RoundPlan,
    role: Role,
    set: &'a [ReportId],
    seeds: &'a [(ReportContext, Vec<Seed>)],
}

impl StoredRows<'_> {
    /// Rows of the stored share.
    fn stored(&self, from: usize, width: usize) -> Result<Vec<u64>, AggregatorError> {
        let (chunk, start) = (from / MAX_WIDTH, from % MAX_WIDTH * 8);
        let end = (start + width * 8).min(self.plan.body_bytes() - chunk * CHUNK_BYTES);
        let bytes = self.handle.block_on(self.store.chunks(self.plan.round(), chunk as u32, start..end, self.set))?;
        if bytes.len() != self.set.len() * (end - start) {
            return Err(AggregatorError::Store(format!("chunk {chunk} of round {} has another size than its reports", self.plan.round())));
        }
        let mut rows = Vec::with_capacity(self.set.len() * width);
        for row in bytes.chunks_exact(end - start) {
            let (words, rest) = row.as_chunks();
            rows.extend(words.iter().map(|w| u64::from_le_bytes(*w)));
            // the last word of a body may be short
            rows.extend((!rest.is_empty()).then(|| rest.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b))));
        }
        Ok(rows)
    }

    /// Rows of the share with number `share`, from its seeds, of which it is number `place` in the envelope.
    fn seeded(&self, share: u8, place: usize, from: usize, width: usize) -> Result<Vec<u64>, AggregatorError> {
        let mut rows = vec![0; self.seeds.len() * width];
        for ((context, seeds), row) in self.seeds.iter().zip(rows.chunks_exact_mut(width)) {
            let seed = seeds.get(place).ok_or_else(|| AggregatorError::Store("an envelope holds too few seeds".into()))?;
            seeded(seed, context, share, from, row);
        }
        Ok(rows)
    }
}

impl Rows for StoredRows<'_> {
    fn block(&self, from: usize, width: usize) -> Result<Shares, AggregatorError> {
        Ok(match self.role.index() {
            0 => Shares { own: self.stored(from, width)?, next: self.seeded(1, 0, from, width)? },
            1 => Shares { own: self.seeded(1, 0, from, width)?, next: self.seeded(2, 1, from, width)? },
            _ => Shares { own: self.seeded(2, 0, from, width)?, next: self.stored(from, width)? },
        })
    }
}

/// Gives a share of the result to another party. That it leaves is stored first.
///
/// # Errors
/// If this party has no such share of that epoch and set.
pub async fn hand_out(party: &Party, cell: &Cell, epoch: u64, set_hash: &[u8], share: u32, to: u8) -> Result<Bytes, AggregatorError> {
    let (me, parties) = (u32::from(party.me()), u32::from(cell.plan.parties()));
    let own = share == me;
    if !own && (parties == 2 || share != (me + 1) % 3) {
        return Err(AggregatorError::Invalid(format!("party {me} has no share {share}")));
    }
    party.change(cell, |record| record.open(epoch, set_hash).map(|()| None)).await?;
    let opening = party.store.opening(cell.plan.round()).await?.filter(|o| o.epoch == epoch || parties == 2);
    let opening = opening.ok_or_else(|| AggregatorError::NotFound(format!("the shares of round {} are gone", cell.plan.round())))?;
    tracing::info!(round = cell.plan.round(), epoch, share, to, "a share of the result leaves");
    Ok(if own { opening.own } else { opening.next })
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect()
}

/// Fetches the share that this party lacks, and with it the result; tries until the round's time is over.
pub async fn reveal(party: &Arc<Party>, cell: &Arc<Cell>) {
    let mut pause = PAUSE;
    loop {
        let record = cell.record();
        if record.phase != Phase::Revealing || party.now_ms() > cell.plan.config().compute_until_ms + GRACE_MS {
            return;
        }
        match try_reveal(party, cell, record.epoch).await {
            Ok(()) => return,
            Err(error) => tracing::info!(round = record.round, epoch = record.epoch, %error, "the missing share is not there yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

async fn try_reveal(party: &Party, cell: &Cell, epoch: u64) -> Result<(), AggregatorError> {
    let (plan, record, me) = (&cell.plan, cell.record(), party.me());
    let round = plan.round();
    let hash = record.set_hash.ok_or_else(|| record.wrong("sealed"))?;
    let opening = party.store.opening(round).await?.ok_or_else(|| AggregatorError::Store(format!("no shares of round {round}")))?;
    let bytes = opening_words(plan, record.clients as usize) * 8;
    let opened = if plan.config().mode() == Mode::Additive2 {
        let other = 1 - me;
        let share = party.peer(other)?.opening(round, epoch, &hash, other, bytes).await?;
        open_additive(plan, &words(&opening.own), &words(&share))?
    } else {
        let (previous, next) = ((me + 2) % 3, (me + 1) % 3);
        let (a, b) = tokio::join!(async { party.peer(previous)?.opening(round, epoch, &hash, previous, bytes).await }, async {
            party.peer(next)?.opening(round, epoch, &hash, previous, bytes).await
        },);
        // both others hold the missing share: one is enough, but two must be equal
        let share = match (a, b) {
            (Ok(a), Ok(b)) if a == b => a,
            (Ok(_), Ok(_)) => {
                return Err(AggregatorError::State(format!("the other parties' shares of round {round} differ: one of them is wrong")));
            }
            (Ok(share), Err(_)) | (Err(_), Ok(share)) => share,
            (Err(error), Err(_)) => return Err(error),
        };
        Shares { own: words(&opening.own), next: words(&opening.next) }.open(&words(&share))?
    };
    finish(party, cell, epoch, &opened).await
}

async fn finish(party: &Party, cell: &Cell, epoch: u64, opened: &[u64]) -> Result<(), AggregatorError> {
    let (outcome, kept) = read_opened(&cell.plan, cell.record().clients as usize, opened)?;
    let now = party.now_ms();
    let finished = party.change(cell, |record| {
        if record.phase == Phase::Done || record.epoch != epoch {
            return Ok(None);
        }
        record.finish(kept, now);
        Ok(Some(Change { outcome: Some(outcome), ..Change::from(record.clone()) }))
    });
    finished.await.map(drop)
}

/// For a party whose attempt was lost while both others have finished it: takes all shares from them.
///
/// # Errors
/// If the others have not both finished the same epoch of the same set, or disagree.
pub async fn catch_up(party: &Party, cell: &Cell) -> Result<(), AggregatorError> {
    let (plan, record, me) = (&cell.plan, cell.record(), party.me());
    if plan.parties() != 3 || record.phase != Phase::Computing {
        return Err(record.wrong("computing"));
    }
    let hash = record.set_hash.ok_or_else(|| record.wrong("sealed"))?;
    let (next, previous) = ((me + 1) % 3, (me + 2) % 3);
    let (a, b) = (party.peer(next)?.round(plan).await?, party.peer(previous)?.round(plan).await?);
    let finished = |r: &PeerRound| matches!(r.state(), State::Revealing | State::Done) && r.set_hash[..] == hash;
    if !finished(&a) || !finished(&b) || a.epoch != b.epoch || a.epoch < record.epoch {
        return Err(AggregatorError::State(format!("the other parties have not finished round {}", plan.round())));
    }
    let (round, epoch, bytes) = (plan.round(), a.epoch, opening_words(plan, record.clients as usize) * 8);
    let fetch = async |from: u8, share: u8| party.peer(from)?.opening(round, epoch, &hash, share, bytes).await;
    let (s_next, s_previous, check) = (fetch(next, next).await?, fetch(previous, previous).await?, fetch(next, previous).await?);
    if s_previous != check {
        return Err(AggregatorError::State(format!("the other parties' shares of round {round} differ: one of them is wrong")));
    }
    let s_own = fetch(previous, me).await?;
    let opened = Shares { own: words(&s_own), next: words(&s_next) }.open(&words(&s_previous))?;
    party.change(cell, |record| record.adopt(epoch).map(|()| None)).await?;
    finish(party, cell, epoch, &opened).await
}
