//! The running server: answers, batching, health, reflection, metrics, TLS, shutdown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{assert_healthy, client, encoder, options, sample};
use edge_client::engine::{Engine, RtenEngine};
use edge_client::{Client, ClientError, Endpoint, InferOptions, Payload};
use isthmus_proto::offload_v1::Features;
use isthmus_proto::offload_v1::features::Encoding;
use isthmus_testkit::{Server, backbones, bundle, demo_photos};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn photos_as_bitstreams_and_as_images() {
    let server = Server::start(&["--model", "efficientnet-lite0", "--model", "efficientnet-lite2"]);
    let mut client = client(&server).await;
    let mut encoder = encoder();
    let described = client.describe(Some(&encoder.bundle().hash), Duration::from_secs(5)).await.unwrap();
    assert_eq!(described.models.len(), 2);
    assert_eq!((described.models[0].input_size, described.models[1].input_size), (224, 260));
    let best = encoder.bundle().levels();
    let (mut ours, mut reused, mut lite0, mut lite2) = (0, 0, 0, 0);
    for path in demo_photos() {
        let label: u32 = path.file_stem().unwrap().to_str().unwrap().rsplit('_').next().unwrap().parse().unwrap();
        let photo = std::fs::read(path).unwrap();
        let container = encoder.encode(&photo, best).unwrap().container;
        let container = Bytes::from(container);
        let answer = client.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
        assert_eq!(answer.model, "efficientnet-lite0");
        assert!(answer.timing.unwrap().total_us > 0);
        ours += u32::from(answer.labels[0].index == label);
        let whole = client.infer(Payload::Image(photo.clone().into()), &options()).await.unwrap();
        lite0 += u32::from(whole.labels[0].index == label);
        let other = InferOptions { model: "efficientnet-lite2".into(), logits: true, ..options() };
        let same = client.infer(Payload::Bitstream(container), &other).await.unwrap();
        assert_eq!(same.model, "efficientnet-lite2");
        reused += u32::from(same.labels[0].index == label);
        let whole = client.infer(Payload::Image(photo.into()), &other).await.unwrap();
        assert_eq!(whole.logits.len(), 1000);
        lite2 += u32::from(whole.labels[0].index == label);
    }
    assert_eq!((lite0, lite2), (18, 18), "whole images give the backbones' own accuracy");
    println!("of 20 right: Lite0 {lite0}, from bitstreams {ours}; Lite2 {lite2}, from the same bitstreams {reused}");
    assert!(ours >= 12, "bitstreams at the best quality: {ours} of 20 right");
    assert!(reused >= 12, "the same bitstreams for the other backbone: {reused} of 20 right");
}

