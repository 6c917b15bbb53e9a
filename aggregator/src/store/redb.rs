//! The store in a file (redb): one thread writes, and commits all that is waiting at once.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use isthmus_proto::aggregator_v1::Model;
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::{Added, CHUNK_BYTES, Change, NewReport, Opening, Outcome, ReportId, Store};
use crate::error::AggregatorError;
use crate::round::{Phase, Record};

const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
const CONFIGS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("configs");
const SETS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("sets");
const OPENINGS: TableDefinition<'_, (u64, u8), &[u8]> = TableDefinition::new("openings");
const OUTCOMES: TableDefinition<'_, (u64, u8), &[u8]> = TableDefinition::new("outcomes");
const HEADERS: TableDefinition<'_, (u64, &ReportId), &[u8]> = TableDefinition::new("headers");
/// Every report of every round, for ever: a name is used once.
const NAMES: TableDefinition<'_, &ReportId, u64> = TableDefinition::new("names");
/// Which report a client has in a round.
const CLIENTS: TableDefinition<'_, (u64, &[u8; 32]), &ReportId> = TableDefinition::new("clients");
const CHUNKS: TableDefinition<'_, (u64, u32, &ReportId), &[u8]> = TableDefinition::new("chunks");
/// Reports that a round has.
const COUNTS: TableDefinition<'_, u64, u32> = TableDefinition::new("counts");
const MODELS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("models");

/// Changes that may wait for the writer.
const QUEUE: usize = 256;
/// Changes committed together.
const TOGETHER: usize = 64;
/// Shares of the result are kept for parties that lag, of this many rounds.
const KEPT_OPENINGS: u64 = 8;

type Reply<T> = oneshot::Sender<Result<T, AggregatorError>>;

enum Write {
    Save(Box<Change>, Reply<()>),
    Add(NewReport, u32, Reply<Added>),
    Model(Model, Bytes, Reply<()>),
}

/// A file.
pub struct RedbStore {
    database: Arc<Database>,
    writes: mpsc::Sender<Write>,
}

fn failed(error: impl std::fmt::Display) -> AggregatorError {
    AggregatorError::Store(error.to_string())
}

impl RedbStore {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// If it is in use by another process, damaged, or cannot be written.
    pub fn open(path: &Path) -> Result<Self, AggregatorError> {
        let named = |e: String| AggregatorError::Store(format!("{}: {e}", path.display()));
        let database = Database::builder().set_cache_size(64 << 20).create(path).map_err(|e| named(e.to_string()))?;
        let database = Arc::new(database);
        let create = || -> Result<(), redb::Error> {
            let write = database.begin_write()?;
            write.open_table(RECORDS)?;
            write.open_table(CONFIGS)?;
            write.open_table(SETS)?;
            write.open_table(OPENINGS)?;
            write.open_table(OUTCOMES)?;
            write.open_table(HEADERS)?;
            write.open_table(NAMES)?;
            write.open_table(CLIENTS)?;
            write.open_table(CHUNKS)?;
            write.open_table(COUNTS)?;
            write.open_table(MODELS)?;
            Ok(write.commit()?)
        };
        create().map_err(|e| named(e.to_string()))?;
        let (writes, queue) = mpsc::channel(QUEUE);
        let writer = database.clone();
        let spawned = std::thread::Builder::new().name("store".into()).spawn(move || write_all(&writer, queue));
        spawned.map_err(failed)?;
        Ok(Self { database, writes })
    }

