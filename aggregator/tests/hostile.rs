//! Uploads that no honest client sends are refused with the right status, change no result, and cost no memory.
//!
//! `ISTHMUS_HOSTILE=10000 cargo test --release -p aggregator --test hostile` is the long form.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use common::{LIMIT, Parties, random_bits, request, sums};
use isthmus_federate::report::{Identity, Report, make};
use isthmus_federate::{FederateError, Participant};
use isthmus_proto::aggregator_v1::client_service_client::ClientServiceClient;
use isthmus_proto::aggregator_v1::peer_service_client::PeerServiceClient;
use isthmus_proto::aggregator_v1::{CreateRoundRequest, PeerRequest, UploadChunk, upload_chunk};
use isthmus_secagg::report::{Credential, SignKey};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tonic::Code;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

const HONEST: usize = 3;
/// Clients that are enrolled and hostile.
const ENROLLED: usize = 20;

fn code(result: Result<impl std::fmt::Debug, FederateError>) -> Code {
    match result {
        Err(FederateError::Refused { status, .. }) => status.code(),
        other => panic!("{other:?}"),
    }
}

/// A change of an honest report, and what must come of it.
type Trick = (&'static str, Code, fn(&mut Report, &mut ChaCha20Rng));

const TRICKS: [Trick; 16] = [
    ("a body that is short", Code::InvalidArgument, |r, _| r.body.truncate(r.body.len() - 1)),
    ("a body that is long", Code::InvalidArgument, |r, _| r.body.push(0)),
    ("a body that is huge", Code::InvalidArgument, |r, _| r.body.resize(3 << 20, 0)),
    ("no body", Code::InvalidArgument, |r, _| r.body.clear()),
    ("a changed byte of the body", Code::Unauthenticated, |r, rng| {
        let at = rng.next_u32() as usize % (r.body.len() - 1);
        r.body[at] ^= 1 << (rng.next_u32() % 8);
    }),
    ("a changed envelope", Code::Unauthenticated, |r, rng| {
        let which = rng.next_u32() as usize % 3;
        let mut changed = r.header.envelopes[which].to_vec();
        let at = rng.next_u32() as usize % changed.len();
        changed[at] ^= 1;
        r.header.envelopes[which] = changed.into();
    }),
    ("envelopes in another order", Code::InvalidArgument, |r, _| r.header.envelopes.swap(0, 1)),
    ("an envelope too few", Code::InvalidArgument, |r, _| r.header.envelopes.truncate(2)),
    ("a thousand envelopes", Code::InvalidArgument, |r, _| r.header.envelopes = vec![Bytes::from_static(&[0; 100]); 1000]),
    ("a changed signature", Code::Unauthenticated, |r, _| {
        let mut changed = r.header.signature.to_vec();
        changed[3] ^= 1;
        r.header.signature = changed.into();
    }),
    ("another round", Code::NotFound, |r, _| r.header.round += 77),
    ("an earlier round", Code::FailedPrecondition, |r, _| r.header.round = 1),
    ("another configuration", Code::FailedPrecondition, |r, _| r.header.config_hash = Bytes::from_static(&[9; 32])),
    ("a credential that lasts longer", Code::Unauthenticated, |r, _| r.header.credential_expires += 1),
    ("a name of another length", Code::InvalidArgument, |r, _| r.header.report = Bytes::from_static(&[9; 15])),
    ("somebody else's name", Code::Unauthenticated, |r, _| r.header.client = Bytes::from_static(&[9; 32])),
];

#[tokio::test(flavor = "multi_thread")]
async fn threat_replay_and_hostile_uploads_are_refused() {
    let total: usize = std::env::var("ISTHMUS_HOSTILE").map_or(320, |n| n.parse().expect("a number of uploads"));
    let parties = Parties::configured(HONEST + ENROLLED, |text| {
        text.replace("upload_idle = \"10s\"", "upload_idle = \"1s\"").replace("uploads_per_minute = 600", "uploads_per_minute = 1000000")
    });
    let (first_plan, first_bits, _) = parties.whole_round(request(2, 20_000), 1).await;
    let mut operator = parties.operator().await;
    let wanted = CreateRoundRequest { upload_ms: 3_600_000, max_clients: 10, ..request(HONEST as u32, 20_000) };
    let round = operator.create(wanted).await.unwrap().round;
    let participant = parties.participant().await;
    let plan = parties.open_round(&participant, 0).await;
    let memory = parties.processes[0].as_ref().unwrap().memory_kb("VmRSS");

    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let bits = random_bits(plan.bits(), 1);
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let identities: Vec<Identity> = (HONEST..HONEST + ENROLLED).map(|c| parties.identity(c)).collect();
    let mut under_way = tokio::task::JoinSet::new();
    for i in 0..total {
        let (name, expected, trick) = TRICKS[i % TRICKS.len()];
        let mut report = make(&plan, &bits, &identities[i % ENROLLED], &mut rng).unwrap();
        trick(&mut report, &mut rng);
        let participant = participant.clone();
        under_way.spawn(async move { (name, expected, code(participant.upload(&report).await)) });
        *seen.entry(name).or_default() += 1;
        while under_way.len() >= 32 {
            let (name, expected, found) = under_way.join_next().await.unwrap().unwrap();
            assert_eq!(found, expected, "{name}");
        }
    }
    while let Some(done) = under_way.join_next().await {
        let (name, expected, found) = done.unwrap();
        assert_eq!(found, expected, "{name}");
    }
    println!("{total} hostile uploads of {} kinds", seen.len());

    // whoever is not enrolled, and whoever no longer is
    let stranger = |authority: &SignKey, expires: u64| {
        let key = SignKey::random(&mut rand::rng());
        let credential = Credential::issue(authority, key.public(), expires);
        make(&plan, &bits, &Identity { key, credential }, &mut rand::rng()).unwrap()
    };
    let other = SignKey::random(&mut rand::rng());
    let authority = aggregator::keys::open_signer(&parties.trial.authority).unwrap();
    assert_eq!(code(participant.upload(&stranger(&other, u64::MAX)).await), Code::Unauthenticated);
    assert_eq!(code(participant.upload(&stranger(&authority, 1000)).await), Code::Unauthenticated);
    // a report of the round before, sent again
    let replayed = parties.report(&first_plan, 0, &first_bits[0]);
    assert_eq!(code(participant.upload(&replayed).await), Code::FailedPrecondition);
    slow(&parties, &make(&plan, &bits, &identities[0], &mut rng).unwrap()).await;
    no_party(&parties, &plan).await;

    // honest clients: the same twice counts once, something else is refused
    let honest: Vec<_> = (0..HONEST).map(|c| random_bits(plan.bits(), 10 + c as u64)).collect();
    let reports: Vec<Report> = honest.iter().enumerate().map(|(c, b)| parties.report(&plan, c, b)).collect();
    participant.upload(&reports[0]).await.unwrap();
    participant.upload(&reports[0]).await.unwrap();
    assert_eq!(code(participant.upload(&parties.report(&plan, 0, &honest[1])).await), Code::AlreadyExists);
    for report in &reports[1..] {
        participant.upload(report).await.unwrap();
    }
    operator.wait(round, LIMIT, |_| ()).await.unwrap_or_else(|e| panic!("{e}: {}", parties.log(0)));
    let result = operator.result(round).await.unwrap();
    assert_eq!((result.round.clients as usize, &result.counts), (HONEST, &sums(&honest, plan.bits())));
    assert_eq!(code(participant.upload(&reports[1]).await), Code::FailedPrecondition, "the round is over");

    let most = parties.processes[0].as_ref().unwrap().memory_kb("VmHWM");
    println!("party 0: {memory} kB before, at most {most} kB");
    assert!(most < memory + (100 << 10), "{memory} kB before, at most {most} kB");
    let page = isthmus_testkit::http_get(parties.trial.status, "/metrics");
    assert!(page.contains("isthmus_reports_refused_total{reason=\"authentication\"}"), "{page}");
}

/// A client that sends a header and then nothing is given up.
async fn slow(parties: &Parties, report: &Report) {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(parties.certificate()));
    let channel = Endpoint::from_shared(parties.trial.url.clone()).unwrap().tls_config(tls).unwrap().connect().await.unwrap();
    let (send, receive) = tokio::sync::mpsc::channel(2);
    send.send(UploadChunk { part: Some(upload_chunk::Part::Header(report.header.clone())) }).await.unwrap();
    let began = std::time::Instant::now();
    let upload = ClientServiceClient::new(channel.clone()).upload_report(tokio_stream::wrappers::ReceiverStream::new(receive)).await;
    assert_eq!(upload.unwrap_err().code(), Code::DeadlineExceeded);
    assert!(began.elapsed() < Duration::from_secs(8));
    drop(send);
    // two headers, and a body before the header
    let header = || UploadChunk { part: Some(upload_chunk::Part::Header(report.header.clone())) };
    let body = || UploadChunk { part: Some(upload_chunk::Part::Body(Bytes::from_static(&[0; 8]))) };
    for parts in [vec![header(), header()], vec![body(), header()], vec![], vec![UploadChunk { part: None }]] {
        let upload = ClientServiceClient::new(channel.clone()).upload_report(tokio_stream::iter(parts)).await;
        assert_eq!(upload.unwrap_err().code(), Code::InvalidArgument);
    }
}

