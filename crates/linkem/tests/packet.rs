//! The packet driver on real kernels' stacks. Needs root; says so where it cannot run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use linkem::config::LossConfig;
use linkem::driver::namespace::missing;
use linkem::driver::packet::{EDGE, PacketLink, SERVER};
use linkem::{DirectionConfig, LinkConfig};

fn link(up: f64, down: f64, delay: u64) -> LinkConfig {
    let direction = |mbit| DirectionConfig::constant(mbit, Duration::from_millis(delay), 64 << 10);
    LinkConfig { up: direction(up), down: direction(down) }
}

/// A running link, or `None` (with the reason printed) where there cannot be one.
fn start(config: &LinkConfig) -> Option<PacketLink> {
    if let Some(why) = missing() {
        isthmus_testkit::skipped(&format!("packet-level emulation: {why}"));
        return None;
    }
    Some(PacketLink::start(config, Path::new("."), 1, "cubic").unwrap())
}

#[test]
fn datagrams_take_the_delay_and_answers_come_back() {
    let Some(link) = start(&link(10.0, 10.0, 20)) else { return };
    let server = link.server().within(|| UdpSocket::bind((SERVER, 7000)).unwrap()).unwrap();
    let edge = link.edge().within(|| UdpSocket::bind((EDGE, 7000)).unwrap()).unwrap();
    for socket in [&server, &edge] {
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    }
    let mut buffer = [0; 100];
    let trips: Vec<Duration> = (0..20)
        .map(|_| {
            let began = Instant::now();
            edge.send_to(b"ping", (SERVER, 7000)).unwrap();
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..n], from).unwrap();
            edge.recv_from(&mut buffer).unwrap();
            began.elapsed()
        })
        .collect();
    let shortest = trips.iter().min().unwrap();
    assert!(*shortest >= Duration::from_millis(40), "{trips:?}");
    assert!(*shortest < Duration::from_millis(80), "{trips:?}");
    assert!(link.lateness().summary().packets >= 40);
}

#[test]
fn tcp_goes_through_at_no_more_than_the_rate() {
    let Some(link) = start(&link(20.0, 20.0, 5)) else { return };
    let listener = link.server().within(|| TcpListener::bind((SERVER, 7001)).unwrap()).unwrap();
    let bytes = 1_000_000;
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received.len()
    });
    let began = Instant::now();
    let mut stream = link.edge().within(|| TcpStream::connect((SERVER, 7001)).unwrap()).unwrap();
    let sockets = link.edge().command("ss").args(["-tin"]).output();
    if let Ok(sockets) = sockets {
        assert!(String::from_utf8_lossy(&sockets.stdout).contains(" cubic "), "the congestion control is pinned");
    }
    stream.write_all(&vec![7; bytes]).unwrap();
    drop(stream);
    assert_eq!(receiver.join().unwrap(), bytes);
    let seconds = began.elapsed().as_secs_f64();
    assert!(seconds >= bytes as f64 * 8.0 / 20e6, "{seconds} s");
    let (up, _) = link.stats();
    assert!(up.delivered_bytes > bytes as u64);
}

#[test]
fn losses_have_the_stated_rate() {
    let mut config = link(100.0, 100.0, 1);
    config.up.loss = Some(LossConfig::Independent(0.1));
    let Some(link) = start(&config) else { return };
    let server = link.server().within(|| UdpSocket::bind((SERVER, 7002)).unwrap()).unwrap();
    let edge = link.edge().within(|| UdpSocket::bind((EDGE, 0)).unwrap()).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let receiver = std::thread::spawn(move || {
        let mut buffer = [0; 100];
        let mut received = 0;
        while server.recv_from(&mut buffer).is_ok() {
            received += 1;
        }
        received
    });
    for i in 0..2000u32 {
        edge.send_to(&i.to_le_bytes(), (SERVER, 7002)).unwrap();
        if i % 20 == 19 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let received: u64 = receiver.join().unwrap();
    let (up, _) = link.stats();
    assert_eq!(up.lost + received, 2000, "{up:?}");
    // binomial, 99.9 % interval: 200 +- 3.3 x 13.4
    assert!((155..=245).contains(&up.lost), "{up:?}");
}

#[test]
fn namespaces_are_gone_afterwards() {
    let Some(link) = start(&link(10.0, 10.0, 1)) else { return };
    let names = [link.edge().name().to_owned(), link.server().name().to_owned()];
    let listed = || String::from_utf8(std::process::Command::new("ip").args(["netns", "list"]).output().unwrap().stdout).unwrap();
    assert!(names.iter().all(|n| listed().contains(n)));
    drop(link);
    let left = listed();
    assert!(!names.iter().any(|n| left.contains(n)), "{left}");
}

#[test]
fn an_unknown_congestion_control_is_named_and_nothing_is_left() {
    if let Some(why) = missing() {
        isthmus_testkit::skipped(&format!("packet-level emulation: {why}"));
        return;
    }
    let error = PacketLink::start(&link(1.0, 1.0, 1), Path::new("."), 1, "nonsense").err().expect("refused").to_string();
    assert!(error.contains("nonsense"), "{error}");
}
