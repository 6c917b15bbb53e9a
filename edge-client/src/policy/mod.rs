//! Chooses, for every request, what to make of a photo: a bitstream of some quality level, an image file, or an answer
//! computed on the device.
//!
//! [`Policy`] is a state machine without clock and I/O: [`Policy::decide`] gives the choice, [`Policy::observe`] takes what came
//! of it; time is a [`Duration`] since any fixed moment. The client that follows it is [`crate::auto`].
//!
//! What is known: the size, agreement and cost of each option (the bundle's own measurements, corrected by what is seen), the
//! link ([`LinkEstimate`]), and the server's reported queue. A better option is taken after it has looked better several times
//! in a row, a worse one at once when the present one no longer fits. A link that answered late or not at all counts as dead;
//! it is tried again with real requests whose answer the device computes at the same time; so is one that was left for the device
//! because it was slow.

mod link;

use std::time::Duration;

pub use link::LinkEstimate;
use serde::{Deserialize, Serialize};

/// A better option must look better this many times in a row.
const PATIENCE: u32 = 3;
/// For a better option, this share of the deadline must be enough.
const HEADROOM: f64 = 0.85;
/// What is expected plus so many mean deviations must fit the deadline.
const CAUTION: f64 = 2.0;
/// A faster option must save this share, and this much.
const WORTH: f64 = 0.04;
const WORTH_SECONDS: f64 = 0.002;
/// An option that fits only if the link is better than it seems is tried after this time, then ever more rarely.
const TRIAL: Duration = Duration::from_secs(2);
/// And not before so many other requests, doubled likewise.
const TRIAL_REQUESTS: u32 = 2;
const TRIAL_REQUESTS_MOST: u32 = 64;
const TRIAL_LONGEST: Duration = Duration::from_secs(64);
/// While the device computes the answers by choice, nothing else tells that the link has become faster.
const TRIAL_LONGEST_LOCAL: Duration = Duration::from_secs(8);
/// Each such trial makes the device encode before it computes: not for more than one photo in so many.
const TRIAL_REQUESTS_LOCAL: u32 = 8;
/// How far the link may be better than it seems, in standard deviations.
const HOPE: f64 = 1.5;
/// A payload beyond so many times the present option's was a trial.
const TRIAL_BYTES: f64 = 1.5;
/// A dead link is tried again at once, then after this time, doubled up to the longest.
const RETRY: Duration = Duration::from_millis(250);
const RETRY_LONGEST: Duration = Duration::from_secs(4);
/// A request that got no answer is taken to need this many times what it was given.
const LATE: f64 = 1.2;
/// Weight of the newest value in running means.
const NEWEST: f64 = 0.25;
/// The device starts computing an answer itself when only this many times the time for it is left.
const RESERVE: f64 = 1.4;

/// What to make of a photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The bundle's bitstream at this quality level.
    Bottleneck(u8),
    /// The crop as JPEG of this quality; the server runs the whole network.
    Jpeg(u8),
    /// The crop as PNG.
    Png,
    /// The photo's file as it is.
    File,
    /// The whole network on the device.
    Local,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bottleneck(q) => write!(f, "q{q}"),
            Self::Jpeg(q) => write!(f, "JPEG q{q}"),
            Self::Png => f.write_str("PNG"),
            Self::File => f.write_str("file"),
            Self::Local => f.write_str("local"),
        }
    }
}

/// What the answers are to be, beside in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aim {
    /// The most agreement with the uncompressed network, then the fewest bytes.
    #[default]
    Agreement,
    /// The soonest, among options of at least [`Goal::least_agreement`].
    Latency,
}

/// When the network may run on the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalUse {
    /// Only where the link fails: it costs the energy that offloading is to save.
    #[default]
    Fallback,
    /// Whenever it serves the goal best.
    Choice,
}

/// What a policy works for: first the deadline, then the aim.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// From photo to answer.
    pub deadline: Duration,
    /// What comes next.
    pub aim: Aim,
    /// Options of less agreement are left out, unless none is left.
    pub least_agreement: f64,
    /// When the network may run on the device.
    pub local: LocalUse,
}

/// An option and what is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The option.
    pub choice: Choice,
    /// Share of photos on which it gives the uncompressed network's answer.
    pub agreement: f64,
    /// Payload bytes.
    pub bytes: f64,
    /// Seconds of the device.
    pub encode: f64,
    /// Seconds of the server, without its queue.
    pub server: f64,
}

