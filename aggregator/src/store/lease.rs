//! One replica of a party works at a time: it holds the lease, the others stand by.
//!
//! The lease is a row with a fence, a number that rises with each holder. Every write of a replica carries its fence and locks that
//! row until it is committed, so that a replica that lost the lease without knowing it cannot write: what leaves a party was written
//! first, hence nothing more leaves that replica. Times are the database's alone: replicas' clocks do not matter.

use std::time::{Duration, Instant};

use deadpool_postgres::{Pool, Transaction};
use tokio::sync::watch;

use super::postgres::failed;
use crate::error::AggregatorError;

const ACQUIRE: &str = "insert into isthmus.lease (one, holder, fence, expires)
    values (true, $1, 1, clock_timestamp() + $2 * interval '1 millisecond')
    on conflict (one) do update set holder = excluded.holder, fence = lease.fence + 1, expires = excluded.expires
    where lease.expires < clock_timestamp() returning fence";
const RENEW: &str = "update isthmus.lease set expires = clock_timestamp() + $2 * interval '1 millisecond' where fence = $1";
const RELEASE: &str = "update isthmus.lease set expires = clock_timestamp() where fence = $1";
const HOLDER: &str = "select holder from isthmus.lease";
const GUARD: &str = "select 1 from isthmus.lease where fence = $1 for share";

/// A lease that is held, or was.
pub struct Lease {
    fence: i64,
    lost: watch::Receiver<bool>,
}

fn millis(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

impl Lease {
    /// Waits until the lease is free, takes it for `holder` and renews it as long as this value lives. Another replica may take it
    /// `length` after the last renewal.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn acquire(pool: &Pool, holder: &str, length: Duration) -> Result<Self, AggregatorError> {
        let mut said = false;
        let fence: i64 = loop {
            let client = pool.get().await.map_err(failed)?;
            if let Some(row) = client.query_opt(ACQUIRE, &[&holder, &millis(length)]).await.map_err(failed)? {
                break row.get(0);
            }
            if !std::mem::replace(&mut said, true) {
                let other = client.query_opt(HOLDER, &[]).await.map_err(failed)?.map_or_else(String::new, |row| row.get(0));
                tracing::info!(holder = other, replica = holder, "standing by: another replica of this party holds the lease");
            }
            drop(client);
            tokio::time::sleep(length / 4).await;
        };
        tracing::info!(replica = holder, fence, "this replica holds the lease");
        let (send, lost) = watch::channel(false);
        tokio::spawn(keep(pool.clone(), fence, length, send));
        Ok(Self { fence, lost })
    }

    /// Returns when the lease is lost, or might be.
    pub async fn lost(&self) {
        let _ = self.lost.clone().wait_for(|lost| *lost).await;
    }

    /// Fails unless the lease is this one's; nobody can take it before the transaction `of` ends.
    ///
    /// # Errors
    /// If another replica has it, or the database fails.
    pub async fn guard(&self, of: &Transaction<'_>) -> Result<(), AggregatorError> {
        let held = of.query_opt(GUARD, &[&self.fence]).await.map_err(failed)?;
        held.map(drop).ok_or_else(|| AggregatorError::Store("another replica of this party has taken over".into()))
    }

    /// Lets the next replica have it at once.
    pub async fn release(&self, pool: &Pool) {
        if let Ok(client) = pool.get().await {
            let _ = client.execute(RELEASE, &[&self.fence]).await;
        }
    }
}

/// Renews until the lease is taken by another, its receiver is dropped, or it could not be renewed for so long that it may be.
async fn keep(pool: Pool, fence: i64, length: Duration, lost: watch::Sender<bool>) {
    let mut renewed = Instant::now();
    while renewed.elapsed() < length {
        tokio::select! {
            () = tokio::time::sleep(length / 4) => {}
            () = lost.closed() => return,
        }
        let asked = Instant::now();
        let renew = async {
            let client = pool.get().await.map_err(failed)?;
            client.execute(RENEW, &[&fence, &millis(length)]).await.map_err(failed)
        };
        match tokio::time::timeout(length.saturating_sub(renewed.elapsed()), renew).await {
            Ok(Ok(1)) => renewed = asked,
            Ok(Ok(_)) => break,
            Ok(Err(error)) => tracing::warn!(%error, "renewing the lease"),
            Err(_) => {}
        }
    }
    let _ = lost.send(true);
}
