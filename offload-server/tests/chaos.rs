//! What goes wrong around a server, and what clients see of it. Servers that die are in `fleet.rs`, clients that do not read in `bad_input.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{assert_healthy, client, configured, options, sample};
use edge_client::{Client, Endpoint, Payload};
use isthmus_testkit::{Process, Server, backbones, binary, bundle, free_port};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::codegen::http::{Method, Request};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty SETTINGS frame.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

/// A frame of HTTP/2: type, flags, stream, payload.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A connection that greets as a client of HTTP/2 does.
async fn greeted(server: &Server) -> TcpStream {
    let mut connection = TcpStream::connect(server.address).await.unwrap();
    connection.write_all(PREFACE).await.unwrap();
    connection.write_all(&SETTINGS).await.unwrap();
    connection
}

fn open_files(server: &Server) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.process.id())).unwrap().count()
}

/// A peer that vanished without a word (a phone without a link): its side answers nothing, not even pings.
#[tokio::test(flavor = "multi_thread")]
async fn threat_half_open_connections_are_closed() {
    let server = configured("keepalive_interval = \"500ms\"\nkeepalive_timeout = \"500ms\"\n");
    let (container, _) = sample();
    let mut asking = client(&server).await;
    assert_healthy(&mut asking, &container).await;
    let before = open_files(&server);
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(greeted(&server).await);
    }
    for connection in &mut silent {
        let mut received = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(20), connection.read_to_end(&mut received)).await;
        assert!(closed.is_ok(), "a connection whose pings are not answered is still open");
    }
    drop(silent);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(open_files(&server) <= before + 1, "descriptors come back");
    // a client that answers pings, as the transport does, keeps its connection
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_healthy(&mut asking, &container).await;
}

/// Calls whose messages never come: they fill the places for calls, and health, which balancers go by, is answered all the same.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_of_places_by_half_sent_calls_leaves_health() {
    let server = configured("max_in_flight = 20\n");
    let (container, _) = sample();
    let mut asking = client(&server).await;
    assert_healthy(&mut asking, &container).await;
    let (requests, driver) = h2::client::handshake(TcpStream::connect(server.address).await.unwrap()).await.unwrap();
    let driver = tokio::spawn(driver);
    let mut held = Vec::new();
    for _ in 0..60 {
        let uri = format!("http://{}/inference.GRPCInferenceService/ModelInfer", server.address);
        let request = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc").body(()).unwrap();
        held.push(requests.clone().ready().await.unwrap().send_request(request, false).unwrap());
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let refused = common::code_of(&mut asking, Payload::Bitstream(container.clone())).await;
    assert!(refused.0 == tonic::Code::ResourceExhausted && refused.1.contains("too many calls"), "{refused:?}");
    let channel = tonic::transport::Endpoint::new(server.url()).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let service = "inference.GRPCInferenceService".to_owned();
    let status = health.check(tonic_health::pb::HealthCheckRequest { service }).await.unwrap().into_inner().status;
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving as i32);
    assert!(server.metrics().contains("isthmus_refused_total{reason=\"busy\"}"), "and it can be seen");
    held.clear();
    driver.abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_healthy(&mut asking, &container).await;
}

