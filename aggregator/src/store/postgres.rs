//! The store in a PostgreSQL database, for a party that runs as several replicas. One of them works at a time ([`super::lease`]).

use std::ops::Range;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts, Transaction};
use isthmus_proto::aggregator_v1::Model;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio_postgres::config::Host;
use tokio_postgres::types::ToSql;
use tokio_postgres::{NoTls, Row};

use super::lease::Lease;
use super::{Added, CHUNK_BYTES, Change, NewReport, Opening, Outcome, ReportId, Store};
use crate::error::AggregatorError;
use crate::round::{Phase, Record};

/// Tables; numbers of rounds and versions are kept as signed integers of the same bits.
const SCHEMA: &str = "create schema if not exists isthmus;
create table if not exists isthmus.owner (one boolean primary key, name text not null);
create table if not exists isthmus.lease (one boolean primary key, holder text not null, fence bigint not null,
    expires timestamptz not null);
create table if not exists isthmus.rounds (round bigint primary key, record text not null, config bytea, members bytea,
    epoch bigint, own bytea, next bytea, counts bytea, flags bytea, reports integer not null default 0);
create table if not exists isthmus.reports (id bytea primary key, round bigint not null, client bytea not null, header bytea,
    unique (round, client));
create table if not exists isthmus.chunks (round bigint, chunk integer, id bytea, data bytea not null,
    primary key (round, chunk, id));
create table if not exists isthmus.models (name text, version bigint, data bytea not null, primary key (name, version));";
/// Any number that no other program uses: two replicas must not create the tables at once.
const SCHEMA_LOCK: i64 = 0x6973_7468_6d75_7301;

/// Connections of one replica.
const CONNECTIONS: usize = 8;
/// Longest wait for a connection, and for a statement.
const LIMIT: Duration = Duration::from_secs(15);
/// Shares of the result are kept for parties that lag, of this many rounds.
const KEPT_OPENINGS: i64 = 8;

/// How to reach a database, and as which replica.
pub struct Access<'a> {
    /// `postgres://` URL or `key=value` pairs.
    pub url: &'a str,
    /// Not in the URL, which is printed and logged.
    pub password: Option<String>,
    /// PEM of the authority of the database's certificate. None: without TLS, only to this machine.
    pub authority: Option<&'a Path>,
    /// Whether to go without TLS to another machine.
    pub insecure: bool,
    /// Task and party: a database belongs to one.
    pub owner: &'a str,
    /// Name of this replica, for people.
    pub replica: &'a str,
    /// Another replica takes over so long after this one was last heard.
    pub lease: Duration,
}

/// A database.
pub struct PostgresStore {
    pool: Pool,
    lease: Lease,
}

/// An error of the database, with the server's own words.
pub(super) fn failed(error: impl std::error::Error) -> AggregatorError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    AggregatorError::Store(text)
}

fn damaged(what: &str) -> AggregatorError {
    AggregatorError::Store(format!("{what} in the database is damaged"))
}

/// # Errors
/// If the URL cannot be read, holds a password, or leads to another machine without TLS.
fn settings(access: &Access<'_>) -> Result<tokio_postgres::Config, AggregatorError> {
    let bad = |why: &str| AggregatorError::Config(format!("postgres: {why}"));
    let mut config = tokio_postgres::Config::from_str(access.url).map_err(|e| bad(&e.to_string()))?;
    if config.get_password().is_some() {
        return Err(bad("give the password in the environment variable PGPASSWORD"));
    }
    if let Some(password) = &access.password {
        config.password(password);
    }
    let here = |host: &Host| match host {
        Host::Tcp(name) => name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback()),
        Host::Unix(_) => true,
    };
    if access.authority.is_none() && !access.insecure && !config.get_hosts().iter().all(here) {
        return Err(bad("a database on another machine needs postgres_ca (or insecure = true, on a network you trust)"));
    }
    let mode = if access.authority.is_some() { tokio_postgres::config::SslMode::Require } else { tokio_postgres::config::SslMode::Disable };
    config.ssl_mode(mode).connect_timeout(LIMIT).application_name(access.replica);
    config.options(format!("{} -c statement_timeout={}", config.get_options().unwrap_or_default(), LIMIT.as_millis()).trim().to_owned());
    Ok(config)
}

