//! The queue in virtual time: against a model, under overload, between tenants.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use isthmus_batcher::{Closed, Entry, Limits, Load, Next, Queue, Refused, Ticket};
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);

fn limits(max_batch: usize) -> Limits {
    Limits { max_batch, max_delay: Duration::ZERO, preferred: vec![], max_entries: 1000, max_cost: None, workers: 1 }
}

fn entry<T>(value: T, now: Instant) -> Entry<u8, T> {
    Entry { key: 0, priority: 0, tenant: 0, weight: 1.0, deadline: now + 10_000 * MS, cost: MS, alone: MS, value }
}

fn batch<T>(next: Next<u8, T>) -> (Vec<T>, Closed) {
    let batch = next.batch.expect("a batch");
    (batch.members.into_iter().map(|(v, _)| v).collect(), batch.closed)
}

#[derive(Debug, Clone)]
enum Step {
    Offer { key: u8, priority: u8, tenant: u32, due_ms: u64, cost_ms: u64 },
    Cancel(usize),
    Next,
    Done,
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0..3u8, 0..3u8, 0..4u32, 1..400u64, 1..20u64)
            .prop_map(|(key, priority, tenant, due_ms, cost_ms)| Step::Offer { key, priority, tenant, due_ms, cost_ms }),
        1 => (0..64usize).prop_map(Step::Cancel),
        3 => Just(Step::Next),
        2 => Just(Step::Done),
        3 => (0..60u64).prop_map(Step::Pass),
    ];
    proptest::collection::vec(step, 1..200)
}

/// What the model knows of an entry that waits.
#[derive(Debug, Clone)]
struct Known {
    /// None before it is taken.
    ticket: Option<Ticket>,
    key: u8,
    tenant: u32,
    priority: u8,
    came: Instant,
    deadline: Instant,
    cost: Duration,
}

/// Weight of a tenant in the model.
fn weight(tenant: u32) -> f64 {
    1.0 + f64::from(tenant)
}

/// What must become of a new entry (ticket and time of coming aside), from a plain list of those that wait.
fn verdict(new: &Known, now: Instant, waiting: &[Known], running: &[(Instant, Duration)], limits: &Limits) -> Result<(), Refused> {
    let idle = waiting.is_empty() && running.is_empty();
    let first = idle || !waiting.is_empty() && waiting.iter().all(|k| k.tenant != new.tenant);
    if waiting.len() >= limits.max_entries && !first {
        return Err(Refused::Full);
    }
    let all: Duration = waiting.iter().map(|k| k.cost).sum();
    if limits.max_cost.is_some_and(|most| all + new.cost > most) && !first {
        return Err(Refused::Cost);
    }
    let of = |wanted: &dyn Fn(&Known) -> bool| waiting.iter().filter(|k| wanted(k)).map(|k| k.cost).sum::<Duration>();
    let urgent = of(&|k| k.priority < new.priority);
    let equal = |tenant: u32| of(&|k| k.priority == new.priority && k.tenant == tenant);
    let own = equal(new.tenant) + new.cost;
    // while this tenant has its turn, others have theirs, as often as their weights say
    let others: f64 =
        (0..4).filter(|t| *t != new.tenant).map(|t| equal(t).as_secs_f64().min(own.as_secs_f64() * weight(t) / weight(new.tenant))).sum();
    let at_work: Duration = running.iter().map(|(since, cost)| cost.saturating_sub(now - *since)).sum();
    let wait = ((at_work + urgent + own - new.cost).as_secs_f64() + others) / limits.workers as f64;
    let company = new.cost * (waiting.len() + 1).min(limits.max_batch) as u32;
    let left = (new.deadline - now).as_secs_f64() - company.as_secs_f64();
    if !idle && wait > left + 1e-6 { Err(Refused::Late) } else { Ok(()) }
}

/// Place in line: priority, its tenant's virtual time, when it came.
fn order((name, k): &(&u64, &Known), finish: &BTreeMap<u32, f64>) -> Place {
    Place(k.priority, finish.get(&k.tenant).copied().unwrap_or(0.0), **name)
}

struct Place(u8, f64, u64);

impl Place {
    fn total_cmp(&self, other: &Self) -> Ordering {
        self.0.cmp(&other.0).then(self.1.total_cmp(&other.1)).then(self.2.cmp(&other.2))
    }
}