/// A decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// What to do.
    pub choice: Choice,
    /// When to start computing the answer on the device too, counted from the request; `None`: not at all.
    pub local_after: Option<Duration>,
}

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// The server answered. Seconds; `wire` is all that was neither device nor server.
    Answered {
        /// What was sent.
        choice: Choice,
        /// Payload bytes.
        bytes: usize,
        /// Of the device.
        encode: f64,
        /// Between the two.
        wire: f64,
        /// Of the server, without its queue.
        server: f64,
        /// In the server's queue.
        queue: f64,
    },
    /// No answer within `waited` seconds after sending.
    Late {
        /// Payload bytes.
        bytes: usize,
        /// Seconds.
        waited: f64,
    },
    /// The connection broke or was refused.
    Broken,
    /// The device computed the answer in so many seconds.
    Local(f64),
}

/// A link that does not answer.
#[derive(Debug, Clone, Copy)]
struct Dead {
    retry_at: Duration,
    pause: Duration,
}

/// The state of the choice.
#[derive(Debug, Clone)]
pub struct Policy {
    goal: Goal,
    candidates: Vec<Candidate>,
    link: LinkEstimate,
    queue: f64,
    current: usize,
    better_for: u32,
    dead: Option<Dead>,
    trial_at: Duration,
    trial_pause: Duration,
    trial_requests: u32,
    since_trial: u32,
    switches: u64,
}

fn running(mean: &mut f64, value: f64) {
    *mean += NEWEST * (value - *mean);
}

impl Policy {
    /// A policy that knows nothing of the link yet; it starts with the smallest payload. `None` if there are no candidates.
    pub fn new(goal: Goal, mut candidates: Vec<Candidate>) -> Option<Self> {
        candidates.sort_by(|a, b| b.agreement.total_cmp(&a.agreement).then(a.bytes.total_cmp(&b.bytes)));
        let sent = candidates.iter().enumerate().filter(|(_, c)| c.choice != Choice::Local);
        let smallest = sent.min_by(|a, b| a.1.bytes.total_cmp(&b.1.bytes)).map_or(0, |(i, _)| i);
        if candidates.is_empty() {
            return None;
        }
        Some(Self {
            goal,
            candidates,
            link: LinkEstimate::default(),
            queue: 0.0,
            current: smallest,
            better_for: 0,
            dead: None,
            trial_at: TRIAL,
            trial_pause: TRIAL,
            trial_requests: TRIAL_REQUESTS,
            since_trial: 0,
            switches: 0,
        })
    }

    /// What is believed of the link.
    pub fn link(&self) -> &LinkEstimate {
        &self.link
    }

    /// How often the choice has changed, trials and fallbacks not counted.
    pub fn switches(&self) -> u64 {
        self.switches
    }

    /// How often an option is believed to give the uncompressed network's answer.
    pub fn agreement(&self, choice: Choice) -> Option<f64> {
        self.candidates.iter().find(|c| c.choice == choice).map(|c| c.agreement)
    }

    /// True while the link counts as dead.
    pub fn link_is_dead(&self) -> bool {
        self.dead.is_some()
    }

    /// Expected seconds from photo to answer of an option; `bytes` instead of its usual ones.
    fn expected(&self, c: &Candidate) -> f64 {
        match c.choice {
            Choice::Local => c.encode,
            _ => c.encode + self.link.expected(c.bytes) + self.queue + c.server,
        }
    }

    /// The time that it takes unless things go badly.
    fn safe(&self, c: &Candidate) -> f64 {
        self.expected(c) + if c.choice == Choice::Local { 0.0 } else { CAUTION * self.link.deviation() }
    }

    fn local(&self) -> Option<&Candidate> {
        self.candidates.iter().find(|c| c.choice == Choice::Local)
    }

    fn allowed(&self, i: usize) -> bool {
        let c = &self.candidates[i];
        c.choice != Choice::Local || self.goal.local == LocalUse::Choice
    }

    /// Indices of the options that the goal allows, best agreement first.
    fn options(&self) -> Vec<usize> {
        let all: Vec<usize> = (0..self.candidates.len()).filter(|&i| self.allowed(i)).collect();
        let good: Vec<usize> = all.iter().copied().filter(|&i| self.candidates[i].agreement >= self.goal.least_agreement).collect();
        match (good.is_empty(), all.is_empty()) {
            (false, _) => good,
            (true, false) => all,
            (true, true) => vec![self.current],
        }
    }

