//! Rounds over three real processes give the plaintext's counts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{LIMIT, Parties, random_bits, request, sums};
use isthmus_proto::aggregator_v1::report_status::Stage;
use isthmus_proto::aggregator_v1::{CreateRoundRequest, Filter, Mode, State, Transform};
use isthmus_secagg::Bits;

#[tokio::test]
async fn counts_equal_the_plaintext_in_every_mode() {
    let parties = Parties::start(67);
    let kashin = |r| CreateRoundRequest { transform: Transform::Kashin.into(), ..r };
    let additive = |r| CreateRoundRequest { mode: Mode::Additive2.into(), ..r };
    let extra = |r| CreateRoundRequest { extra_bits: 13, ..r };
    let rounds = [request(2, 1), request(3, 1000), extra(request(67, 70_001)), kashin(request(5, 300)), additive(extra(request(4, 777)))];
    for (i, request) in rounds.into_iter().enumerate() {
        let (plan, bits, result) = parties.whole_round(request, 100 * i as u64).await;
        assert_eq!(result.counts, sums(&bits, plan.bits()), "round {i}");
        assert_eq!((result.round.clients as usize, result.round.kept as usize), (bits.len(), bits.len()));
        assert_eq!(result.mean().unwrap().len(), plan.config().dim as usize);
        assert_eq!(result.extra().unwrap().len(), plan.config().extra_bits as usize);
    }
    check_metrics(&parties);
    // nothing secret is logged
    for party in 0..3 {
        let secret = std::fs::read_to_string(parties.folder().join(format!("party{party}/envelope.key"))).unwrap();
        assert!(!parties.log(party).contains(&secret), "party {party}");
    }
}

/// docs/metrics.md and the exported metrics name the same things.
fn check_metrics(parties: &Parties) {
    let page = isthmus_testkit::http_get(parties.trial.status, "/metrics");
    isthmus_testkit::check_metrics("aggregator", &page, &["isthmus_reports_refused_total"]);
    let status = isthmus_testkit::http_get(parties.trial.status, "/status.json");
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert!(status["rounds"].as_array().is_some_and(|r| r.iter().all(|r| r["state"] == "done")), "{status}");
    // the page as a browser shows it
    let Some(page) = isthmus_testkit::browser::shown(&format!("http://{}/", parties.trial.status)) else { return };
    for shown in ["party 0, task", "<b>5</b>", "<svg", "answered"] {
        assert!(page.contains(shown), "{shown} is missing: {page}");
    }
    assert!(page.matches("<tr>").count() >= 9, "five rounds, three parties, heads: {page}");
}

#[tokio::test]
async fn threat_poisoning_clients_that_agree_least_are_left_out() {
    let parties = Parties::start(9);
    let (_, _, first) = parties.whole_round(request(9, 5000), 7).await;
    let mean = first.mean().unwrap();
    for (reveal_flags, round) in [(true, 2), (false, 3)] {
        let filter = Filter { reference_round: 1, drop: 3, reveal_flags, ..Filter::default() };
        let mut operator = parties.operator().await;
        operator.create(CreateRoundRequest { filter: Some(filter), min_clients: 4, ..request(9, 5000) }).await.unwrap();
        let participant = parties.participant().await;
        let plan = parties.open_round(&participant, 0).await;
        let direction = plan.direction(&mean).unwrap();
        // client c flips a share of the direction's signs; clients 2, 5 and 8 flip most
        let bits_of = |c: usize| {
            let noise =
                [random_bits(plan.bits(), c as u64), random_bits(plan.bits(), 50 + c as u64), random_bits(plan.bits(), 90 + c as u64)];
            Bits::fill(plan.bits(), |k| {
                let [a, b, d] = [noise[0].words()[k], noise[1].words()[k], noise[2].words()[k]];
                let flips = if c % 3 == 2 { a | b | d } else { a & b & d };
                direction[k] ^ flips
            })
        };
        let all: Vec<Bits> = (0..9).map(bits_of).collect();
        let mut names = Vec::new();
        for (c, bits) in all.iter().enumerate() {
            let report = parties.report(&plan, c, bits);
            names.push((report.header.report.to_vec(), c));
            participant.upload_until_stored(&report, LIMIT).await.unwrap();
        }
        operator.wait(round, LIMIT, |_| ()).await.unwrap_or_else(|e| panic!("{e}\n{}\n{}", parties.log(0), parties.log(1)));
        let result = operator.result(round).await.unwrap();
        assert_eq!(result.round.kept, 6);
        let kept: Vec<Bits> = all.iter().enumerate().filter(|(c, _)| c % 3 != 2).map(|(_, b)| b.clone()).collect();
        assert_eq!(result.counts, sums(&kept, plan.bits()));
        names.sort();
        let flags: Vec<bool> =
            names.iter().enumerate().map(|(i, _)| result.kept_flags.get(i / 8).is_some_and(|f| f >> (i % 8) & 1 == 1)).collect();
        let expected: Vec<bool> = names.iter().map(|(_, c)| reveal_flags && c % 3 != 2).collect();
        assert_eq!(flags, expected);
    }
}

#[tokio::test]
async fn threat_small_rounds_end_without_a_result() {
    let parties = Parties::start(4);
    let mut operator = parties.operator().await;
    let round = operator.create(CreateRoundRequest { min_clients: 3, ..request(4, 100) }).await.unwrap().round;
    let participant = parties.participant().await;
    let plan = parties.open_round(&participant, 0).await;
    let report = parties.report(&plan, 0, &random_bits(plan.bits(), 1));
    let stored = participant.upload_until_stored(&report, LIMIT).await.unwrap();
    assert_eq!(stored.stage(), Stage::Complete);
    operator.seal(round).await.unwrap();
    let error = operator.wait(round, LIMIT, |_| ()).await.unwrap_err().to_string();
    assert!(error.contains("a set of 1 reports; the round needs 3"), "{error}");
    assert!(operator.result(round).await.is_err());
    assert_eq!(participant.status(round, &report.header.report).await.unwrap().stage(), Stage::LeftOut);
    for party in 0..3 {
        assert!(!parties.log(party).contains("a share of the result leaves"), "nothing was opened");
    }
    // the next one works
    let (plan, bits, result) = parties.whole_round(request(4, 100), 5).await;
    assert_eq!(result.counts, sums(&bits, plan.bits()));
    assert_eq!(result.round.state(), State::Done);
}

/// `aggregator local` runs until it is told to stop, and takes its parties with it.
#[test]
fn three_parties_on_one_machine_run_until_they_are_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(isthmus_testkit::binary("aggregator"));
    command.args(["local", "--port", "0"]).arg(folder.path().join("trial")).stdin(std::process::Stdio::null());
    let (mut process, line) = isthmus_testkit::Process::spawn(&mut command);
    assert!(line.starts_with("operators:"), "{line}");
    std::thread::sleep(std::time::Duration::from_secs(2));
    process.signal("INT");
    assert_eq!(process.wait(LIMIT), Some(0), "it was still there, and ended in good order");
}
