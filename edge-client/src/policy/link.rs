//! What the link does, learned from requests that were made anyway.
//!
//! The time on the wire is modelled as `base + bytes x per_byte`. Both drift, so they are tracked by a Kalman filter whose
//! uncertainty grows with time: an old observation counts less, and what has not been tried lately is less sure.

use std::time::Duration;

/// What is believed before the first request: 60 ms and 1 Mbit/s, either of which may well be wrong.
const BASE: f64 = 0.06;
const PER_BYTE: f64 = 8e-6;
const RELATIVE_DOUBT: f64 = 1.0;
/// Growth of the uncertainty, relative to the value, per square root of a second.
const DRIFT: f64 = 0.35;
/// An observation's own noise: this share of it and this much besides.
const NOISE: f64 = 0.08;
const NOISE_FLOOR: f64 = 0.002;
/// Residuals beyond so many standard deviations mean that the link has changed.
const SURPRISE: f64 = 4.0;
/// Weight of the newest residual in the mean deviation.
const NEWEST: f64 = 0.15;

/// Seconds, and seconds a byte.
#[derive(Debug, Clone)]
pub struct LinkEstimate {
    state: [f64; 2],
    covariance: [[f64; 2]; 2],
    deviation: f64,
    updated: Duration,
}

impl Default for LinkEstimate {
    fn default() -> Self {
        let variance = |v: f64| (v * RELATIVE_DOUBT).powi(2);
        Self {
            state: [BASE, PER_BYTE],
            covariance: [[variance(BASE), 0.0], [0.0, variance(PER_BYTE)]],
            deviation: 0.01,
            updated: Duration::ZERO,
        }
    }
}

impl LinkEstimate {
    /// Time on the wire of a request of `bytes`.
    pub fn expected(&self, bytes: f64) -> f64 {
        self.state[0] + self.state[1] * bytes
    }

    /// Standard deviation of [`LinkEstimate::expected`].
    pub fn doubt(&self, bytes: f64) -> f64 {
        let c = &self.covariance;
        (c[0][0] + 2.0 * bytes * c[0][1] + bytes * bytes * c[1][1]).max(0.0).sqrt()
    }

    /// Mean absolute difference between what was expected and what came, seconds.
    pub fn deviation(&self) -> f64 {
        self.deviation
    }

    /// Uplink rate in bit/s.
    pub fn rate(&self) -> f64 {
        8.0 / self.state[1]
    }

    /// Takes note that `bytes` took `wire` seconds; `now` is the time since any fixed moment.
    pub fn observe(&mut self, now: Duration, bytes: f64, wire: f64) {
        let elapsed = now.saturating_sub(self.updated).as_secs_f64().min(30.0);
        self.updated = self.updated.max(now);
        for i in 0..2 {
            self.covariance[i][i] += (self.state[i] * DRIFT).powi(2) * elapsed;
        }
        let residual = wire - self.expected(bytes);
        let noise = (wire * NOISE + NOISE_FLOOR).powi(2);
        if residual.abs() > SURPRISE * (self.doubt(bytes).powi(2) + noise).sqrt() {
            for i in 0..2 {
                self.covariance[i][i] += (self.state[i] * RELATIVE_DOUBT).powi(2);
            }
        }
        let h = [1.0, bytes];
        let c = self.covariance;
        let ch = [c[0][0] + c[0][1] * bytes, c[1][0] + c[1][1] * bytes];
        let total = h[0] * ch[0] + h[1] * ch[1] + noise;
        for i in 0..2 {
            self.state[i] += ch[i] / total * residual;
            for j in 0..2 {
                self.covariance[i][j] = c[i][j] - ch[i] * ch[j] / total;
            }
        }
        // neither a wire faster than light nor one that is never done
        self.state[0] = self.state[0].clamp(1e-4, 60.0);
        self.state[1] = self.state[1].clamp(1e-9, 1.0);
        self.deviation += NEWEST * (residual.abs() - self.deviation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(link: &mut LinkEstimate, from: u64, n: u64, base: f64, per_byte: f64) {
        for i in from..from + n {
            let bytes = [900.0, 1500.0, 2300.0, 3400.0][(i % 4) as usize];
            link.observe(Duration::from_millis(i * 100), bytes, base + bytes * per_byte);
        }
    }

    #[test]
    fn delay_and_rate_are_found_from_requests_of_several_sizes() {
        let mut link = LinkEstimate::default();
        watch(&mut link, 0, 40, 0.030, 8.0 / 0.27e6);
        let expected = 0.030 + 5000.0 * 8.0 / 0.27e6;
        assert!((link.expected(5000.0) / expected - 1.0).abs() < 0.1, "{} for {expected}", link.expected(5000.0));
        assert!((link.rate() / 0.27e6 - 1.0).abs() < 0.15, "{}", link.rate());
    }

    #[test]
    fn a_change_is_followed_within_a_few_requests() {
        let mut link = LinkEstimate::default();
        watch(&mut link, 0, 50, 0.02, 8.0 / 12e6);
        watch(&mut link, 50, 4, 0.02, 8.0 / 0.3e6);
        let expected = 0.02 + 2000.0 * 8.0 / 0.3e6;
        assert!((link.expected(2000.0) / expected - 1.0).abs() < 0.35, "{} for {expected}", link.expected(2000.0));
    }

    #[test]
    fn what_was_not_tried_lately_is_less_sure() {
        let mut link = LinkEstimate::default();
        watch(&mut link, 0, 50, 0.02, 8.0 / 12e6);
        let sure = link.doubt(80_000.0);
        link.observe(Duration::from_secs(25), 1500.0, 0.021);
        assert!(link.doubt(80_000.0) > sure);
        assert!(link.doubt(80_000.0) > link.doubt(1500.0));
    }
}
