//! Party 0 passes reports on to the other parties, until each has answered for each.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use isthmus_federate::participant::CHUNK_BYTES;
use isthmus_proto::aggregator_v1::{ForwardedReport, ReportHeader};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::error::AggregatorError;
use crate::party::{Cell, Party};
use crate::round::Phase;
use crate::store::ReportId;

/// Reports that are under way to a party at once.
const UNDER_WAY: usize = 64;
const PAUSE: Duration = Duration::from_millis(300);

/// Keeps passing an open round's reports on to `peer` until the set is fixed.
pub async fn run(party: Arc<Party>, cell: Arc<Cell>, peer: u8, stop: CancellationToken) {
    while cell.record().phase <= Phase::Sealing && !stop.is_cancelled() {
        tokio::select! {
            passed = pass_on(&party, &cell, peer) => if let Err(error) = passed {
                tracing::debug!(round = cell.plan.round(), peer, %error, "passing reports on");
            },
            () = stop.cancelled() => break,
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = cell.until(|r| r.phase > Phase::Sealing) => break,
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

/// Passes on what `peer` lacks, and what comes, until the connection or the round ends.
async fn pass_on(party: &Party, cell: &Cell, peer: u8) -> Result<(), AggregatorError> {
    let link = party.peer(peer)?;
    let round = cell.plan.round();
    let has = link.list_reports(&cell.plan).await?;
    cell.forwarding().stored[usize::from(peer)] = has.iter().copied().collect();
    cell.forwarded.notify_waiters();
    let (send, receive) = mpsc::channel(4);
    let mut answers = link.forward_reports(ReceiverStream::new(receive)).await?;
    let mut reports = cell.reports.subscribe();
    let mut known: HashSet<ReportId> = has.into_iter().collect();
    known.extend(&cell.forwarding().refused);
    let (mut waiting, mut under_way) = (Vec::new(), HashSet::new());
    reports.mark_changed();
    loop {
        while under_way.len() < UNDER_WAY
            && let Some(id) = waiting.pop()
        {
            under_way.insert(id);
            if let Some(header) = party.store.header(round, id).await? {
                let body = if cell.plan.holds_body(peer) { party.store.body(round, id).await? } else { None };
                send_report(&send, round, &header, body.unwrap_or_default()).await?;
            }
        }
        tokio::select! {
            changed = reports.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                waiting.extend(party.store.reports(round).await?.into_iter().filter(|id| known.insert(*id)));
            }
            answer = answers.message() => {
                let gone = |status| AggregatorError::Peer { party: peer, status: Box::new(status) };
                let Some(answer) = answer.map_err(gone)? else { return Ok(()) };
                let Some(id) = ReportId::try_from(&answer.report[..]).ok().filter(|id| under_way.remove(id)) else { continue };
                if answer.code == 0 {
                    cell.forwarding().stored[usize::from(peer)].insert(id);
                } else {
                    tracing::warn!(round, peer, report = hex::encode(id), code = answer.code, why = answer.message, "a report is left out");
                    cell.forwarding().refused.insert(id);
                }
                cell.forwarded.notify_waiters();
            }
            () = cell.until(|r| r.phase > Phase::Sealing) => return Ok(()),
        }
    }
}

async fn send_report(send: &mpsc::Sender<ForwardedReport>, round: u64, header: &[u8], body: Bytes) -> Result<(), AggregatorError> {
    let gone = |_| AggregatorError::Transport("the connection ended".into());
    let header = ReportHeader::decode(header).map_err(|e| AggregatorError::Store(e.to_string()))?;
    let last = body.len().saturating_sub(1) / CHUNK_BYTES * CHUNK_BYTES;
    for at in (0..last).step_by(CHUNK_BYTES) {
        let part = ForwardedReport { round, header: None, body: body.slice(at..at + CHUNK_BYTES) };
        send.send(part).await.map_err(gone)?;
    }
    send.send(ForwardedReport { round, header: Some(header), body: body.slice(last..) }).await.map_err(gone)
}
