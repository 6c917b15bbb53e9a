//! When a packet has been sent: the serialiser.

use std::time::Duration;

use crate::trace::{OPPORTUNITY_BYTES, Trace};

const NANOS: u128 = 1_000_000_000;

/// Bits per second from given times on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Rising times; the first is zero.
    steps: Vec<(Duration, u64)>,
}

impl Schedule {
    /// `steps` (rising, the first at zero) with the rate set to zero during `outages` (sorted from, to).
    pub fn new(steps: Vec<(Duration, u64)>, outages: &[(Duration, Duration)]) -> Self {
        let at = |t: Duration| {
            let dark = outages.iter().any(|&(from, to)| from <= t && t < to);
            if dark { 0 } else { steps.iter().rev().find(|s| s.0 <= t).map_or(0, |s| s.1) }
        };
        let ends = outages.iter().flat_map(|&(from, to)| [from, to]);
        let mut times: Vec<Duration> = steps.iter().map(|s| s.0).chain(ends).collect();
        times.sort_unstable();
        times.dedup();
        Self { steps: times.into_iter().map(|t| (t, at(t))).collect() }
    }

    /// When `bytes` have been sent, if sending starts at `start`; `None` if never.
    pub fn finish(&self, start: Duration, bytes: u64) -> Option<Duration> {
        let mut left = u128::from(bytes) * 8 * NANOS; // bits x nanoseconds per second
        let mut now = start;
        let mut index = self.steps.partition_point(|s| s.0 <= start).saturating_sub(1);
        loop {
            let rate = u128::from(self.steps.get(index)?.1);
            let until = self.steps.get(index + 1).map(|s| s.0);
            if rate > 0 {
                let needed = nanos(left.div_ceil(rate));
                if until.is_none_or(|u| now + needed <= u) {
                    return Some(now + needed);
                }
            }
            let until = until?;
            left = left.saturating_sub(rate * (until - now).as_nanos());
            now = until;
            index += 1;
        }
    }
}

fn nanos(n: u128) -> Duration {
    Duration::from_nanos(u64::try_from(n).unwrap_or(u64::MAX))
}

/// Sends one packet after the other.
#[derive(Debug, Clone)]
pub struct Serialiser {
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Paced(Schedule),
    Traced { trace: Trace, outages: Vec<(Duration, Duration)>, next: u64, left: u64 },
}

impl Serialiser {
    /// By a schedule of rates.
    pub fn paced(schedule: Schedule) -> Self {
        Self { kind: Kind::Paced(schedule) }
    }

    /// By a trace of delivery opportunities; those during `outages` and those that nobody waits for are lost.
    pub fn traced(trace: Trace, outages: Vec<(Duration, Duration)>) -> Self {
        Self { kind: Kind::Traced { trace, outages, next: 0, left: OPPORTUNITY_BYTES } }
    }

    /// When a packet of `bytes` that may start at `start` has been sent; `None` if never. Starts must not fall.
    pub fn send(&mut self, start: Duration, bytes: u64) -> Option<Duration> {
        let (trace, outages, next, left) = match &mut self.kind {
            Kind::Paced(schedule) => return schedule.finish(start, bytes),
            Kind::Traced { trace, outages, next, left } => (trace, outages, next, left),
        };
        if trace.time(*next) < start {
            *next = trace.first_at(start);
            *left = OPPORTUNITY_BYTES;
        }
        let mut bytes = bytes;
        loop {
            let time = trace.time(*next);
            if let Some(&(_, to)) = outages.iter().find(|&&(from, to)| from <= time && time < to) {
                *next = trace.first_at(to);
                *left = OPPORTUNITY_BYTES;
                continue;
            }
            let taken = bytes.min(*left);
            bytes -= taken;
            *left -= taken;
            if *left == 0 {
                *next += 1;
                *left = OPPORTUNITY_BYTES;
            }
            if bytes == 0 {
                return Some(time);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_constant_rate_takes_size_over_rate() {
        let schedule = Schedule::new(vec![(ms(0), 8_000_000)], &[]);
        assert_eq!(schedule.finish(ms(3), 1000), Some(ms(4)));
    }

    #[test]
    fn a_packet_may_span_steps_and_outages() {
        let schedule = Schedule::new(vec![(ms(0), 8_000_000), (ms(2), 4_000_000)], &[(ms(3), ms(10))]);
        // 1 ms at 8, 1 ms at 4, nothing for 7 ms, 1 ms at 4 Mbit/s
        assert_eq!(schedule.finish(ms(1), 1000 + 500 + 500), Some(ms(11)));
        let dead = Schedule::new(vec![(ms(0), 8_000), (ms(1), 0)], &[]);
        assert_eq!(dead.finish(ms(0), 1000), None);
    }

    #[test]
    fn traces_give_opportunities_and_lose_unused_ones() {
        let trace = Trace::new(vec![1, 2, 2, 5]).unwrap();
        let mut serialiser = Serialiser::traced(trace, vec![]);
        assert_eq!(serialiser.send(ms(0), 1500), Some(ms(1)));
        assert_eq!(serialiser.send(ms(1), 3000), Some(ms(2)));
        // the one at 5 ms is shared by two small packets, the next ones come a period later
        assert_eq!(serialiser.send(ms(2), 700), Some(ms(5)));
        assert_eq!(serialiser.send(ms(5), 700), Some(ms(5)));
        assert_eq!(serialiser.send(ms(6), 1500), Some(ms(6)), "what was left of the one at 5 ms is gone");
    }
}
