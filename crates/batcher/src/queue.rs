//! The decisions, under an injected clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a queue is bounded by, and how long it waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Most entries of a batch.
    pub max_batch: usize,
    /// An incomplete batch is closed when its oldest entry has waited this long; zero: at once.
    pub max_delay: Duration,
    /// Sizes at which a batch is closed before that; none: only the largest.
    pub preferred: Vec<usize>,
    /// Most entries waiting.
    pub max_entries: usize,
    /// Most predicted cost waiting; none: no bound.
    pub max_cost: Option<Duration>,
    /// Workers that run batches at the same time.
    pub workers: usize,
}

/// Something to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry<K, T> {
    /// Entries with equal keys may share a batch.
    pub key: K,
    /// 0 is the most urgent.
    pub priority: u8,
    /// Who asks.
    pub tenant: u32,
    /// The tenant's share among others of the same priority; above 0.
    pub weight: f64,
    /// When the result must be there.
    pub deadline: Instant,
    /// Predicted time of a worker for this entry as a member of a full batch.
    pub cost: Duration,
    /// Predicted time of a worker for this entry by itself: no result is sooner.
    pub alone: Duration,
    /// Whatever the caller needs.
    pub value: T,
}

/// What is known of an entry before it is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Asked {
    /// Who asks.
    pub tenant: u32,
    /// The tenant's share.
    pub weight: f64,
    /// 0 is the most urgent.
    pub priority: u8,
    /// When the result must be there.
    pub deadline: Instant,
    /// Predicted time of a worker for it as a member of a full batch.
    pub cost: Duration,
    /// Predicted time of a worker for it by itself.
    pub alone: Duration,
}

/// Names an entry that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// Why an entry was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refused {
    /// As many entries wait as may.
    Full,
    /// As much predicted cost waits as may.
    Cost,
    /// By prediction it could not be done by its deadline.
    Late,
    /// The queue is closed.
    Closed,
}

/// Why a batch was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Closed {
    /// It has the largest size.
    Full,
    /// It has a preferred size.
    Preferred,
    /// Its oldest entry has waited long enough.
    Delay,
    /// A member would have missed its deadline, waiting or in larger company.
    Deadline,
    /// The queue is closed and runs empty.
    Drain,
}

/// What a worker is to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Next<K, T> {
    /// Entries whose deadline passed; not to be computed.
    pub expired: Vec<T>,
    /// Entries to compute together.
    pub batch: Option<Batch<K, T>>,
    /// Without a batch: when to ask again, if nothing comes before.
    pub ask_again: Option<Instant>,
}

/// Entries to compute together.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch<K, T> {
    /// Their key.
    pub key: K,
    /// The entries' values and when they came, in order.
    pub members: Vec<(T, Instant)>,
    /// Predicted time of the worker.
    pub cost: Duration,
    /// Why it was closed.
    pub closed: Closed,
}

struct Waiting<K, T> {
    ticket: Ticket,
    came: Instant,
    entry: Entry<K, T>,
}

/// A tenant's virtual time, and how many of its entries wait.
#[derive(Default)]
struct Share {
    finish: f64,
    waiting: usize,
}

/// What a queue has to do, by prediction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// What is left of batches that run.
    pub running: Duration,
    /// What waits.
    pub waiting: Duration,
    /// The next batch of it; while there is something to do, as long as those before were at least, for more comes until it is closed.
    pub batch: Duration,
    /// Batches that have to be computed until one with a new entry is done.
    pub batches: u32,
}

/// Entries that wait. Every decision looks at all of them once for each member: queues are short (hundreds), batches take milliseconds.
pub struct Queue<K, T> {
    limits: Limits,
    waiting: Vec<Waiting<K, T>>,
    shares: BTreeMap<u32, Share>,
    /// Virtual time: the start tag of the last entry that was taken.
    now_served: f64,
    next: u64,
    cost: Duration,
    /// Predicted cost of batches that were handed out and are not done.
    running: Vec<(Instant, Duration)>,
    /// Mean predicted cost of the last batches.
    recent: Duration,
    closed: bool,
}

