//! The policy against an emulated link in virtual time: no clock, no sockets, the same every time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::time::Duration;

use edge_client::policy::{Aim, Candidate, Choice, Goal, LocalUse, Outcome, Policy};
use linkem::config::{Outage, Step};
use linkem::trace::Driving;
use linkem::{Direction, DirectionConfig};

const PERIOD: Duration = Duration::from_millis(200);
const MTU: usize = 1448;

fn candidates(local: Option<f64>) -> Vec<Candidate> {
    let sent = [
        (Choice::Bottleneck(1), 0.43, 479.0, 0.03, 0.015),
        (Choice::Bottleneck(3), 0.66, 1540.0, 0.03, 0.015),
        (Choice::Bottleneck(5), 0.68, 3444.0, 0.03, 0.015),
        (Choice::Jpeg(75), 0.79, 8194.0, 0.01, 0.02),
        (Choice::Png, 1.0, 76_764.0, 0.05, 0.02),
    ];
    let mut all: Vec<Candidate> =
        sent.into_iter().map(|(choice, agreement, bytes, encode, server)| Candidate { choice, agreement, bytes, encode, server }).collect();
    all.extend(local.map(|encode| Candidate { choice: Choice::Local, agreement: 1.0, bytes: 0.0, encode, server: 0.0 }));
    all
}

/// Seconds until `bytes` sent at `at` have arrived; none within 10 s.
fn wire(link: &mut Direction<usize>, at: Duration, bytes: usize, back: Duration) -> Option<f64> {
    let packets = bytes.div_ceil(MTU);
    for i in 0..packets {
        let size = if i + 1 == packets { bytes - i * MTU } else { MTU } + 52;
        link.offer(at, i, size as u32).ok()?;
    }
    let mut arrived = 0;
    let mut now = at;
    while arrived < packets {
        now = link.next_deadline()?.max(now);
        if now > at + Duration::from_secs(10) {
            return None;
        }
        arrived += link.poll(now).len();
    }
    Some((now + back - at).as_secs_f64())
}

struct Run {
    /// In time and, by the option's agreement, right.
    value: f64,
    in_time: f64,
    choices: Vec<Choice>,
    switches: u64,
    /// Mean seconds, too late counted as the deadline.
    latency: f64,
}

/// Plays `seconds` of photos, one a period, over a link; `fixed` instead of the policy's choice, without fallback.
fn play(up: &DirectionConfig, goal: Goal, local: Option<f64>, seconds: u64, fixed: Option<Choice>) -> Run {
    let mut link: Direction<usize> = Direction::new(up, Path::new("."), 1).unwrap();
    let all = candidates(local);
    let mut policy = Policy::new(goal, all.clone()).unwrap();
    let deadline = goal.deadline.as_secs_f64();
    let mut run = Run { value: 0.0, in_time: 0.0, choices: Vec::new(), switches: 0, latency: 0.0 };
    let mut now = Duration::ZERO;
    let mut photos = 0.0;
    // what is learned after the device has answered already
    let mut later: Option<(Duration, Outcome)> = None;
    while now < Duration::from_secs(seconds) {
        if let Some((_, outcome)) = later.take_if(|(at, _)| *at <= now) {
            policy.observe(now, outcome);
        }
        let decision = match fixed {
            Some(choice) => edge_client::policy::Decision { choice, local_after: None },
            None => policy.decide(now, None),
        };
        let c = all.iter().find(|c| c.choice == decision.choice).unwrap();
        run.choices.push(c.choice);
        photos += 1.0;
        let (mut took, mut agreement);
        if c.choice == Choice::Local {
            (took, agreement) = (c.encode, c.agreement);
            policy.observe(now + Duration::from_secs_f64(took), Outcome::Local(took));
        } else {
            let sent = now + Duration::from_secs_f64(c.encode);
            let bytes = c.bytes as usize + photos as usize * 37 % 300;
            let wire = wire(&mut link, sent, bytes, up.delay);
            let answered = wire.map(|w| c.encode + w + c.server).filter(|t| *t <= deadline);
            let outcome = match answered {
                Some(_) => {
                    Outcome::Answered { choice: c.choice, bytes, encode: c.encode, wire: wire.unwrap(), server: c.server, queue: 0.0 }
                }
                None => Outcome::Late { bytes, waited: deadline - c.encode },
            };
            let known = now + Duration::from_secs_f64(answered.unwrap_or(deadline));
            (took, agreement) = (answered.unwrap_or(f64::INFINITY), c.agreement);
            let device = local.zip(decision.local_after).map(|(l, after)| after.as_secs_f64() + l).filter(|t| *t < took);
            if let Some(device) = device {
                (took, agreement) = (device, 1.0);
                later = Some((known, outcome));
            } else {
                policy.observe(known, outcome);
            }
        }
        run.in_time += f64::from(u8::from(took <= deadline));
        run.value += if took <= deadline { agreement } else { 0.0 };
        run.latency += took.min(deadline);
        now += PERIOD.max(Duration::from_secs_f64(took.min(deadline)));
    }
    if let Some((_, outcome)) = later {
        policy.observe(now, outcome);
    }
    run.switches = policy.switches();
    (run.value, run.in_time, run.latency) = (run.value / photos, run.in_time / photos, run.latency / photos);
    run
}

fn goal(deadline: u64, aim: Aim) -> Goal {
    Goal { deadline: Duration::from_millis(deadline), aim, least_agreement: 0.0, local: LocalUse::Fallback }
}

fn constant(mbit: f64, delay: u64) -> DirectionConfig {
    DirectionConfig::constant(mbit, Duration::from_millis(delay), 1 << 20)
}

