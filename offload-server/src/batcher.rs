//! The network's queue: [`isthmus_batcher`] with libtorch behind it.
//!
//! What waits together and enters at the same stage runs together. How long an entry takes is predicted from how long the last ones took.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use isthmus_batcher::{Asked, Batch, Closed, Entry, Limits, Load, Pool, Refused, Ticket, Work};
use tch::Device;
use tokio::sync::oneshot;

use crate::ServerError;
use crate::admission::{Admission, Admitted};
use crate::model::{Model, Stage};
use crate::placement::{Backlog, Cores, Held, Instance};
use crate::statistics::Statistics;
use crate::telemetry;
use crate::tenants::Tenant;

/// Weight of the last batch in the predicted time of an entry, if it was slower, and if it was faster than predicted: one stall must not
/// make the next hundred requests look hopeless. A batch that was too late for its members weighs more: what is let in by a prediction
/// that is too short is computed in vain.
const SLOWER: f64 = 0.1;
const FASTER: f64 = 0.5;
const LATE: f64 = 0.5;
/// A batch counts as at most so many times as slow as predicted; one that was too late may count for more.
const STALL: f64 = 2.0;
const STALL_LATE: f64 = 8.0;
/// Batches of other models that a busy one expects beyond its turns: what it lets in waits while theirs fill (decision 0019).
const MORE: u32 = 2;
/// One hopeless request in this time is let in.
const PROBE: Duration = Duration::from_millis(250);
/// Share of a request's time that is left over by prediction.
const MARGIN: f64 = 0.05;
/// Bounds of when those that were refused may come again.
const SOONEST: Duration = Duration::from_millis(10);
const LATEST: Duration = Duration::from_secs(5);

/// Runs batches; the seam between queueing and networks.
pub trait Runner: Send + 'static {
    /// Runs on the thread that will compute, before the first batch: kernels are chosen and memory is taken for batches of up to `largest`.
    fn warm_up(&self, _largest: usize) {}

    /// Logits of each input.
    ///
    /// # Errors
    /// One error for the whole batch.
    fn run(&self, stage: Stage, inputs: &[&[f32]]) -> Result<Vec<Vec<f32>>, ServerError>;
}

impl Runner for Model {
    fn warm_up(&self, largest: usize) {
        Self::warm_up(self, largest);
    }

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

type Answer = oneshot::Sender<Result<Computed, ServerError>>;

struct Item {
    input: Vec<f32>,
    answer: Answer,
    came: Instant,
    deadline: Instant,
}

/// An item that waited in vain.
fn gone(model: &'static str, item: &Item) {
    telemetry::dropped("deadline");
    telemetry::queued(model, item.came.elapsed());
}

/// How much longer than the roofline's time an entry takes: by itself, and as a member of the batches of late. The roofline knows the
/// stages apart; what the kernels reach of it is learned.
struct Pace {
    alone: f64,
    each: f64,
}

/// How the network's queue is served.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Bounds and delays of the queue.
    pub limits: Limits,
    /// The roofline's time of an entry at each stage.
    pub costs: Vec<(Stage, Duration)>,
    /// How many times as long an entry took by itself.
    pub factor: f64,
}

/// An entry that waits or runs; leaves the queue if dropped before.
pub struct Pending<'a> {
    batcher: &'a Batcher,
    ticket: Ticket,
    answer: oneshot::Receiver<Result<Computed, ServerError>>,
}

impl Pending<'_> {
    /// The result.
    ///
    /// # Errors
    /// [`ServerError::Deadline`] if it does not come in time, or what the network says.
    pub async fn answer(mut self, deadline: Instant) -> Result<Computed, ServerError> {
        if let Ok(answer) = tokio::time::timeout_at(deadline.into(), &mut self.answer).await {
            return answer.map_err(|_| ServerError::Draining)?;
        }
        if let Some(item) = self.batcher.pool.cancel(self.ticket) {
            telemetry::waiting(self.batcher.name, -1.0);
            gone(self.batcher.name, &item);
        } else {
            telemetry::dropped("late");
        }
        Err(ServerError::Deadline("waiting for the network or in it"))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.batcher.pool.cancel(self.ticket).is_some() {
            telemetry::dropped("cancelled");
            telemetry::waiting(self.batcher.name, -1.0);
        }
    }
}

