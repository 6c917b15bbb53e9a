//! Is the emulator what it says? Known ideals against what real programs see through it.
//!
//! Packet level: `ping` for the delay, `iperf3` for rates in both directions at once, datagrams of our own for loss and for the
//! response to a step, the emulator's own lateness. Both levels: transfers that must take as long on the one as on the other.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use linkem::config::{LossConfig, QueueConfig, Step};
use linkem::driver::namespace::missing;
use linkem::driver::packet::{EDGE, PacketLink, SERVER};
use linkem::driver::stream::StreamLink;
use linkem::{DirectionConfig, LinkConfig};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::HarnessError;

/// Longest time for one program.
const LIMIT: Duration = Duration::from_secs(60);
/// Datagrams of iperf3: payload, and with headers of UDP and IP.
const DATAGRAM: (f64, f64) = (1470.0, 1498.0);
/// Seconds of each iperf3 run, and how many of them are left out at the beginning.
const SECONDS: (usize, usize) = (10, 2);
const SEED: u64 = 1;

/// A check and its outcome.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// What an ideal link would give.
    pub ideal: f64,
    /// What was measured.
    pub measured: f64,
    /// Unit of both.
    pub unit: &'static str,
    /// Within what the check allows.
    pub ok: bool,
    /// What it allows.
    pub allowed: String,
}

impl Check {
    /// Measured against ideal, which may differ by `percent`.
    fn within(name: String, ideal: f64, measured: f64, unit: &'static str, percent: f64) -> Self {
        let ok = (measured / ideal - 1.0).abs() <= percent / 100.0;
        Self { name, ideal, measured, unit, ok, allowed: format!("{percent} %") }
    }
}

/// All checks, and those that could not be made with the reason.
#[derive(Debug, Default, Serialize)]
pub struct Validation {
    /// In order.
    pub checks: Vec<Check>,
    /// Left out.
    pub left_out: Vec<String>,
}

fn io(what: &str) -> impl Fn(std::io::Error) -> HarnessError + '_ {
    move |e| HarnessError::data(what, e.to_string())
}

fn direction(mbit: f64, delay_ms: u64) -> DirectionConfig {
    DirectionConfig::constant(mbit, Duration::from_millis(delay_ms), 128 << 10)
}

fn symmetric(mbit: f64, delay_ms: u64) -> LinkConfig {
    LinkConfig { up: direction(mbit, delay_ms), down: direction(mbit, delay_ms) }
}

fn start(link: &LinkConfig, congestion_control: &str) -> Result<PacketLink, HarnessError> {
    PacketLink::start(link, Path::new("."), SEED, congestion_control).map_err(io("link"))
}

