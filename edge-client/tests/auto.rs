//! The client that chooses, against a real server that goes away and comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use edge_client::auto::Photo;
use edge_client::local::LocalClassifier;
use edge_client::policy::{Aim, Choice, Goal, LocalUse};
use edge_client::{AutoClient, Client, Encoder, Endpoint, InferOptions, open_bundle};
use isthmus_testkit::{Server, backbones, binary, bundle, demo_photos, free_port, root};

const DEADLINE: Duration = Duration::from_secs(2);

fn local() -> LocalClassifier {
    LocalClassifier::open(&backbones().join("efficientnet-lite0.onnx"), 224, 1).unwrap()
}

fn photo(i: usize) -> Photo {
    let file = std::fs::read(&demo_photos()[i]).unwrap();
    Photo { pixels: isthmus_pixels::decode(&file).unwrap(), file: Some(file.into()) }
}

async fn client(address: Arc<Mutex<SocketAddr>>, local: Option<LocalClassifier>) -> AutoClient {
    let goal = Goal { deadline: DEADLINE, aim: Aim::Agreement, least_agreement: 0.0, local: LocalUse::Fallback };
    let encoder = Encoder::new(open_bundle(&bundle()).unwrap(), 1).unwrap();
    let connector = Arc::new(move || {
        let endpoint = Endpoint::new(&format!("http://{}", address.lock().unwrap())).unwrap();
        Box::pin(async move { Client::connect(&endpoint).await }) as _
    });
    AutoClient::new(encoder, local, connector, goal, InferOptions { top_k: 1, ..InferOptions::default() }, 1.0).await.unwrap()
}

#[tokio::test]
async fn a_server_that_goes_away_is_bridged_by_the_device_and_found_again() {
    let server = Server::start(&[]);
    let address = Arc::new(Mutex::new(server.address));
    let mut client = client(address.clone(), Some(local())).await;
    for i in 0..6 {
        let answer = client.classify(&photo(i)).await.unwrap();
        assert!(answer.choice != Choice::Local && answer.bytes > 0 && answer.elapsed < DEADLINE, "{answer:?}");
    }
    drop(server);
    for i in 0..6 {
        let answer = client.classify(&photo(i)).await.unwrap();
        assert!(answer.choice == Choice::Local && answer.elapsed < DEADLINE, "{answer:?}");
    }
    assert!(client.policy().link_is_dead());
    let server = Server::start(&[]);
    *address.lock().unwrap() = server.address;
    let began = Instant::now();
    while client.classify(&photo(0)).await.unwrap().choice == Choice::Local {
        assert!(began.elapsed() < Duration::from_secs(20), "the server is back and not used");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(server);
}

#[tokio::test]
async fn without_a_network_on_the_device_a_dead_link_is_an_error_in_time() {
    let address = Arc::new(Mutex::new(free_port()));
    let mut client = client(address, None).await;
    let began = Instant::now();
    let error = client.classify(&photo(0)).await.unwrap_err();
    assert!(began.elapsed() < DEADLINE + Duration::from_millis(500), "{error}");
    assert!(error.to_string().contains("cannot reach"), "{error}");
}

#[test]
fn the_device_gives_the_same_logits_as_the_server() {
    let mut local = local();
    let server = Server::start(&[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut client = runtime.block_on(Client::connect(&Endpoint::new(&server.url()).unwrap())).unwrap();
    for i in 0..4 {
        let photo = photo(i);
        let options = InferOptions { logits: true, ..InferOptions::default() };
        let payload = edge_client::Payload::Image(photo.file.clone().unwrap());
        let wanted = runtime.block_on(client.infer(payload, &options)).unwrap().logits;
        let found = local.logits(&photo.pixels).unwrap();
        let worst = wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(wanted.len() == found.len() && worst < 1e-3, "photo {i}: {worst}");
    }
}

#[test]
fn the_command_line_chooses_and_explains_itself() {
    let server = Server::start(&[]);
    let photos = demo_photos();
    let run = |extra: &[&str]| {
        let mut command = Command::new(binary("edge-client"));
        command.current_dir(root()).arg("classify").args(&photos[..3]).args(["--policy", "auto", "--json"]).args(extra);
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (ok, lines, error) = run(&["--server", &server.url(), "--deadline", "1s"]);
    assert!(ok, "{error}");
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["choice"].is_string() && line["latency_ms"].as_f64().unwrap() < 1000.0, "{line}");
    }
    assert_eq!(lines.lines().count(), 3);
    let nowhere = format!("http://{}", free_port());
    let (ok, lines, _) = run(&["--server", &nowhere]);
    assert!(ok && lines.lines().all(|l| l.contains("\"choice\":\"local\"")), "{lines}");
    let (ok, lines, error) = run(&["--server", &nowhere, "--local-model", "nowhere.onnx"]);
    assert!(!ok && error.contains("nowhere.onnx") && lines.contains("cannot reach"), "{error}{lines}");
    let (ok, _, error) = run(&["--server", &nowhere, "--quality", "3"]);
    assert!(!ok && error.contains("leave out --quality"), "{error}");
    let (ok, _, error) = run(&["--server", &nowhere, "--least-agreement", "7"]);
    assert!(!ok && error.contains("from 0 to 1"), "{error}");
}