/// The listener for parties takes nobody without a party's certificate, and party 0's calls from nobody else.
async fn no_party(parties: &Parties, plan: &isthmus_federate::RoundPlan) {
    let certificate = std::fs::read_to_string(parties.folder().join("party1/identity.pem")).unwrap();
    let tls = || ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&certificate)).domain_name(aggregator::keys::tls_name(1));
    let request = || PeerRequest { round: plan.round(), config_hash: plan.hash().to_vec().into() };
    let url = format!("https://{}", parties.peer_address(1));
    let connect = async |tls: ClientTlsConfig| Endpoint::from_shared(url.clone()).unwrap().tls_config(tls).unwrap().connect().await;
    let nobody = match connect(tls()).await {
        Ok(channel) => PeerServiceClient::new(channel).propose_set(request()).await.is_err(),
        Err(_) => true,
    };
    assert!(nobody, "a caller without a certificate");
    let read = |name: &str| std::fs::read_to_string(parties.folder().join("party2").join(name)).unwrap();
    let identity = tonic::transport::Identity::from_pem(read("identity.pem"), read("identity.key"));
    let channel = connect(tls().identity(identity)).await.unwrap();
    let refused = PeerServiceClient::new(channel.clone()).propose_set(request()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    assert!(PeerServiceClient::new(channel).get_round(request()).await.is_ok(), "another party may ask how far a round is");
}