/// Messages that stop before their end: what they take is bounded, and by tenant; and what nobody has to be known for takes next to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn threat_exhaustion_by_half_sent_messages_is_bounded() {
    const MB: usize = 1 << 20;
    let tenant = |name: &str, token: &str| {
        let token_sha256 = isthmus_codec::bundle::sha256(token.as_bytes());
        format!("[[tenants]]\nname = {name:?}\ntoken_sha256 = {token_sha256:?}\n")
    };
    let bounds =
        format!("max_received_bytes = {}\nmax_request_bytes = {MB}\nmax_stream_message_bytes = {MB}\nmax_deadline = \"4s\"\n", 16 * MB);
    let server = configured(&[bounds, tenant("flood", "one"), tenant("quiet", "two")].concat());
    let (container, _) = sample();
    let as_quiet = Endpoint::new(&server.url()).unwrap().with_token("two").unwrap();
    let mut asking = Client::connect(&as_quiet).await.unwrap();
    assert_healthy(&mut asking, &container).await;
    let before = server.process.memory_kb("VmRSS");
    let (requests, driver) = h2::client::handshake(TcpStream::connect(server.address).await.unwrap()).await.unwrap();
    let driver = tokio::spawn(driver);
    // all but the last byte of a message of so many
    let half = async |path: &str, bytes: usize| {
        let uri = format!("http://{}/{path}", server.address);
        let head = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc");
        let head = head.header("te", "trailers").header("authorization", "Bearer one").body(()).unwrap();
        let (answer, mut body) = requests.clone().ready().await.unwrap().send_request(head, false).unwrap();
        let message = [&[0][..], &(bytes as u32).to_be_bytes(), &vec![0; bytes - 1]].concat();
        let mut sent = 0;
        while sent < message.len() {
            body.reserve_capacity((message.len() - sent).min(MB));
            let room = tokio::time::timeout(Duration::from_millis(500), std::future::poll_fn(|context| body.poll_capacity(context))).await;
            // refused, or as much as the server takes
            let Ok(Some(Ok(room))) = room else { break };
            let end = (sent + room).min(message.len());
            if body.send_data(message[sent..end].to_vec().into(), false).is_err() {
                break;
            }
            sent = end;
        }
        (answer, body)
    };
    let mut held = Vec::new();
    for _ in 0..30 {
        held.push(half("inference.GRPCInferenceService/ModelInfer", MB - 100).await);
    }
    assert!(server.metrics().contains("isthmus_refused_total{reason=\"busy\"}"));
    // a tenant's flood leaves the other its bytes
    assert_healthy(&mut asking, &container).await;
    for path in ["grpc.health.v1.Health/Check", "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"] {
        for _ in 0..30 {
            held.push(half(path, MB).await);
        }
    }
    let grown = server.process.memory_kb("VmRSS").saturating_sub(before);
    println!("memory grew by {grown} kB");
    assert!(grown < 60_000, "memory grew by {grown} kB");
    assert_healthy(&mut asking, &container).await;
    // and what stalled ends
    let (answer, _) = held.swap_remove(0);
    let status = tokio::time::timeout(Duration::from_secs(10), answer).await.unwrap().unwrap();
    assert_eq!(status.headers().get("grpc-status").unwrap(), "4", "{status:?}");
    driver.abort();
}

/// A health watch and an open reflection stream have nothing to finish: they do not hold up the end.
#[tokio::test(flavor = "multi_thread")]
async fn watches_do_not_hold_up_a_shutdown() {
    let mut server = configured("drain_delay = \"0s\"\ndrain_limit = \"60s\"\n");
    let channel = tonic::transport::Endpoint::new(server.url()).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let mut watch = health.watch(tonic_health::pb::HealthCheckRequest::default()).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().is_some());
    server.process.signal("TERM");
    assert_eq!(server.process.wait(Duration::from_secs(15)), Some(0));
}