proptest! {
    #[test]
    fn every_step_is_what_a_plain_list_allows(
        steps in steps(),
        max_batch in 1..6usize,
        delay_ms in 0..50u64,
        preferred in proptest::collection::vec(1..6usize, 0..3),
        max_entries in 1..20usize,
        max_cost_ms in proptest::option::of(10..200u64),
        workers in 1..3usize,
    ) {
        let limits = Limits {
            max_batch,
            max_delay: delay_ms as u32 * MS,
            preferred: preferred.clone(),
            max_entries,
            max_cost: max_cost_ms.map(|ms| ms as u32 * MS),
            workers,
        };
        let mut queue: Queue<u8, u64> = Queue::new(limits.clone());
        let mut model: BTreeMap<u64, Known> = BTreeMap::new();
        let mut running: VecDeque<(Instant, Duration)> = VecDeque::new();
        let (mut now, mut names) = (Instant::now(), 0u64);
        // start-time fair queueing: virtual time, and that at which each tenant's next entry begins
        let (mut served, mut finish) = (0f64, BTreeMap::<u32, f64>::new());
        for step in steps {
            match step {
                Step::Pass(ms) => now += ms as u32 * MS,
                Step::Offer { key, priority, tenant, due_ms, cost_ms } => {
                    let cost = cost_ms as u32 * MS;
                    let deadline = now + due_ms as u32 * MS;
                    let offered = Entry { key, priority, tenant, weight: weight(tenant), deadline, cost, alone: cost, value: names };
                    let known = |ticket| Known { ticket, key, tenant, priority, came: now, deadline, cost };
                    let waiting: Vec<Known> = model.values().cloned().collect();
                    let made = queue.offer(offered, now);
                    let expected = verdict(&known(None), now, &waiting, running.make_contiguous(), &limits);
                    prop_assert_eq!(made.as_ref().map(|_| ()).map_err(|(why, _)| *why), expected);
                    match made {
                        Ok(ticket) => {
                            let own = finish.entry(tenant).or_default();
                            if waiting.iter().all(|k| k.tenant != tenant) {
                                *own = own.max(served);
                            }
                            model.insert(names, known(Some(ticket)));
                        }
                        Err((_, back)) => prop_assert_eq!(back.value, names, "what is refused is given back"),
                    }
                    names += 1;
                }
                Step::Cancel(i) => {
                    let chosen = model.iter().nth(i).map(|(name, k)| (*name, k.ticket));
                    if let Some((name, Some(ticket))) = chosen {
                        prop_assert_eq!(queue.cancel(ticket), Some(name));
                        prop_assert_eq!(queue.cancel(ticket), None);
                        model.remove(&name);
                    }
                }
                Step::Done => if let Some((started, cost)) = running.pop_front() { queue.done(started, cost) },
                Step::Next => {
                    let ready = queue.is_ready(now);
                    let next = queue.next(now);
                    prop_assert_eq!(ready, next.batch.is_some() || !next.expired.is_empty());
                    for name in &next.expired {
                        prop_assert!(model.remove(name).unwrap().deadline <= now, "only what is over is given back");
                    }
                    prop_assert!(model.values().all(|k| k.deadline > now), "nothing that is over stays");
                    // a batch of this key is to be closed: it is complete, or a member must wait no longer
                    let ripe = |key: u8| {
                        let group: Vec<&Known> = model.values().filter(|k| k.key == key).collect();
                        let size = group.len().min(max_batch);
                        let together: Duration = group[..size].iter().map(|k| k.cost).sum();
                        size == max_batch
                            || preferred.iter().any(|p| (1..max_batch).contains(p) && *p <= size)
                            || group.iter().any(|k| k.came + limits.max_delay <= now || k.deadline <= now + together.max(k.cost))
                    };
                    let ripe: Vec<u8> = (0..=u8::MAX).filter(|key| model.values().any(|k| k.key == *key) && ripe(*key)).collect();
                    match next.batch {
                        None => {
                            prop_assert_eq!(next.ask_again.is_none(), model.is_empty());
                            if let Some(at) = next.ask_again {
                                // whoever sleeps until then finds something to do
                                prop_assert!(at > now);
                                prop_assert!(ripe.is_empty(), "a batch of {ripe:?} waits beside an idle worker");
                            }
                        }
                        Some(batch) => {
                            let mut left = model.clone();
                            for (i, (name, _)) in batch.members.iter().enumerate() {
                                // the first of all whose batch is to be closed, then the first of those that may go with it
                                let fits = left.iter().filter(|(_, k)| if i == 0 { ripe.contains(&k.key) } else { k.key == batch.key });
                                let first = *fits.min_by(|a, b| order(a, &finish).total_cmp(&order(b, &finish))).unwrap().0;
                                prop_assert_eq!(*name, first, "by priority, then shares, then as they came");
                                let taken = left.remove(name).unwrap();
                                let own = finish.entry(taken.tenant).or_default();
                                served = served.max(*own);
                                *own += taken.cost.as_secs_f64().max(1e-9) / weight(taken.tenant);
                            }
                            let members: Vec<Known> = batch.members.iter().map(|(name, _)| model.remove(name).unwrap()).collect();
                            prop_assert!((1..=max_batch).contains(&members.len()));
                            prop_assert!(members.iter().all(|k| k.key == batch.key));
                            prop_assert_eq!(batch.cost, members.iter().map(|k| k.cost).sum::<Duration>());
                            prop_assert!(members.windows(2).all(|w| w[0].priority <= w[1].priority), "by priority");
                            let left = |keys: &[u8]| model.values().filter(|k| keys.contains(&k.key)).map(|k| k.priority).min();
                            prop_assert!(left(&ripe).is_none_or(|p| p >= members[0].priority), "the most urgent goes first");
                            prop_assert!(left(&[batch.key]).is_none_or(|p| p >= members.last().unwrap().priority));
                            let same: Vec<&Known> = members.iter().chain(model.values().filter(|k| k.key == batch.key)).collect();
                            let oldest = same.iter().map(|k| k.came).min().unwrap();
                            match batch.closed {
                                Closed::Full => prop_assert_eq!(members.len(), max_batch),
                                Closed::Preferred => prop_assert!(preferred.contains(&members.len())),
                                Closed::Delay => prop_assert!(oldest + limits.max_delay <= now),
                                Closed::Deadline => {
                                    let all: Duration = same.iter().map(|k| k.cost).sum();
                                    prop_assert!(same.iter().any(|k| k.deadline <= now + all));
                                }
                                Closed::Drain => prop_assert!(false, "it is open"),
                            }
                            running.push_back((now, batch.cost));
                        }
                    }
                }
            }
            prop_assert_eq!(queue.len(), model.len());
            prop_assert_eq!(queue.cost(), model.values().map(|k| k.cost).sum::<Duration>());
        }
        // closed, it runs empty without waiting and takes nothing
        queue.close();
        prop_assert_eq!(queue.offer(entry(u64::MAX, now), now).unwrap_err().0, Refused::Closed);
        while !queue.is_empty() {
            let next = queue.next(now);
            prop_assert!(next.batch.is_some() || !next.expired.is_empty());
            for name in next.expired.into_iter().chain(next.batch.into_iter().flat_map(|b| b.members).map(|(name, _)| name)) {
                prop_assert!(model.remove(&name).is_some());
            }
        }
        prop_assert!(model.is_empty(), "every entry came out exactly once");
    }

    /// Sleeping until the time that the queue names finds something to do: no wake-up is lost.
    #[test]
    fn the_time_to_ask_again_is_right(offers in proptest::collection::vec((0..3u8, 5..300u64, 1..10u64), 1..12), delay_ms in 1..100u64) {
        let mut queue = Queue::new(Limits { max_delay: delay_ms as u32 * MS, ..limits(16) });
        let mut now = Instant::now();
        for (key, due_ms, cost_ms) in offers {
            let cost = cost_ms as u32 * MS;
            let _ = queue.offer(Entry { key, deadline: now + due_ms as u32 * MS, cost, alone: cost, ..entry(0, now) }, now);
        }
        while !queue.is_empty() {
            let next = queue.next(now);
            if next.batch.is_none() && next.expired.is_empty() {
                now = next.ask_again.unwrap();
                let woken = queue.next(now);
                prop_assert!(woken.batch.is_some() || !woken.expired.is_empty());
            }
        }
    }
}

