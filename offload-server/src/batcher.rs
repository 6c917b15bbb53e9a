//! Collects what is waiting into batches and runs them on one thread.
//!
//! The network's thread takes the oldest request and whatever else waits for the same stage, up to the
//! largest batch; it never waits for a batch to fill. Requests whose deadline has passed or whose client
//! has gone are dropped before they cost anything. The queue is bounded: when it is full, `submit` fails at
//! once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::ServerError;
use crate::model::{Model, Stage};
use crate::statistics::Statistics;
use crate::telemetry;

/// Runs batches; the seam between queueing and networks.
pub trait Runner: Send + 'static {
    /// Logits of each input.
    ///
    /// # Errors
    /// One error for the whole batch.
    fn run(&self, stage: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError>;
}

impl Runner for Model {
    fn run(&self, stage: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError> {
        Self::run(self, stage, inputs)
    }
}

/// Result of one request.
#[derive(Debug)]
pub struct Computed {
    /// Logits in class order.
    pub logits: Vec<f32>,
    /// Time between submission and the start of its batch.
    pub waited: Duration,
    /// Time of the batch in the network.
    pub network: Duration,
    /// Requests in the batch.
    pub batch_size: usize,
}

struct Item {
    stage: Stage,
    input: Vec<f32>,
    deadline: Instant,
    submitted: Instant,
    answer: oneshot::Sender<Result<Computed, ServerError>>,
}

/// Handle to the network's thread, which finishes what is queued and ends once the handle is gone.
pub struct Batcher {
    queue: SyncSender<Item>,
}

impl Batcher {
    /// Starts the thread. At most `max_queue` requests wait, at most `max_batch` run together.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        runner: impl Runner,
        name: &str,
        max_batch: usize,
        max_queue: usize,
        statistics: Arc<Statistics>,
    ) -> Result<Self, ServerError> {
        let (queue, waiting) = sync_channel(max_queue);
        let thread = std::thread::Builder::new().name(format!("network-{name}"));
        let thread = thread.spawn(move || {
            work(&runner, &waiting, max_batch, &statistics);
            // a model that is unloaded leaves its memory to others
            drop(runner);
            isthmus_nets::process::return_memory();
        });
        thread.map_err(|e| ServerError::Config(e.to_string()))?;
        Ok(Self { queue })
    }

    /// Queues one input; the answer comes through the returned channel.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if the queue is full, [`ServerError::Draining`] if the thread has ended.
    pub fn submit(
        &self,
        stage: Stage,
        input: Vec<f32>,
        deadline: Instant,
    ) -> Result<oneshot::Receiver<Result<Computed, ServerError>>, ServerError> {
        let (answer, receiver) = oneshot::channel();
        let item = Item { stage, input, deadline, submitted: Instant::now(), answer };
        match self.queue.try_send(item) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(ServerError::Busy("network queue full")),
            Err(TrySendError::Disconnected(_)) => Err(ServerError::Draining),
        }
    }
}

