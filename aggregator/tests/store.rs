//! Both stores behave alike; replicas of a party take turns.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use aggregator::round::{Phase, Record};
use aggregator::store::postgres::{Access, PostgresStore};
use aggregator::store::redb::RedbStore;
use aggregator::store::{Added, CHUNK_BYTES, Change, NewReport, Opening, Outcome, Store};
use bytes::Bytes;
use common::{LIMIT, Parties, random_bits, request, sums};
use isthmus_proto::aggregator_v1::Model;
use isthmus_testkit::Postgres;

const NONE: &str = "no PostgreSQL server is installed (Debian: postgresql)";

fn record(round: u64, phase: Phase) -> Record {
    Record { phase, ..Record::new(round, 2, 5) }
}

fn report(round: u64, n: u8, client: u8) -> NewReport {
    let body = (0..CHUNK_BYTES * 2 + 100).map(|i| (i as u8).wrapping_mul(n)).collect::<Vec<_>>();
    NewReport { round, id: [n; 16], client: [client; 32], header: vec![n; 9].into(), body: body.into() }
}

/// What every store must do.
async fn behaves(store: &dyn Store) {
    let open = Change { config: Some(Bytes::from_static(b"config")), ..record(7, Phase::Open).into() };
    assert!(store.add_report(report(7, 1, 1), 9).await.unwrap_err().to_string().contains("not known"));
    store.save(open).await.unwrap();
    store.save(Change { config: Some(Bytes::from_static(b"later")), ..record(8, Phase::Open).into() }).await.unwrap();
    let rounds = store.rounds().await.unwrap();
    assert_eq!(rounds.iter().map(|(r, c)| (r.round, &c[..])).collect::<Vec<_>>(), [(7, &b"config"[..]), (8, &b"later"[..])]);

    assert_eq!(store.add_report(report(7, 3, 1), 3).await.unwrap(), Added::New);
    assert_eq!(store.add_report(report(7, 3, 1), 3).await.unwrap(), Added::Same);
    let refused = async |r: NewReport, most: u32| store.add_report(r, most).await.unwrap_err().to_string();
    assert!(refused(report(7, 4, 1), 3).await.contains("another report in this round"), "one vote each");
    assert!(refused(report(7, 3, 2), 3).await.contains("sent before"), "a name is used once");
    assert!(refused(report(8, 3, 1), 3).await.contains("sent before"), "also in another round");
    assert_eq!(store.add_report(report(7, 1, 2), 3).await.unwrap(), Added::New);
    assert_eq!(store.add_report(report(7, 2, 3), 3).await.unwrap(), Added::New);
    assert!(refused(report(7, 9, 4), 3).await.contains("full"));

    assert_eq!(store.reports(7).await.unwrap(), [[1; 16], [2; 16], [3; 16]]);
    assert_eq!(store.reports(8).await.unwrap(), Vec::<[u8; 16]>::new());
    assert_eq!(store.header(7, [2; 16]).await.unwrap().unwrap(), vec![2; 9]);
    assert_eq!(store.header(8, [2; 16]).await.unwrap(), None);
    assert_eq!(store.body(7, [2; 16]).await.unwrap().unwrap(), report(7, 2, 3).body);
    let two = store.chunks(7, 1, 10..20, &[[1; 16], [3; 16]]).await.unwrap();
    let at = CHUNK_BYTES + 10..CHUNK_BYTES + 20;
    assert_eq!(two, [&report(7, 1, 2).body[at.clone()], &report(7, 3, 1).body[at]].concat());
    assert!(store.chunks(7, 1, 0..10, &[[1; 16], [9; 16]]).await.is_err(), "a report that is not there");
    assert!(store.chunks(7, 2, 0..200, &[[1; 16]]).await.is_err(), "more than the last chunk holds");

    store.save(Change { set: Some(vec![[1; 16], [3; 16]]), ..record(7, Phase::Computing).into() }).await.unwrap();
    assert!(refused(report(7, 9, 4), 9).await.contains("computing"), "too late");
    assert_eq!(store.set(7).await.unwrap(), [[1; 16], [3; 16]]);
    assert_eq!((store.opening(7).await.unwrap(), store.outcome(7).await.unwrap()), (None, None));
    let opening = Opening { epoch: 4, own: Bytes::from_static(b"own"), next: Bytes::from_static(b"next") };
    store.save(Change { opening: Some(opening.clone()), ..record(7, Phase::Revealing).into() }).await.unwrap();
    assert_eq!(store.opening(7).await.unwrap(), Some(opening));
    let outcome = Outcome { counts: Bytes::from_static(b"counts"), flags: Bytes::new() };
    store.save(Change { outcome: Some(outcome.clone()), ..record(7, Phase::Done).into() }).await.unwrap();
    assert_eq!(store.outcome(7).await.unwrap(), Some(outcome.clone()));
    assert_eq!((store.body(7, [2; 16]).await.unwrap(), store.header(7, [2; 16]).await.unwrap()), (None, None), "erased");
    assert!(refused(report(8, 2, 9), 9).await.contains("sent before"), "names outlive their reports");
    store.save(Change { outcome: Some(outcome), ..record(100, Phase::Done).into() }).await.unwrap();
    assert_eq!(store.opening(7).await.unwrap(), None, "old shares are erased");

    let model = |version| Model { name: "m".into(), version, ..Model::default() };
    store.put_model(model(1), Bytes::from_static(b"one")).await.unwrap();
    store.put_model(model(u64::MAX), Bytes::from_static(b"last")).await.unwrap();
    assert_eq!(store.model("m", 1).await.unwrap().unwrap(), "one");
    assert_eq!(store.model("m", u64::MAX).await.unwrap().unwrap(), "last");
    assert_eq!(store.model("m", 2).await.unwrap(), None);
}

