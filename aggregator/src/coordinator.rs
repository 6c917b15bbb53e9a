//! Party 0 drives rounds from state to state; every party ends what is overdue and takes up what a restart left.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use isthmus_proto::aggregator_v1::State;
use tokio_util::sync::CancellationToken;

use crate::compute::attempt;
use crate::error::AggregatorError;
use crate::party::{Cell, Party};
use crate::peer::client::is_transient;
use crate::peer::forward;
use crate::round::Phase;
use crate::store::ReportId;
use crate::telemetry;

const SWEEP: Duration = Duration::from_millis(500);
/// Parties other than 0 wait this much longer for it to end a round.
const GRACE_MS: u64 = 5000;
const PAUSE: Duration = Duration::from_millis(300);
/// Waiting for other parties to store the last reports.
const FLUSH: Duration = Duration::from_secs(10);
const ABORT_TRIES: usize = 3;

/// Runs until `stop`: takes up all rounds that are under way, and new ones.
pub async fn run(party: Arc<Party>, stop: CancellationToken) {
    for cell in party.cells().into_iter().filter(|c| c.record().phase == Phase::Revealing) {
        let party = party.clone();
        tokio::spawn(async move { attempt::reveal(&party, &cell).await });
    }
    let mut driven = HashSet::new();
    let mut tick = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => sweep(&party).await,
            () = party.work.notified() => {}
        }
        let under_way: Vec<Arc<Cell>> = party.cells().into_iter().filter(|c| !c.record().phase.is_final()).collect();
        telemetry::under_way(under_way.len());
        if party.me() == 0 {
            for cell in under_way.into_iter().filter(|c| driven.insert(c.plan.round())) {
                tokio::spawn(drive(party.clone(), cell, stop.clone()));
            }
        }
    }
}

/// Ends overdue rounds, and takes the result of rounds whose attempt was lost here.
async fn sweep(party: &Arc<Party>) {
    let grace = if party.me() == 0 { 0 } else { GRACE_MS };
    for cell in party.cells().into_iter().filter(|c| !c.record().phase.is_final()) {
        let record = cell.record();
        let idle = cell.attempt.borrow().as_ref().is_none_or(|a| a.inbox.is_closed());
        let caught_up = record.phase == Phase::Computing && idle && attempt::catch_up(party, &cell).await.is_ok();
        let overdue = party.now_ms() > cell.plan.config().compute_until_ms + grace;
        if !caught_up
            && overdue
            && !record.opened
            && let Err(error) = party.abort(&cell, "it was not finished in time").await
        {
            tracing::warn!(round = record.round, %error, "ending an overdue round");
        }
    }
}

/// Takes a round to its end.
async fn drive(party: Arc<Party>, cell: Arc<Cell>, stop: CancellationToken) {
    let mut forwarding = false;
    loop {
        let phase = cell.record().phase;
        if matches!(phase, Phase::Open | Phase::Sealing) && !std::mem::replace(&mut forwarding, true) {
            for peer in 1..cell.plan.parties() {
                tokio::spawn(forward::run(party.clone(), cell.clone(), peer, stop.clone()));
            }
        }
        let step = async {
            match phase {
                Phase::Created => announce(&party, &cell).await,
                Phase::Open => take_reports(&party, &cell).await,
                Phase::Sealing => agree(&party, &cell).await,
                Phase::Computing => compute(&party, &cell).await,
                Phase::Revealing => opened(&party, &cell).await,
                Phase::Done | Phase::Aborted => Ok(()),
            }
        };
        let done = tokio::select! {
            done = step => done,
            () = stop.cancelled() => return,
        };
        match (done, cell.record().phase) {
            (_, Phase::Done) => return,
            (_, Phase::Aborted) => return tell_the_others(&party, &cell).await,
            (Ok(()), _) => {}
            (Err(error), now) if is_transient(&error) || now >= Phase::Computing => {
                tracing::info!(round = cell.plan.round(), phase = now.name(), %error, "waiting");
                tokio::time::sleep(PAUSE).await;
            }
            (Err(error), _) => {
                let _ = party.abort(&cell, &error.to_string()).await;
            }
        }
    }
}

async fn tell_the_others(party: &Party, cell: &Cell) {
    let record = cell.record();
    for peer in 1..cell.plan.parties() {
        for _ in 0..ABORT_TRIES {
            let told = match party.peer(peer) {
                Ok(link) => link.abort(record.round, &record.reason).await.map(drop),
                Err(error) => Err(error),
            };
            match told {
                Err(error) if is_transient(&error) => tokio::time::sleep(PAUSE).await,
                _ => break,
            }
        }
    }
}

