//! What a party remembers. [`redb`] keeps it in a file, [`postgres`] in a database that several replicas of the party share.
//!
//! A report's body is stored in chunks by coordinate, so that a block of all clients is one range, and computing never holds more
//! than the blocks under way.

pub mod lease;
pub mod postgres;
pub mod redb;

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use isthmus_proto::aggregator_v1::Model;

use crate::error::AggregatorError;
use crate::round::Record;

/// Bytes of a report's body in one chunk: 256 words of 64 coordinates.
pub const CHUNK_BYTES: usize = 2048;

/// Name of a report.
pub type ReportId = [u8; 16];

/// A report as it comes.
#[derive(Debug, Clone)]
pub struct NewReport {
    /// The round.
    pub round: u64,
    /// Drawn by the client.
    pub id: ReportId,
    /// The client's public key.
    pub client: [u8; 32],
    /// The encoded header.
    pub header: Bytes,
    /// Empty at parties that hold none.
    pub body: Bytes,
}

/// What became of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// Stored.
    New,
    /// The same report was stored before.
    Same,
}

/// A party's shares of the result: digits of the counts, and how they are laid out.
#[derive(Debug, Clone, PartialEq)]
pub struct Opening {
    /// The epoch that made it.
    pub epoch: u64,
    /// This party's own share.
    pub own: Bytes,
    /// The next party's share, which this party has too.
    pub next: Bytes,
}

/// A round's result.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Little-endian 32-bit counts of coordinates and extra bits.
    pub counts: Bytes,
    /// One bit for each client, if the round reveals them.
    pub flags: Bytes,
}

/// A change of a round, stored at once or not at all.
#[derive(Debug, Clone)]
pub struct Change {
    /// The round's new state.
    pub record: Record,
    /// The configuration, of a new round.
    pub config: Option<Bytes>,
    /// The agreed set, ascending.
    pub set: Option<Vec<ReportId>>,
    /// This party's shares of the result.
    pub opening: Option<Opening>,
    /// The result. Bodies and headers are erased with it.
    pub outcome: Option<Outcome>,
}

impl From<Record> for Change {
    fn from(record: Record) -> Self {
        Self { record, config: None, set: None, opening: None, outcome: None }
    }
}

impl Change {
    /// Whether bodies and seeds are of no more use.
    pub fn erases(&self) -> bool {
        self.record.phase.is_final()
    }
}

/// A party's memory. Every call that returns has reached the disk.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// All rounds with their configurations, ascending.
    async fn rounds(&self) -> Result<Vec<(Record, Bytes)>, AggregatorError>;
    /// Stores a change.
    async fn save(&self, change: Change) -> Result<(), AggregatorError>;
    /// Stores a report, unless its client has another one in the round, its name was used before, or `most` are there already.
    async fn add_report(&self, report: NewReport, most: u32) -> Result<Added, AggregatorError>;
    /// Names of a round's reports, ascending.
    async fn reports(&self, round: u64) -> Result<Vec<ReportId>, AggregatorError>;
    /// A report's header.
    async fn header(&self, round: u64, id: ReportId) -> Result<Option<Bytes>, AggregatorError>;
    /// A report's body.
    async fn body(&self, round: u64, id: ReportId) -> Result<Option<Bytes>, AggregatorError>;
    /// Bytes `part` of chunk number `chunk` of the bodies of `ids`, which ascend, one after the other.
    async fn chunks(&self, round: u64, chunk: u32, part: Range<usize>, ids: &[ReportId]) -> Result<Vec<u8>, AggregatorError>;
    /// The agreed set.
    async fn set(&self, round: u64) -> Result<Vec<ReportId>, AggregatorError>;
    /// This party's shares of the result.
    async fn opening(&self, round: u64) -> Result<Option<Opening>, AggregatorError>;
    /// The result.
    async fn outcome(&self, round: u64) -> Result<Option<Outcome>, AggregatorError>;
    /// Stores a model.
    async fn put_model(&self, model: Model, data: Bytes) -> Result<(), AggregatorError>;
    /// A model.
    async fn model(&self, name: &str, version: u64) -> Result<Option<Bytes>, AggregatorError>;
    /// Returns when this process must not work on: another replica of this party may have taken over.
    async fn lost(&self) -> AggregatorError {
        std::future::pending().await
    }
    /// Lets another replica take over at once; called last.
    async fn release(&self) {}
}