/// Handle to the network's threads, which finish what is queued and end once the handle is gone.
pub struct Batcher {
    name: &'static str,
    pool: Arc<Pool<Stage, Item>>,
    /// Who shares the cores; none if no copy is on the CPU.
    cores: Option<Shared>,
    admission: Admission,
    pace: Arc<Mutex<Pace>>,
    costs: Arc<Vec<(Stage, Duration)>>,
    /// When one was let in last that would be late by prediction.
    tried: Mutex<Option<Instant>>,
    /// The same of many that came together.
    tried_many: Mutex<Option<Instant>>,
    /// Copies of the network.
    workers: usize,
}

/// The cores, and the pool as others see it there.
struct Shared {
    cores: Arc<Cores>,
    own: Arc<dyn Backlog>,
}

impl Backlog for Pool<Stage, Item> {
    fn load(&self) -> Load {
        Self::load(self)
    }
}

/// The roofline's seconds of an entry at `stage`.
fn roofline(costs: &[(Stage, Duration)], stage: Stage) -> f64 {
    costs.iter().find(|(s, _)| *s == stage).map_or(0.01, |(_, cost)| cost.as_secs_f64()).max(1e-6)
}

/// Moves a predicted factor towards the one that was seen; `late` if a member's deadline passed meanwhile.
fn follow(predicted: &mut f64, seen: f64, late: bool) {
    let (weight, most) = match (seen > *predicted, late) {
        (false, _) => (FASTER, 1.0),
        (true, false) => (SLOWER, STALL),
        (true, true) => (LATE, STALL_LATE),
    };
    *predicted += weight * (seen.min(most * *predicted) - *predicted);
}

/// When the network should be done with what is due at `deadline`: predictions are good to some per cent, and who would be just in time
/// would often be late, and was computed in vain.
fn with_margin(deadline: Instant) -> Instant {
    deadline - deadline.saturating_duration_since(Instant::now()).mul_f64(MARGIN)
}