    /// The option that serves the goal best by what is believed now: in time with headroom if there is one such, else just in
    /// time, else the soonest.
    fn best(&self) -> usize {
        let options = self.options();
        let soonest = |among: &[usize]| {
            let time = |i: &usize| self.expected(&self.candidates[*i]);
            among.iter().copied().min_by(|a, b| time(a).total_cmp(&time(b)))
        };
        let in_time = |among: &[usize]| {
            let within = |share: f64| among.iter().copied().find(|&i| self.fits(i, share));
            within(HEADROOM).or_else(|| within(1.0))
        };
        match self.goal.aim {
            Aim::Latency => soonest(&options),
            Aim::Agreement => in_time(&options).or_else(|| {
                // nothing of the wanted agreement is in time: less agreement in time is better than an answer too late
                let all: Vec<usize> = (0..self.candidates.len()).filter(|&i| self.allowed(i)).collect();
                in_time(&all).or_else(|| soonest(&all))
            }),
        }
        .unwrap_or(self.current)
    }

    /// Whether an option is done within this share of the deadline, unless things go badly.
    fn fits(&self, option: usize, share: f64) -> bool {
        self.safe(&self.candidates[option]) <= share * self.goal.deadline.as_secs_f64()
    }

    /// Whether moving from the present option to `best` is a matter of taste, not of need.
    fn present_will_do(&self, best: usize) -> bool {
        let deadline = self.goal.deadline.as_secs_f64();
        let (present, new) = (&self.candidates[self.current], &self.candidates[best]);
        self.options().contains(&self.current)
            && match self.goal.aim {
                Aim::Agreement => self.fits(self.current, 1.0),
                Aim::Latency => self.expected(present) <= deadline || self.expected(new) > deadline,
            }
    }

    /// Whether the move is worth it.
    fn worth(&self, best: usize) -> bool {
        let (present, new) = (&self.candidates[self.current], &self.candidates[best]);
        match self.goal.aim {
            // candidates are in order of what they are worth
            Aim::Agreement => best < self.current && self.fits(best, HEADROOM),
            Aim::Latency => {
                let (old, new) = (self.expected(present), self.expected(new));
                old - new > (old * WORTH).max(WORTH_SECONDS)
            }
        }
    }

    /// What to do with the next photo; `file_bytes` is the size of its file, if there is one to send.
    pub fn decide(&mut self, now: Duration, file_bytes: Option<usize>) -> Decision {
        if let Some(file) = self.candidates.iter_mut().find(|c| c.choice == Choice::File) {
            file.bytes = file_bytes.map_or(f64::INFINITY, |b| b as f64); // without a file never in time
        }
        if let Some(dead) = self.dead {
            let smallest = (0..self.candidates.len()).filter(|&i| self.candidates[i].choice != Choice::Local);
            let smallest = smallest.min_by(|&a, &b| self.candidates[a].bytes.total_cmp(&self.candidates[b].bytes));
            let retry = now >= dead.retry_at || self.local().is_none();
            return match smallest.filter(|_| retry) {
                Some(i) => {
                    let pause = if dead.pause.is_zero() { RETRY } else { (dead.pause * 2).min(RETRY_LONGEST) };
                    self.dead = Some(Dead { retry_at: now + pause, pause });
                    Decision { choice: self.candidates[i].choice, local_after: self.local().map(|_| Duration::ZERO) }
                }
                None => Decision { choice: Choice::Local, local_after: None },
            };
        }
        let best = self.best();
        if best == self.current {
            self.better_for = 0;
        } else if !self.present_will_do(best) {
            self.switch(best);
        } else if self.worth(best) {
            self.better_for += 1;
            if self.better_for >= PATIENCE {
                self.switch(best);
            }
        } else {
            self.better_for = 0;
        }
        let chosen = self.trial(now).unwrap_or(self.current);
        let from_local = chosen != self.current && self.candidates[self.current].choice == Choice::Local;
        let local_after = if from_local { Some(Duration::ZERO) } else { self.local_after(chosen) };
        Decision { choice: self.candidates[chosen].choice, local_after }
    }

