//! What operators rely on: settings from the environment, probes, the order of draining, ages of connections, sizes by method, placements.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{assert_healthy, client, configured, options, sample};
use edge_client::{Client, ClientError, Endpoint, InferOptions, Payload};
use isthmus_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use isthmus_proto::inference::{ModelConfigRequest, ModelReadyRequest, ServerReadyRequest};
use isthmus_testkit::{Server, binary, http_body};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

fn run(command: &mut Command) -> (bool, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_environment_overrides_the_file_and_flags_override_both() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.toml");
    std::fs::write(&file, "max_batch = 4\nmax_queue = 50\n").unwrap();
    let server = || {
        let mut command = Command::new(binary("offload-server"));
        command.arg("--config").arg(&file).arg("--print-config");
        command
    };
    let (_, plain, _) = run(&mut server());
    assert!(plain.contains("max_batch = 4\n") && plain.contains("max_queue = 50\n"), "{plain}");
    let with = |command: &mut Command| {
        let variables = [
            ("MAX_BATCH", "8"),
            ("MODELS", "[\"efficientnet-lite2\"]"),
            ("QUEUE_DELAY", "3ms"),
            ("LOG_FORMAT", "json"),
            ("INSECURE", "true"),
        ];
        command.envs(variables.map(|(k, v)| (format!("ISTHMUS_SERVER_{k}"), v)));
        run(command).1
    };
    let shown = with(&mut server());
    for line in [
        "max_batch = 8",
        "max_queue = 50",
        "models = [\"efficientnet-lite2\"]",
        "queue_delay = \"3ms\"",
        "log_format = \"json\"",
        "insecure = true",
    ] {
        assert!(shown.lines().any(|l| l == line), "{line}: {shown}");
    }
    let shown = with(server().args(["--max-batch", "16"]));
    assert!(shown.contains("max_batch = 16\n"), "{shown}");
    for (name, value, why) in [("MAX_BATCH", "many", "MAX_BATCH"), ("MAX_BATHC", "8", "max_bathc"), ("MAX_BATCH", "0", "max_batch")] {
        let (ok, _, error) = run(server().env(format!("ISTHMUS_SERVER_{name}"), value));
        assert!(!ok && error.contains(why), "{name}={value}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_goes_in_order_and_loses_nothing() {
    let mut server = configured("drain_delay = \"4s\"\ndrain_limit = \"10s\"\nkeepalive_interval = \"1s\"\n");
    let probe = |server: &Server| {
        let mut command = Command::new(binary("offload-server"));
        run(command.args(["--probe", "--admin-listen", &server.admin.to_string()]))
    };
    let (ready, said, _) = probe(&server);
    assert!(ready && said == "ready\n", "{said}");
    let mut asking = client(&server).await;
    let (container, photo) = sample();
    assert_healthy(&mut asking, &container).await;
    let channel = tonic::transport::Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let mut inference = GrpcInferenceServiceClient::new(channel);
    let ask = || HealthCheckRequest { service: "inference.GRPCInferenceService".into() };
    assert_eq!(health.check(ask()).await.unwrap().into_inner().status, 1);

    server.process.signal("TERM");
    let began = Instant::now();
    // first health and readiness say no, while everything is still answered and new connections are taken
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(health.check(ask()).await.unwrap().into_inner().status, 2, "NOT_SERVING");
    assert!(!inference.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(http_body(server.admin, "/readyz").is_none());
    let (ready, _, why) = probe(&server);
    assert!(!ready && why.contains("503"), "{why}");
    let mut late = client(&server).await;
    assert_healthy(&mut late, &container).await;
    assert!(began.elapsed() < Duration::from_millis(3800), "all of this within the delay");
    // what is in flight when connections are asked to end is answered
    let mut busy = Vec::new();
    tokio::time::sleep(Duration::from_millis(3800).saturating_sub(began.elapsed())).await;
    for _ in 0..8 {
        let (mut late, photo) = (late.clone(), photo.clone());
        busy.push(tokio::spawn(async move { late.infer(Payload::Image(photo), &options()).await }));
    }
    for answer in busy {
        answer.await.unwrap().unwrap();
    }
    drop((asking, late, health, inference));
    assert_eq!(server.process.wait(Duration::from_secs(15)), Some(0));
    assert!(began.elapsed() >= Duration::from_secs(4));
    let gone = Client::connect(&Endpoint::new(&server.url()).unwrap()).await;
    assert!(matches!(gone, Err(ClientError::Connect { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_end_of_age_spread_out_and_nobody_notices() {
    let server = configured("max_connection_age = \"1s\"\n");
    let (container, _) = sample();
    let connected = Arc::new(AtomicUsize::new(0));
    let mut asking = Vec::new();
    for _ in 0..4 {
        let (connected, address, container) = (connected.clone(), server.address, container.clone());
        let endpoint = Endpoint::new(&server.url()).unwrap();
        asking.push(tokio::spawn(async move {
            let connector = move |_| {
                connected.fetch_add(1, Ordering::SeqCst);
                tokio::net::TcpStream::connect(address)
            };
            let mut client = Client::connect_through(&endpoint, connector).await.unwrap();
            let (began, mut answered) = (Instant::now(), 0);
            while began.elapsed() < Duration::from_secs(4) {
                client.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
                answered += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answered
        }));
    }
    for task in asking {
        assert!(task.await.unwrap() > 2);
    }
    // a stream would hold its connection: it ends too, after what is under way
    let mut streaming = client(&server).await;
    let (mut sender, mut receiver) = edge_client::stream::open(&mut streaming, 2, options()).await.unwrap();
    sender.send(Payload::Bitstream(container.clone())).await.unwrap();
    assert!(receiver.next().await.unwrap().unwrap().result.is_ok());
    let ended = receiver.next().await;
    assert!(matches!(&ended, Err(ClientError::Server(s)) if s.code() == Code::Unavailable && s.message().contains("old")), "{ended:?}");
    assert!(server.metrics().contains("isthmus_streams_ended_total{by=\"age\"} 1"), "{}", server.metrics());
    let connected = connected.load(Ordering::SeqCst);
    assert!((8..=24).contains(&connected), "four clients, four seconds, one second each: {connected} connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_has_its_own_limit_of_size() {
    let server = configured("max_request_bytes = 400000\nmax_stream_message_bytes = 100000\nmax_response_bytes = 2048\n");
    let mut asking = client(&server).await;
    let (container, _) = sample();
    assert_healthy(&mut asking, &container).await;
    let refused = |status: &tonic::Status| status.code() == Code::InvalidArgument && status.message().contains("too large");
    let mut inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
    let name = "x".repeat(100_000);
    let control = inference.model_ready(ModelReadyRequest { name: name.clone(), version: String::new() }).await.unwrap_err();
    assert!(refused(&control), "methods without payload: {control:?}");
    // a single request of that size is read (and then found to be no image)
    let code = common::code_of(&mut asking, Payload::Image(vec![1; 200_000].into())).await.0;
    assert_eq!(code, Code::InvalidArgument);
    let large = edge_client::stream::open(&mut asking, 2, options()).await.unwrap();
    let (mut sender, mut receiver) = large;
    sender.send(Payload::Image(vec![1; 200_000].into())).await.unwrap();
    let ended = receiver.next().await;
    assert!(matches!(&ended, Err(ClientError::Server(s)) if refused(s)), "{ended:?}");
    // an answer that is larger than it may be: 1000 logits
    let logits = asking.infer(Payload::Bitstream(container), &InferOptions { logits: true, ..options() }).await;
    assert!(matches!(&logits, Err(ClientError::Server(s)) if s.code() == Code::OutOfRange), "{logits:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_run_where_the_configuration_places_them() {
    let text = "models = [\"efficientnet-lite0\", \"efficientnet-lite2\"]\nnetwork_threads = 2\n\
        [[placements]]\ndevice = \"cpu\"\ninstances = 2\n\
        [[placements]]\nmodel = \"efficientnet-lite2\"\ndevice = \"cpu\"\nprecision = \"bfloat16\"\n";
    let server = configured(text);
    let mut asking = client(&server).await;
    let (container, photo) = sample();
    let mut inference = GrpcInferenceServiceClient::connect(server.url()).await.unwrap();
    for (name, copies) in [("efficientnet-lite0", 2), ("efficientnet-lite2", 1)] {
        let ask = ModelConfigRequest { name: name.into(), version: String::new() };
        let config = inference.model_config(ask).await.unwrap().into_inner().config.unwrap();
        assert_eq!(config.instance_group.iter().map(|g| g.count).sum::<i32>(), copies, "{name}");
    }
    let mut both = Vec::new();
    // few for Lite2: without bfloat16 instructions one takes over a second, and its queue refuses what its deadline will miss
    for i in 0..10 {
        let (mut asking, container, photo) = (asking.clone(), container.clone(), photo.clone());
        both.push(tokio::spawn(async move {
            if i % 5 != 4 {
                return asking.infer(Payload::Bitstream(container), &options()).await;
            }
            asking.infer(Payload::Image(photo), &InferOptions { model: "efficientnet-lite2".into(), ..options() }).await
        }));
    }
    for answer in both {
        assert_eq!(answer.await.unwrap().unwrap().labels.len(), 5);
    }
    assert_healthy(&mut asking, &container).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.toml");
    for (placement, why) in
        [("device = \"cuda:7\"", "cuda:7"), ("device = \"cpu\"\nprecision = \"half\"", "bfloat16"), ("instances = 0", "instances")]
    {
        std::fs::write(&file, format!("bundles = []\nbackbones = {:?}\n[[placements]]\n{placement}\n", isthmus_testkit::backbones()))
            .unwrap();
        let mut command = Command::new(binary("offload-server"));
        let (ok, _, error) = run(command.arg("--config").arg(&file).args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]));
        assert!(!ok && error.contains(why), "{placement}: {error}");
    }
}