fn locked(pace: &Mutex<Pace>) -> MutexGuard<'_, Pace> {
    pace.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Batcher {
    /// Starts a thread for each of `runners`; those on the CPU compute with threads of `cores`.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start<R: Runner>(
        runners: Vec<(R, Instance)>,
        name: &'static str,
        serving: &Serving,
        cores: &Arc<Cores>,
        statistics: &Arc<Statistics>,
    ) -> Result<Self, ServerError> {
        let pace = Arc::new(Mutex::new(Pace { alone: serving.factor, each: serving.factor }));
        let costs = Arc::new(serving.costs.clone());
        let largest = serving.limits.max_batch;
        let copies = runners.len().max(1);
        let on_cpu = runners.iter().any(|(_, instance)| instance.device == Device::Cpu);
        let workers = runners.into_iter().map(|(runner, instance)| {
            let (pace, costs, statistics) = (pace.clone(), costs.clone(), statistics.clone());
            let cores = (instance.device == Device::Cpu).then(|| cores.clone());
            move || {
                // OpenMP's number of threads is one for each thread that asks
                tch::set_num_threads(instance.threads as i32);
                Worker { name, runner, pace, costs, statistics, cores, threads: instance.threads, largest }
            }
        });
        let pool = Pool::start(serving.limits.clone(), &format!("network-{name}"), workers);
        let pool = Arc::new(pool.map_err(|e| ServerError::Config(e.to_string()))?);
        let shared = on_cpu.then(|| {
            let own: Arc<dyn Backlog> = pool.clone();
            cores.join(&own);
            Shared { cores: cores.clone(), own }
        });
        Ok(Self {
            name,
            pool,
            cores: shared,
            admission: Admission::default(),
            pace: pace.clone(),
            costs: costs.clone(),
            tried: Mutex::default(),
            tried_many: Mutex::default(),
            workers: copies,
        })
    }

    /// Lets a request in, before its payload is decoded, that would enter at `stage` and must leave the network by `deadline`; the time that decoding will
    /// take, other requests' before it included, is `decoding`.
    ///
    /// # Errors
    /// As [`Self::submit`], and [`ServerError::Hopeless`].
    pub fn admit(
        &self,
        stage: Stage,
        (deadline, decoding): (Instant, Duration),
        priority: u8,
        tenant: &Tenant,
    ) -> Result<Admitted<'_>, ServerError> {
        let (alone, cost) = self.predicted(stage);
        self.hopeful(alone, deadline, &self.tried, Instant::now())?;
        let deadline = with_margin(deadline.checked_sub(decoding).unwrap_or_else(Instant::now));
        let asked = Asked { tenant: tenant.index, weight: tenant.weight, priority, deadline, cost, alone };
        let others = self.others();
        self.admission.enter(cost, |ahead| self.pool.would_take(&asked, ahead, others)).map_err(|why| self.refused(why))
    }

    /// Refuses what the network cannot have done by its deadline even if it begins at once. Now and then (`tried` is when) one is let in all the same: predictions are learned from
    /// what is computed, and a wrong one must be found out.
    fn hopeful(&self, takes: Duration, deadline: Instant, tried: &Mutex<Option<Instant>>, now: Instant) -> Result<(), ServerError> {
        let left = deadline.saturating_duration_since(now);
        if takes <= left {
            return Ok(());
        }
        let mut tried = tried.lock().unwrap_or_else(PoisonError::into_inner);
        if tried.is_none_or(|last| now.duration_since(last) >= PROBE) {
            *tried = Some(now);
            return Ok(());
        }
        telemetry::dropped("overload");
        Err(ServerError::Hopeless { takes, left })
    }

    /// Whether the last of `n` requests that come together would be let in: if not, none needs to be begun.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn would_admit(&self, stage: Stage, n: usize, deadline: Instant, priority: u8, tenant: &Tenant) -> Result<(), ServerError> {
        let (alone, cost) = self.predicted(stage);
        let all = cost * n as u32 / self.workers as u32;
        self.hopeful(alone.max(all), deadline, &self.tried_many, Instant::now())?;
        let (own, others) = (self.pool.load(), self.others());
        if own.running.is_zero() && own.waiting.is_zero() && others.is_zero() {
            return Ok(());
        }
        let deadline = with_margin(deadline);
        let asked = Asked { tenant: tenant.index, weight: tenant.weight, priority, deadline, cost, alone };
        let before = cost * n.saturating_sub(1) as u32;
        let taken = self.admission.enter(Duration::ZERO, |ahead| self.pool.would_take(&asked, ahead + before, others));
        taken.map(drop).map_err(|why| self.refused(why))
    }

    /// What other models will compute before an entry that comes now.
    fn others(&self) -> Duration {
        let own = self.pool.load();
        let idle = own.running.is_zero() && own.waiting.is_zero();
        let batches = own.batches + if idle { 0 } else { MORE };
        self.cores.as_ref().map_or(Duration::ZERO, |shared| shared.cores.others(&shared.own, batches))
    }

    /// What an entry takes by itself, and as a member of a full batch.
    fn predicted(&self, stage: Stage) -> (Duration, Duration) {
        let (pace, cost) = (locked(&self.pace), roofline(&self.costs, stage));
        (Duration::from_secs_f64(cost * pace.alone), Duration::from_secs_f64(cost * pace.each))
    }

    /// Alive until the network's threads have ended.
    pub fn at_work(&self) -> Weak<()> {
        self.pool.at_work()
    }

    /// Entries waiting, by tenant.
    pub fn waiting(&self) -> std::collections::BTreeMap<u32, usize> {
        self.pool.waiting()
    }

    /// Queues one input; `priority` 0 is the most urgent.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if the queue is full or too slow for the deadline, [`ServerError::Draining`] if it is closed.
    pub fn submit(
        &self,
        stage: Stage,
        input: Vec<f32>,
        deadline: Instant,
        priority: u8,
        tenant: &Tenant,
    ) -> Result<Pending<'_>, ServerError> {
        let (answer, receiver) = oneshot::channel();
        let (alone, cost) = self.predicted(stage);
        let value = Item { input, answer, came: Instant::now(), deadline };
        let (tenant, weight, deadline) = (tenant.index, tenant.weight, with_margin(deadline));
        let entry = Entry { key: stage, priority, tenant, weight, deadline, cost, alone, value };
        match self.pool.submit(entry) {
            Ok(ticket) => {
                telemetry::waiting(self.name, 1.0);
                Ok(Pending { batcher: self, ticket, answer: receiver })
            }
            Err((why, _)) => Err(self.refused(why)),
        }
    }

    /// The error of a request that was refused, and its count. It may come again when half of what is there now is done: room is made
    /// entry by entry, and who waits for the last finds it taken.
    fn refused(&self, why: Refused) -> ServerError {
        let busy = |why| ServerError::Busy { why, retry: (self.pool.backlog() / 2).clamp(SOONEST, LATEST) };
        let (reason, error) = match why {
            Refused::Full => ("full", busy("network queue full")),
            Refused::Cost => ("full", busy("too much work is queued")),
            Refused::Late => ("overload", busy("those before it take longer than its deadline allows")),
            Refused::Closed => ("closed", ServerError::Draining),
        };
        telemetry::dropped(reason);
        error
    }
}