    fn switch(&mut self, to: usize) {
        self.current = to;
        self.better_for = 0;
        self.switches += 1;
    }

    /// Latest moment at which the device can still compute the answer itself.
    fn local_after(&self, chosen: usize) -> Option<Duration> {
        let local = self.local().filter(|_| self.candidates[chosen].choice != Choice::Local)?;
        Some(self.goal.deadline.saturating_sub(Duration::from_secs_f64(local.encode * RESERVE)))
    }

    /// An option that would be better if the link is better than it seems, once in a while.
    fn trial(&mut self, now: Duration) -> Option<usize> {
        self.since_trial += 1;
        if self.candidates[self.current].choice == Choice::Local {
            return self.trial_from_local(now);
        }
        if now < self.trial_at || self.since_trial < self.trial_requests {
            return None;
        }
        let deadline = self.goal.deadline.as_secs_f64();
        let present = self.expected(&self.candidates[self.current]);
        let hoped = |c: &Candidate| self.expected(c) - HOPE * self.link.doubt(c.bytes);
        let better = self.options().into_iter().filter(|&i| i != self.current && self.candidates[i].choice != Choice::Local).rfind(|&i| {
            let c = &self.candidates[i];
            match self.goal.aim {
                Aim::Agreement => c.agreement > self.candidates[self.current].agreement && hoped(c) <= HEADROOM * deadline,
                Aim::Latency => hoped(c) < present * (1.0 - WORTH) && self.could_save(c, present),
            }
        });
        self.trial_at = now + self.trial_pause;
        if better.is_some() {
            self.trial_pause = (self.trial_pause * 2).min(TRIAL_LONGEST);
            self.trial_requests = (self.trial_requests * 2).min(TRIAL_REQUESTS_MOST);
            self.since_trial = 0;
        }
        better
    }

    /// A payload that is no smaller travels no faster, whatever the link is like: only less computing could make it sooner.
    fn could_save(&self, c: &Candidate, present: f64) -> bool {
        let current = &self.candidates[self.current];
        c.bytes < current.bytes || current.encode + current.server - c.encode - c.server > WORTH * present
    }

    /// While the device is the soonest: the soonest way over the link, to see what has become of it.
    fn trial_from_local(&mut self, now: Duration) -> Option<usize> {
        if self.goal.aim != Aim::Latency || now < self.trial_at || self.since_trial < TRIAL_REQUESTS_LOCAL {
            return None;
        }
        self.trial_pause = (self.trial_pause * 2).min(TRIAL_LONGEST_LOCAL);
        self.trial_at = now + self.trial_pause;
        self.since_trial = 0;
        let sent = self.options().into_iter().filter(|&i| self.candidates[i].choice != Choice::Local);
        sent.min_by(|&a, &b| self.expected(&self.candidates[a]).total_cmp(&self.expected(&self.candidates[b])))
    }

    /// Learns from what came of a request.
    pub fn observe(&mut self, now: Duration, outcome: Outcome) {
        match outcome {
            Outcome::Answered { choice, bytes, encode, wire, server, queue } => {
                self.link.observe(now, bytes as f64, wire);
                running(&mut self.queue, queue);
                if let Some(c) = self.candidates.iter_mut().find(|c| c.choice == choice) {
                    running(&mut c.bytes, bytes as f64);
                    running(&mut c.encode, encode);
                    running(&mut c.server, server);
                }
                if self.dead.take().is_some() {
                    self.trial_pause = TRIAL;
                    self.trial_requests = TRIAL_REQUESTS;
                    self.trial_at = now + TRIAL;
                }
            }
            Outcome::Late { bytes, waited } => {
                let bytes = bytes as f64;
                self.link.observe(now, bytes, self.link.expected(bytes).max(waited * LATE));
                // a trial that was too much for the link says nothing of smaller payloads
                if self.dead.is_some() || bytes <= TRIAL_BYTES * self.candidates[self.current].bytes {
                    self.died(now);
                }
            }
            Outcome::Broken => self.died(now),
            Outcome::Local(took) => {
                if let Some(c) = self.candidates.iter_mut().find(|c| c.choice == Choice::Local) {
                    running(&mut c.encode, took);
                }
            }
        }
    }

    fn died(&mut self, now: Duration) {
        self.dead.get_or_insert(Dead { retry_at: now, pause: Duration::ZERO });
    }
}