#[tokio::test]
async fn operators_need_a_token_and_rounds_must_make_sense() {
    let parties = Parties::start(2);
    let ca = parties.certificate();
    let mut stranger = isthmus_federate::Operator::connect(&parties.trial.url, Some(&ca), "guess", LIMIT).await.unwrap();
    assert_eq!(code(stranger.list(0).await), Code::Unauthenticated);
    let mut operator = parties.operator().await;
    let wrong: [fn(&mut CreateRoundRequest); 9] = [
        |r| r.dim = 0,
        |r| r.norm = f32::NAN,
        |r| r.norm = -1.0,
        |r| r.mode = 0,
        |r| r.transform = 77,
        |r| r.min_clients = 1,
        |r| r.max_clients = 1 << 30,
        |r| r.upload_ms = 0,
        |r| r.extra_bits = u32::MAX,
    ];
    for (i, change) in wrong.into_iter().enumerate() {
        let mut asked = request(4, 100);
        change(&mut asked);
        assert_eq!(code(operator.create(asked).await), Code::InvalidArgument, "{i}");
    }
    assert_eq!(code(operator.round(9).await), Code::NotFound);
    assert_eq!(code(operator.seal(9).await), Code::NotFound);
    assert!(Participant::connect("https://127.0.0.1:1", Some(&ca), Duration::from_secs(2)).await.is_err());
    let round = operator.create(request(2, 100)).await.unwrap().round;
    operator.abort(round, "a test").await.unwrap();
    assert_eq!(code(operator.seal(round).await), Code::FailedPrecondition);
    assert!(operator.wait(round, LIMIT, |_| ()).await.unwrap_err().to_string().contains("a test"));
}