fn access<'a>(url: &'a str, replica: &'a str) -> Access<'a> {
    let lease = Duration::from_secs(1);
    Access { url, password: None, authority: None, insecure: false, owner: "party 1 of test", replica, lease }
}

#[tokio::test]
async fn the_file_behaves() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    behaves(&RedbStore::open(&path).unwrap()).await;
    assert!(tokio::time::timeout(Duration::from_millis(50), RedbStore::open(&folder.path().join("other")).unwrap().lost()).await.is_err());
}

#[tokio::test]
async fn the_database_behaves_and_its_replicas_take_turns() {
    let Some(server) = Postgres::start() else { return isthmus_testkit::skipped(NONE) };
    let url = server.database("party1");
    let first = PostgresStore::open(access(&url, "first")).await.unwrap();
    behaves(&first).await;
    let other = Access { owner: "party 2 of test", ..access(&url, "other") };
    assert!(PostgresStore::open(other).await.err().unwrap().to_string().contains("belongs to party 1 of test"));

    // a second replica waits as long as the first renews its lease
    let waiting = PostgresStore::open(access(&url, "second"));
    tokio::pin!(waiting);
    assert!(tokio::time::timeout(Duration::from_secs(3), &mut waiting).await.is_err());
    // the first is cut off: another fence, as after a pause that was longer than the lease
    assert!(server.psql("party1", "update isthmus.lease set fence = fence + 1, expires = clock_timestamp()"));
    let second = tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap();
    let refused = first.save(record(200, Phase::Open).into()).await.unwrap_err().to_string();
    assert!(refused.contains("taken over"), "{refused}");
    assert!(first.add_report(report(8, 50, 50), 9).await.unwrap_err().to_string().contains("taken over"));
    let lost = tokio::time::timeout(LIMIT, first.lost()).await.unwrap().to_string();
    assert!(lost.contains("lost the lease"), "{lost}");
    second.save(record(200, Phase::Open).into()).await.unwrap();
    // a replica that stops in good order lets the next one in at once
    second.release().await;
    tokio::time::timeout(LIMIT, PostgresStore::open(access(&url, "third"))).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_database_is_reached_over_tls_with_its_authority_only() {
    let own = |name: &str| rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    let (certified, stranger) = (own("localhost"), own("localhost"));
    let Some(server) = Postgres::with_tls(&certified.cert.pem(), &certified.signing_key.serialize_pem()) else {
        return isthmus_testkit::skipped(NONE);
    };
    let url = server.database("tls").replace("127.0.0.1", "localhost");
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (folder.path().join("good.pem"), folder.path().join("bad.pem"));
    std::fs::write(&good, certified.cert.pem()).unwrap();
    std::fs::write(&bad, stranger.cert.pem()).unwrap();
    let open = |authority| PostgresStore::open(Access { authority, ..access(&url, "r") });
    let store = open(Some(good.as_path())).await.unwrap();
    store.save(record(1, Phase::Open).into()).await.unwrap();
    for wrong in [Some(bad.as_path()), None] {
        assert!(open(wrong).await.is_err(), "{wrong:?}");
    }
}

/// Party 1 as two replicas over one database: the one at work is killed in the middle of a round, the other one ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_replica_ends_the_round_of_one_that_was_killed() {
    let Some(server) = Postgres::start() else { return isthmus_testkit::skipped(NONE) };
    let url = server.database("party1");
    let mut parties = Parties::configured(5, |text| {
        let rest: String = text.lines().filter(|l| !l.starts_with("lease =")).flat_map(|l| [l, "\n"]).collect();
        if text.contains("party = 1\n") { format!("postgres = {url:?}\nlease = \"1s\"\n{rest}") } else { text }
    });
    let mut operator = parties.operator().await;
    let round = operator.create(request(5, 5000)).await.unwrap().round;
    let participant = parties.participant().await;
    let plan = parties.open_round(&participant, 0).await;
    let bits: Vec<_> = (0..5).map(|c| random_bits(plan.bits(), 40 + c)).collect();
    for (c, bits) in bits.iter().enumerate() {
        if c == 3 {
            let standby = parties.standby(1);
            while !parties.log(1).contains("standing by") {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            parties.kill(1);
            parties.processes[1] = Some(standby.join().unwrap());
        }
        participant.upload_until_stored(&parties.report(&plan, c, bits), LIMIT).await.unwrap();
    }
    operator.wait(round, LIMIT, |_| ()).await.unwrap();
    let result = operator.result(round).await.unwrap();
    assert_eq!(result.counts[..5000], sums(&bits, 5000)[..]);
    let log = parties.log(1);
    assert_eq!(log.matches("this replica holds the lease").count(), 2, "{log}");
}