fn share(run: &Run, choice: Choice) -> f64 {
    run.choices.iter().filter(|c| **c == choice).count() as f64 / run.choices.len() as f64
}

#[test]
fn on_a_steady_link_the_best_option_that_is_in_time_is_found_and_kept() {
    let thin = play(&constant(0.27, 15), goal(240, Aim::Agreement), None, 60, None);
    // at 0.27 Mbit/s: q5 needs 30 + 30 + 105 + 15 ms, JPEG 280
    assert!(share(&thin, Choice::Bottleneck(5)) > 0.8 && thin.in_time > 0.95, "{:?}", thin.choices);
    let wide = play(&constant(54.0, 3), goal(200, Aim::Agreement), None, 60, None);
    assert!(share(&wide, Choice::Png) > 0.8 && wide.in_time > 0.98, "{:?}", wide.choices);
}

#[test]
fn soonest_means_soonest_among_those_that_agree_enough() {
    let aim = Goal { least_agreement: 0.65, ..goal(500, Aim::Latency) };
    let run = play(&constant(1.0, 35), aim, None, 60, None);
    assert!(share(&run, Choice::Bottleneck(3)) > 0.8, "{:?}", run.choices);
    let fast = play(&constant(50.0, 5), aim, None, 60, None);
    assert!(share(&fast, Choice::Jpeg(75)) > 0.6, "encoding JPEG is cheaper than the network: {:?}", fast.choices);
}

#[test]
fn at_the_edge_between_two_options_it_does_not_flap() {
    for rate in [0.6, 0.7, 0.8, 0.9] {
        let run = play(&constant(rate, 20), goal(150, Aim::Agreement), None, 120, None);
        assert!(run.switches <= 12, "{} switches at {rate} Mbit/s: {:?}", run.switches, run.choices);
    }
}

#[test]
fn a_dead_link_is_bridged_by_the_device_and_recovers_by_itself() {
    let mut up = constant(12.0, 20);
    up.outages = vec![Outage { at: Duration::from_secs(10), lasts: Duration::from_secs(5) }];
    let run = play(&up, goal(400, Aim::Agreement), Some(0.2), 40, None);
    assert!(run.in_time > 0.999, "every photo is answered in time: {}", run.in_time);
    let tail = &run.choices[run.choices.len() - 60..];
    assert!(tail.iter().all(|c| *c != Choice::Local), "the link is used again: {tail:?}");
    let without = play(&up, goal(400, Aim::Agreement), None, 40, None);
    assert!(without.in_time > 0.8, "without a device it still recovers: {}", without.in_time);
}

#[test]
fn on_links_that_vary_it_beats_every_fixed_choice() {
    let driving = Driving { peak_mbit_per_s: 12.0, length: Duration::from_secs(60), dwell: Duration::from_millis(500), seed: 7 };
    let traced = DirectionConfig { driving: Some(driving), delay: Duration::from_millis(25), ..DirectionConfig::default() };
    let steps = [(0, 12.0), (15, 0.3), (30, 2.0), (45, 40.0)];
    let stepped = DirectionConfig {
        steps: steps.iter().map(|&(at, mbit_per_s)| Step { at: Duration::from_secs(at), mbit_per_s }).collect(),
        delay: Duration::from_millis(20),
        ..DirectionConfig::default()
    };
    for (name, up) in [("driving", traced), ("steps", stepped)] {
        for local in [None, Some(0.35)] {
            let goal = goal(300, Aim::Agreement);
            let auto = play(&up, goal, local, 60, None);
            // a device that is to spare its energy is no rival here: the next test is about one that is not
            for c in candidates(None) {
                let fixed = play(&up, goal, None, 60, Some(c.choice));
                assert!(auto.value > fixed.value, "{name}, local {local:?}: {:.3} against {:.3} of {}", auto.value, fixed.value, c.choice);
            }
        }
    }
}

#[test]
fn a_device_that_may_compute_by_choice_loses_to_no_fixed_choice_and_goes_back_to_a_link_that_recovers() {
    let may = |aim| Goal { local: LocalUse::Choice, least_agreement: 0.6, ..goal(500, aim) };
    let driving = Driving { peak_mbit_per_s: 12.0, length: Duration::from_secs(60), dwell: Duration::from_millis(500), seed: 7 };
    let traced = DirectionConfig { driving: Some(driving), delay: Duration::from_millis(25), ..DirectionConfig::default() };
    for local in [0.15, 0.25] {
        let auto = play(&traced, may(Aim::Agreement), Some(local), 60, None);
        for c in candidates(Some(local)) {
            let fixed = play(&traced, may(Aim::Agreement), Some(local), 60, Some(c.choice));
            assert!(auto.value > fixed.value - 0.01, "{:.3} against {:.3} of {}", auto.value, fixed.value, c.choice);
        }
    }
    let mut dark = constant(12.0, 20);
    dark.outages = vec![Outage { at: Duration::from_secs(10), lasts: Duration::from_secs(2) }];
    let thin = |then: f64| {
        let steps = [(0, 0.1), (10, then)];
        let steps = steps.iter().map(|&(at, mbit_per_s)| Step { at: Duration::from_secs(at), mbit_per_s }).collect();
        DirectionConfig { steps, delay: Duration::from_millis(10), ..DirectionConfig::default() }
    };
    for (name, up) in [("outage", dark), ("thin, then 12", thin(12.0)), ("thin, then 54", thin(54.0))] {
        let run = play(&up, may(Aim::Latency), Some(0.2), 120, None);
        let second_half = &run.choices[run.choices.len() / 2..];
        let local = second_half.iter().filter(|c| **c == Choice::Local).count();
        assert!(local * 10 < second_half.len(), "{name}: {local} of {} on the device, mean {:.3}", second_half.len(), run.latency);
    }
}