/// CVE-2023-44487: streams opened and reset as fast as they can be written.
#[tokio::test(flavor = "multi_thread")]
async fn threat_rapid_reset_storm() {
    const STREAMS: usize = 20_000;
    let server = Server::start(&[]);
    let (container, _) = sample();
    let mut asking = client(&server).await;
    assert_healthy(&mut asking, &container).await;
    let before = server.process.memory_kb("VmRSS");
    let mut ended_early = 0;
    for _ in 0..3 {
        let connection = TcpStream::connect(server.address).await.unwrap();
        let (requests, driver) = h2::client::handshake(connection).await.unwrap();
        let driver = tokio::spawn(driver);
        for n in 0..STREAMS {
            let Ok(mut ready) = requests.clone().ready().await else {
                ended_early += 1;
                break;
            };
            let uri = format!("http://{}/isthmus.offload.v1.OffloadService/Infer", server.address);
            let request = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc").body(()).unwrap();
            let Ok((_, mut stream)) = ready.send_request(request, false) else {
                ended_early += 1;
                break;
            };
            stream.send_reset(h2::Reason::CANCEL);
            if n % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        drop(requests);
        let _ = tokio::time::timeout(Duration::from_secs(20), driver).await;
    }
    println!("{ended_early} of 3 connections were ended by the server");
    assert_healthy(&mut asking, &container).await;
    let grown = server.process.memory_kb("VmRSS").saturating_sub(before);
    assert!(grown < 50_000, "memory grew by {grown} kB");
}

/// RUSTSEC-2024-0332: a header block that never ends.
#[tokio::test(flavor = "multi_thread")]
async fn threat_continuation_flood() {
    let server = Server::start(&[]);
    let (container, _) = sample();
    let before = server.process.memory_kb("VmRSS");
    let mut connection = greeted(&server).await;
    let (mut reading, mut writing) = connection.split();
    let flood = async {
        // HEADERS without END_HEADERS, then CONTINUATION without end: a literal header of 8 kB each
        let mut literal = vec![0x40, 1, b'x', 0x7f, 0x81, 0x3f];
        literal.extend(vec![b'y'; 8192 + 127]);
        if writing.write_all(&frame(1, 0, 1, &literal[..100])).await.is_err() {
            return 0;
        }
        for sent in 0..20_000 {
            if writing.write_all(&frame(9, 0, 1, &literal)).await.is_err() {
                return sent;
            }
        }
        20_000
    };
    let mut received = Vec::new();
    let closed = async { tokio::time::timeout(Duration::from_secs(30), reading.read_to_end(&mut received)).await };
    let (sent, closed) = tokio::join!(tokio::time::timeout(Duration::from_secs(30), flood), closed);
    assert!(closed.is_ok() && sent.unwrap() < 20_000, "the server ends the connection");
    let grown = server.process.memory_kb("VmRSS").saturating_sub(before);
    assert!(grown < 50_000, "memory grew by {grown} kB");
    assert_healthy(&mut client(&server).await, &container).await;
}

/// A server whose standard error and environment are the test's.
fn server(stderr: Stdio, variables: &[(&str, String)]) -> Server {
    let admin = free_port();
    let mut command = Command::new(binary("offload-server"));
    command.args(["--listen", "127.0.0.1:0", "--admin-listen", &admin.to_string()]).arg("--bundle").arg(bundle());
    command.arg("--backbones").arg(backbones()).stderr(stderr).envs(variables.iter().map(|(k, v)| (k, v)));
    let (process, line) = Process::spawn(&mut command);
    let address = line.strip_prefix("listening on ").unwrap().parse().unwrap();
    Server { process, address, admin }
}

/// Logs go to standard error, and what takes them has no room left.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_a_full_disk_for_logs_stops_nothing() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut server = server(full.into(), &[("RUST_LOG", "debug".into())]);
    let (container, photo) = sample();
    let mut asking = client(&server).await;
    for _ in 0..10 {
        assert_healthy(&mut asking, &container).await;
    }
    asking.infer(Payload::Image(photo), &options()).await.unwrap();
    let bad = common::code_of(&mut asking, Payload::Bitstream(vec![1; 50].into())).await;
    assert_eq!(bad.0, tonic::Code::InvalidArgument);
    drop(asking);
    server.process.signal("TERM");
    assert_eq!(server.process.wait(Duration::from_secs(30)), Some(0));
}

/// A file to which the address would be written, for scripts, has no room left: the log has it too.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_a_full_disk_for_standard_output_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let address = free_port();
    let mut command = Command::new(binary("offload-server"));
    command.args(["--listen", &address.to_string(), "--admin-listen", "none"]).arg("--bundle").arg(bundle());
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    command.arg("--backbones").arg(backbones()).stdout(full).stderr(std::fs::File::create(&log).unwrap());
    let mut process = Process::from(command.spawn().unwrap());
    let told = wait_for(&log, "standard output cannot be written").await;
    assert!(told.contains(&address.to_string()), "{told}");
    let endpoint = Endpoint::new(&format!("http://{address}")).unwrap();
    let mut asking = Client::connect(&endpoint).await.unwrap();
    assert_healthy(&mut asking, &sample().0).await;
    drop(asking);
    process.signal("TERM");
    assert_eq!(process.wait(Duration::from_secs(30)), Some(0));
}

