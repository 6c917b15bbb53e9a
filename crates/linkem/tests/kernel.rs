//! The emulator's rate against an independent one: the kernel's token bucket on a veth pair.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use linkem::driver::namespace::{Namespace, missing};
use linkem::driver::packet::{PacketLink, SERVER};
use linkem::{DirectionConfig, LinkConfig};

const MBIT: f64 = 10.0;
const TURNS: u16 = 5;
const BYTES: usize = 2_000_000;
const INTO_BUCKET: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// Seconds from the first byte to the last that arrives.
fn transfer(from: &Namespace, to: &Namespace, address: (Ipv4Addr, u16)) -> f64 {
    let listener = to.within(|| TcpListener::bind(address).unwrap()).unwrap();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let began = Instant::now();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        (rest.len(), began.elapsed().as_secs_f64())
    });
    let mut stream = from.within(|| TcpStream::connect(address).unwrap()).unwrap();
    stream.write_all(&vec![7; BYTES]).unwrap();
    drop(stream);
    let (received, seconds) = receiver.join().unwrap();
    assert_eq!(received, BYTES - 1);
    seconds
}

/// Two namespaces joined by a veth pair behind a token bucket.
fn bucket() -> [Namespace; 2] {
    let [near, far] = ["tbf-a", "tbf-b"].map(|role| Namespace::new(role).unwrap());
    near.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", far.name()]).unwrap();
    for (namespace, device, address) in [(&near, "v0", "10.77.0.1/24"), (&far, "v1", "10.77.0.2/24")] {
        namespace.ip(&["addr", "add", address, "dev", device]).unwrap();
        namespace.ip(&["link", "set", device, "up"]).unwrap();
    }
    near.ip(&["route", "change", "10.77.0.0/24", "dev", "v0", "congctl", "cubic"]).unwrap();
    // the kernel counts the Ethernet header of each frame, the emulator IP packets
    let rate = format!("{}bit", (MBIT * 1e6 * 1514.0 / 1500.0).round());
    let bucket = ["qdisc", "add", "dev", "v0", "root", "tbf", "rate", &rate, "burst", "4000", "latency", "50ms"];
    assert!(near.command("tc").args(bucket).status().unwrap().success());
    [near, far]
}

#[test]
fn bulk_transfers_take_as_long_as_through_the_kernels_token_bucket() {
    if let Some(why) = missing() {
        return isthmus_testkit::skipped(&format!("packet-level emulation: {why}"));
    }
    let direction = || DirectionConfig::constant(MBIT, Duration::from_millis(1), 64 << 10);
    let link = PacketLink::start(&LinkConfig { up: direction(), down: direction() }, Path::new("."), 1, "cubic").unwrap();
    let [near, far] = bucket();
    // other work on the machine disturbs single transfers
    let ratios = (0..TURNS).map(|turn| {
        let emulated = transfer(link.edge(), link.server(), (SERVER, 7100 + turn));
        let kernel = transfer(&near, &far, (INTO_BUCKET, 7100 + turn));
        println!("{BYTES} bytes at {MBIT} Mbit/s: emulator {emulated:.3} s, kernel {kernel:.3} s, ratio {:.3}", emulated / kernel);
        emulated / kernel
    });
    let mut ratios: Vec<f64> = ratios.collect();
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    assert!((0.98..=1.02).contains(&median), "median {median:.3} of {ratios:.3?}");
}
