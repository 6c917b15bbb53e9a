//! Latency over a fixed link: strategies take turns on each photo, so that whatever else the machine does meets all of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use edge_client::AutoClient;
use linkem::LinkConfig;
use linkem::catalogue::NamedLink;

use crate::error::HarnessError;
use crate::run::progress;
use crate::run::results::{LinkResults, Percentiles, Row, percentile, sorted};
use crate::run::session::{Bench, Sample, Session, choose, spread};
use crate::run::strategy::Strategy;

/// Bytes on the link per byte of payload: headers of IP and TCP with timestamps on full packets of 1500.
const OVERHEAD: f64 = 1500.0 / 1448.0;
/// HTTP/2 and gRPC headers of a request on an open connection, and those of its packets.
const REQUEST: f64 = 130.0;

/// Measures all strategies over one link.
///
/// # Errors
/// If link or server do not start.
pub async fn measure(
    bench: &mut Bench<'_>,
    (name, named): &(String, NamedLink),
    seed: u64,
    levels: u8,
) -> Result<LinkResults, HarnessError> {
    let config = &bench.prepared.config;
    let began = Instant::now();
    let strategies = config.strategies.all(levels)?;
    let site = bench.site(&named.link, seed)?;
    let mut session = Session::new(&site, config.device_slowdown, config.deadline);
    let mut auto: Vec<Option<AutoClient>> = Vec::new();
    for strategy in &strategies {
        auto.push(match strategy {
            Strategy::Auto(a) => Some(bench.auto(&site, *a, config.deadline).await?),
            _ => None,
        });
    }
    let sent = config.most_sent.min(bench.photos.len());
    let bar = progress(format!("{name}: latency"), (config.rounds + 1) * sent * strategies.len());
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); strategies.len()];
    let mut failed = vec![0; strategies.len()];
    for round in 0..=config.rounds {
        for p in spread(bench.photos.len(), sent) {
            let (photo, wanted) = (&bench.photos[p], bench.reference[p]);
            for (s, strategy) in strategies.iter().enumerate() {
                let sample = match &mut auto[s] {
                    Some(client) => choose(client, photo, wanted).await,
                    None => session.one(&mut bench.device, *strategy, photo, wanted).await,
                };
                bar.inc(1);
                match sample {
                    Ok(sample) if round > 0 => samples[s].push(sample),
                    Err(_) if round > 0 => failed[s] += 1,
                    _ => {}
                }
            }
        }
    }
    bar.finish_and_clear();
    let rows = strategies.iter().zip(&samples).zip(&failed).map(|((s, samples), &f)| row(*s, samples, f, &named.link)).collect();
    let emulator = site.emulation.report(&named.link, &config.congestion_control);
    eprintln!("{name}: {} requests, {:.0} s", strategies.len() * sent * config.rounds, began.elapsed().as_secs_f64());
    Ok(LinkResults { name: name.clone(), about: named.about.clone(), uplink_mbit_per_s: named.link.up.mbit_per_s, emulator, rows })
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Encode + round trip + bits / uplink rate + server, in milliseconds.
fn predicted(link: &LinkConfig, encode: f64, bytes: f64, server: f64) -> Option<f64> {
    let mbit = link.up.mbit_per_s.filter(|_| link.up.outages.is_empty())?;
    let on_link = bytes * OVERHEAD + REQUEST;
    Some(encode + ms(link.up.delay + link.down.delay) + on_link * 8.0 / (mbit * 1e3) + server)
}

fn row(strategy: Strategy, samples: &[Sample], failed: usize, link: &LinkConfig) -> Row {
    let n = samples.len();
    let mean = |f: &dyn Fn(&Sample) -> f64| samples.iter().map(f).sum::<f64>() / n.max(1) as f64;
    let latency = sorted(samples.iter().map(|s| s.latency));
    let median = |f: fn(&Sample) -> f64| percentile(&sorted(samples.iter().map(f)), 0.5);
    let (bytes, encode, server) = (mean(&|s| s.bytes as f64), median(|s| s.encode), median(|s| s.server));
    let mut choices: BTreeMap<String, usize> = BTreeMap::new();
    for (choice, _) in samples.iter().filter_map(|s| s.choice.clone()) {
        *choices.entry(choice).or_default() += 1;
    }
    let believed = samples.iter().filter_map(|s| s.choice.as_ref()).map(|c| c.1).sum::<f64>() / n.max(1) as f64;
    Row {
        strategy: strategy.name(),
        family: strategy.family().into(),
        n,
        failed,
        bytes,
        agreement: mean(&|s| f64::from(u8::from(s.agrees))),
        latency_ms: Percentiles::of(&latency),
        latencies_ms: latency.iter().map(|l| (l * 1e3).round() / 1e3).collect(),
        encode_ms: encode,
        server_ms: server,
        predicted_ms: match strategy {
            Strategy::Auto(_) | Strategy::Local => None,
            _ => predicted(link, encode, bytes, server),
        },
        believed_agreement: (!choices.is_empty()).then_some(believed),
        choices: choices.into_iter().collect(),
    }
}