async fn announce(party: &Party, cell: &Cell) -> Result<(), AggregatorError> {
    for peer in 1..cell.plan.parties() {
        party.peer(peer)?.open_round(&cell.plan).await?;
    }
    let open = party.change(cell, |record| {
        record.expect(Phase::Created)?;
        record.phase = Phase::Open;
        Ok(None)
    });
    open.await.map(drop)
}

/// Until enough reports are complete, the time is over, or an operator seals or aborts.
async fn take_reports(party: &Party, cell: &Cell) -> Result<(), AggregatorError> {
    let target = cell.record().target.max(1) as usize;
    loop {
        let forwarded = cell.forwarded.notified();
        tokio::pin!(forwarded);
        forwarded.as_mut().enable();
        let left = cell.plan.config().upload_until_ms.saturating_sub(party.now_ms());
        if cell.complete() >= target || left == 0 {
            return party.change(cell, |record| record.seal().map(|()| None)).await.map(drop);
        }
        tokio::select! {
            () = forwarded => {}
            () = tokio::time::sleep(Duration::from_millis(left)) => {}
            () = cell.until(|r| r.phase != Phase::Open) => return Ok(()),
        }
    }
}

/// Ends uploads everywhere; the set is what all parties have.
async fn agree(party: &Party, cell: &Cell) -> Result<(), AggregatorError> {
    let flushed = async {
        loop {
            let forwarded = cell.forwarded.notified();
            let left_out = cell.forwarding().refused.len();
            if cell.complete() + left_out >= *cell.reports.borrow() as usize {
                return;
            }
            forwarded.await;
        }
    };
    let _ = tokio::time::timeout(FLUSH, flushed).await;
    let mut set: Vec<ReportId> = party.store.reports(cell.plan.round()).await?;
    for peer in 1..cell.plan.parties() {
        let has: HashSet<ReportId> = party.peer(peer)?.propose_set(&cell.plan).await?.into_iter().collect();
        set.retain(|id| has.contains(id));
    }
    attempt::commit(party, cell, set).await
}

async fn compute(party: &Arc<Party>, cell: &Arc<Cell>) -> Result<(), AggregatorError> {
    let record = cell.record();
    let hash = record.set_hash.ok_or_else(|| record.wrong("sealed"))?;
    let set = party.store.set(record.round).await?;
    let mut epoch = record.epoch;
    for peer in 1..cell.plan.parties() {
        let theirs = party.peer(peer)?.commit_set(&cell.plan, &set).await?;
        if theirs.opened {
            return attempt::catch_up(party, cell).await;
        }
        epoch = epoch.max(theirs.epoch);
    }
    epoch += 1;
    for peer in 1..cell.plan.parties() {
        party.peer(peer)?.start_compute(&cell.plan, &hash, epoch).await?;
    }
    attempt::start(party, cell, epoch).await?;
    let attempt = cell.attempt.borrow().clone();
    loop {
        tokio::select! {
            () = cell.until(|r| r.phase != Phase::Computing || r.epoch != epoch) => return Ok(()),
            () = tokio::time::sleep(PAUSE) => {}
        }
        if attempt.as_ref().is_none_or(|a| a.inbox.is_closed()) && cell.record().phase == Phase::Computing {
            return Err(AggregatorError::Deadline("the attempt"));
        }
        // a party that was restarted knows nothing of the attempt
        for peer in 1..cell.plan.parties() {
            if let Ok(theirs) = party.peer(peer)?.round(&cell.plan).await
                && theirs.state() == State::Computing
                && !theirs.computing
            {
                cell.end_attempt("another party lost its attempt");
            }
        }
    }
}

/// Waits for the result; begins anew if no other party finished the attempt and nothing was opened.
async fn opened(party: &Arc<Party>, cell: &Arc<Cell>) -> Result<(), AggregatorError> {
    tokio::select! {
        () = cell.until(|r| r.phase != Phase::Revealing) => return Ok(()),
        () = tokio::time::sleep(PAUSE) => {}
    }
    let record = cell.record();
    let mut epoch = record.epoch;
    for peer in 1..cell.plan.parties() {
        let theirs = party.peer(peer)?.round(&cell.plan).await?;
        if theirs.computing || theirs.opened || (theirs.epoch == record.epoch && theirs.state() != State::Computing) {
            return Ok(());
        }
        epoch = epoch.max(theirs.epoch);
    }
    party.change(cell, |record| record.attempt(epoch + 1).map(|()| None)).await.map(drop)
}
