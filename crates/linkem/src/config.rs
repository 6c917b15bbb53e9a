//! Descriptions of links, as scenario files have them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::LinkError;
use crate::rate::{Schedule, Serialiser};
use crate::trace::{Driving, Trace};

/// Fastest rate that is believed, in Mbit/s: a user-space emulator does not keep up with more.
pub const MAX_MBIT_PER_S: f64 = 1000.0;
const MAX_DELAY: Duration = Duration::from_secs(60);

/// Both directions of a link, as the device sees them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// Device to server.
    pub up: DirectionConfig,
    /// Server to device.
    pub down: DirectionConfig,
}

/// One direction. Exactly one of `mbit_per_s`, `steps`, `trace` and `driving` gives the rate.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DirectionConfig {
    /// Constant rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mbit_per_s: Option<f64>,
    /// Rates from given times on; the first starts at zero.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// File of delivery opportunities, one time in milliseconds a line, each for 1500 bytes (Mahimahi's format).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<PathBuf>,
    /// A trace made here by a seeded Markov model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driving: Option<Driving>,
    /// One-way propagation delay.
    #[serde(with = "humantime_serde")]
    pub delay: Duration,
    /// Variation of the delay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<JitterConfig>,
    /// Lost packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<LossConfig>,
    /// Bound of the queue; none: unbounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueConfig>,
    /// Times at which nothing gets through.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outages: Vec<Outage>,
    /// Bytes that each packet takes beside its own (38 on Ethernet).
    pub overhead: u32,
}

/// A rate from a time on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Since the start.
    #[serde(with = "humantime_serde")]
    pub at: Duration,
    /// The rate.
    pub mbit_per_s: f64,
}

/// Variation of the delay of each packet; the sum never falls below zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JitterConfig {
    /// Which distribution.
    pub distribution: Distribution,
    /// Uniform: half-width around zero. Normal: standard deviation around zero. Pareto: mean of what is added.
    #[serde(with = "humantime_serde")]
    pub spread: Duration,
    /// Packets may overtake each other; else a late one holds back those behind it.
    #[serde(default)]
    pub reorder: bool,
}

/// Distributions of jitter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// Between minus and plus the spread.
    Uniform,
    /// Gaussian.
    Normal,
    /// Heavy tail (shape 3), never negative.
    Pareto,
}

/// Lost packets.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum LossConfig {
    /// Each packet is lost with this probability.
    Independent(f64),
    /// Two states (Gilbert 1960, Elliott 1963).
    GilbertElliott {
        /// Probability of going from good to bad, per packet.
        to_bad: f64,
        /// Probability of going from bad to good, per packet.
        to_good: f64,
        /// Loss in the good state.
        good_loss: f64,
        /// Loss in the bad state.
        bad_loss: f64,
    },
}

/// Bound of the queue before the serialiser; the packet being sent counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueConfig {
    /// Most bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Most packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<usize>,
    /// Also drop by CoDel (RFC 8289; target 5 ms, interval 100 ms).
    #[serde(default)]
    pub codel: bool,
}

/// A time at which nothing gets through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// First moment.
    #[serde(with = "humantime_serde")]
    pub at: Duration,
    /// How long.
    #[serde(with = "humantime_serde")]
    pub lasts: Duration,
}

fn probability(key: &str, p: f64) -> Result<(), LinkError> {
    if (0.0..=1.0).contains(&p) { Ok(()) } else { Err(LinkError::new(key, format!("{p} is no probability; use 0 to 1"))) }
}

fn rate(key: &str, mbit_per_s: f64, least: f64) -> Result<u64, LinkError> {
    if !(least..=MAX_MBIT_PER_S).contains(&mbit_per_s) {
        return Err(LinkError::new(key, format!("{mbit_per_s} Mbit/s; use {least} to {MAX_MBIT_PER_S}")));
    }
    Ok((mbit_per_s * 1e6).round() as u64)
}

