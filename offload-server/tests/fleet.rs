//! Several servers: behind Envoy (the product's configuration) and balanced by the client. One is killed, one is drained, under load.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{assert_healthy, options, sample};
use edge_client::{Client, ClientError, Endpoint, Payload};
use isthmus_testkit::{Authority, Envoy, Server, backbones, bundle, http_body};
use tokio::task::JoinSet;

/// How servers are run behind a balancer.
fn start(folder: &Path, more: &str) -> Server {
    let config = folder.join("server.toml");
    let text = format!("bundles = [{:?}]\nnetwork_threads = 1\ndrain_delay = \"2s\"\ndrain_limit = \"10s\"\n{more}", bundle());
    std::fs::write(&config, text).unwrap();
    Server::configured(&config, &backbones())
}

/// Keeps some requests under way until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<(u64, Vec<ClientError>)>,
}

impl Load {
    fn start(client: &Client, container: &Bytes, under_way: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for _ in 0..under_way {
            let (mut client, container, stop) = (client.clone(), container.clone(), stop.clone());
            tasks.spawn(async move {
                let (mut answered, mut failed) = (0, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    match client.infer(Payload::Bitstream(container.clone()), &options()).await {
                        Ok(_) => answered += 1,
                        Err(error) => failed.push(error),
                    }
                }
                (answered, failed)
            });
        }
        Self { stop, tasks }
    }

    /// Answers and failures.
    async fn end(mut self) -> (u64, Vec<ClientError>) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut answered, mut failed) = (0, Vec::new());
        while let Some(done) = self.tasks.join_next().await {
            let (n, f) = done.unwrap();
            answered += n;
            failed.extend(f);
        }
        (answered, failed)
    }
}