fn tls(authority: &Path) -> Result<tokio_postgres_rustls::MakeRustlsConnect, AggregatorError> {
    let bad = |why: String| AggregatorError::Config(format!("postgres_ca: {}: {why}", authority.display()));
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(authority).map_err(|e| bad(e.to_string()))? {
        roots.add(certificate.map_err(|e| bad(e.to_string()))?).map_err(|e| bad(e.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|e| bad(e.to_string()))?.with_root_certificates(roots).with_no_client_auth();
    Ok(tokio_postgres_rustls::MakeRustlsConnect::new(config))
}

impl PostgresStore {
    /// Connects, makes the tables if they are missing, and waits for the lease.
    ///
    /// # Errors
    /// If the database cannot be reached, or belongs to another party.
    pub async fn open(access: Access<'_>) -> Result<Self, AggregatorError> {
        let config = settings(&access)?;
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = match access.authority {
            Some(authority) => Manager::from_config(config, tls(authority)?, recycling),
            None => Manager::from_config(config, NoTls, recycling),
        };
        let timeouts = Timeouts { wait: Some(LIMIT), create: Some(LIMIT), recycle: Some(LIMIT) };
        let pool = Pool::builder(manager).max_size(CONNECTIONS).timeouts(timeouts).runtime(Runtime::Tokio1).build().map_err(failed)?;
        let mut client = pool.get().await.map_err(|e| AggregatorError::Store(format!("postgres = {:?}: {}", access.url, failed(e))))?;
        let transaction = client.transaction().await.map_err(failed)?;
        transaction.execute("select pg_advisory_xact_lock($1)", &[&SCHEMA_LOCK]).await.map_err(failed)?;
        transaction.batch_execute(SCHEMA).await.map_err(failed)?;
        transaction
            .execute("insert into isthmus.owner values (true, $1) on conflict do nothing", &[&access.owner])
            .await
            .map_err(failed)?;
        let owner: String = transaction.query_one("select name from isthmus.owner", &[]).await.map_err(failed)?.get(0);
        transaction.commit().await.map_err(failed)?;
        drop(client);
        if owner != access.owner {
            return Err(AggregatorError::Config(format!("postgres: the database belongs to {owner}, not to {}", access.owner)));
        }
        let lease = Lease::acquire(&pool, access.replica, access.lease).await?;
        Ok(Self { pool, lease })
    }

    async fn client(&self) -> Result<Object, AggregatorError> {
        self.pool.get().await.map_err(failed)
    }

    async fn rows(&self, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, AggregatorError> {
        let client = self.client().await?;
        let statement = client.prepare_cached(query).await.map_err(failed)?;
        client.query(&statement, parameters).await.map_err(failed)
    }

    async fn row(&self, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, AggregatorError> {
        Ok(self.rows(query, parameters).await?.into_iter().next())
    }
}

fn signed(n: u64) -> i64 {
    n.cast_signed()
}

fn report_id(bytes: &[u8]) -> Result<ReportId, AggregatorError> {
    bytes.try_into().map_err(|_| damaged("the name of a report"))
}

fn bytes(row: &Row, column: &str) -> Option<Bytes> {
    row.get::<_, Option<Vec<u8>>>(column).map(Bytes::from)
}

async fn save(transaction: &Transaction<'_>, change: &Change) -> Result<(), AggregatorError> {
    let round = signed(change.record.round);
    let record = serde_json::to_string(&change.record).map_err(failed)?;
    let execute = async |query: &str, parameters: &[&(dyn ToSql + Sync)]| transaction.execute(query, parameters).await.map_err(failed);
    let insert = "insert into isthmus.rounds (round, record) values ($1, $2) on conflict (round) do update set record = excluded.record";
    execute(insert, &[&round, &record]).await?;
    if let Some(config) = &change.config {
        execute("update isthmus.rounds set config = $2 where round = $1", &[&round, &&config[..]]).await?;
    }
    if let Some(set) = &change.set {
        execute("update isthmus.rounds set members = $2 where round = $1", &[&round, &set.concat()]).await?;
    }
    if let Some(o) = &change.opening {
        let query = "update isthmus.rounds set epoch = $2, own = $3, next = $4 where round = $1";
        execute(query, &[&round, &signed(o.epoch), &&o.own[..], &&o.next[..]]).await?;
    }
    if let Some(o) = &change.outcome {
        execute("update isthmus.rounds set counts = $2, flags = $3 where round = $1", &[&round, &&o.counts[..], &&o.flags[..]]).await?;
        let old = "update isthmus.rounds set epoch = null, own = null, next = null where round < $1 and epoch is not null";
        execute(old, &[&(round - KEPT_OPENINGS)]).await?;
    }
    if change.erases() {
        // names stay: each is used once
        execute("update isthmus.reports set header = null where round = $1", &[&round]).await?;
        execute("delete from isthmus.chunks where round = $1", &[&round]).await?;
    }
    Ok(())
}

async fn add(transaction: &Transaction<'_>, report: &NewReport, most: u32) -> Result<Added, AggregatorError> {
    let round = signed(report.round);
    let (id, client) = (&report.id[..], &report.client[..]);
    // one report of a round at a time
    let query = "select record, reports from isthmus.rounds where round = $1 for update";
    let row = transaction.query_opt(query, &[&round]).await.map_err(failed)?;
    let row = row.ok_or_else(|| AggregatorError::NotFound(format!("round {} is not known here", report.round)))?;
    let record: Record = serde_json::from_str(row.get("record")).map_err(failed)?;
    record.expect(Phase::Open)?;
    let query = "select id, header from isthmus.reports where round = $1 and client = $2";
    if let Some(earlier) = transaction.query_opt(query, &[&round, &client]).await.map_err(failed)? {
        let same = earlier.get::<_, &[u8]>("id") == id && bytes(&earlier, "header").is_some_and(|h| h == report.header);
        return if same { Ok(Added::Same) } else { Err(AggregatorError::Conflict("the client has another report in this round")) };
    }
    if row.get::<_, i32>("reports").cast_unsigned() >= most {
        return Err(AggregatorError::Busy("the round is full"));
    }
    let query = "insert into isthmus.reports (id, round, client, header) values ($1, $2, $3, $4) on conflict (id) do nothing";
    if transaction.execute(query, &[&id, &round, &client, &&report.header[..]]).await.map_err(failed)? == 0 {
        return Err(AggregatorError::Conflict("a report of this name was sent before"));
    }
    let query = "update isthmus.rounds set reports = reports + 1 where round = $1";
    transaction.execute(query, &[&round]).await.map_err(failed)?;
    let (numbers, parts): (Vec<i32>, Vec<&[u8]>) = (0..).zip(report.body.chunks(CHUNK_BYTES)).unzip();
    let query = "insert into isthmus.chunks (round, chunk, id, data)
        select $1, c, $2, d from unnest($3::integer[], $4::bytea[]) as parts (c, d)";
    transaction.execute(query, &[&round, &id, &numbers, &parts]).await.map_err(failed)?;
    Ok(Added::New)
}

#[async_trait]
impl Store for PostgresStore {
    async fn rounds(&self) -> Result<Vec<(Record, Bytes)>, AggregatorError> {
        let rows = self.rows("select record, config from isthmus.rounds where config is not null order by round", &[]).await?;
        let round = |row: &Row| Ok((serde_json::from_str(row.get("record")).map_err(failed)?, bytes(row, "config").unwrap_or_default()));
        rows.iter().map(round).collect()
    }

    async fn save(&self, change: Change) -> Result<(), AggregatorError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await.map_err(failed)?;
        self.lease.guard(&transaction).await?;
        save(&transaction, &change).await?;
        transaction.commit().await.map_err(failed)
    }

    async fn add_report(&self, report: NewReport, most: u32) -> Result<Added, AggregatorError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await.map_err(failed)?;
        self.lease.guard(&transaction).await?;
        let added = add(&transaction, &report, most).await?;
        transaction.commit().await.map_err(failed)?;
        Ok(added)
    }

    async fn reports(&self, round: u64) -> Result<Vec<ReportId>, AggregatorError> {
        let query = "select id from isthmus.reports where round = $1 and header is not null order by id";
        self.rows(query, &[&signed(round)]).await?.iter().map(|row| report_id(row.get(0))).collect()
    }

    async fn header(&self, round: u64, id: ReportId) -> Result<Option<Bytes>, AggregatorError> {
        let row = self.row("select header from isthmus.reports where round = $1 and id = $2", &[&signed(round), &&id[..]]).await?;
        Ok(row.and_then(|row| bytes(&row, "header")))
    }

    async fn body(&self, round: u64, id: ReportId) -> Result<Option<Bytes>, AggregatorError> {
        let query = "select data from isthmus.chunks where round = $1 and id = $2 order by chunk";
        let rows = self.rows(query, &[&signed(round), &&id[..]]).await?;
        let parts: Vec<&[u8]> = rows.iter().map(|row| row.get(0)).collect();
        Ok((!parts.is_empty()).then(|| parts.concat().into()))
    }

    async fn chunks(&self, round: u64, chunk: u32, part: Range<usize>, ids: &[ReportId]) -> Result<Vec<u8>, AggregatorError> {
        let names: Vec<&[u8]> = ids.iter().map(|id| &id[..]).collect();
        let number = i32::try_from(chunk).map_err(failed)?;
        let query = "select data from isthmus.chunks where round = $1 and chunk = $2 and id = any($3) order by id";
        let rows = self.rows(query, &[&signed(round), &number, &names]).await?;
        let mut out = Vec::with_capacity(ids.len() * part.len());
        for row in &rows {
            let data: &[u8] = row.get(0);
            out.extend_from_slice(data.get(part.clone()).ok_or_else(|| damaged("a chunk"))?);
        }
        if rows.len() == ids.len() { Ok(out) } else { Err(AggregatorError::Store(format!("chunk {chunk} of a report is missing"))) }
    }

    async fn set(&self, round: u64) -> Result<Vec<ReportId>, AggregatorError> {
        let row = self.row("select members from isthmus.rounds where round = $1", &[&signed(round)]).await?;
        Ok(row.and_then(|row| bytes(&row, "members")).map(|set| set.as_chunks::<16>().0.to_vec()).unwrap_or_default())
    }

    async fn opening(&self, round: u64) -> Result<Option<Opening>, AggregatorError> {
        let row = self.row("select epoch, own, next from isthmus.rounds where round = $1 and epoch is not null", &[&signed(round)]).await?;
        let part = |row: &Row, column: &str| bytes(row, column).ok_or_else(|| damaged("an opening"));
        let opening = |row: Row| {
            let epoch = row.get::<_, i64>("epoch").cast_unsigned();
            Ok(Opening { epoch, own: part(&row, "own")?, next: part(&row, "next")? })
        };
        row.map(opening).transpose()
    }

    async fn outcome(&self, round: u64) -> Result<Option<Outcome>, AggregatorError> {
        let row = self.row("select counts, flags from isthmus.rounds where round = $1", &[&signed(round)]).await?;
        Ok(row.and_then(|row| Some(Outcome { counts: bytes(&row, "counts")?, flags: bytes(&row, "flags")? })))
    }

    async fn put_model(&self, model: Model, data: Bytes) -> Result<(), AggregatorError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await.map_err(failed)?;
        self.lease.guard(&transaction).await?;
        let query = "insert into isthmus.models values ($1, $2, $3) on conflict (name, version) do update set data = excluded.data";
        transaction.execute(query, &[&model.name, &signed(model.version), &&data[..]]).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    async fn model(&self, name: &str, version: u64) -> Result<Option<Bytes>, AggregatorError> {
        let row = self.row("select data from isthmus.models where name = $1 and version = $2", &[&name, &signed(version)]).await?;
        Ok(row.and_then(|row| bytes(&row, "data")))
    }

    async fn lost(&self) -> AggregatorError {
        self.lease.lost().await;
        AggregatorError::Store("this replica has lost the lease: another one of this party takes over".into())
    }

    async fn release(&self) {
        self.lease.release(&self.pool).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(url: &str) -> Access<'_> {
        Access { url, password: None, authority: None, insecure: false, owner: "t", replica: "r", lease: LIMIT }
    }

    #[test]
    fn a_database_elsewhere_needs_tls_and_a_password_has_its_own_place() {
        for good in ["postgres://u@localhost/d", "host=/run/postgresql user=u", "postgres://u@[::1]:5433/d", "host=127.0.0.1"] {
            assert!(settings(&access(good)).is_ok(), "{good}");
        }
        let error = |url: &str| settings(&access(url)).unwrap_err().to_string();
        assert!(error("postgres://u@db.example/d").contains("postgres_ca"));
        assert!(error("postgres://u:secret@localhost/d").contains("PGPASSWORD"));
        assert!(!error("postgres://u:secret@localhost/d").contains("secret"));
        assert!(error("nonsense").starts_with("configuration: postgres: "));
    }
}
