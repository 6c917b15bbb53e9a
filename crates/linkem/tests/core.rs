//! Properties of the core, in virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use linkem::config::{Distribution, JitterConfig, LossConfig, Outage, QueueConfig, Step};
use linkem::trace::Driving;
use linkem::{Direction, DirectionConfig, Drop};
use proptest::prelude::*;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn direction(config: &DirectionConfig, seed: u64) -> Direction<usize> {
    Direction::new(config, Path::new("."), seed).unwrap()
}

/// Offers packets (gap since the last in microseconds, bytes), then runs until nothing moves. Gives (packet, sent, arrival).
fn run(config: &DirectionConfig, seed: u64, packets: &[(u64, u32)]) -> (Vec<(usize, Duration)>, Direction<usize>) {
    let mut d = direction(config, seed);
    let mut arrived = Vec::new();
    let mut now = Duration::ZERO;
    for (i, &(gap, bytes)) in packets.iter().enumerate() {
        let next = now + Duration::from_micros(gap);
        while let Some(deadline) = d.next_deadline().filter(|t| *t <= next) {
            arrived.extend(d.poll(deadline).into_iter().map(|(t, p)| (p, t)));
        }
        now = next;
        let _ = d.offer(now, i, bytes);
    }
    while let Some(deadline) = d.next_deadline() {
        arrived.extend(d.poll(deadline).into_iter().map(|(t, p)| (p, t)));
    }
    (arrived, d)
}

fn packets() -> impl Strategy<Value = Vec<(u64, u32)>> {
    proptest::collection::vec((0u64..5000, 40u32..=1500), 1..200)
}

/// A trace file in Mahimahi's format, with a gap of half a second, in a folder that lives as long as the tests.
static TRACE: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gap.trace");
    let times = (1..=100).chain((101..=300).map(|t| t + 500)).map(|t| format!("{t}\n"));
    std::fs::write(&path, times.collect::<String>()).unwrap();
    (folder, path)
});

fn loss() -> impl Strategy<Value = LossConfig> {
    let independent = (0.0f64..0.3).prop_map(LossConfig::Independent);
    let bursts = (0.0f64..0.2, 0.05f64..1.0, 0.0f64..0.01, 0.1f64..=1.0)
        .prop_map(|(to_bad, to_good, good_loss, bad_loss)| LossConfig::GilbertElliott { to_bad, to_good, good_loss, bad_loss });
    prop_oneof![independent, bursts]
}

prop_compose! {
    fn config()(
        mbit in 0.1f64..100.0,
        stepped in any::<bool>(),
        traced in proptest::option::of(any::<bool>()),
        delay in 0u64..200,
        jitter in proptest::option::of((0usize..3, 0u64..30, any::<bool>())),
        loss in proptest::option::of(loss()),
        queue in proptest::option::of((2000u64..100_000, 1usize..100, any::<bool>())),
        outage in proptest::option::of((0u64..300, 1u64..300)),
        overhead in 0u32..60,
    ) -> DirectionConfig {
        let kinds = [Distribution::Uniform, Distribution::Normal, Distribution::Pareto];
        let mut c = DirectionConfig { delay: ms(delay), overhead, ..DirectionConfig::default() };
        if traced == Some(true) {
            c.trace = Some(TRACE.1.clone());
        } else if traced == Some(false) {
            c.driving = Some(Driving { peak_mbit_per_s: mbit, length: Duration::from_secs(2), dwell: ms(100), seed: delay });
        } else if stepped {
            c.steps = vec![Step { at: ms(0), mbit_per_s: mbit }, Step { at: ms(50), mbit_per_s: mbit / 10.0 }];
        } else {
            c.mbit_per_s = Some(mbit);
        }
        c.jitter = jitter.map(|(k, spread, reorder)| JitterConfig { distribution: kinds[k], spread: ms(spread), reorder });
        c.loss = loss;
        c.queue = queue.map(|(bytes, packets, codel)| QueueConfig { bytes: Some(bytes), packets: Some(packets), codel });
        c.outages = outage.map(|(at, lasts)| Outage { at: ms(at), lasts: ms(lasts) }).into_iter().collect();
        c
    }
}