impl LinkConfig {
    /// Checks both directions; `folder` is where trace files are looked for.
    ///
    /// # Errors
    /// Names the key that is wrong.
    pub fn check(&self, folder: &Path) -> Result<(), LinkError> {
        for (name, direction) in [("up", &self.up), ("down", &self.down)] {
            direction.check(folder).map_err(|e| LinkError::new(format!("{name}.{}", e.key), e.why))?;
        }
        Ok(())
    }
}

impl DirectionConfig {
    /// A direction of constant rate and delay, with a queue of `queue_bytes`.
    pub fn constant(mbit_per_s: f64, delay: Duration, queue_bytes: u64) -> Self {
        let queue = QueueConfig { bytes: Some(queue_bytes), packets: None, codel: false };
        Self { mbit_per_s: Some(mbit_per_s), delay, queue: Some(queue), ..Self::default() }
    }

    /// Checks everything, reading the trace file if there is one.
    ///
    /// # Errors
    /// Names the key that is wrong.
    pub fn check(&self, folder: &Path) -> Result<(), LinkError> {
        self.serialiser(folder)?;
        if self.delay > MAX_DELAY {
            return Err(LinkError::new("delay", "at most 60s"));
        }
        if self.jitter.as_ref().is_some_and(|j| j.spread > MAX_DELAY) {
            return Err(LinkError::new("jitter.spread", "at most 60s"));
        }
        match self.loss {
            Some(LossConfig::Independent(p)) => probability("loss.independent", p)?,
            Some(LossConfig::GilbertElliott { to_bad, to_good, good_loss, bad_loss }) => {
                for (key, p) in [("to_bad", to_bad), ("to_good", to_good), ("good_loss", good_loss), ("bad_loss", bad_loss)] {
                    probability(&format!("loss.gilbert-elliott.{key}"), p)?;
                }
            }
            None => {}
        }
        if let Some(queue) = &self.queue {
            // one full packet must fit, or nothing ever gets through
            if queue.bytes.is_some_and(|b| b < 1500 + u64::from(self.overhead)) {
                return Err(LinkError::new("queue.bytes", "must hold one packet: at least 1500 and the overhead"));
            }
            if queue.packets == Some(0) {
                return Err(LinkError::new("queue.packets", "must be at least 1"));
            }
        }
        Ok(())
    }

    /// What sends the packets of this direction.
    ///
    /// # Errors
    /// Names the key that is wrong: none or several rates, an impossible one, an unusable trace.
    pub fn serialiser(&self, folder: &Path) -> Result<Serialiser, LinkError> {
        let given = [self.mbit_per_s.is_some(), !self.steps.is_empty(), self.trace.is_some(), self.driving.is_some()];
        if given.iter().filter(|g| **g).count() != 1 {
            return Err(LinkError::new("mbit_per_s", "give exactly one of mbit_per_s, steps, trace and driving"));
        }
        let mut outages: Vec<(Duration, Duration)> = self.outages.iter().map(|o| (o.at, o.at.saturating_add(o.lasts))).collect();
        outages.sort_unstable();
        if let Some(mbit) = self.mbit_per_s {
            return Ok(Serialiser::paced(Schedule::new(vec![(Duration::ZERO, rate("mbit_per_s", mbit, 0.001)?)], &outages)));
        }
        if let Some(first) = self.steps.first() {
            if !first.at.is_zero() {
                return Err(LinkError::new("steps", "the first step must be at 0s"));
            }
            if self.steps.windows(2).any(|w| w[0].at >= w[1].at) {
                return Err(LinkError::new("steps", "times must rise"));
            }
            let steps = self.steps.iter().map(|s| Ok((s.at, rate("steps.mbit_per_s", s.mbit_per_s, 0.0)?)));
            return Ok(Serialiser::paced(Schedule::new(steps.collect::<Result<_, LinkError>>()?, &outages)));
        }
        let trace = match (&self.trace, &self.driving) {
            (Some(path), _) => Trace::open(&folder.join(path))?,
            (None, Some(driving)) => driving.trace()?,
            (None, None) => return Err(LinkError::new("mbit_per_s", "no rate is given")),
        };
        Ok(Serialiser::traced(trace, outages))
    }
}
