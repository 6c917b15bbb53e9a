//! Progressive bitstreams: beginnings are answered, kept while they may be refined, and refined.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use bytes::Bytes;
use common::{assert_healthy, client, code_of, encoder, options, sample};
use edge_client::stream::open;
use edge_client::{InferOptions, Payload};
use isthmus_proto::offload_v1::{InferRequest, InferResponse, infer_request};
use isthmus_testkit::{Server, binary, demo_photos, root};
use tonic::{Code, Status};

fn parts(photo: usize) -> Vec<Bytes> {
    let photo = std::fs::read(&demo_photos()[photo]).unwrap();
    encoder().encode_progressive(&photo).unwrap().parts.into_iter().map(Bytes::from).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_want_more_until_they_are_certain_or_nothing_is_left() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let parts = parts(0);
    assert_eq!(parts.len(), 3, "level 1 and two refinements");
    let asked = InferOptions { certainty: 1.0, logits: true, ..options() };
    let (mut sender, mut receiver) = open(&mut client, 4, asked.clone()).await.unwrap();
    let id = sender.send(Payload::Bitstream(parts[0].clone())).await.unwrap();
    let mut come = parts[0].to_vec();
    let mut answers = vec![receiver.next().await.unwrap().unwrap().result.unwrap()];
    for part in &parts[1..] {
        assert!(answers.last().unwrap().wants_more);
        sender.refine(id, Instant::now(), part.clone()).await.unwrap();
        come.extend(part);
        let answer = receiver.next().await.unwrap().unwrap();
        assert_eq!(answer.id, id);
        let answer = answer.result.unwrap();
        // as if it had come whole
        let whole = client.infer(Payload::Bitstream(come.clone().into()), &asked).await.unwrap();
        assert!(!whole.wants_more, "single requests are answered once");
        let near = answer.logits.iter().zip(&whole.logits).all(|(a, b)| (a - b).abs() < 1e-3);
        assert!(near && answer.logits.len() == 1000);
        answers.push(answer);
    }
    assert!(!answers.last().unwrap().wants_more, "there is no more");
    assert!(answers.windows(2).all(|pair| pair[0].logits != pair[1].logits));

    // certain enough, and not asked for
    for certainty in [1e-6, 0.0] {
        let (mut sender, mut receiver) = open(&mut client, 4, InferOptions { certainty, ..options() }).await.unwrap();
        sender.send(Payload::Bitstream(parts[0].clone())).await.unwrap();
        assert!(!receiver.next().await.unwrap().unwrap().result.unwrap().wants_more);
        // so nothing is kept
        sender.refine(1, Instant::now(), parts[1].clone()).await.unwrap();
        let refused = receiver.next().await.unwrap().unwrap().result.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
        assert!(refused.message().contains("send it whole"), "{refused:?}");
    }
    // another level than the one that refinements refine
    let (mut sender, mut receiver) = open(&mut client, 4, asked).await.unwrap();
    sender.send(Payload::Bitstream(sample().0)).await.unwrap();
    assert!(!receiver.next().await.unwrap().unwrap().result.unwrap().wants_more);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_and_the_stream_goes_on() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let (first, other) = (parts(0), parts(1));
    let asked = InferOptions { certainty: 1.0, ..options() };
    let (mut sender, mut receiver) = open(&mut client, 4, asked.clone()).await.unwrap();
    let refused = |result: Result<InferResponse, Status>| result.unwrap_err();
    // of another photo, damaged, in another order, nothing at all
    for wrong in [other[1].clone(), first[1].slice(..first[1].len() - 3), first[2].clone(), Bytes::from_static(b"x")] {
        let id = sender.send(Payload::Bitstream(first[0].clone())).await.unwrap();
        assert!(receiver.next().await.unwrap().unwrap().result.unwrap().wants_more);
        sender.refine(id, Instant::now(), wrong).await.unwrap();
        let status = refused(receiver.next().await.unwrap().unwrap().result);
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    }
    let (code, why) = code_of(&mut client, Payload::Refinement(first[1].clone())).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(why.contains("InferStream"), "{why}");
    for certainty in [f32::NAN, -0.1, 1.5, f32::INFINITY] {
        let payload = Some(infer_request::Payload::Bitstream(first[0].clone()));
        let request = InferRequest { payload, certainty, ..InferRequest::default() };
        let status = client.raw().infer(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains("certainty"), "{status:?}");
    }
    assert_healthy(&mut client, &first[0]).await;
}

/// More is sent for the photos that need it, and for no others.
#[test]
fn the_client_stops_where_the_server_is_certain() {
    let server = Server::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    for photo in demo_photos() {
        std::fs::copy(&photo, folder.path().join(photo.file_name().unwrap())).unwrap();
    }
    let ask = |command: &[&str], photos: &[PathBuf], certainty: &str| {
        let output = Command::new(binary("edge-client"))
            .args(command)
            .args(photos)
            .args(["--progressive", "--certainty", certainty, "--json", "--server", &server.url()])
            .current_dir(root())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
        let lines: Vec<serde_json::Value> = printed.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), demo_photos().len());
        lines
            .iter()
            .map(|l| (l["refinements"].as_u64().unwrap(), l["bytes"].as_u64().unwrap(), l["labels"][0]["score"].as_f64().unwrap()))
            .collect::<Vec<_>>()
    };
    let run = |certainty: &str| ask(&["stream", "--fps", "30", "--window", "2"], &[folder.path().to_owned()], certainty);
    let (none, some, all) = (run("0"), run("0.5"), run("1"));
    // a stream's answers come in another order
    let sorted = |lines: &[(u64, u64, f64)]| {
        let mut sent: Vec<_> = lines.iter().map(|(refinements, bytes, _)| (*refinements, *bytes)).collect();
        sent.sort_unstable();
        sent
    };
    assert_eq!(sorted(&ask(&["classify"], &demo_photos(), "0.5")), sorted(&some));
    assert!(none.iter().all(|(refinements, _, _)| *refinements == 0));
    assert!(all.iter().all(|(refinements, _, _)| *refinements == 2), "{all:?}");
    assert!(some.iter().all(|(refinements, _, score)| *refinements == 2 || *score >= 0.5), "{some:?}");
    assert!(some.iter().any(|(refinements, _, _)| *refinements == 0), "{some:?}");
    let bytes = |lines: &[(u64, u64, f64)]| lines.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
    assert!(bytes(&none) < bytes(&some) && bytes(&some) < bytes(&all));
}