    async fn write<T>(&self, write: impl FnOnce(Reply<T>) -> Write) -> Result<T, AggregatorError> {
        let (reply, answer) = oneshot::channel();
        let gone = || AggregatorError::Store("the writer has stopped".into());
        self.writes.send(write(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, AggregatorError> {
        let database = self.database.clone();
        let done = tokio::task::spawn_blocking(move || read(&database.begin_read()?));
        done.await.map_err(failed)?.map_err(failed)
    }
}

/// A write whose outcome is known once the transaction is committed.
enum Pending {
    Unit(Reply<()>),
    Added(Reply<Added>, Added),
}

fn write_all(database: &Database, mut queue: mpsc::Receiver<Write>) {
    let mut batch = Vec::with_capacity(TOGETHER);
    while queue.blocking_recv_many(&mut batch, TOGETHER) > 0 {
        let mut pending = Vec::with_capacity(batch.len());
        let committed = (|| -> Result<(), redb::Error> {
            let transaction = database.begin_write()?;
            for write in batch.drain(..) {
                match write {
                    Write::Save(change, reply) => {
                        save(&transaction, &change)?;
                        pending.push(Pending::Unit(reply));
                    }
                    Write::Add(report, most, reply) => match add(&transaction, &report, most)? {
                        Ok(added) => pending.push(Pending::Added(reply, added)),
                        Err(refused) => drop(reply.send(Err(refused))),
                    },
                    Write::Model(model, data, reply) => {
                        transaction.open_table(MODELS)?.insert((model.name.as_str(), model.version), &data[..])?;
                        pending.push(Pending::Unit(reply));
                    }
                }
            }
            Ok(transaction.commit()?)
        })();
        let text = committed.err().map(|e| e.to_string());
        let outcome = || text.as_ref().map_or(Ok(()), |t| Err(AggregatorError::Store(t.clone())));
        for pending in pending {
            match pending {
                Pending::Unit(reply) => drop(reply.send(outcome())),
                Pending::Added(reply, added) => drop(reply.send(outcome().map(|()| added))),
            }
        }
        batch.clear();
    }
}

fn save(write: &WriteTransaction, change: &Change) -> Result<(), redb::Error> {
    let round = change.record.round;
    let record = serde_json::to_vec(&change.record).map_err(|e| redb::Error::Corrupted(e.to_string()))?;
    write.open_table(RECORDS)?.insert(round, &record[..])?;
    if let Some(config) = &change.config {
        write.open_table(CONFIGS)?.insert(round, &config[..])?;
    }
    if let Some(set) = &change.set {
        write.open_table(SETS)?.insert(round, &set.concat()[..])?;
    }
    let mut openings = write.open_table(OPENINGS)?;
    if let Some(opening) = &change.opening {
        openings.insert((round, 0), &opening.epoch.to_le_bytes()[..])?;
        openings.insert((round, 1), &opening.own[..])?;
        openings.insert((round, 2), &opening.next[..])?;
    }
    if let Some(outcome) = &change.outcome {
        let mut outcomes = write.open_table(OUTCOMES)?;
        outcomes.insert((round, 0), &outcome.counts[..])?;
        outcomes.insert((round, 1), &outcome.flags[..])?;
        openings.retain_in(..(round.saturating_sub(KEPT_OPENINGS), 0), |_, _| false)?;
    }
    if change.erases() {
        write.open_table(HEADERS)?.retain_in((round, &[0; 16])..(round + 1, &[0; 16]), |_, _| false)?;
        write.open_table(CHUNKS)?.retain_in((round, 0, &[0; 16])..(round + 1, 0, &[0; 16]), |_, _| false)?;
    }
    Ok(())
}

fn add(write: &WriteTransaction, report: &NewReport, most: u32) -> Result<Result<Added, AggregatorError>, redb::Error> {
    let record = write.open_table(RECORDS)?.get(report.round)?.and_then(|r| serde_json::from_slice::<Record>(r.value()).ok());
    match record.map(|r| r.expect(Phase::Open)) {
        Some(Ok(())) => {}
        Some(Err(closed)) => return Ok(Err(closed)),
        None => return Ok(Err(AggregatorError::NotFound(format!("round {} is not known here", report.round)))),
    }
    let mut clients = write.open_table(CLIENTS)?;
    let mut names = write.open_table(NAMES)?;
    let mut headers = write.open_table(HEADERS)?;
    let key = (report.round, &report.id);
    let earlier = clients.get((report.round, &report.client))?.map(|id| *id.value());
    if let Some(earlier) = earlier {
        let same = earlier == report.id && headers.get(key)?.is_some_and(|h| h.value() == &report.header[..]);
        return Ok(if same { Ok(Added::Same) } else { Err(AggregatorError::Conflict("the client has another report in this round")) });
    }
    if names.get(&report.id)?.is_some() {
        return Ok(Err(AggregatorError::Conflict("a report of this name was sent before")));
    }
    let mut counts = write.open_table(COUNTS)?;
    let stored = counts.get(report.round)?.map_or(0, |c| c.value());
    if stored >= most {
        return Ok(Err(AggregatorError::Busy("the round is full")));
    }
    counts.insert(report.round, stored + 1)?;
    clients.insert((report.round, &report.client), &report.id)?;
    names.insert(&report.id, report.round)?;
    headers.insert(key, &report.header[..])?;
    let mut chunks = write.open_table(CHUNKS)?;
    for (chunk, part) in (0..).zip(report.body.chunks(CHUNK_BYTES)) {
        chunks.insert((report.round, chunk, &report.id), part)?;
    }
    Ok(Ok(Added::New))
}

#[async_trait]
impl Store for RedbStore {
    async fn rounds(&self) -> Result<Vec<(Record, Bytes)>, AggregatorError> {
        self.read(|read| {
            let configs = read.open_table(CONFIGS)?;
            let mut rounds = Vec::new();
            for entry in read.open_table(RECORDS)?.iter()? {
                let (round, record) = entry?;
                let record: Record = serde_json::from_slice(record.value()).map_err(|e| redb::Error::Corrupted(e.to_string()))?;
                if let Some(config) = configs.get(round.value())? {
                    rounds.push((record, Bytes::copy_from_slice(config.value())));
                }
            }
            Ok(rounds)
        })
        .await
    }

    async fn save(&self, change: Change) -> Result<(), AggregatorError> {
        self.write(|reply| Write::Save(Box::new(change), reply)).await
    }

    async fn add_report(&self, report: NewReport, most: u32) -> Result<Added, AggregatorError> {
        self.write(|reply| Write::Add(report, most, reply)).await
    }

    async fn reports(&self, round: u64) -> Result<Vec<ReportId>, AggregatorError> {
        self.read(move |read| {
            let headers = read.open_table(HEADERS)?;
            let range = headers.range((round, &[0; 16])..(round + 1, &[0; 16]))?;
            range.map(|entry| Ok(*entry?.0.value().1)).collect()
        })
        .await
    }

    async fn header(&self, round: u64, id: ReportId) -> Result<Option<Bytes>, AggregatorError> {
        self.read(move |read| Ok(read.open_table(HEADERS)?.get((round, &id))?.map(|h| Bytes::copy_from_slice(h.value())))).await
    }

    async fn body(&self, round: u64, id: ReportId) -> Result<Option<Bytes>, AggregatorError> {
        self.read(move |read| {
            let chunks = read.open_table(CHUNKS)?;
            let mut body = Vec::new();
            let mut chunk = 0;
            while let Some(part) = chunks.get((round, chunk, &id))? {
                body.extend_from_slice(part.value());
                chunk += 1;
            }
            Ok((chunk > 0).then(|| body.into()))
        })
        .await
    }

    async fn chunks(&self, round: u64, chunk: u32, part: Range<usize>, ids: &[ReportId]) -> Result<Vec<u8>, AggregatorError> {
        let ids = ids.to_vec();
        self.read(move |read| {
            let chunks = read.open_table(CHUNKS)?;
            let mut out = Vec::with_capacity(ids.len() * part.len());
            let mut wanted = ids.iter().peekable();
            for entry in chunks.range((round, chunk, &[0; 16])..(round, chunk + 1, &[0; 16]))? {
                let (key, bytes) = entry?;
                if wanted.next_if(|id| **id == *key.value().2).is_some() {
                    let bytes = bytes.value().get(part.clone());
                    out.extend_from_slice(bytes.ok_or_else(|| redb::Error::Corrupted(format!("chunk {chunk} is short")))?);
                }
            }
            match wanted.next() {
                None => Ok(out),
                Some(id) => Err(redb::Error::Corrupted(format!("chunk {chunk} of report {} is missing", hex::encode(id)))),
            }
        })
        .await
    }

    async fn set(&self, round: u64) -> Result<Vec<ReportId>, AggregatorError> {
        self.read(move |read| {
            let set = read.open_table(SETS)?.get(round)?.map(|s| s.value().as_chunks::<16>().0.to_vec());
            Ok(set.unwrap_or_default())
        })
        .await
    }

    async fn opening(&self, round: u64) -> Result<Option<Opening>, AggregatorError> {
        self.read(move |read| {
            let openings = read.open_table(OPENINGS)?;
            let part =
                |i: u8| -> Result<Option<Bytes>, redb::Error> { Ok(openings.get((round, i))?.map(|b| Bytes::copy_from_slice(b.value()))) };
            let (Some(epoch), Some(own), Some(next)) = (part(0)?, part(1)?, part(2)?) else { return Ok(None) };
            let epoch = epoch[..].try_into().map(u64::from_le_bytes).map_err(|_| redb::Error::Corrupted("epoch of an opening".into()))?;
            Ok(Some(Opening { epoch, own, next }))
        })
        .await
    }

    async fn outcome(&self, round: u64) -> Result<Option<Outcome>, AggregatorError> {
        self.read(move |read| {
            let outcomes = read.open_table(OUTCOMES)?;
            let part =
                |i: u8| -> Result<Option<Bytes>, redb::Error> { Ok(outcomes.get((round, i))?.map(|b| Bytes::copy_from_slice(b.value()))) };
            Ok(part(0)?.zip(part(1)?).map(|(counts, flags)| Outcome { counts, flags }))
        })
        .await
    }

    async fn put_model(&self, model: Model, data: Bytes) -> Result<(), AggregatorError> {
        self.write(|reply| Write::Model(model, data, reply)).await
    }

    async fn model(&self, name: &str, version: u64) -> Result<Option<Bytes>, AggregatorError> {
        let name = name.to_owned();
        self.read(move |read| Ok(read.open_table(MODELS)?.get((name.as_str(), version))?.map(|m| Bytes::copy_from_slice(m.value())))).await
    }
}
