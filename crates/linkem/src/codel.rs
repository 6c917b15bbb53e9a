//! Controlled delay (CoDel, RFC 8289), section 5 of the RFC as a decision per packet that leaves the queue.

use std::time::Duration;

/// Acceptable standing delay.
pub const TARGET: Duration = Duration::from_millis(5);
/// Time within which it must show.
pub const INTERVAL: Duration = Duration::from_millis(100);

/// State of the controller.
#[derive(Debug, Clone, Default)]
pub struct Codel {
    first_above: Option<Duration>,
    drop_next: Duration,
    count: u32,
    last_count: u32,
    dropping: bool,
}

fn after(t: Duration, count: u32) -> Duration {
    t + INTERVAL.div_f64(f64::from(count.max(1)).sqrt())
}

impl Codel {
    /// True if the packet that leaves the queue at `now`, after `waited`, is to be dropped. `backlog` is what stays behind
    /// it in bytes; with less than a packet there, nothing is dropped.
    pub fn drops(&mut self, now: Duration, waited: Duration, backlog: u64) -> bool {
        let above = if waited < TARGET || backlog < 1500 {
            self.first_above = None;
            false
        } else {
            now >= *self.first_above.get_or_insert(now + INTERVAL)
        };
        if self.dropping {
            if !above {
                self.dropping = false;
                return false;
            }
            if now >= self.drop_next {
                self.count += 1;
                self.drop_next = after(self.drop_next, self.count);
                return true;
            }
            return false;
        }
        if !above {
            return false;
        }
        self.dropping = true;
        // soon after the last time: go on at about the rate that helped then
        let delta = self.count - self.last_count;
        let recent = now.saturating_sub(self.drop_next) < INTERVAL * 16;
        self.count = if delta > 1 && recent { delta } else { 1 };
        self.last_count = self.count;
        self.drop_next = after(now, self.count);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_burst_passes_and_a_standing_queue_is_dropped_faster_and_faster() {
        let ms = Duration::from_millis;
        let mut codel = Codel::default();
        assert!(!(0..90).any(|t| codel.drops(ms(t), ms(50), 100_000)), "less than an interval");
        let drops: Vec<u64> = (90..2000).filter(|&t| codel.drops(ms(t), ms(50), 100_000)).collect();
        assert_eq!(drops[0], 100);
        let gaps: Vec<u64> = drops.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps[0] >= 99 && gaps[gaps.len() - 1] < 30, "{gaps:?}");
        assert!(!codel.drops(ms(2001), ms(1), 100_000), "stops as soon as the delay is fine");
        assert!(!codel.drops(ms(2002), ms(50), 0), "never the last packet");
    }
}
