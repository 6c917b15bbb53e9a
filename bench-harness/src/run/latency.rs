//! Latency over a fixed link: strategies take turns on each photo, so that whatever else the machine does meets all of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use edge_client::AutoClient;
use linkem::LinkConfig;
use linkem::catalogue::NamedLink;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::HarnessError;
use crate::run::progress;
use crate::run::results::{LinkResults, Percentiles, Row, percentile, sorted};
use crate::run::session::{Bench, Sample, Session, choose, spread};
use crate::run::strategy::Strategy;

/// Bytes on the link per byte of payload: headers of IP and TCP with timestamps on full packets of 1500.
const OVERHEAD: f64 = 1500.0 / 1448.0;
/// HTTP/2 and gRPC headers of a request on an open connection, and those of its packets.
const REQUEST: f64 = 130.0;
/// A strategy whose first so many requests all failed is not tried any more; the rest count as failed.
const HOPELESS: usize = 3;
/// Seconds that are waited at most for a queue to drain.
const LONGEST_BACKLOG: f64 = 20.0;
/// What TCP sends before the first acknowledgement: ten packets (RFC 6928), also after a pause.
const INITIAL_WINDOW: f64 = 10.0 * 1500.0;

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
    // a connection each: what TCP learns from one strategy's payloads must not help or hurt another's
    let mut sessions: Vec<Session> = strategies.iter().map(|_| Session::new(&site, config.device_slowdown, config.deadline)).collect();
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
    let mut order: Vec<usize> = (0..strategies.len()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for round in 0..=config.rounds {
        for p in spread(bench.photos.len(), sent) {
            let (photo, wanted) = (&bench.photos[p], bench.reference[p]);
            // in another order each time: who comes after a pause finds a colder server
            order.shuffle(&mut rng);
            for &s in &order {
                let strategy = &strategies[s];
                if failed[s] >= HOPELESS && samples[s].is_empty() {
                    failed[s] += usize::from(round > 0);
                    bar.inc(1);
                    continue;
                }
                let sample = match &mut auto[s] {
                    Some(client) => choose(client, photo, wanted).await,
                    None => sessions[s].one(&mut bench.device, *strategy, photo, wanted).await,
                };
                bar.inc(1);
                match sample {
                    Ok(sample) if round > 0 => samples[s].push(sample),
                    Ok(_) => {}
                    Err(_) => {
                        failed[s] += usize::from(round > 0);
                        // what the link still holds of it must not delay the next
                        tokio::time::sleep(backlog(&named.link)).await;
                    }
                }
            }
        }
    }
    bar.finish_and_clear();
    let model = Model { link: &named.link, slow_start: site.emulation.is_packet_level() };
    let rows = strategies.iter().zip(&samples).zip(&failed).map(|((s, samples), &f)| row(*s, samples, f, &model)).collect();
    let emulator = site.emulation.report(&named.link, &config.congestion_control);
    eprintln!("{name}: {} requests, {:.0} s", strategies.len() * sent * config.rounds, began.elapsed().as_secs_f64());
    Ok(LinkResults {
        name: name.clone(),
        about: named.about.clone(),
        uplink_mbit_per_s: named.link.up.mbit_per_s,
        link: Some(named.link.clone()),
        emulator,
        rows,
    })
}

/// How long a full queue takes to drain, as far as a queue and a rate are given.
pub(crate) fn backlog(link: &LinkConfig) -> Duration {
    let up = &link.up;
    let bytes = up.queue.as_ref().and_then(|q| q.bytes).unwrap_or_default() as f64;
    let seconds = up.mbit_per_s.map_or(0.0, |mbit| bytes * 8.0 / (mbit * 1e6));
    Duration::from_secs_f64(seconds.min(LONGEST_BACKLOG)) + up.delay
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// What a request takes by arithmetic: encode + round trip + upload + server (frankensplit.md 4.3), the upload being bits / rate and,
/// with TCP, the rounds in which a connection that was idle finds out that it may send more.
struct Model<'a> {
    link: &'a LinkConfig,
    slow_start: bool,
}

impl Model<'_> {
    /// Milliseconds; none over a link that varies.
    fn predicted(&self, encode: f64, bytes: f64, server: f64) -> Option<f64> {
        let mbit = self.link.up.mbit_per_s.filter(|_| self.link.up.outages.is_empty())?;
        let round_trip = ms(self.link.up.delay + self.link.down.delay);
        Some(encode + round_trip + self.upload(bytes * OVERHEAD + REQUEST, mbit * 1e3 / 8.0, round_trip) + server)
    }

    /// `bytes` on the link at `rate` bytes a millisecond: each round sends a window, and the next one, twice as large, may begin when
    /// the first of it has been acknowledged.
    fn upload(&self, bytes: f64, rate: f64, round_trip: f64) -> f64 {
        let (mut left, mut window, mut time) = (bytes, INITIAL_WINDOW, 0.0);
        while self.slow_start && left > window && window / rate < round_trip {
            left -= window;
            window *= 2.0;
            time += round_trip;
        }
        time + left / rate
    }
}

fn row(strategy: Strategy, samples: &[Sample], failed: usize, model: &Model<'_>) -> Row {
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
            _ if n == 0 => None,
            _ => model.predicted(encode, bytes, server),
        },
        believed_agreement: (!choices.is_empty()).then_some(believed),
        choices: choices.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_that_fit_the_first_window_take_bits_over_rate_and_larger_ones_wait() {
        let link = LinkConfig { up: linkem::DirectionConfig::default(), down: linkem::DirectionConfig::default() };
        let model = |slow_start| Model { link: &link, slow_start };
        // 12 Mbit/s are 1500 bytes a millisecond
        assert_eq!(model(true).upload(15_000.0, 1500.0, 40.0), 10.0);
        assert_eq!(model(true).upload(45_000.0, 1500.0, 40.0), 40.0 + 20.0);
        assert_eq!(model(true).upload(75_000.0, 1500.0, 40.0), 80.0 + 20.0);
        assert_eq!(model(false).upload(75_000.0, 1500.0, 40.0), 50.0);
        assert_eq!(model(true).upload(75_000.0, 1500.0, 9.0), 50.0, "the window exceeds what fits the link");
    }
}