proptest! {
    #[test]
    fn every_packet_is_delivered_or_dropped_once(c in config(), seed in any::<u64>(), packets in packets()) {
        let (arrived, d) = run(&c, seed, &packets);
        let s = d.stats();
        prop_assert_eq!(s.offered, packets.len() as u64);
        prop_assert_eq!(s.delivered, arrived.len() as u64);
        prop_assert_eq!(s.offered, s.delivered + s.lost + s.tail_dropped + s.codel_dropped);
        prop_assert_eq!((d.under_way(), d.queued_bytes()), (0, 0));
        let mut ids: Vec<usize> = arrived.iter().map(|a| a.0).collect();
        ids.sort_unstable();
        ids.dedup();
        prop_assert_eq!(ids.len(), arrived.len());
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule(c in config(), seed in any::<u64>(), packets in packets()) {
        prop_assert_eq!(run(&c, seed, &packets).0, run(&c, seed, &packets).0);
    }

    #[test]
    fn packets_keep_their_order_unless_they_may_overtake(c in config(), seed in any::<u64>(), packets in packets()) {
        prop_assume!(!c.jitter.as_ref().is_some_and(|j| j.reorder));
        let (arrived, _) = run(&c, seed, &packets);
        prop_assert!(arrived.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1));
    }

    /// In any window no more gets through than the rate allows, and a packet.
    #[test]
    fn the_rate_is_never_exceeded(mbit in 0.1f64..100.0, delay in 0u64..50, packets in packets()) {
        let c = DirectionConfig { mbit_per_s: Some(mbit), delay: ms(delay), ..DirectionConfig::default() };
        let (arrived, _) = run(&c, 1, &packets);
        for i in 0..arrived.len() {
            let mut bits = 0.0;
            for a in &arrived[i..] {
                bits += f64::from(packets[a.0].1) * 8.0;
                let allowed = (a.1 - arrived[i].1).as_secs_f64() * mbit * 1e6 + 1500.0 * 8.0;
                prop_assert!(bits <= allowed + 1.0, "{bits} bits where {allowed} may pass");
            }
        }
    }

    /// A lone packet takes its size over the rate, and the delay.
    #[test]
    fn an_idle_link_adds_serialisation_and_delay(mbit in 0.1f64..100.0, delay in 0u64..100, bytes in 40u32..=1500, overhead in 0u32..60) {
        let c = DirectionConfig { mbit_per_s: Some(mbit), delay: ms(delay), overhead, ..DirectionConfig::default() };
        let (arrived, _) = run(&c, 1, &[(1000, bytes)]);
        let rate = (mbit * 1e6).round();
        let ideal = 1e-3 + f64::from(bytes + overhead) * 8.0 / rate + delay as f64 / 1e3;
        prop_assert!((arrived[0].1.as_secs_f64() - ideal).abs() < 1e-8);
    }
}

#[test]
fn a_full_queue_drops_the_tail() {
    let mut d = direction(&DirectionConfig::constant(1.0, ms(0), 3000), 1);
    let kinds: Vec<Option<Drop>> = (0..4).map(|i| d.offer(ms(0), i, 1500).err().map(|e| e.0)).collect();
    assert_eq!(kinds, [None, None, Some(Drop::Queue), Some(Drop::Queue)]);
    assert_eq!(d.poll(ms(12)).len(), 1);
    assert!(d.offer(ms(12), 9, 1500).is_ok(), "there is room again");
}

#[test]
fn nothing_gets_through_in_an_outage() {
    let mut c = DirectionConfig::constant(12.0, ms(10), 1_000_000);
    c.outages = vec![Outage { at: ms(5), lasts: ms(100) }];
    let packets: Vec<(u64, u32)> = (0..20).map(|_| (1000, 1500)).collect();
    let (arrived, _) = run(&c, 1, &packets);
    assert_eq!(arrived.len(), 20);
    assert!(arrived.iter().all(|(_, t)| *t <= ms(15) || *t > ms(115)), "{arrived:?}");
}