impl<K: Clone + PartialEq, T> Queue<K, T> {
    /// An empty queue. Limits below one count as one; preferred sizes beyond the largest are left out.
    pub fn new(mut limits: Limits) -> Self {
        limits.max_batch = limits.max_batch.max(1);
        limits.max_entries = limits.max_entries.max(1);
        limits.workers = limits.workers.max(1);
        limits.preferred.retain(|p| (1..limits.max_batch).contains(p));
        limits.preferred.sort_unstable();
        Self {
            limits,
            waiting: Vec::new(),
            shares: BTreeMap::new(),
            now_served: 0.0,
            next: 0,
            cost: Duration::ZERO,
            running: Vec::new(),
            recent: Duration::ZERO,
            closed: false,
        }
    }

    /// Entries waiting.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// True if none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Entries waiting, by tenant.
    pub fn waiting(&self) -> BTreeMap<u32, usize> {
        self.shares.iter().filter(|(_, s)| s.waiting > 0).map(|(tenant, s)| (*tenant, s.waiting)).collect()
    }

    /// Predicted cost of what waits.
    pub fn cost(&self) -> Duration {
        self.cost
    }

    /// What there is to do, for others who share something with the workers.
    pub fn load(&self, now: Instant) -> Load {
        let (len, most) = (self.waiting.len() as u32, self.limits.max_batch as u32);
        let next = self.cost / len.max(1) * len.min(most);
        let busy = len > 0 || !self.running.is_empty();
        let batch = if busy { next.max(self.recent) } else { Duration::ZERO };
        Load { running: self.running_at(now), waiting: self.cost, batch, batches: (len + 1).div_ceil(most) }
    }

    /// Predicted time until everything that waits or runs is done, by all workers together.
    pub fn backlog(&self, now: Instant) -> Duration {
        (self.running_at(now) + self.cost) / self.limits.workers as u32
    }

    fn running_at(&self, now: Instant) -> Duration {
        self.running.iter().map(|(since, cost)| cost.saturating_sub(now.saturating_duration_since(*since))).sum()
    }

    /// Takes nothing more; what waits is handed out without delay.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// True if it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Predicted wait of a new entry: what is running, and what will be computed before it, over all workers. That is everything more
    /// urgent, its tenant's own of the same priority, and of other tenants' as much as their shares give them meanwhile.
    pub fn predicted_wait(&self, asked: &Asked, now: Instant) -> Duration {
        let running = self.running_at(now);
        let (mut before, mut own) = (Duration::ZERO, asked.cost);
        let mut others: BTreeMap<u32, (Duration, f64)> = BTreeMap::new();
        for Waiting { entry, .. } in self.waiting.iter().filter(|w| w.entry.priority <= asked.priority) {
            match () {
                () if entry.priority < asked.priority => before += entry.cost,
                () if entry.tenant == asked.tenant => own += entry.cost,
                () => {
                    let other = others.entry(entry.tenant).or_default();
                    *other = (other.0 + entry.cost, entry.weight);
                }
            }
        }
        for (cost, weight) in others.into_values() {
            before += cost.min(own.mul_f64(weight.max(1e-3) / asked.weight.max(1e-3)));
        }
        // a free worker begins at once with the first of them
        (running + before + own - asked.cost) / self.limits.workers as u32
    }

