//! kill -9 of any party at any moment: a round ends exact or without a result, and is opened in one attempt only.
//!
//! `ISTHMUS_FAULT_ROUNDS=1000 cargo test --release -p aggregator --test faults` is the long form; docs/benchmarks has its numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{LIMIT, Parties, random_bits, request, sums};
use isthmus_federate::participant::Found;
use isthmus_proto::aggregator_v1::State;
use isthmus_secagg::Bits;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;

const CLIENTS: usize = 6;

/// Epochs in which shares of each round left a party.
fn openings(log: &str) -> BTreeMap<u64, BTreeSet<u64>> {
    let number = |line: &str, key: &str| {
        let rest = &line[line.find(&format!(" {key}="))? + key.len() + 2..];
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let mut found: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for line in log.lines().filter(|l| l.contains("a share of the result leaves")) {
        found.entry(number(line, "round").unwrap()).or_default().insert(number(line, "epoch").unwrap());
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn threat_replay_rounds_survive_kills_and_nobody_counts_twice() {
    let rounds: u64 = std::env::var("ISTHMUS_FAULT_ROUNDS").map_or(12, |n| n.parse().expect("a number of rounds"));
    let mut parties = Parties::start(CLIENTS);
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let (mut done, mut aborted, mut kills) = (0, 0, 0);
    for turn in 0..rounds {
        let mut operator = parties.operator().await;
        let request =
            isthmus_proto::aggregator_v1::CreateRoundRequest { upload_ms: 15_000, compute_ms: 20_000, ..request(CLIENTS as u32, 3000) };
        let round = operator.create(request).await.unwrap().round;
        let participant = parties.participant().await;
        // when and whom: from before the first upload to after the result
        let (after, victim) = (Duration::from_millis(u64::from(rng.next_u32() % 160)), rng.next_u32() as usize % 4);
        let (url, ca) = (parties.trial.url.clone(), parties.certificate());
        let identities: Vec<_> = (0..CLIENTS).map(|c| parties.identity(c)).collect();
        let uploads = tokio::spawn(async move {
            let plan = loop {
                match participant.round(&identities[0].key.public()).await {
                    Ok(Found::Round(plan)) if plan.round() == round => break plan,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            };
            let mut sent = BTreeMap::new();
            for (c, identity) in identities.iter().enumerate() {
                let bits = random_bits(plan.bits(), turn * 100 + c as u64);
                let report = isthmus_federate::report::make(&plan, &bits, identity, &mut rand::rng()).unwrap();
                // a client that is killed loses its connection and sends the same report again
                let participant =
                    isthmus_federate::Participant::connect(&url, Some(&ca), LIMIT).await.unwrap_or_else(|_| participant.clone());
                let stored = participant.upload_until_stored(&report, Duration::from_secs(10)).await;
                if stored.is_ok() && c % 2 == 0 {
                    let _ = participant.upload(&report).await;
                }
                sent.insert(report.header.report.to_vec(), bits);
            }
            (plan, sent)
        });
        tokio::time::sleep(after).await;
        if victim < 3 {
            parties.kill(victim);
            kills += 1;
            tokio::time::sleep(Duration::from_millis(u64::from(rng.next_u32() % 300))).await;
            parties.restart(victim);
        }
        let (plan, sent) = uploads.await.unwrap();
        let mut operator = parties.operator().await;
        let ended = loop {
            match operator.round(round).await {
                Ok(seen) if matches!(seen.state(), State::Done | State::Aborted) => break seen,
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(_) => operator = parties.operator().await,
            }
        };
        if ended.state() == State::Aborted {
            aborted += 1;
            continue;
        }
        done += 1;
        let result = operator.result(round).await.unwrap();
        let participant = parties.participant().await;
        let mut counted: Vec<Bits> = Vec::new();
        for (report, bits) in &sent {
            if participant
                .status(round, report)
                .await
                .is_ok_and(|s| s.stage() == isthmus_proto::aggregator_v1::report_status::Stage::Counted)
            {
                counted.push(bits.clone());
            }
        }
        assert_eq!(counted.len(), result.round.clients as usize, "round {round}: every client of the set counts once");
        assert_eq!(result.counts, sums(&counted, plan.bits()), "round {round}");
    }
    println!("{rounds} rounds, {kills} kills: {done} done, {aborted} ended without a result");
    assert!(done * 2 > rounds, "{done} of {rounds} rounds were done");
    let mut opened: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for party in 0..3 {
        for (round, epochs) in openings(&parties.log(party)) {
            opened.entry(round).or_default().extend(epochs);
        }
    }
    for (round, epochs) in &opened {
        assert_eq!(epochs.len(), 1, "round {round} was opened in epochs {epochs:?}");
    }
    assert!(opened.len() as u64 >= done);
}