/// Nothing is in flight while models load, however long that takes: signals end the process at once.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_stopped_while_models_load() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    std::fs::copy(backbones().join("labels.json"), here.join("labels.json")).unwrap();
    // a file system that hangs
    assert!(Command::new("mkfifo").arg(here.join("efficientnet-lite0.safetensors")).status().unwrap().success());
    for signal in ["TERM", "INT"] {
        let log = here.join(signal);
        let mut command = Command::new(binary("offload-server"));
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "none"]).arg("--bundle").arg(bundle()).arg("--backbones").arg(here);
        command.env("RUST_LOG", "debug").stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
        let mut process = Process::from(command.spawn().unwrap());
        // signals are heard from before the first log line on
        tokio::time::sleep(Duration::from_secs(2)).await;
        process.signal(signal);
        assert_eq!(process.wait(Duration::from_secs(5)), Some(0), "SIG{signal}");
        wait_for(&log, "stopped before the models were loaded").await;
    }
}

/// What a file holds once it holds `text`.
async fn wait_for(path: &Path, text: &str) -> String {
    for _ in 0..600 {
        let found = std::fs::read_to_string(path).unwrap();
        if found.contains(text) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{text:?} is not in {}: {}", path.display(), std::fs::read_to_string(path).unwrap());
}

/// The process ends while the network computes for clients that have left: it ends in order all the same.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_stopped_while_the_network_computes_for_nobody() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let log = folder.path().join(format!("log-{round}"));
        let mut server = server(std::fs::File::create(&log).unwrap().into(), &[]);
        let (_, photo) = sample();
        let asking = client(&server).await;
        let leaving: Vec<_> = (0..16)
            .map(|_| {
                let (mut asking, photo) = (asking.clone(), photo.clone());
                tokio::spawn(async move { asking.infer(Payload::Image(photo), &options()).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(60 + 20 * round)).await;
        leaving.iter().for_each(tokio::task::JoinHandle::abort);
        drop(asking);
        server.process.signal("TERM");
        assert_eq!(server.process.wait(Duration::from_secs(30)), Some(0));
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    }
}

/// A library that sets the wall clock off; built here, since libfaketime allocates when it is asked for the time, and jemalloc asks when it allocates.
fn stepped_clock(folder: &Path) -> PathBuf {
    let library = folder.join("stepped.so");
    let source = isthmus_testkit::root().join("offload-server/tests/clock/stepped.c");
    let built = std::process::Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(source).status().unwrap();
    assert!(built.success(), "cc builds the clock");
    library
}

/// The wall clock is set back and forth by a day: deadlines, queues and streams go by the monotonic one.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_clock_steps_are_not_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let clock = folder.path().join("clock");
    std::fs::write(&clock, "0").unwrap();
    let variables = [
        ("LD_PRELOAD", stepped_clock(folder.path()).display().to_string()),
        ("CLOCK_STEP", clock.display().to_string()),
        ("RUST_LOG", "offload_server=debug".into()),
    ];
    let log = folder.path().join("log");
    let server = server(std::fs::File::create(&log).unwrap().into(), &variables);
    let (container, _) = sample();
    let mut asking = client(&server).await;
    let began = Instant::now();
    for step in ["0", "86400", "-86400", "3600", "0"] {
        std::fs::write(&clock, step).unwrap();
        let bad = common::code_of(&mut asking, Payload::Bitstream(vec![1; 50].into())).await;
        assert_eq!(bad.0, tonic::Code::InvalidArgument);
        for _ in 0..10 {
            let answer = asking.infer(Payload::Bitstream(container.clone()), &options()).await.unwrap();
            assert!(answer.timing.unwrap().total_us < 20_000_000);
        }
    }
    assert!(began.elapsed() < Duration::from_secs(60));
    // the clock of the log's own lines did step: the test is real
    let today = server_time(&std::fs::read_to_string(&log).unwrap());
    assert!(today.len() >= 3, "the server's clock showed {today:?}");
    let page = server.metrics();
    assert!(page.contains("isthmus_requests_total{payload=\"bitstream\",code=\"Ok\"} 50"), "{page}");
}

/// Dates of a log's lines.
fn server_time(log: &str) -> std::collections::BTreeSet<String> {
    log.lines().filter_map(|l| l.trim_start_matches(|c: char| !c.is_ascii_digit()).get(..10)).map(str::to_owned).collect()
}