#[test]
fn a_link_that_stays_dark_never_delivers_and_never_asks_to_be_polled() {
    let c = DirectionConfig { steps: vec![Step { at: ms(0), mbit_per_s: 0.0 }], ..DirectionConfig::default() };
    let (arrived, d) = run(&c, 1, &[(0, 100), (0, 100)]);
    assert!(arrived.is_empty() && d.under_way() == 2 && d.next_deadline().is_none());
}

#[test]
fn codel_keeps_a_standing_queue_short() {
    let longest = |codel| {
        let mut c = DirectionConfig::constant(1.0, ms(0), 1_000_000);
        c.queue = Some(QueueConfig { bytes: None, packets: Some(1000), codel });
        let packets: Vec<(u64, u32)> = (0..3000).map(|_| (10_000, 1500)).collect(); // 1.2 Mbit/s
        let (arrived, _) = run(&c, 1, &packets);
        let waits: Vec<f64> = arrived.iter().map(|(i, t)| t.as_secs_f64() - (*i as f64 + 1.0) * 0.01).collect();
        waits[waits.len() - 200..].iter().copied().fold(0.0, f64::max)
    };
    assert!(longest(true) < 0.3 && longest(false) > 4.0, "{} {}", longest(true), longest(false));
}

#[test]
fn wrong_descriptions_name_the_key() {
    let good = DirectionConfig::constant(1.0, ms(10), 64_000);
    let error = |change: fn(&mut DirectionConfig)| {
        let mut c = good.clone();
        change(&mut c);
        Direction::<()>::new(&c, Path::new("."), 1).err().expect("refused").to_string()
    };
    assert!(error(|c| c.mbit_per_s = None).contains("exactly one"));
    assert!(error(|c| c.mbit_per_s = Some(-1.0)).contains("-1 Mbit/s"));
    assert!(error(|c| c.mbit_per_s = Some(f64::NAN)).contains("mbit_per_s"));
    assert!(error(|c| c.delay = Duration::from_secs(100)).contains("delay"));
    assert!(error(|c| c.loss = Some(LossConfig::Independent(1.5))).contains("loss.independent"));
    assert!(error(|c| c.queue = Some(QueueConfig { bytes: Some(10), packets: None, codel: false })).contains("queue.bytes"));
    let trace = error(|c| (c.mbit_per_s, c.trace) = (None, Some("/nonexistent.trace".into())));
    assert!(trace.contains("/nonexistent.trace"), "{trace}");
}

/// Losses come in bursts: their share and their mean length are those of the two-state chain.
#[test]
fn gilbert_elliott_loses_in_bursts_of_the_chains_length() {
    let (to_bad, to_good) = (0.02, 0.25);
    let mut c = DirectionConfig::constant(1000.0, ms(0), 1 << 30);
    c.loss = Some(LossConfig::GilbertElliott { to_bad, to_good, good_loss: 0.0, bad_loss: 1.0 });
    let n = 100_000;
    let (arrived, d) = run(&c, 5, &vec![(20, 1000); n]);
    let share = d.stats().lost as f64 / n as f64;
    let bursts = arrived.windows(2).filter(|w| w[1].0 > w[0].0 + 1).count();
    let length = d.stats().lost as f64 / bursts as f64;
    // stationary share to_bad / (to_bad + to_good); a stay in the bad state lasts 1 / to_good packets
    assert!((share - to_bad / (to_bad + to_good)).abs() < 0.007, "{share}");
    assert!((length - 1.0 / to_good).abs() < 0.4, "{length}");
}

/// A trace gives one full packet per line, repeats when it ends, and gives nothing in its gaps.
#[test]
fn a_trace_delivers_at_its_opportunities_and_repeats() {
    let c = DirectionConfig { trace: Some(TRACE.1.clone()), ..DirectionConfig::default() };
    let (arrived, _) = run(&c, 1, &vec![(0, 1500); 700]);
    assert_eq!(arrived.len(), 700);
    // 300 opportunities in 800 ms
    let period = arrived[300].1 - arrived[0].1;
    assert_eq!(period, ms(800));
    assert!(arrived.iter().all(|(_, t)| !(101..600).contains(&(t.as_millis() % 800))), "{arrived:?}");
}
