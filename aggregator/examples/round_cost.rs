//! What a round costs the three parties: `cargo run --release -p aggregator --example round_cost -- [CLIENTS] [COORDINATES] [MBIT DELAY_MS]`.
//! With the last two, each party's access to the others is an emulated link (stream level) of that rate and one-way delay.
//!
//! Starts three parties on loopback as processes, uploads reports of random bits over gRPC, seals, and checks the counts. JSON on standard output: times
//! by the wall, CPU seconds and peak memory of each party, bytes between them.
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aggregator::local::set_up;
use isthmus_federate::participant::Found;
use isthmus_federate::report::{Identity, make};
use isthmus_federate::{Operator, Participant};
use isthmus_proto::aggregator_v1::{CreateRoundRequest, Mode, Transform};
use isthmus_secagg::Bits;
use isthmus_secagg::report::{Credential, SignKey};
use linkem::driver::stream::StreamLink;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(600);
const UPLOADS: usize = 32;
/// Clock ticks of a second in /proc/PID/stat.
const TICKS: f64 = 100.0;

struct Party(Child);

impl Drop for Party {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Party {
    /// CPU seconds so far, and peak memory in MB.
    fn cost(&self) -> Result<(f64, f64), Box<dyn Error>> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).and_then(|l| l.split_whitespace().next()).unwrap_or("0");
        Ok((ticks / TICKS, peak.parse::<f64>()? / 1024.0))
    }
}

/// Moves a party's listener for the others behind an emulated link, at the address that they know.
async fn behind_link(config: &std::path::Path, mbit: f64, delay: Duration) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(config)?;
    let mut table: toml::Table = toml::from_str(&text)?;
    let known = table["peer_listen"].as_str().ok_or("no peer_listen")?.to_owned();
    let listener = tokio::net::TcpListener::bind(&known).await?;
    let moved = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    table.insert("peer_listen".into(), moved.to_string().into());
    std::fs::write(config, toml::to_string(&table)?)?;
    let direction = || linkem::DirectionConfig::constant(mbit, delay, 8 << 20);
    let link = linkem::LinkConfig { up: direction(), down: direction() };
    let link = StreamLink::start(&link, std::path::Path::new("."), 1).map_err(|e| e.why)?;
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let far = tokio::net::TcpStream::connect(moved);
            let Ok(mut shaped) = link.connect(far).await else { continue };
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut shaped).await });
        }
    });
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let number = |place: usize, default: u32| std::env::args().nth(place).map_or(Ok(default), |text| text.parse());
    let (clients, dim) = (number(1, 1000)?, number(2, 1_000_000)?);
    let folder = std::env::temp_dir().join(format!("round-cost-{}", std::process::id()));
    let trial = set_up(&folder, 0, 0, 2)?;
    let link = (number(3, 0)?, number(4, 0)?);
    if link.0 > 0 {
        for config in &trial.configs {
            behind_link(config, link.0.into(), Duration::from_millis(link.1.into())).await?;
        }
    }
    let binary = std::env::current_exe()?.ancestors().nth(2).map(|p| p.join("aggregator")).ok_or("no folder of binaries")?;
    let mut parties = Vec::new();
    for config in &trial.configs {
        let mut command = Command::new(&binary);
        command
            .args(["party", "--while-stdin", "--config"])
            .arg(config)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("{}: {e}; build it first", binary.display()))?;
        BufReader::new(child.stdout.take().ok_or("no output")?).lines().next().ok_or("a party did not start")??;
        parties.push(Party(child));
    }
    let (ca, token) = (std::fs::read_to_string(&trial.certificate)?, std::fs::read_to_string(&trial.token)?);
    let mut operator = Operator::connect(&trial.url, Some(&ca), token.trim(), LIMIT).await?;
    let participant = Participant::connect(&trial.url, Some(&ca), LIMIT).await?;
    let authority = aggregator::keys::open_signer(&trial.authority)?;
    let created = operator
        .create(CreateRoundRequest {
            mode: Mode::Boolean3.into(),
            dim,
            transform: Transform::Hadamard.into(),
            norm: 1.0,
            min_clients: 2,
            max_clients: clients,
            upload_ms: 3_600_000,
            compute_ms: 3_600_000,
            ..CreateRoundRequest::default()
        })
        .await?;
    let identity = |c: u32| {
        let mut secret = [7; 32];
        secret[..4].copy_from_slice(&c.to_le_bytes());
        let key = SignKey::from_bytes(&secret);
        let credential = Credential::issue(&authority, key.public(), u64::MAX);
        Identity { key, credential }
    };
    let plan = loop {
        match participant.round(&identity(0).key.public()).await? {
            Found::Round(plan) => break Arc::new(*plan),
            Found::Nothing(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let mut sums = vec![0u32; plan.bits()];
    let places = Arc::new(tokio::sync::Semaphore::new(UPLOADS));
    let began = Instant::now();
    let mut uploads = tokio::task::JoinSet::new();
    let (mut making, mut single) = (Duration::ZERO, 0);
    for c in 0..clients {
        let mut rng = ChaCha20Rng::seed_from_u64(c.into());
        let bits = Bits::fill(plan.bits(), |_| rng.next_u64());
        sums.iter_mut().enumerate().for_each(|(j, s)| *s += u32::from(bits.get(j)));
        let start = Instant::now();
        let report = make(&plan, &bits, &identity(c), &mut rng)?;
        making += start.elapsed();
        single = prost::Message::encoded_len(&report.header) + report.body.len();
        let (place, participant) = (places.clone().acquire_owned().await?, participant.clone());
        uploads.spawn(async move {
            let start = Instant::now();
            let stored = participant.upload_until_stored(&report, LIMIT).await;
            drop(place);
            stored.map(|_| start.elapsed())
        });
    }
    let mut times = Vec::new();
    while let Some(done) = uploads.join_next().await {
        times.push(done??.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let uploaded = began.elapsed().as_secs_f64();
    let before = parties.iter().map(Party::cost).collect::<Result<Vec<_>, _>>()?;
    let began = Instant::now();
    operator.seal(created.round).await?;
    operator.wait(created.round, LIMIT, |_| ()).await?;
    let computed = began.elapsed().as_secs_f64();
    let after = parties.iter().map(Party::cost).collect::<Result<Vec<_>, _>>()?;
    let result = operator.result(created.round).await?;
    if result.counts != sums {
        return Err("the counts are wrong".into());
    }
    let costs: Vec<Value> = before
        .iter()
        .zip(&after)
        .map(|(b, a)| json!({ "cpu_until_sealed_s": b.0, "cpu_computing_s": a.0 - b.0, "peak_mb": a.1 }))
        .collect();
    println!(
        "{}",
        json!({
            "clients": clients, "coordinates": dim, "link_mbit": link.0, "one_way_ms": link.1, "report_bytes": single, "making_a_report_ms": 1e3 * making.as_secs_f64() / f64::from(clients),
            "upload_s": uploaded, "upload_median_ms": 1e3 * times[times.len() / 2], "seal_to_result_s": computed, "parties": costs,
        })
    );
    drop(parties);
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
