//! The network's queue, with stand-ins for networks.

use super::*;
use crate::placement::Precision;

struct Echo(Duration);

impl Runner for Echo {
    fn run(&self, _: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError> {
        std::thread::sleep(self.0);
        if inputs.iter().any(|i| i[0] < 0.0) {
            panic!("negative");
        }
        Ok(inputs.iter().map(|i| i.to_vec()).collect())
    }
}

fn everybody() -> Tenant {
    let config = toml::from_str("name = \"test\"").unwrap();
    Tenant::alone(0, &config)
}

fn batcher(takes: u64, max_entries: usize) -> Batcher {
    let limits = Limits { max_batch: 4, max_delay: Duration::ZERO, preferred: vec![], max_entries, max_cost: None, workers: 1 };
    let serving = Serving { limits, costs: vec![(Stage::Pixels, Duration::from_millis(1))], factor: 1.0 };
    let instance = Instance { device: Device::Cpu, threads: 1, precision: Precision::Float };
    let runners = vec![(Echo(Duration::from_millis(takes)), instance)];
    Batcher::start(runners, "test", &serving, &Cores::new(1), &Arc::default()).unwrap()
}

#[test]
fn late_batches_teach_fast_and_stalls_slowly() {
    let after = |late, seen: &[f64]| {
        let mut pace = 1.0;
        seen.iter().for_each(|s| follow(&mut pace, *s, late));
        pace
    };
    assert!((after(false, &[100.0]) - 1.1).abs() < 1e-9, "a stall that hurt nobody");
    assert!(after(true, &[4.0, 4.0, 4.0]) > 3.5, "three late batches");
    assert!(after(true, &[100.0]) < 4.6);
    assert!(after(true, &[4.0, 1.0, 1.0, 1.0]) < 1.2, "forgotten as fast");
}

#[test]
fn what_the_network_cannot_have_done_in_time_is_refused_but_now_and_then() {
    let (batcher, tried, now) = (batcher(0, 8), Mutex::default(), Instant::now());
    let hopeful = |left, later| batcher.hopeful(Duration::from_millis(30), now + later + left, &tried, now + later);
    let (short, long) = (Duration::from_millis(20), Duration::from_millis(40));
    assert!(hopeful(short, Duration::ZERO).is_ok(), "the prediction may be wrong");
    for later in [Duration::ZERO, PROBE / 2] {
        assert!(matches!(hopeful(short, later), Err(ServerError::Hopeless { .. })));
        assert!(hopeful(long, later).is_ok());
    }
    assert!(hopeful(short, PROBE).is_ok(), "and may be wrong later");
    let error = ServerError::Hopeless { takes: long, left: short };
    assert_eq!((error.code(), error.retry_pushback_ms()), (tonic::Code::DeadlineExceeded, 0));
    assert_eq!(error.to_string(), "the network takes about 40 ms, the deadline leaves 20 ms");
}

#[tokio::test]
async fn many_that_come_together_are_begun_only_if_the_last_one_can_be_in_time() {
    let (batcher, minute) = (batcher(500, 100), Duration::from_secs(60));
    let all = |n, left| batcher.would_admit(Stage::Pixels, n, Instant::now() + left, 0, &everybody());
    // a millisecond each
    assert!(all(60_000, minute / 2).is_ok(), "the prediction may be wrong");
    assert!(matches!(all(60_000, minute / 2), Err(ServerError::Hopeless { .. })), "nothing is before them");
    assert!(all(10_000, minute / 2).is_ok());
    let later = Instant::now() + minute;
    let _running = batcher.submit(Stage::Pixels, vec![1.0], later, 0, &everybody()).unwrap();
    let _waiting: Vec<_> = (0..50).map(|_| batcher.submit(Stage::Pixels, vec![1.0], later, 0, &everybody()).unwrap()).collect();
    assert!(matches!(all(9_990, Duration::from_secs(10)), Err(ServerError::Busy { .. })), "others are before them");
    assert!(all(1000, minute / 2).is_ok());
}

#[tokio::test]
async fn a_panicking_batch_is_survived() {
    let (batcher, later) = (batcher(0, 8), Instant::now() + Duration::from_secs(5));
    let bad = batcher.submit(Stage::Pixels, vec![-1.0], later, 0, &everybody()).unwrap().answer(later).await;
    assert!(matches!(bad, Err(ServerError::Network(_))));
    let good = batcher.submit(Stage::Pixels, vec![2.0], later, 0, &everybody()).unwrap().answer(later).await.unwrap();
    assert_eq!(good.logits, [2.0]);
}

#[tokio::test]
async fn what_expires_while_others_have_the_cores_is_not_computed() {
    let limits = Limits { max_batch: 4, max_delay: Duration::ZERO, preferred: vec![], max_entries: 8, max_cost: None, workers: 1 };
    let serving = Serving { limits, costs: vec![(Stage::Pixels, Duration::from_millis(1))], factor: 1.0 };
    let instance = Instance { device: Device::Cpu, threads: 1, precision: Precision::Float };
    let cores = Cores::new(1);
    let statistics = Arc::new(Statistics::default());
    // computing a negative one would panic and be counted
    let batcher = Batcher::start(vec![(Echo(Duration::ZERO), instance)], "test", &serving, &cores, &statistics).unwrap();
    let held = cores.take(1);
    let (soon, later) = (Instant::now() + Duration::from_millis(100), Instant::now() + Duration::from_secs(5));
    let short = batcher.submit(Stage::Pixels, vec![-1.0], soon, 0, &everybody()).unwrap();
    let release = async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        drop(held);
    };
    let (short, ()) = tokio::join!(short.answer(later), release);
    assert!(matches!(short, Err(ServerError::Deadline(_))), "{short:?}");
    assert!(statistics.read().batches.is_empty());
}

#[tokio::test]
async fn the_queue_is_bounded_and_who_leaves_makes_room() {
    let (batcher, later) = (batcher(200, 2), Instant::now() + Duration::from_secs(5));
    let first = batcher.submit(Stage::Pixels, vec![1.0], later, 0, &everybody()).unwrap();
    while !batcher.waiting().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let second = batcher.submit(Stage::Pixels, vec![2.0], later, 0, &everybody()).unwrap();
    let third = batcher.submit(Stage::Pixels, vec![3.0], later, 0, &everybody()).unwrap();
    assert!(matches!(batcher.submit(Stage::Pixels, vec![4.0], later, 0, &everybody()), Err(ServerError::Busy { .. })));
    drop(third);
    let fourth = batcher.submit(Stage::Pixels, vec![4.0], later, 0, &everybody()).unwrap();
    let (a, b, c) = tokio::join!(first.answer(later), second.answer(later), fourth.answer(later));
    assert_eq!((a.unwrap().batch_size, b.unwrap().batch_size), (1, 2));
    assert_eq!(c.unwrap().logits, [4.0]);
}