#[test]
fn the_load_is_what_runs_what_waits_and_the_next_batch() {
    let now = Instant::now();
    let mut queue = Queue::new(limits(4));
    assert_eq!(queue.load(now), Load { batches: 1, ..Load::default() });
    for i in 0..10 {
        queue.offer(entry(i, now), now).unwrap();
    }
    assert_eq!(queue.load(now), Load { running: Duration::ZERO, waiting: 10 * MS, batch: 4 * MS, batches: 3 });
    assert_eq!(batch(queue.next(now)).0.len(), 4);
    assert_eq!(queue.load(now + MS), Load { running: 3 * MS, waiting: 6 * MS, batch: 4 * MS, batches: 2 });
    // while there is something to do, the next batch is expected to be like the last ones: a half of the first, so far
    for _ in 0..2 {
        let cost = queue.next(now).batch.map_or(Duration::ZERO, |b| b.cost);
        queue.done(now, cost);
    }
    queue.offer(entry(10, now), now).unwrap();
    assert_eq!(queue.load(now + 4 * MS), Load { running: Duration::ZERO, waiting: MS, batch: 5 * MS / 2, batches: 1 });
}

/// A batch that is complete does not wait, let alone expire, behind one of another key that is not.
#[test]
fn an_incomplete_batch_holds_up_no_complete_one() {
    let start = Instant::now();
    let mut queue = Queue::new(Limits { max_delay: 100 * MS, ..limits(8) });
    queue.offer(Entry { key: 1, deadline: start + 1000 * MS, ..entry(0, start) }, start).unwrap();
    for i in 1..=8 {
        queue.offer(Entry { key: 2, deadline: start + 60 * MS, ..entry(i, start) }, start + MS).unwrap();
    }
    assert_eq!(batch(queue.next(start + MS)), ((1..=8).collect(), Closed::Full));
    assert_eq!(queue.next(start + MS).ask_again, Some(start + 100 * MS));
    // one of the other key has to begin before the first is due
    queue.offer(Entry { key: 2, deadline: start + 60 * MS, ..entry(9, start) }, start + 10 * MS).unwrap();
    let again = queue.next(start + 10 * MS).ask_again.unwrap();
    assert_eq!(batch(queue.next(again)), (vec![9], Closed::Deadline));
    assert_eq!(batch(queue.next(start + 100 * MS)), (vec![0], Closed::Delay));
}