/// A child that ends with this value.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ends {
    /// Standard output of a program that ends by itself within the limit.
    fn output(mut self, what: &str) -> Result<String, HarnessError> {
        let mut pipe = self.0.stdout.take().ok_or_else(|| HarnessError::data(what, "has no output"))?;
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).map(|_| text)
        });
        let began = Instant::now();
        while self.0.try_wait().map_err(io(what))?.is_none() {
            if began.elapsed() > LIMIT {
                return Err(HarnessError::data(what, format!("still runs after {LIMIT:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        reader.join().map_err(|_| HarnessError::data(what, "its output could not be read"))?.map_err(io(what))
    }
}

fn spawn(mut command: Command, what: &str) -> Result<Ends, HarnessError> {
    Ok(Ends(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(io(what))?))
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Runs every check; `progress` gets each as it is done.
///
/// # Errors
/// If a link cannot be made or a program fails.
pub async fn run(mut progress: impl FnMut(&Check)) -> Result<Validation, HarnessError> {
    let mut all = Validation::default();
    let impossible = missing();
    let mut add = |checks: Vec<Check>| {
        checks.iter().for_each(&mut progress);
        all.checks.extend(checks);
    };
    for bytes in UPLOADS {
        let took = over_streams(bytes).await?;
        add(vec![Check::within(upload_name(bytes, "stream level (ideal: arithmetic)"), upload_ideal(bytes), took, "ms", 10.0)]);
    }
    if let Some(why) = impossible {
        all.left_out.push(format!("everything at packet level: {why}"));
        return Ok(all);
    }
    if installed("ping") {
        add(vec![delay()?])
    } else {
        all.left_out.push("delay: ping is not installed (Debian: iputils-ping)".into())
    }
    if installed("iperf3") {
        add(udp()?);
        add(tcp("cubic")?);
        if std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").is_ok_and(|t| t.contains("bbr")) {
            add(tcp("bbr")?);
        }
        add(vec![lateness()?]);
    } else {
        all.left_out.push("rates and lateness under load: iperf3 is not installed (Debian: iperf3)".into());
    }
    add(vec![step(20.0, 2.0)?]);
    add(vec![step(2.0, 20.0)?]);
    add(vec![loss()?]);
    add(levels().await?);
    Ok(all)
}

fn delay() -> Result<Check, HarnessError> {
    let (mbit, ms) = (10.0, 20);
    let link = start(&symmetric(mbit, ms), "cubic")?;
    let mut command = link.edge().command("ping");
    command.args(["-q", "-c", "200", "-i", "0.02", &SERVER.to_string()]);
    let text = spawn(command, "ping")?.output("ping")?;
    // rtt min/avg/max/mdev = 40.2/...
    let least = text.split("mdev = ").nth(1).and_then(|t| t.split('/').next()).and_then(|t| t.parse::<f64>().ok());
    let measured = least.ok_or_else(|| HarnessError::data("ping", format!("not understood: {text}")))?;
    let ideal = 2.0 * (ms as f64 + 84.0 * 8.0 / (mbit * 1e3));
    let ok = measured >= ideal - 0.05 && measured <= ideal + 1.0;
    Ok(Check {
        name: "shortest round trip of 200 pings, 10 Mbit/s, 20 ms".into(),
        ideal,
        measured,
        unit: "ms",
        ok,
        allowed: "+1 ms".into(),
    })
}

/// Mbit/s that arrive (up, down) while both directions are loaded.
fn iperf(link: &PacketLink, extra: &[&str]) -> Result<(f64, f64), HarnessError> {
    let server = |port: &str| {
        let mut command = link.server().command("iperf3");
        command.args(["-s", "-1", "-J", "-p", port]);
        spawn(command, "iperf3 -s")
    };
    let (receiver, sender) = (server("5201")?, server("5202")?);
    let began = Instant::now();
    // both listen, or the clients are refused
    for port in [5201, 5202] {
        while link.server().within(|| TcpListener::bind((SERVER, port)).is_ok()).map_err(io("namespace"))? {
            if began.elapsed() > Duration::from_secs(10) {
                return Err(HarnessError::data("iperf3 -s", "does not listen"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let client = |port: &str, reverse: bool| {
        let mut command = link.edge().command("iperf3");
        command.args(["-c", &SERVER.to_string(), "-p", port, "-J", "-t", &SECONDS.0.to_string()]).args(extra);
        if reverse {
            command.arg("-R");
        }
        spawn(command, "iperf3")
    };
    let (up, down) = (client("5201", false)?, client("5202", true)?);
    // each second's bytes as the receiving side saw them; the sums at the end mix both sides
    let received = |text: String| -> Result<f64, HarnessError> {
        let report: serde_json::Value = serde_json::from_str(&text).map_err(|e| HarnessError::data("iperf3", e.to_string()))?;
        let intervals = report["intervals"].as_array().map(Vec::as_slice).unwrap_or_default();
        let part = |key: &str| {
            let counted = intervals.iter().take(SECONDS.0).skip(SECONDS.1).filter_map(|i| i["sum"][key].as_f64());
            counted.sum::<f64>()
        };
        let (bytes, seconds) = (part("bytes"), part("seconds"));
        let why = || HarnessError::data("iperf3", report["error"].as_str().unwrap_or("no result").to_owned());
        if seconds > 0.0 { Ok(bytes * 8.0 / seconds / 1e6) } else { Err(why()) }
    };
    let down = received(down.output("iperf3")?)?;
    up.output("iperf3")?;
    drop(sender);
    Ok((received(receiver.output("iperf3 -s")?)?, down))
}

fn udp() -> Result<Vec<Check>, HarnessError> {
    let (up, down) = (2.0, 20.0);
    let link = start(&LinkConfig { up: direction(up, 20), down: direction(down, 20) }, "cubic")?;
    let (u, d) = iperf(&link, &["-u", "-b", "30M", "-l", "1470"])?;
    let check = |what: &str, rate: f64, measured: f64| {
        let name = format!("UDP {what} of {up}/{down} Mbit/s, 20 ms, both directions loaded");
        Check::within(name, rate * DATAGRAM.0 / DATAGRAM.1, measured, "Mbit/s", 2.0)
    };
    Ok(vec![check("up", up, u), check("down", down, d)])
}

fn tcp(congestion_control: &str) -> Result<Vec<Check>, HarnessError> {
    let mbit = 20.0;
    let mut config = symmetric(mbit, 10);
    // acknowledgements wait behind data in both queues: room for both, or losses rule
    for direction in [&mut config.up, &mut config.down] {
        direction.queue = Some(QueueConfig { bytes: Some(256 << 10), packets: None, codel: false });
    }
    let link = start(&config, congestion_control)?;
    let (u, d) = iperf(&link, &["-P", "4"])?;
    let check = |what: &str, measured: f64| Check {
        name: format!("TCP ({congestion_control}, 4 connections each way) {what} of {mbit}/{mbit} Mbit/s, 10 ms, both directions loaded"),
        ideal: mbit,
        measured,
        unit: "Mbit/s",
        ok: measured >= 0.9 * mbit && measured <= mbit,
        allowed: "90 to 100 %".into(),
    };
    Ok(vec![check("up", u), check("down", d)])
}

fn lateness() -> Result<Check, HarnessError> {
    let link = start(&symmetric(100.0, 5), "cubic")?;
    iperf(&link, &[])?;
    let measured = link.lateness().summary().p99_us as f64 / 1e3;
    let name = "lateness of the emulator, 99th percentile, TCP both ways at 100 Mbit/s".into();
    Ok(Check { name, ideal: 0.0, measured, unit: "ms", ok: measured < 1.0, allowed: "below 1 ms".into() })
}

/// Datagram sockets at both ends.
fn sockets(link: &PacketLink) -> Result<(UdpSocket, UdpSocket), HarnessError> {
    let edge = link.edge().within(|| UdpSocket::bind((EDGE, 0))).map_err(io("namespace"))?.map_err(io("socket"))?;
    let server = link.server().within(|| UdpSocket::bind((SERVER, 7000))).map_err(io("namespace"))?.map_err(io("socket"))?;
    server.set_read_timeout(Some(Duration::from_millis(500))).map_err(io("socket"))?;
    Ok((edge, server))
}

/// Milliseconds from a change of the rate until what arrives has changed too.
fn step(from: f64, to: f64) -> Result<Check, HarnessError> {
    let at = Duration::from_secs(2);
    let mut config = symmetric(20.0, 10);
    config.up.mbit_per_s = None;
    config.up.steps = [(Duration::ZERO, from), (at, to)].map(|(at, mbit_per_s)| Step { at, mbit_per_s }).to_vec();
    let began = Instant::now();
    let link = start(&config, "cubic")?;
    // the link's clock started between these two moments
    let began = began + began.elapsed() / 2;
    let (edge, server) = sockets(&link)?;
    let end = began + at + Duration::from_secs(1);
    let sender = std::thread::spawn(move || {
        let datagram = [0u8; 1470];
        while Instant::now() < end {
            let _ = edge.send_to(&datagram, (SERVER, 7000));
            std::thread::sleep(Duration::from_micros(300)); // some 35 Mbit/s
        }
    });
    let (mut arrivals, mut buffer) = (Vec::new(), [0u8; 2000]);
    while let Ok(n) = server.recv(&mut buffer) {
        arrivals.push((began.elapsed().as_secs_f64(), n as f64 * 8.0 / 1e6));
    }
    let _ = sender.join();
    // the first 50 ms in which what arrives is the new rate, with a fifth to spare
    let window = 0.05;
    let rate = |since: f64| arrivals.iter().filter(|(t, _)| (since..since + window).contains(t)).map(|(_, m)| m).sum::<f64>() / window;
    let reached = |rate: f64| if to < from { rate <= to * 1.2 } else { rate >= to * 0.8 };
    let first = (0..100).map(|i| at.as_secs_f64() + f64::from(i) * 0.01).find(|&t| reached(rate(t)));
    let measured = first.map_or(f64::INFINITY, |t| (t + window - at.as_secs_f64()) * 1e3);
    let name = format!("response to a step from {from} to {to} Mbit/s");
    // what is in flight when the rate changes arrives within the delay
    Ok(Check { name, ideal: 10.0 + window * 1e3, measured, unit: "ms", ok: measured <= 200.0, allowed: "200 ms".into() })
}

fn loss() -> Result<Check, HarnessError> {
    let (n, p) = (4000u32, 0.1);
    let mut config = symmetric(100.0, 1);
    config.up.loss = Some(LossConfig::Independent(p));
    let link = start(&config, "cubic")?;
    let (edge, server) = sockets(&link)?;
    let receiver = std::thread::spawn(move || {
        let (mut received, mut buffer) = (0u32, [0u8; 100]);
        while server.recv(&mut buffer).is_ok() {
            received += 1;
        }
        received
    });
    for i in 0..n {
        edge.send_to(&i.to_le_bytes(), (SERVER, 7000)).map_err(io("socket"))?;
        if i % 20 == 19 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let received = receiver.join().map_err(|_| HarnessError::data("loss", "the receiver failed"))?;
    let measured = f64::from(n - received.min(n)) / f64::from(n) * 100.0;
    // 99.9 % interval of the binomial distribution
    let half = 3.29 * (p * (1.0 - p) / f64::from(n)).sqrt() * 100.0;
    let (name, ideal) = (format!("loss of 10 %, {n} datagrams"), p * 100.0);
    let ok = (measured - ideal).abs() <= half;
    Ok(Check { name, ideal, measured, unit: "%", ok, allowed: format!("{half:.1} points (99.9 % interval)") })
}

/// Payloads of uploads that are timed, each answered by one byte, and how often.
const UPLOADS: [usize; 3] = [1500, 8000, 80_000];
const ROUNDS: usize = 5;

/// The link of these uploads.
fn upload_link() -> LinkConfig {
    LinkConfig { up: direction(2.0, 20), down: direction(20.0, 20) }
}

fn upload_name(bytes: usize, level: &str) -> String {
    format!("upload of {bytes} bytes at 2/20 Mbit/s, 20 ms: {level}")
}

/// Milliseconds by arithmetic: bits over the rate with headers on full packets of 1500, and a round trip.
fn upload_ideal(bytes: usize) -> f64 {
    bytes as f64 * 8.0 * (1500.0 / 1448.0) / 2e3 + 40.0
}

/// The median without the first, which has TCP's slow start.
fn median(times: &[f64]) -> f64 {
    let mut rest = times[1..].to_vec();
    rest.sort_by(f64::total_cmp);
    rest[rest.len() / 2]
}

/// Median milliseconds of an upload through shaped streams.
async fn over_streams(bytes: usize) -> Result<f64, HarnessError> {
    let link = StreamLink::start(&upload_link(), Path::new("."), SEED).map_err(|e| HarnessError::data(e.key, e.why))?;
    let (far, mut server) = tokio::io::duplex(1 << 20);
    let mut client = link.wrap(far);
    let answering = tokio::spawn(async move {
        let mut buffer = vec![0; bytes];
        while server.read_exact(&mut buffer).await.is_ok() && server.write_all(&[1]).await.is_ok() {}
    });
    let (payload, mut times) = (vec![7; bytes], Vec::new());
    for _ in 0..=ROUNDS {
        let began = Instant::now();
        client.write_all(&payload).await.map_err(io("upload"))?;
        client.read_exact(&mut [0]).await.map_err(io("upload"))?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    answering.abort();
    Ok(median(&times))
}

/// Uploads over both levels: how much longer or shorter streams take than packets.
async fn levels() -> Result<Vec<Check>, HarnessError> {
    let config = upload_link();
    let mut checks = Vec::new();
    for bytes in UPLOADS {
        let packets = {
            let link = start(&config, "cubic")?;
            let listener = link.server().within(|| TcpListener::bind((SERVER, 7001))).map_err(io("namespace"))?.map_err(io("socket"))?;
            let server = std::thread::spawn(move || serve(&listener, bytes));
            let stream = link.edge().within(|| TcpStream::connect((SERVER, 7001))).map_err(io("namespace"))?.map_err(io("socket"))?;
            let times = tokio::task::spawn_blocking(move || uploads(stream, bytes, ROUNDS)).await;
            let times = times.map_err(|e| HarnessError::data("upload", e.to_string()))?.map_err(io("upload"))?;
            let _ = server.join();
            times
        };
        let name = upload_name(bytes, "stream level (ideal: packet level)");
        checks.push(Check::within(name, median(&packets), over_streams(bytes).await?, "ms", 10.0));
    }
    Ok(checks)
}

fn serve(listener: &TcpListener, bytes: usize) -> std::io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut buffer = vec![0; bytes];
    loop {
        stream.read_exact(&mut buffer)?;
        stream.write_all(&[1])?;
    }
}

/// Milliseconds of each upload.
fn uploads(mut stream: TcpStream, bytes: usize, rounds: usize) -> std::io::Result<Vec<f64>> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let payload = vec![7; bytes];
    let mut times = Vec::new();
    for _ in 0..=rounds {
        let began = Instant::now();
        stream.write_all(&payload)?;
        stream.read_exact(&mut [0])?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}
