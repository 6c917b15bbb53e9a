//! One direction of a link.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::path::Path;
use std::time::Duration;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::codel::Codel;
use crate::config::DirectionConfig;
use crate::error::LinkError;
use crate::jitter;
use crate::loss::Loss;
use crate::rate::Serialiser;

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drop {
    /// Lost on the way.
    Loss,
    /// The queue was full.
    Queue,
}

/// What happened so far. Every offered packet is delivered, dropped, or still under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Packets offered.
    pub offered: u64,
    /// Packets delivered.
    pub delivered: u64,
    /// Bytes delivered, without overhead.
    pub delivered_bytes: u64,
    /// Packets lost.
    pub lost: u64,
    /// Packets dropped by the full queue.
    pub tail_dropped: u64,
    /// Packets dropped by CoDel.
    pub codel_dropped: u64,
    /// Longest wait between arrival and the end of sending.
    pub longest_queueing: Duration,
}

struct Waiting<T> {
    packet: T,
    bytes: u64,
    offered: Duration,
}

struct Sending<T> {
    waiting: Waiting<T>,
    /// `None`: never, the rate stays zero.
    done: Option<Duration>,
}

struct Flying<T> {
    arrival: Duration,
    order: u64,
    packet: T,
    bytes: u64,
}

impl<T> Flying<T> {
    fn key(&self) -> (Duration, u64) {
        (self.arrival, self.order)
    }
}

impl<T> PartialEq for Flying<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Flying<T> {}

impl<T> PartialOrd for Flying<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Flying<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// A direction that carries packets of type `T`. Time must not run backwards between calls.
pub struct Direction<T> {
    config: DirectionConfig,
    rng: ChaCha8Rng,
    loss: Loss,
    serialiser: Serialiser,
    codel: Option<Codel>,
    queue: VecDeque<Waiting<T>>,
    queued_bytes: u64,
    sending: Option<Sending<T>>,
    flying: BinaryHeap<Reverse<Flying<T>>>,
    /// The serialiser is free from then on.
    free: Duration,
    /// Latest arrival, which later packets may not precede unless they may overtake.
    last_arrival: Duration,
    order: u64,
    stats: Stats,
}

impl<T> Direction<T> {
    /// A direction in which nothing has been sent yet. Trace files are looked for in `folder`.
    ///
    /// # Errors
    /// If the description is wrong.
    pub fn new(config: &DirectionConfig, folder: &Path, seed: u64) -> Result<Self, LinkError> {
        config.check(folder)?;
        Ok(Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            loss: Loss::new(config.loss),
            serialiser: config.serialiser(folder)?,
            codel: config.queue.as_ref().filter(|q| q.codel).map(|_| Codel::default()),
            config: config.clone(),
            queue: VecDeque::new(),
            queued_bytes: 0,
            sending: None,
            flying: BinaryHeap::new(),
            free: Duration::ZERO,
            last_arrival: Duration::ZERO,
            order: 0,
            stats: Stats::default(),
        })
    }

    /// Takes a packet of `bytes` at `now`.
    ///
    /// # Errors
    /// Why it was dropped at once, with the packet.
    pub fn offer(&mut self, now: Duration, packet: T, bytes: u32) -> Result<(), (Drop, T)> {
        self.advance(now);
        self.stats.offered += 1;
        if self.loss.next(&mut self.rng) {
            self.stats.lost += 1;
            return Err((Drop::Loss, packet));
        }
        let bytes = u64::from(bytes) + u64::from(self.config.overhead);
        let packets = self.queue.len() + usize::from(self.sending.is_some());
        let full = self.config.queue.as_ref().is_some_and(|q| {
            q.bytes.is_some_and(|limit| self.queued_bytes + bytes > limit) || q.packets.is_some_and(|limit| packets >= limit)
        });
        if full {
            self.stats.tail_dropped += 1;
            return Err((Drop::Queue, packet));
        }
        self.queued_bytes += bytes;
        self.queue.push_back(Waiting { packet, bytes, offered: now });
        self.advance(now);
        Ok(())
    }

    /// Starts and ends sendings up to `now`.
    fn advance(&mut self, now: Duration) {
        loop {
            if let Some(sending) = self.sending.take_if(|s| s.done.is_some_and(|d| d <= now)) {
                self.sent(sending);
            }
            if self.sending.is_some() {
                return;
            }
            let Some(waiting) = self.queue.pop_front() else { return };
            let start = waiting.offered.max(self.free);
            let waited = start - waiting.offered;
            let behind = self.queued_bytes - waiting.bytes;
            if self.codel.as_mut().is_some_and(|c| c.drops(start, waited, behind)) {
                self.queued_bytes = behind;
                self.stats.codel_dropped += 1;
                continue;
            }
            let done = self.serialiser.send(start, waiting.bytes);
            self.sending = Some(Sending { waiting, done });
        }
    }

    fn sent(&mut self, sending: Sending<T>) {
        let Sending { waiting, done } = sending;
        let Some(done) = done else { return };
        self.free = done;
        self.queued_bytes -= waiting.bytes;
        self.stats.longest_queueing = self.stats.longest_queueing.max(done - waiting.offered);
        let jitter = self.config.jitter.as_ref();
        let mut arrival = done + jitter::delay(&mut self.rng, self.config.delay, jitter);
        if !jitter.is_some_and(|j| j.reorder) {
            arrival = arrival.max(self.last_arrival);
            self.last_arrival = arrival;
        }
        self.order += 1;
        self.flying.push(Reverse(Flying { arrival, order: self.order, packet: waiting.packet, bytes: waiting.bytes }));
    }

    /// The packets that have arrived by `now`, with the time at which they should have, in that order.
    pub fn poll(&mut self, now: Duration) -> Vec<(Duration, T)> {
        self.advance(now);
        let mut arrived = Vec::new();
        while self.flying.peek().is_some_and(|Reverse(f)| f.arrival <= now) {
            let Some(Reverse(flying)) = self.flying.pop() else { break };
            self.stats.delivered += 1;
            self.stats.delivered_bytes += flying.bytes - u64::from(self.config.overhead);
            arrived.push((flying.arrival, flying.packet));
        }
        arrived
    }

    /// When [`Direction::poll`] is next worth calling; `None` if nothing is under way (or will never arrive).
    pub fn next_deadline(&self) -> Option<Duration> {
        let sent = self.sending.as_ref().and_then(|s| s.done);
        let arrival = self.flying.peek().map(|Reverse(f)| f.arrival);
        [sent, arrival].into_iter().flatten().min()
    }

    /// Packets taken and neither delivered nor dropped.
    pub fn under_way(&self) -> usize {
        self.queue.len() + usize::from(self.sending.is_some()) + self.flying.len()
    }

    /// Bytes that wait or are being sent, with overhead.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }
}
