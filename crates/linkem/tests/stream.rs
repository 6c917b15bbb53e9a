//! The stream driver on real time: rates, delays, sharing, closing. Lower bounds are the link's; upper ones are wide, since other work
//! may share the machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::time::{Duration, Instant};

use linkem::driver::stream::StreamLink;
use linkem::{DirectionConfig, LinkConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

fn link(up: f64, down: f64, delay: u64) -> LinkConfig {
    let direction = |mbit| DirectionConfig::constant(mbit, Duration::from_millis(delay), 64 << 10);
    LinkConfig { up: direction(up), down: direction(down) }
}

fn start(config: &LinkConfig) -> StreamLink {
    StreamLink::start(config, Path::new("."), 1).unwrap()
}

/// The rate of the link includes headers: 1448 of 1500 bytes are payload.
fn ideal_seconds(bytes: usize, mbit: f64) -> f64 {
    bytes as f64 * 8.0 * 1500.0 / 1448.0 / (mbit * 1e6)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_whole_at_the_rate_and_after_the_delay() {
    let link = start(&link(8.0, 80.0, 30));
    let (far, mut server) = duplex(1 << 20);
    let mut client = link.wrap(far);
    let sent: Vec<u8> = (0..200_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let expected = sent.clone();
    let began = Instant::now();
    let upload = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        (answer, began.elapsed())
    });
    let mut first = [0; 1];
    server.read_exact(&mut first).await.unwrap();
    let delay = began.elapsed().as_secs_f64();
    assert!((0.030..1.0).contains(&delay), "first byte after {delay} s");
    let mut received = first.to_vec();
    server.read_to_end(&mut received).await.unwrap();
    let took = began.elapsed().as_secs_f64();
    let ideal = ideal_seconds(200_000, 8.0) + 0.030;
    assert!(received == expected, "{} bytes", received.len());
    assert!(took >= ideal * 0.99 && took < ideal * 5.0, "{took} s where {ideal} s are ideal");
    server.write_all(b"done").await.unwrap();
    server.shutdown().await.unwrap();
    let (answer, whole) = upload.await.unwrap();
    assert_eq!(answer, b"done");
    assert!(whole.as_secs_f64() >= took + 0.030);
    assert!(link.lateness().summary().packets > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_share_the_link() {
    let link = start(&link(8.0, 8.0, 5));
    let began = Instant::now();
    let mut transfers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (far, mut server) = duplex(1 << 20);
        let mut client = link.wrap(far);
        transfers.spawn(async move {
            let send = async {
                client.write_all(&[1; 50_000]).await.unwrap();
                client.shutdown().await.unwrap();
            };
            let mut received = Vec::new();
            let (_, n) = tokio::join!(send, server.read_to_end(&mut received));
            assert_eq!(n.unwrap(), 50_000);
        });
    }
    while let Some(done) = transfers.join_next().await {
        done.unwrap();
    }
    let ideal = ideal_seconds(200_000, 8.0);
    assert!(began.elapsed().as_secs_f64() >= ideal * 0.99, "{:?} where {ideal} s are ideal", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_costs_a_round_trip_and_a_gone_stream_ends_the_other_side() {
    let link = start(&link(10.0, 10.0, 40));
    let began = Instant::now();
    let (far, mut server) = duplex(1 << 16);
    let client = link.connect(async { Ok(far) }).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(80));
    drop(client);
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), server.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the server's side ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_read_stops_the_sender() {
    let link = start(&link(1000.0, 1000.0, 0));
    let (far, server) = duplex(1 << 10);
    let mut client = link.wrap(far);
    let mut sent = 0usize;
    let flood = async {
        loop {
            sent += client.write(&[0; 1 << 16]).await.unwrap();
        }
    };
    let _: Result<(), _> = tokio::time::timeout(Duration::from_secs(2), flood).await;
    assert!(sent < 8 << 20, "{sent} bytes were taken for a reader that reads nothing");
    drop(server);
}
