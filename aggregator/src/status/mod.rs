//! The admin listener: status page, its data, metrics, liveness.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use isthmus_listen::admin;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::keys::PublicParty;
use crate::party::Party;
use crate::peer::client::PeerLink;

const PAGE: &str = include_str!("page.html");
/// Rounds on the page.
const SHOWN: usize = 200;

/// What the page shows.
#[derive(Serialize)]
struct Status {
    task: String,
    party: u8,
    version: &'static str,
    now_ms: u64,
    parties: Vec<Neighbour>,
    rounds: Vec<Shown>,
    counters: Vec<(String, f64)>,
}

#[derive(Serialize)]
struct Neighbour {
    party: u8,
    url: String,
    own: bool,
    /// When it last answered a call of this party.
    answered_ms: Option<u64>,
    /// Why it has not since.
    failure: Option<String>,
}

#[derive(Serialize)]
struct Shown {
    round: u64,
    state: &'static str,
    reason: String,
    mode: &'static str,
    dim: u32,
    body_bytes: usize,
    reports: u32,
    clients: u32,
    kept: u32,
    target: u32,
    max_clients: u32,
    epoch: u64,
    created_ms: u64,
    sealed_ms: u64,
    done_ms: u64,
    upload_until_ms: u64,
    score: Option<f64>,
}

fn neighbour(party: &Party, public: &PublicParty) -> Neighbour {
    let last = party.peer(public.party).map(PeerLink::last_call).unwrap_or_default();
    let millis = |at: SystemTime| at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    Neighbour {
        party: public.party,
        url: public.url.clone(),
        own: public.party == party.me(),
        answered_ms: last.answered.map(millis),
        failure: last.failure,
    }
}

fn status(party: &Party, metrics: &str) -> Status {
    let cells = party.cells();
    let shown = cells.iter().rev().take(SHOWN).map(|cell| {
        let (record, config) = (cell.record(), cell.plan.config());
        Shown {
            round: record.round,
            state: record.phase.name(),
            reason: record.reason,
            mode: if cell.plan.parties() == 3 { "boolean-3" } else { "additive-2" },
            dim: config.dim,
            body_bytes: cell.plan.body_bytes(),
            reports: *cell.reports.borrow(),
            clients: record.clients,
            kept: record.kept,
            target: record.target,
            max_clients: config.max_clients,
            epoch: record.epoch,
            created_ms: record.created_ms,
            sealed_ms: record.sealed_ms,
            done_ms: record.done_ms,
            upload_until_ms: config.upload_until_ms,
            score: record.score,
        }
    });
    Status {
        task: party.config.task.clone(),
        party: party.me(),
        version: env!("CARGO_PKG_VERSION"),
        now_ms: party.now_ms(),
        parties: party.parties.iter().map(|p| neighbour(party, p)).collect(),
        rounds: shown.collect(),
        counters: admin::counters(metrics),
    }
}

/// Serves the admin listener until `stop`.
pub async fn serve(listener: TcpListener, party: Arc<Party>, metrics: PrometheusHandle, stop: CancellationToken) {
    admin::serve(listener, PAGE, move |metrics| status(&party, metrics), || true, metrics, stop).await;
}