    /// Whether an entry would be taken that has yet to be made, such as one whose payload must be decoded first. `ahead` is the predicted
    /// cost of those that were told so before and have not come, `held_up` the time that workers will have to wait for what they share with others. Where nothing waits or runs every entry is taken, however wrong the
    /// prediction may be. A full queue is full for those of whom something waits: one entry of each other tenant is taken.
    ///
    /// # Errors
    /// Why not.
    pub fn would_take(&self, asked: &Asked, ahead: Duration, held_up: Duration, now: Instant) -> Result<(), Refused> {
        let idle = self.waiting.is_empty() && self.running.is_empty() && ahead.is_zero() && held_up.is_zero();
        let nothing_waits = self.shares.get(&asked.tenant).is_none_or(|s| s.waiting == 0);
        let first = idle || nothing_waits && !self.waiting.is_empty();
        // its batch ends for all of its members at once, and those that come later fill it
        let company = asked.cost * (self.waiting.len() + 1).min(self.limits.max_batch) as u32;
        let wait = self.predicted_wait(asked, now) + ahead / self.limits.workers as u32 + held_up;
        let late = now + wait + asked.alone.max(company) > asked.deadline;
        let too_much = self.limits.max_cost.is_some_and(|most| self.cost + ahead + asked.cost > most);
        match () {
            () if self.closed => Err(Refused::Closed),
            () if self.waiting.len() >= self.limits.max_entries && !first => Err(Refused::Full),
            () if too_much && !first => Err(Refused::Cost),
            () if late && !idle => Err(Refused::Late),
            () => Ok(()),
        }
    }