fn work(runner: &impl Runner, queue: &Receiver<Item>, max_batch: usize, statistics: &Statistics) {
    let mut waiting: VecDeque<Item> = VecDeque::new();
    loop {
        if waiting.is_empty() {
            match queue.recv() {
                Ok(item) => waiting.push_back(item),
                Err(_) => return,
            }
        }
        // keep at most one batch outside the bounded queue
        while waiting.len() < max_batch {
            match queue.try_recv() {
                Ok(item) => waiting.push_back(item),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        let batch = next_batch(&mut waiting, max_batch, Instant::now());
        if !batch.is_empty() {
            run(runner, batch, statistics);
        }
    }
}

/// Takes the oldest live request and those that can share its batch; answers the expired ones.
fn next_batch(waiting: &mut VecDeque<Item>, max_batch: usize, now: Instant) -> Vec<Item> {
    let mut batch: Vec<Item> = Vec::new();
    let mut rest = VecDeque::new();
    while let Some(item) = waiting.pop_front() {
        if item.answer.is_closed() {
            telemetry::dropped("cancelled");
        } else if item.deadline <= now {
            telemetry::dropped("deadline");
            let _ = item.answer.send(Err(ServerError::Deadline("waiting for the network")));
        } else if batch.len() < max_batch && batch.first().is_none_or(|first| first.stage == item.stage) {
            batch.push(item);
        } else {
            rest.push_back(item);
        }
    }
    *waiting = rest;
    batch
}

fn run(runner: &impl Runner, batch: Vec<Item>, statistics: &Statistics) {
    let start = Instant::now();
    let stage = batch[0].stage;
    let inputs: Vec<&[f32]> = batch.iter().map(|i| i.input.as_slice()).collect();
    // libtorch's bindings panic on internal errors; one bad batch must not end the thread
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runner.run(stage, &inputs)))
        .unwrap_or_else(|_| Err(ServerError::Network("the batch failed inside libtorch".into())));
    let network = start.elapsed();
    let batch_size = batch.len();
    telemetry::batch(stage, batch_size, network);
    statistics.executed(batch_size, network);
    match result {
        Ok(logits) => {
            for (item, logits) in batch.into_iter().zip(logits) {
                let waited = start.duration_since(item.submitted);
                let _ = item.answer.send(Ok(Computed { logits, waited, network, batch_size }));
            }
        }
        Err(error) => {
            tracing::error!(%error, batch_size, "batch failed");
            for item in batch {
                let _ = item.answer.send(Err(ServerError::Network(error.to_string())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Runner for Echo {
        fn run(&self, _: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError> {
            if inputs.iter().any(|i| i[0] < 0.0) {
                panic!("negative");
            }
            Ok(inputs.iter().map(|i| i.to_vec()).collect())
        }
    }

    fn item(stage: Stage, deadline: Instant) -> (Item, oneshot::Receiver<Result<Computed, ServerError>>) {
        let (answer, receiver) = oneshot::channel();
        (Item { stage, input: vec![1.0], deadline, submitted: Instant::now(), answer }, receiver)
    }

    #[test]
    fn batches_share_a_stage_and_skip_the_expired_and_the_gone() {
        let now = Instant::now();
        let later = now + Duration::from_secs(5);
        let (a, _ra) = item(Stage::Pixels, later);
        let (b, _rb) = item(Stage::Latent(0), later);
        let (c, mut rc) = item(Stage::Pixels, now);
        let (d, rd) = item(Stage::Pixels, later);
        drop(rd);
        let (e, _re) = item(Stage::Pixels, later);
        let mut waiting = VecDeque::from([a, b, c, d, e]);
        let batch = next_batch(&mut waiting, 8, now);
        assert_eq!(batch.len(), 2);
        assert!(batch.iter().all(|i| i.stage == Stage::Pixels));
        assert_eq!(waiting.len(), 1, "the other stage waits for its own batch");
        assert!(matches!(rc.try_recv(), Ok(Err(ServerError::Deadline(_)))));
    }

    #[test]
    fn a_full_queue_refuses_and_a_panicking_batch_is_survived() {
        let batcher = Batcher::start(Echo, "test", 4, 1, Arc::default()).unwrap();
        let later = Instant::now() + Duration::from_secs(5);
        let bad = batcher.submit(Stage::Pixels, vec![-1.0], later).unwrap().blocking_recv().unwrap();
        assert!(matches!(bad, Err(ServerError::Network(_))));
        let good = batcher.submit(Stage::Pixels, vec![2.0], later).unwrap().blocking_recv().unwrap().unwrap();
        assert_eq!(good.logits, [2.0]);
    }

    struct Slow;

    impl Runner for Slow {
        fn run(&self, _: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError> {
            std::thread::sleep(Duration::from_millis(200));
            Ok(inputs.iter().map(|i| i.to_vec()).collect())
        }
    }

    #[test]
    fn the_queue_is_bounded() {
        let batcher = Batcher::start(Slow, "test", 1, 2, Arc::default()).unwrap();
        let later = Instant::now() + Duration::from_secs(5);
        let all: Vec<_> = (0..10).map(|_| batcher.submit(Stage::Pixels, vec![1.0], later)).collect();
        let refused = all.iter().filter(|r| matches!(r, Err(ServerError::Busy(_)))).count();
        assert!(refused >= 6, "2 wait, up to 2 are taken, the others are refused: {refused}");
    }
}