#[test]
fn preferred_sizes_delay_and_deadlines_close_batches() {
    let start = Instant::now();
    let mut queue = Queue::new(Limits { max_delay: 20 * MS, preferred: vec![4], ..limits(8) });
    for i in 0..3 {
        queue.offer(entry(i, start), start).unwrap();
    }
    let waiting = queue.next(start);
    assert!(waiting.batch.is_none());
    assert_eq!(waiting.ask_again, Some(start + 20 * MS));
    queue.offer(entry(3, start), start + MS).unwrap();
    assert_eq!(batch(queue.next(start + MS)), (vec![0, 1, 2, 3], Closed::Preferred));
    queue.done(start + MS, 4 * MS);
    queue.offer(entry(4, start), start + 2 * MS).unwrap();
    assert_eq!(batch(queue.next(start + 22 * MS)), (vec![4], Closed::Delay));
    queue.done(start + 22 * MS, MS);
    for i in 5..14 {
        queue.offer(entry(i, start), start + 30 * MS).unwrap();
    }
    assert_eq!(batch(queue.next(start + 30 * MS)), ((5..13).collect(), Closed::Full));
    queue.done(start + 30 * MS, 8 * MS);
    let hasty = Entry { deadline: start + 36 * MS, ..entry(14, start) };
    queue.offer(hasty, start + 31 * MS).unwrap();
    assert_eq!(queue.next(start + 31 * MS).ask_again, Some(start + 34 * MS), "two members take 2 ms");
    assert_eq!(batch(queue.next(start + 34 * MS)), (vec![13, 14], Closed::Deadline));
}

/// A tenant with nothing waiting is let in however full the queue is of another's, and by when it would really be computed.
#[test]
fn a_flood_does_not_shut_others_out() {
    let now = Instant::now();
    let soon = |value| Entry { tenant: 2, weight: 9.0, deadline: now + 20 * MS, ..entry(value, now) };
    let mut queue = Queue::new(Limits { max_entries: 100, max_cost: Some(100 * MS), ..limits(1) });
    for _ in 0..100 {
        queue.offer(Entry { tenant: 1, ..entry(1, now) }, now).unwrap();
    }
    assert_eq!(queue.offer(Entry { tenant: 1, ..entry(1, now) }, now).unwrap_err().0, Refused::Full);
    // first come, first served, it would wait for 100 ms
    queue.offer(soon(2), now).unwrap();
    assert_eq!(queue.offer(soon(2), now).unwrap_err().0, Refused::Full, "one each beyond the bound");
    let order: Vec<i32> = (0..3).map(|_| batch(queue.next(now)).0[0]).collect();
    assert!(order.contains(&2), "{order:?}");
}

