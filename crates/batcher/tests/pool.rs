//! The pool with real threads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use isthmus_batcher::{Batch, Entry, Limits, Pool, Refused, Work};

const LONG: Duration = Duration::from_secs(20);

/// Tells what it ran, and waits for leave to go on.
struct Told {
    ran: Sender<Vec<u32>>,
    warm: bool,
    expired: Sender<u32>,
    leave: Receiver<()>,
}

impl Work<u8, u32> for Told {
    fn warm_up(&mut self) {
        self.warm = true;
    }

    type Turn = ();

    fn turn(&self) {}

    fn run(&mut self, batch: Batch<u8, u32>, (): ()) {
        assert!(self.warm);
        let _ = self.ran.send(batch.members.into_iter().map(|(v, _)| v).collect());
        let _ = self.leave.recv_timeout(LONG);
    }

    fn expired(&mut self, value: u32) {
        let _ = self.expired.send(value);
    }
}

fn entry(value: u32, due: Duration) -> Entry<u8, u32> {
    let cost = Duration::from_millis(1);
    Entry { key: 0, priority: 0, tenant: 0, weight: 1.0, deadline: Instant::now() + due, cost, alone: cost, value }
}

#[test]
fn what_waits_runs_together_the_cancelled_do_not_and_the_rest_is_finished_at_the_end() {
    let limits = Limits { max_batch: 4, max_delay: Duration::ZERO, preferred: vec![], max_entries: 3, max_cost: None, workers: 1 };
    let ((ran, batches), (expired, late), (go, leave)) = (channel(), channel(), channel());
    let pool = Pool::start(limits, "test", [move || Told { ran, warm: false, expired, leave }]).unwrap();
    pool.submit(entry(0, LONG)).unwrap();
    assert_eq!(batches.recv_timeout(LONG).unwrap(), [0]);
    pool.submit(entry(1, LONG)).unwrap();
    let gone = pool.submit(entry(2, LONG)).unwrap();
    pool.submit(entry(3, Duration::from_millis(30))).unwrap();
    assert_eq!(pool.submit(entry(4, LONG)).unwrap_err().0, Refused::Full);
    assert_eq!(pool.cancel(gone), Some(2));
    assert_eq!(pool.cancel(gone), None);
    pool.submit(entry(5, LONG)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    go.send(()).unwrap();
    assert_eq!(late.recv_timeout(LONG).unwrap(), 3);
    assert_eq!(batches.recv_timeout(LONG).unwrap(), [1, 5]);
    pool.submit(entry(6, LONG)).unwrap();
    drop(pool);
    go.send(()).unwrap();
    assert_eq!(batches.recv_timeout(LONG).unwrap(), [6], "what waits is finished");
    go.send(()).unwrap();
    assert!(batches.recv_timeout(LONG).is_err(), "and the worker ends");
}

#[test]
fn several_workers_share_the_queue() {
    let limits = Limits { max_batch: 1, max_delay: Duration::ZERO, preferred: vec![], max_entries: 100, max_cost: None, workers: 1 };
    let (ran, batches) = channel();
    let (expired, _late) = channel();
    let mut leaves = Vec::new();
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let (go, leave) = channel();
            leaves.push(go);
            let (ran, expired) = (ran.clone(), expired.clone());
            move || Told { ran, warm: false, expired, leave }
        })
        .collect();
    let pool = Pool::start(limits, "test", workers).unwrap();
    for i in 0..3 {
        pool.submit(entry(i, LONG)).unwrap();
    }
    let mut seen: Vec<u32> = (0..3).flat_map(|_| batches.recv_timeout(LONG).unwrap()).collect();
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2], "all three at the same time: none was told to go on");
    leaves.iter().for_each(|go| go.send(()).unwrap());
}

/// A worker that fails while it warms up is told at the start, not met by the first request.
#[test]
fn workers_are_warm_before_the_pool_is_there() {
    struct Slow(Arc<AtomicUsize>, bool);
    impl Work<u8, u32> for Slow {
        fn warm_up(&mut self) {
            std::thread::sleep(Duration::from_millis(30));
            assert!(self.1, "cannot warm up");
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        type Turn = ();

        fn turn(&self) {}
        fn run(&mut self, _: Batch<u8, u32>, (): ()) {}
        fn expired(&mut self, _: u32) {}
    }
    let limits = Limits { max_batch: 4, max_delay: Duration::ZERO, preferred: vec![], max_entries: 3, max_cost: None, workers: 3 };
    let warm = Arc::new(AtomicUsize::new(0));
    let workers = |fine: [bool; 3]| fine.map(|fine| (warm.clone(), fine)).map(|(warm, fine)| move || Slow(warm, fine));
    let _pool = Pool::start(limits.clone(), "warm", workers([true; 3])).unwrap();
    assert_eq!(warm.load(Ordering::SeqCst), 3);
    let cold = Pool::start(limits, "cold", workers([true, false, true]));
    assert!(cold.is_err_and(|e| e.to_string().contains("warm")));
}