/// A bundle that has no decoder for one of the server's models.
#[tokio::test(flavor = "multi_thread")]
async fn bitstreams_without_a_decoder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(bundle()).unwrap().map(|e| e.unwrap().path()) {
        std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("manifest.toml");
    let mut manifest: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
    manifest["decoders"].as_array_mut().unwrap().truncate(1);
    manifest["golden"]["logits"].as_array_mut().unwrap().truncate(1);
    manifest["files"].as_table_mut().unwrap().remove("decoder-efficientnet-lite2.safetensors").unwrap();
    std::fs::write(&path, manifest.to_string()).unwrap();
    let config = folder.path().join("server.toml");
    std::fs::write(&config, format!("bundles = [{:?}]\nmodels = [\"efficientnet-lite0\", \"efficientnet-lite2\"]\n", folder.path()))
        .unwrap();
    let server = Server::configured(&config, &backbones());
    let mut client = client(&server).await;
    let mut encoder = edge_client::Encoder::new(edge_client::open_bundle(folder.path()).unwrap(), 1).unwrap();
    let container = Bytes::from(encoder.encode(&std::fs::read(&demo_photos()[0]).unwrap(), 3).unwrap().container);
    client.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
    let other = InferOptions { model: "efficientnet-lite2".into(), ..options() };
    let refused = client.infer(Payload::Bitstream(container), &other).await;
    assert!(matches!(refused, Err(ClientError::Server(s)) if s.code() == Code::FailedPrecondition));
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_requests_give_equal_logits_alone_and_in_batches() {
    let server = Server::start(&[]);
    let client = client(&server).await;
    let (good, _) = sample();
    let ask = InferOptions { logits: true, ..options() };
    let alone = client.clone().infer(Payload::Bitstream(good.clone()), &ask).await.unwrap().logits;
    let again = client.clone().infer(Payload::Bitstream(good.clone()), &ask).await.unwrap().logits;
    assert_eq!(alone, again, "two runs of one container");
    let mut tasks = Vec::new();
    for _ in 0..24 {
        let (mut client, good, ask) = (client.clone(), good.clone(), ask.clone());
        tasks.push(tokio::spawn(async move { client.infer(Payload::Bitstream(good), &ask).await.unwrap() }));
    }
    let mut largest = 0;
    for task in tasks {
        let answer = task.await.unwrap();
        largest = largest.max(answer.timing.unwrap().batch_size);
        let worst = answer.logits.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3, "a batch changed the logits by {worst}");
    }
    assert!(largest > 1, "what waits together runs together");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_and_two_threads_agree() {
    let ask = InferOptions { logits: true, ..options() };
    let (good, _) = sample();
    let mut all = Vec::new();
    for threads in ["1", "2"] {
        let server = Server::start(&["--threads", threads]);
        all.push(client(&server).await.infer(Payload::Bitstream(good.clone()), &ask).await.unwrap().logits);
    }
    let worst = all[0].iter().zip(&all[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_what_is_in_flight() {
    let mut server = Server::start(&["--threads", "1"]);
    let client = client(&server).await;
    let (_, photo) = sample();
    let mut tasks = Vec::new();
    for _ in 0..60 {
        let (mut client, photo) = (client.clone(), photo.clone());
        tasks.push(tokio::spawn(async move { client.infer(Payload::Image(photo), &options()).await }));
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let in_flight = loop {
        let metrics = server.metrics();
        let gauge = metrics.lines().find_map(|l| l.strip_prefix("isthmus_in_flight ")).unwrap_or("0");
        match gauge.parse().unwrap() {
            n @ 20.. => break n,
            n => assert!(Instant::now() < deadline, "{n} in flight"),
        }
    };
    server.process.signal("TERM");
    let mut answered: u32 = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => answered += 1,
            // those that had not arrived yet are told to go elsewhere
            Err(ClientError::Server(s)) => assert!(matches!(s.code(), Code::Unavailable | Code::Cancelled), "{s:?}"),
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(answered >= in_flight, "{answered} answered, {in_flight} were in flight");
    drop(client);
    assert_eq!(server.process.wait(Duration::from_secs(30)), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer_standard_clients() {
    let server = Server::start(&[]);
    let channel = tonic::transport::Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let ask = tonic_health::pb::HealthCheckRequest { service: "isthmus.offload.v1.OffloadService".into() };
    assert_eq!(health.check(ask).await.unwrap().into_inner().status, 1);
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let mut reflection = tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response else {
        panic!("no list of services")
    };
    assert!(list.service.iter().any(|s| s.name == "isthmus.offload.v1.OffloadService"));
}

/// The output of block 0 for a photo, from the device's graph, in single precision.
fn features(photo: usize) -> Features {
    let graph = std::fs::read(isthmus_testkit::backbones().join("efficientnet-lite0-to-block0.onnx")).unwrap();
    let file = std::fs::read(&demo_photos()[photo]).unwrap();
    let mut pixels = Vec::new();
    isthmus_pixels::decode(&file).unwrap().network_input(224).unwrap().normalise_into(&mut pixels);
    let values = RtenEngine::new(&graph, 224, 1).unwrap().run(pixels).unwrap();
    assert_eq!(values.len(), 16 * 112 * 112);
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Features { block: 0, encoding: Encoding::F32 as i32, data: data.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_features_and_avif_give_the_answers_of_the_whole_network() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let ask = InferOptions { logits: true, ..options() };
    for i in 0..3 {
        let photo = std::fs::read(&demo_photos()[i]).unwrap();
        let whole = client.infer(Payload::Image(photo.clone().into()), &ask).await.unwrap();
        let split = client.infer(Payload::Features(features(i)), &ask).await.unwrap();
        let worst = whole.logits.iter().zip(&split.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3, "photo {i}: {worst}");
        let pixels = isthmus_pixels::decode(&photo).unwrap().network_input(224).unwrap();
        let rgb: Vec<ravif::RGB8> = pixels.data().chunks_exact(3).map(|p| ravif::RGB8::new(p[0], p[1], p[2])).collect();
        let encoder = ravif::Encoder::new().with_quality(98.0).with_speed(10).with_bit_depth(ravif::BitDepth::Eight);
        let file = encoder.encode_rgb(ravif::Img::new(rgb.as_slice(), 224, 224)).unwrap().avif_file;
        let avif = client.infer(Payload::Image(file.into()), &ask).await.unwrap();
        // little is lost, but something is: about the same probability for the same class
        let (best, score) = (whole.labels[0].index, whole.labels[0].score);
        let found = avif.labels.iter().find(|l| l.index == best).map_or(0.0, |l| l.score);
        assert!((score - found).abs() < 0.15, "photo {i}: {score} as a file, {found} as AVIF");
    }
}

/// docs/metrics.md and the exported metrics name the same things.
#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_those_of_the_specification() {
    let server = Server::start(&[]);
    let mut client = client(&server).await;
    let (good, photo) = sample();
    assert_healthy(&mut client, &good).await;
    client.infer(Payload::Image(photo), &options()).await.unwrap();
    client.infer(Payload::Features(features(0)), &options()).await.unwrap();
    let _ = client.infer(Payload::Bitstream(vec![1, 2, 3].into()), &options()).await;
    let page = server.metrics();
    isthmus_testkit::check_metrics("offload-server", &page, &[]);
    assert!(page.contains("isthmus_requests_total{payload=\"bitstream\",code=\"InvalidArgument\"} 1"), "{page}");
    // the status page, as a browser shows it
    let Some(shown) = isthmus_testkit::browser::shown(&format!("http://{}/", server.admin)) else { return };
    for text in ["efficientnet-lite0", "lite0-patch-stem ", "anonymous", "bad_container", "median, last minute", "<svg", "<b>3</b>"] {
        assert!(shown.contains(text), "{text} is missing: {shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_used_and_demanded_off_loopback() {
    let folder = tempfile::tempdir().unwrap();
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert, certified.cert.pem()).unwrap();
    std::fs::write(&key, certified.signing_key.serialize_pem()).unwrap();
    let server = Server::start(&["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()]);
    let url = format!("https://localhost:{}", server.address.port());
    let trusted = Endpoint::new(&url).unwrap().with_ca(std::fs::read(&cert).unwrap());
    let mut client = Client::connect(&trusted).await.unwrap();
    assert_healthy(&mut client, &sample().0).await;
    let stranger = Client::connect(&Endpoint::new(&url).unwrap()).await;
    assert!(matches!(stranger, Err(ClientError::Connect { .. })), "a certificate of nobody is not trusted");
    let away = Client::connect(&Endpoint::new("http://192.0.2.1:50051").unwrap()).await;
    assert!(matches!(away, Err(ClientError::Usage(_))), "no plain HTTP to another machine");

    let refused = std::process::Command::new(isthmus_testkit::binary("offload-server")).args(["--listen", "0.0.0.0:0"]).output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("tls_cert"), "says what is missing");
}

#[test]
fn wrong_set_ups_say_what_is_wrong() {
    let run = |args: &[&str]| {
        let output = std::process::Command::new(isthmus_testkit::binary("offload-server")).args(args).output().unwrap();
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let bundle = isthmus_testkit::bundle();
    let backbones = isthmus_testkit::backbones();
    let (bundle, backbones) = (bundle.to_str().unwrap(), backbones.to_str().unwrap());
    let base = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let with = |extra: &[&str]| run(&[&base[..], extra].concat());
    assert!(with(&["--bundle", "/nonexistent", "--backbones", backbones]).contains("/nonexistent"));
    assert!(with(&["--bundle", bundle, "--backbones", "/nonexistent"]).contains("labels.json"));
    assert!(with(&["--bundle", bundle, "--backbones", backbones, "--model", "vgg"]).contains("efficientnet-lite0"));
    assert!(with(&["--bundle", bundle, "--backbones", backbones, "--device", "cuda:7"]).contains("cuda:7"));
    let senseless = |toml: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), toml).unwrap();
        with(&["--config", file.path().to_str().unwrap(), "--print-config"])
    };
    for (toml, named) in [
        ("max_image_pixels = 0", "max_image_pixels"),
        ("max_connection_age = \"1ms\"", "max_connection_age"),
        ("network_threads = 30000", "network_threads"),
        ("models = [\"efficientnet-lite0\", \"efficientnet-lite0\"]", "twice"),
        ("max_received_bytes = 1000", "max_received_bytes"),
    ] {
        assert!(senseless(toml).contains(named), "{toml}: {}", senseless(toml));
    }
    let mut logged = std::process::Command::new(isthmus_testkit::binary("offload-server"));
    let logged =
        logged.args([&base[..], &["--bundle", bundle, "--backbones", backbones]].concat()).env("RUST_LOG", "===,[").output().unwrap();
    assert!(!logged.status.success() && String::from_utf8_lossy(&logged.stderr).contains("RUST_LOG"), "{logged:?}");
    assert!(with(&["--config", "/nonexistent.toml"]).contains("/nonexistent.toml"));
}

#[test]
fn the_sample_configuration_is_complete_and_equals_the_defaults() {
    let path = isthmus_testkit::root().join("configs/offload-server.toml");
    let sample = offload_server::Config::open(&path).unwrap();
    assert_eq!(sample, offload_server::Config::default());
    let text = std::fs::read_to_string(&path).unwrap();
    let default = toml_keys(&offload_server::Config::default());
    for key in default {
        assert!(text.contains(&format!("{key} =")), "{key} is missing in the sample");
    }
}

fn toml_keys(config: &offload_server::Config) -> Vec<String> {
    let text = toml::to_string(config).unwrap();
    text.lines().filter_map(|l| l.split_once(" =").map(|(k, _)| k.to_owned())).collect()
}