#[test]
fn tenants_get_their_shares_and_nobody_starves() {
    let now = Instant::now();
    let mut queue = Queue::new(limits(4));
    for _ in 0..200 {
        queue.offer(Entry { tenant: 1, priority: 1, weight: 1.0, ..entry(1, now) }, now).unwrap();
        queue.offer(Entry { tenant: 2, priority: 1, weight: 3.0, ..entry(2, now) }, now).unwrap();
    }
    let mut served = [0; 4];
    for _ in 0..40 {
        batch(queue.next(now)).0.into_iter().for_each(|t: usize| served[t] += 1);
    }
    assert!((35..=45).contains(&served[1]) && served[1] + served[2] == 160, "a quarter and three quarters: {served:?}");
    // somebody new is in the next batch, however long the others' queues are
    queue.offer(Entry { tenant: 3, priority: 1, ..entry(3, now) }, now).unwrap();
    assert!(batch(queue.next(now)).0.contains(&3));
    // an urgent one goes before everybody
    queue.offer(Entry { tenant: 1, priority: 0, ..entry(9, now) }, now).unwrap();
    assert_eq!(batch(queue.next(now)).0[0], 9);
    let mut urgent = Queue::new(limits(1));
    urgent.offer(Entry { priority: 2, ..entry(1, now) }, now).unwrap();
    urgent.offer(Entry { priority: 1, ..entry(2, now) }, now).unwrap();
    assert_eq!(batch(urgent.next(now)).0, [2]);
}

/// A tenant that floods the queue takes nothing from one that asks now and then, and one that was away saves nothing up.
#[test]
fn absence_earns_no_claim() {
    let now = Instant::now();
    let mut queue = Queue::new(limits(1));
    for _ in 0..50 {
        queue.offer(Entry { tenant: 1, ..entry(1, now) }, now).unwrap();
    }
    for _ in 0..30 {
        batch(queue.next(now));
    }
    for _ in 0..20 {
        queue.offer(Entry { tenant: 2, ..entry(2, now) }, now).unwrap();
    }
    let order: Vec<u32> = (0..10).map(|_| batch(queue.next(now)).0[0]).collect();
    let second = order.iter().filter(|t| **t == 2).count();
    assert!((4..=6).contains(&second), "half each from now on: {order:?}");
}

#[test]
fn the_backlog_is_what_waits_and_what_is_left_of_what_runs() {
    let now = Instant::now();
    let mut queue = Queue::new(Limits { workers: 2, ..limits(2) });
    assert_eq!(queue.backlog(now), Duration::ZERO);
    for value in 0..6 {
        queue.offer(Entry { cost: 10 * MS, ..entry(value, now) }, now).unwrap();
    }
    assert_eq!(queue.backlog(now), 30 * MS, "six of 10 ms, two at a time");
    batch(queue.next(now));
    assert_eq!(queue.backlog(now + 5 * MS), (40 + 15) * MS / 2);
    queue.done(now, 20 * MS);
    assert_eq!(queue.backlog(now + 5 * MS), 20 * MS);
}

/// Answers in time per second when `rate` a second are offered to one worker that takes what was predicted, in virtual time.
fn goodput(rate: f64, deadline: Duration) -> (f64, f64) {
    let (alone, each) = (12 * MS, 8 * MS);
    let mut queue: Queue<u8, Instant> = Queue::new(Limits { max_entries: 256, ..limits(16) });
    let start = Instant::now();
    let (mut now, mut arrived, mut busy) = (start, 0u64, None::<(Instant, Instant, Vec<Instant>, Duration)>);
    let (mut good, mut late) = (0u64, 0u64);
    let length = Duration::from_secs(20);
    while now < start + length {
        let arrival = start + Duration::from_secs_f64(arrived as f64 / rate);
        match &busy {
            Some((ends, ..)) if *ends <= arrival => {
                let (ends, began, due, cost) = busy.take().unwrap();
                now = ends;
                queue.done(began, cost);
                good += due.iter().filter(|d| **d >= now).count() as u64;
                late += due.iter().filter(|d| **d < now).count() as u64;
            }
            _ => {
                now = arrival;
                arrived += 1;
                let due = now + deadline;
                let _ = queue.offer(Entry { deadline: due, cost: each, alone, ..entry(due, now) }, now);
            }
        }
        if busy.is_none()
            && let Some(batch) = queue.next(now).batch
        {
            let takes = (each * batch.members.len() as u32).max(alone);
            busy = Some((now + takes, now, batch.members.into_iter().map(|(due, _)| due).collect(), batch.cost));
        }
    }
    (good as f64 / length.as_secs_f64(), late as f64 / (good + late).max(1) as f64)
}

#[test]
fn ten_times_the_load_leaves_goodput_where_it_was() {
    for deadline in [100, 250, 1000] {
        let peak = [40.0, 80.0, 110.0, 125.0, 150.0].map(|r| goodput(r, deadline * MS).0).into_iter().fold(0.0, f64::max);
        let (flooded, late) = goodput(1250.0, deadline * MS);
        println!("{deadline} ms: {flooded}/s, late {late}, peak {peak}");
        assert!(flooded >= 0.9 * peak, "{deadline} ms: {flooded}/s of at best {peak}/s");
        assert!(late <= 0.01, "{deadline} ms: {late} of the admitted were late");
    }
}