    /// Takes an entry, as [`Self::would_take`] says.
    ///
    /// # Errors
    /// Why not, with the entry.
    pub fn offer(&mut self, entry: Entry<K, T>, now: Instant) -> Result<Ticket, (Refused, Entry<K, T>)> {
        let Entry { priority, tenant, weight, deadline, cost, alone, .. } = entry;
        let asked = Asked { tenant, weight, priority, deadline, cost, alone };
        if let Err(refused) = self.would_take(&asked, Duration::ZERO, Duration::ZERO, now) {
            return Err((refused, entry));
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.cost += entry.cost;
        let share = self.shares.entry(entry.tenant).or_default();
        if share.waiting == 0 {
            // who was away has no claim on the time that others used
            share.finish = share.finish.max(self.now_served);
        }
        share.waiting += 1;
        self.waiting.push(Waiting { ticket, came: now, entry });
        Ok(ticket)
    }

    /// Takes an entry back; none if it has been handed out.
    pub fn cancel(&mut self, ticket: Ticket) -> Option<T> {
        let at = self.waiting.iter().position(|w| w.ticket == ticket)?;
        Some(self.remove(at).entry.value)
    }

    fn remove(&mut self, at: usize) -> Waiting<K, T> {
        let removed = self.waiting.remove(at);
        self.cost = self.cost.saturating_sub(removed.entry.cost);
        if let Some(share) = self.shares.get_mut(&removed.entry.tenant) {
            share.waiting -= 1;
            if share.waiting == 0 && share.finish <= self.now_served {
                self.shares.remove(&removed.entry.tenant);
            }
        }
        removed
    }

    /// Which of two entries is next: the more urgent, then whose tenant had less of its share, then who came first.
    fn before(&self, a: &Waiting<K, T>, b: &Waiting<K, T>) -> std::cmp::Ordering {
        let finish = |w: &Waiting<K, T>| self.shares.get(&w.entry.tenant).map_or(0.0, |s| s.finish);
        let priority = a.entry.priority.cmp(&b.entry.priority);
        priority.then(finish(a).total_cmp(&finish(b))).then(a.ticket.cmp(&b.ticket))
    }

    /// The entry that is next, of those with this key.
    fn first(&self, key: &K) -> Option<usize> {
        let fitting = self.waiting.iter().enumerate().filter(|(_, w)| w.entry.key == *key);
        fitting.min_by(|(_, a), (_, b)| self.before(a, b)).map(|(at, _)| at)
    }

    /// What a free worker does at this time. Of those keys whose batch is to be closed, the one whose first entry is next: a batch that is complete does
    /// not wait behind one that is not.
    pub fn next(&mut self, now: Instant) -> Next<K, T> {
        let mut expired = Vec::new();
        while let Some(at) = self.waiting.iter().position(|w| w.entry.deadline <= now) {
            expired.push(self.remove(at).entry.value);
        }
        let mut keys = self.keys();
        let of = |key: &K| self.first(key).map(|at| &self.waiting[at]);
        keys.sort_by(|a, b| of(a).zip(of(b)).map_or(std::cmp::Ordering::Equal, |(a, b)| self.before(a, b)));
        let ready = keys.iter().find_map(|key| Some((key, self.ready(key, now).ok()?)));
        let Some((key, (take, closed))) = ready else {
            let due = keys.iter().filter_map(|key| self.ready(key, now).err());
            let ask_again = due.chain(self.waiting.iter().map(|w| w.entry.deadline)).min();
            return Next { expired, batch: None, ask_again };
        };
        let batch = self.hand_out(key, take, closed, now);
        Next { expired, batch: Some(batch), ask_again: None }
    }

    /// True if [`Self::next`] has something to do at this time.
    pub fn is_ready(&self, now: Instant) -> bool {
        self.waiting.iter().any(|w| w.entry.deadline <= now) || self.keys().iter().any(|key| self.ready(key, now).is_ok())
    }

    /// Keys of what waits: a few.
    fn keys(&self) -> Vec<K> {
        let mut keys: Vec<K> = Vec::new();
        for key in self.waiting.iter().map(|w| &w.entry.key) {
            if !keys.contains(key) {
                keys.push(key.clone());
            }
        }
        keys
    }

    /// How many entries with this key are to be taken now, and why, or when that is to be asked again.
    fn ready(&self, key: &K, now: Instant) -> Result<(usize, Closed), Instant> {
        let fitting = || self.waiting.iter().filter(|w| w.entry.key == *key);
        let size = fitting().count().min(self.limits.max_batch);
        // together they take as long as their costs, and none is sooner than by itself
        let together = fitting().take(size).map(|w| w.entry.cost).sum::<Duration>();
        let oldest = fitting().map(|w| w.came).min().unwrap_or(now);
        let latest_start = fitting().map(|w| w.entry.deadline.checked_sub(together.max(w.entry.alone)).unwrap_or(now)).min().unwrap_or(now);
        let preferred = self.limits.preferred.iter().rev().find(|p| **p <= size);
        let due = oldest + self.limits.max_delay;
        match preferred {
            _ if size == self.limits.max_batch => Ok((size, Closed::Full)),
            _ if self.closed => Ok((size, Closed::Drain)),
            _ if due <= now => Ok((size, Closed::Delay)),
            _ if latest_start <= now => Ok((size, Closed::Deadline)),
            Some(preferred) => Ok((*preferred, Closed::Preferred)),
            None => Err(due.min(latest_start)),
        }
    }

    /// Up to `take` entries with this key, those first that are next.
    fn hand_out(&mut self, key: &K, take: usize, closed: Closed, now: Instant) -> Batch<K, T> {
        let mut batch = Batch { key: key.clone(), members: Vec::with_capacity(take), cost: Duration::ZERO, closed };
        // company must not cost a member its deadline
        let mut slack = Duration::MAX;
        while batch.members.len() < take
            && let Some(at) = self.first(key)
        {
            let next = &self.waiting[at].entry;
            if batch.cost + next.cost > slack && !batch.members.is_empty() {
                batch.closed = Closed::Deadline;
                break;
            }
            // who is late even alone is no reason to hurry
            let left = next.deadline.saturating_duration_since(now);
            if next.alone.max(next.cost) <= left {
                slack = slack.min(left);
            }
            let tenant = next.tenant;
            let step = self.waiting[at].entry.cost.as_secs_f64().max(1e-9) / self.waiting[at].entry.weight.max(1e-3);
            if let Some(share) = self.shares.get_mut(&tenant) {
                self.now_served = self.now_served.max(share.finish);
                share.finish += step;
            }
            let taken = self.remove(at);
            batch.cost += taken.entry.cost;
            batch.members.push((taken.entry.value, taken.came));
        }
        self.running.push((now, batch.cost));
        self.recent = (self.recent + batch.cost) / 2;
        batch
    }

    /// A batch that was handed out at `started` with this cost is done.
    pub fn done(&mut self, started: Instant, cost: Duration) {
        if let Some(at) = self.running.iter().position(|r| *r == (started, cost)) {
            self.running.swap_remove(at);
        }
    }
}