/// Requests that a server has answered.
fn answered(server: &Server) -> u64 {
    let page = server.metrics();
    let line = page.lines().find_map(|l| l.strip_prefix("isthmus_requests_total{payload=\"bitstream\",code=\"Ok\"} "));
    line.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// One of `servers` is killed and another one drained while requests flow through `client`; none fails.
async fn killed_and_drained(mut servers: Vec<Server>, client: &Client, what: &str) {
    let (container, _) = sample();
    let pause = Duration::from_secs(3);
    let load = Load::start(client, &container, 4);
    tokio::time::sleep(pause).await;
    for server in &servers {
        let n = answered(server);
        assert!(n > 5, "{what}: a server answered {n} only");
    }
    let mut killed = servers.remove(0);
    killed.process.signal("KILL");
    tokio::time::sleep(pause).await;
    let mut drained = servers.remove(0);
    drained.process.signal("TERM");
    let ended = tokio::task::spawn_blocking(move || drained.process.wait(Duration::from_secs(20))).await.unwrap();
    assert_eq!(ended, Some(0), "{what}: drained");
    let before = answered(&servers[0]);
    tokio::time::sleep(pause).await;
    assert!(answered(&servers[0]) > before, "{what}: the last one goes on");
    let (n, failed) = load.end().await;
    println!("{what}: {n} answered, {} failed while one of three was killed and one drained", failed.len());
    assert!(failed.is_empty(), "{what}: {failed:?}");
    assert_eq!(killed.process.wait(Duration::from_secs(5)), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_kill_and_drain_under_client_side_balancing() {
    let folder = tempfile::tempdir().unwrap();
    let servers: Vec<Server> = (0..3).map(|_| start(folder.path(), "")).collect();
    let endpoints: Vec<Endpoint> = servers.iter().map(|s| Endpoint::new(&s.url()).unwrap()).collect();
    let client = Client::connect_any(&endpoints).await.unwrap();
    killed_and_drained(servers, &client, "client-side balancing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_kill_and_drain_behind_envoy() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(folder.path(), &["offload-server", "envoy"]);
    let tls =
        format!("tls_cert = {:?}\ntls_key = {:?}\n", folder.path().join("offload-server.pem"), folder.path().join("offload-server.key"));
    let servers: Vec<Server> = (0..3).map(|_| start(folder.path(), &tls)).collect();
    let addresses: Vec<_> = servers.iter().map(|s| s.address).collect();
    let Some(envoy) = Envoy::start(&addresses, folder.path()) else { return };
    let url = format!("https://localhost:{}", envoy.address.port());
    let endpoint = Endpoint::new(&url).unwrap().with_ca(authority.pem.clone().into_bytes());
    let client = Client::connect(&endpoint).await.unwrap();
    killed_and_drained(servers, &client, "Envoy").await;
    println!("Envoy: {} requests tried again", envoy.statistic("cluster.offload.upstream_rq_retry"));
    assert_eq!(envoy.healthy(), 1);
    // Prometheus, and whoever else shares a network with Envoy, sees its statistics and cannot stop it
    assert!(http_body(envoy.statistics, "/stats/prometheus").unwrap().contains("envoy_cluster_upstream_rq_total"));
    for path in ["/", "/quitquitquit", "/config_dump", "/stats/prometheus/../../certs"] {
        assert!(http_body(envoy.statistics, path).is_none(), "{path}");
    }
}

/// What a client's own deadline brings about says nothing of a server.
#[tokio::test(flavor = "multi_thread")]
async fn deadlines_of_a_client_eject_no_server() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(folder.path(), &["offload-server", "envoy"]);
    let tls =
        format!("tls_cert = {:?}\ntls_key = {:?}\n", folder.path().join("offload-server.pem"), folder.path().join("offload-server.key"));
    let servers: Vec<Server> = (0..2).map(|_| start(folder.path(), &tls)).collect();
    let addresses: Vec<_> = servers.iter().map(|s| s.address).collect();
    let Some(envoy) = Envoy::start(&addresses, folder.path()) else { return };
    let url = format!("https://localhost:{}", envoy.address.port());
    let mut client = Client::connect(&Endpoint::new(&url).unwrap().with_ca(authority.pem.into_bytes())).await.unwrap();
    let (container, _) = sample();
    assert_healthy(&mut client, &container).await;
    let mut refused = 0;
    // the limit goes with the call, as of clients that know their deadline
    for _ in 0..30 {
        let request = options().request(0, Payload::Bitstream(container.clone()));
        let mut request = tonic::Request::new(request);
        request.set_timeout(Duration::from_millis(7));
        refused += u32::from(client.raw().infer(request).await.is_err_and(|status| status.code() == tonic::Code::DeadlineExceeded));
    }
    assert!(refused > 10, "{refused} of 30");
    assert!(envoy.statistic("cluster.offload.upstream_rq_total") >= 30, "statistics are read");
    assert_eq!(envoy.statistic("cluster.offload.outlier_detection.ejections_enforced_total"), 0);
    assert_healthy(&mut client, &container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_away_are_found_when_they_come_and_none_at_all_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (container, _) = sample();
    let (first, second) = (isthmus_testkit::free_port(), isthmus_testkit::free_port());
    let endpoints = [first, second].map(|a| Endpoint::new(&format!("http://{a}")).unwrap());
    let nobody = Client::connect_any(&endpoints).await;
    assert!(matches!(&nobody, Err(ClientError::Connect { why, .. }) if why.contains("is the server running")), "{nobody:?}");
    assert!(matches!(Client::connect_any(&[]).await, Err(ClientError::Usage(_))));
    let tokens = [endpoints[0].clone().with_token("one").unwrap(), endpoints[1].clone()];
    assert!(matches!(Client::connect_any(&tokens).await, Err(ClientError::Usage(_))), "a token goes only where it was meant for");
    // one is there, the other one comes later at its address
    let there = start(folder.path(), "");
    let endpoints = [Endpoint::new(&there.url()).unwrap(), endpoints[1].clone()];
    let mut client = Client::connect_any(&endpoints).await.unwrap();
    for _ in 0..4 {
        assert_healthy(&mut client, &container).await;
    }
    let config = folder.path().join("server.toml");
    let mut command = std::process::Command::new(isthmus_testkit::binary("offload-server"));
    command.arg("--config").arg(&config).args(["--listen", &second.to_string(), "--admin-listen", "127.0.0.1:0"]);
    let (late, _) = isthmus_testkit::Process::spawn(command.arg("--backbones").arg(backbones()));
    drop(there);
    for _ in 0..4 {
        assert_healthy(&mut client, &container).await;
    }
    drop(late);
}

/// A server that hangs takes connections and says nothing: whoever was given up there once goes elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_a_server_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let servers: Vec<Server> = (0..2).map(|_| start(folder.path(), "")).collect();
    let endpoints: Vec<Endpoint> = servers.iter().map(|s| Endpoint::new(&s.url()).unwrap()).collect();
    let mut client = Client::connect_any(&endpoints).await.unwrap();
    let (container, _) = sample();
    for _ in 0..4 {
        assert_healthy(&mut client, &container).await;
    }
    servers[0].process.signal("STOP");
    let short = edge_client::InferOptions { deadline: Duration::from_secs(1), ..options() };
    let mut lost = 0;
    for _ in 0..30 {
        lost += u32::from(client.infer(Payload::Bitstream(container.clone()), &short).await.is_err());
    }
    servers[0].process.signal("CONT");
    println!("a server hangs: {lost} of 30 without an answer");
    assert!(lost <= 4, "{lost} of 30");
}

/// A stream that breaks is opened again at another server, and every photo has its answer.
#[tokio::test(flavor = "multi_thread")]
async fn chaos_kill_while_a_camera_streams() {
    let folder = tempfile::tempdir().unwrap();
    let mut servers: Vec<Server> = (0..2).map(|_| start(folder.path(), "")).collect();
    let urls = servers.iter().map(Server::url).collect::<Vec<_>>().join(",");
    let chosen = folder.path().join("photos");
    std::fs::create_dir(&chosen).unwrap();
    for photo in &isthmus_testkit::demo_photos()[..4] {
        std::fs::copy(photo, chosen.join(photo.file_name().unwrap())).unwrap();
    }
    let mut command = std::process::Command::new(isthmus_testkit::binary("edge-client"));
    command.arg("stream").arg(&chosen).args(["--fps", "10", "--repeat", "20", "--server", &urls]).arg("--bundle").arg(bundle());
    let camera = tokio::task::spawn_blocking(move || command.output().unwrap());
    tokio::time::sleep(Duration::from_secs(3)).await;
    // the one that has the stream
    let busy = usize::from(answered(&servers[1]) > answered(&servers[0]));
    let killed = servers.remove(busy);
    killed.process.signal("KILL");
    let output = camera.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().filter(|l| l.contains("\"labels\"")).count(), 80, "{text}");
    assert!(answered(&servers[0]) > 10, "the other one went on");
}