struct Worker<R> {
    name: &'static str,
    runner: R,
    pace: Arc<Mutex<Pace>>,
    costs: Arc<Vec<(Stage, Duration)>>,
    statistics: Arc<Statistics>,
    /// None if it does not compute on the CPU.
    cores: Option<Arc<Cores>>,
    threads: usize,
    /// Largest batch.
    largest: usize,
}

impl<R: Runner> Work<Stage, Item> for Worker<R> {
    fn warm_up(&mut self) {
        let _turn = self.turn();
        // a panic would end the thread; the request that causes it again is told
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.runner.warm_up(self.largest)));
    }

    type Turn = Option<Held>;

    /// Others may have the cores.
    fn turn(&self) -> Self::Turn {
        self.cores.as_ref().map(|cores| cores.take(self.threads))
    }

    fn run(&mut self, batch: Batch<Stage, Item>, _held: Self::Turn) {
        let (start, stage) = (Instant::now(), batch.key);
        telemetry::waiting(self.name, -(batch.members.len() as f64));
        let inputs: Vec<&[f32]> = batch.members.iter().map(|(item, _)| item.input.as_slice()).collect();
        // libtorch's bindings panic on internal errors; one bad batch must not end the thread
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.runner.run(stage, &inputs)))
            .unwrap_or_else(|_| Err(ServerError::Network("the batch failed inside libtorch".into())));
        let network = start.elapsed();
        let batch_size = batch.members.len();
        telemetry::batch(self.name, stage, batch_size, network, closed(batch.closed));
        match result {
            Ok(logits) => {
                self.statistics.executed(batch_size, network);
                let late = batch.members.iter().any(|(item, _)| item.deadline < start + network);
                let mut pace = locked(&self.pace);
                let factor = network.as_secs_f64() / (roofline(&self.costs, stage) * batch_size as f64);
                let predicted = if batch_size == 1 { pace.alone } else { pace.each };
                follow(&mut pace.each, factor, late);
                if batch_size == 1 {
                    follow(&mut pace.alone, factor, late);
                }
                drop(pace);
                telemetry::predicted(self.name, factor / predicted.max(1e-9));
                for ((item, came), logits) in batch.members.into_iter().zip(logits) {
                    let waited = start.saturating_duration_since(came);
                    let _ = item.answer.send(Ok(Computed { logits, waited, network, batch_size }));
                }
            }
            Err(error) => {
                tracing::error!(%error, batch_size, "batch failed");
                for (item, _) in batch.members {
                    let _ = item.answer.send(Err(ServerError::Network(error.to_string())));
                }
            }
        }
    }

    fn expired(&mut self, item: Item) {
        telemetry::waiting(self.name, -1.0);
        expired(self.name, item);
    }
}

fn expired(model: &'static str, item: Item) {
    gone(model, &item);
    let _ = item.answer.send(Err(ServerError::Deadline("waiting for the network or in it")));
}

/// Value of the label `closed`.
fn closed(closed: Closed) -> &'static str {
    match closed {
        Closed::Full => "full",
        Closed::Preferred => "preferred",
        Closed::Delay => "delay",
        Closed::Deadline => "deadline",
        Closed::Drain => "drain",
    }
}

#[cfg(test)]
mod tests;
