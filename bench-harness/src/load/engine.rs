//! Sends requests as [`Arrivals`] say and keeps what came of them in histograms: memory does not grow with their number.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use edge_client::{Client, ClientError, InferOptions, Payload};
use hdrhistogram::Histogram;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::error::HarnessError;
use crate::load::arrivals::Arrivals;

/// Most requests of an open loop under way; more are not sent and counted as such.
const MOST_UNDER_WAY: usize = 4096;
const LONGEST_US: u64 = 600_000_000;

/// What to send where.
#[derive(Clone)]
pub struct Target {
    /// Connections, used in turn.
    pub clients: Vec<Client>,
    /// Payloads, sent in turn.
    pub payloads: Arc<Vec<Payload>>,
    /// Limit of each request, from when it is sent.
    pub deadline: Duration,
}

/// Histograms and counts of one window. Microseconds.
pub struct Window {
    /// From the intended time to the answer.
    pub latency: Histogram<u64>,
    /// From the intended time to sending: the generator's own lag.
    pub lag: Histogram<u64>,
    /// In the server.
    pub server: Histogram<u64>,
    /// Of that, waiting.
    pub queue: Histogram<u64>,
    /// Of the server's time, what is neither decoding nor the network's: limits, admission, queue, threads that wake each other.
    pub serving: Histogram<u64>,
    /// The server's time without the network's: entropy decoding and serving.
    pub server_overhead: Histogram<u64>,
    /// From sending to the answer, without the network's own time: transport, decoding, waiting, batching.
    pub overhead: Histogram<u64>,
    /// Answers with a failure, by kind.
    pub failed: std::collections::BTreeMap<String, u64>,
    /// Never sent: too many were under way.
    pub unsent: u64,
    /// Seconds of the network for each request alone: a batch's time is shared by its members.
    pub network: f64,
    /// Sum of batch sizes.
    pub batches: f64,
    /// Length.
    pub seconds: f64,
}

impl Window {
    fn new() -> Result<Self, HarnessError> {
        let histogram = || Histogram::new_with_bounds(1, LONGEST_US, 3).map_err(|e| HarnessError::data("histogram", e.to_string()));
        Ok(Self {
            latency: histogram()?,
            lag: histogram()?,
            server: histogram()?,
            queue: histogram()?,
            serving: histogram()?,
            server_overhead: histogram()?,
            overhead: histogram()?,
            failed: Default::default(),
            unsent: 0,
            network: 0.0,
            batches: 0.0,
            seconds: 0.0,
        })
    }

    /// Answers a second.
    pub fn per_second(&self) -> f64 {
        self.latency.len() as f64 / self.seconds.max(1e-9)
    }

    /// Requests that got no answer.
    pub fn failures(&self) -> u64 {
        self.failed.values().sum::<u64>() + self.unsent
    }

    /// Adds another window's requests.
    ///
    /// # Errors
    /// If the histograms do not fit each other.
    pub fn add(&mut self, other: &Self) -> Result<(), HarnessError> {
        let pairs = [
            (&mut self.latency, &other.latency),
            (&mut self.lag, &other.lag),
            (&mut self.server, &other.server),
            (&mut self.queue, &other.queue),
            (&mut self.serving, &other.serving),
            (&mut self.server_overhead, &other.server_overhead),
            (&mut self.overhead, &other.overhead),
        ];
        for (mine, theirs) in pairs {
            mine.add(theirs).map_err(|e| HarnessError::data("histogram", e.to_string()))?;
        }
        for (kind, n) in &other.failed {
            *self.failed.entry(kind.clone()).or_default() += n;
        }
        self.unsent += other.unsent;
        self.network += other.network;
        self.batches += other.batches;
        self.seconds += other.seconds;
        Ok(())
    }
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// Kind of a failure: a bounded set.
fn kind(e: &ClientError) -> String {
    match e {
        ClientError::Server(status) => format!("{:?}", status.code()),
        ClientError::Deadline(_) => "Deadline".into(),
        _ => "Connection".into(),
    }
}

/// One request; `intended` is when it should have been sent.
async fn one(target: Target, number: u64, intended: Instant, window: Arc<Mutex<Window>>) {
    let mut client = target.clients[number as usize % target.clients.len()].clone();
    let payload = target.payloads[number as usize % target.payloads.len()].clone();
    let options = InferOptions { top_k: 1, deadline: target.deadline, ..InferOptions::default() };
    let (lag, sent) = (intended.elapsed(), Instant::now());
    let answer = client.infer(payload, &options).await;
    let (latency, waited) = (intended.elapsed(), sent.elapsed());
    let mut w = window.lock().await;
    w.lag.saturating_record(micros(lag));
    match answer {
        Ok(answer) => {
            let t = answer.timing.unwrap_or_default();
            w.latency.saturating_record(micros(latency));
            w.server.saturating_record(t.total_us);
            w.queue.saturating_record(t.queue_us);
            w.serving.saturating_record(t.total_us.saturating_sub(t.network_us + t.decode_us));
            w.server_overhead.saturating_record(t.total_us.saturating_sub(t.network_us));
            w.overhead.saturating_record(micros(waited).saturating_sub(t.network_us));
            w.network += t.network_us as f64 / f64::from(t.batch_size.max(1)) / 1e6;
            w.batches += f64::from(t.batch_size);
        }
        Err(e) => *w.failed.entry(kind(&e)).or_default() += 1,
    }
}

/// Runs `arrivals` for `warm_up`, then for windows of `length`, handing each to `judge` until it says that it is enough. Requests
/// flow on between windows; each counts for the window in which it is answered.
///
/// # Errors
/// Those of `judge`.
pub async fn run(
    target: &Target,
    arrivals: &Arrivals,
    warm_up: Duration,
    length: Duration,
    seed: u64,
    mut judge: impl FnMut(Window) -> Result<bool, HarnessError>,
) -> Result<(), HarnessError> {
    let shared = Arc::new(Mutex::new(Window::new()?));
    let mut senders = JoinSet::new();
    match arrivals.times(seed) {
        None => {
            let Arrivals::Closed(concurrency) = arrivals else { return Ok(()) };
            let number = Arc::new(AtomicU64::new(0));
            for _ in 0..*concurrency {
                let (target, number, shared) = (target.clone(), number.clone(), shared.clone());
                senders.spawn(async move {
                    loop {
                        let n = number.fetch_add(1, Ordering::Relaxed);
                        one(target.clone(), n, Instant::now(), shared.clone()).await;
                    }
                });
            }
        }
        Some(times) => {
            let (target, shared, room) = (target.clone(), shared.clone(), Arc::new(Semaphore::new(MOST_UNDER_WAY)));
            let began = Instant::now();
            senders.spawn(async move {
                let mut under_way = JoinSet::new();
                for (n, at) in (0..).zip(times) {
                    let intended = began + at;
                    tokio::time::sleep_until(intended).await;
                    while under_way.try_join_next().is_some() {}
                    match room.clone().try_acquire_owned() {
                        Ok(place) => {
                            let request = one(target.clone(), n, intended, shared.clone());
                            under_way.spawn(async move {
                                request.await;
                                drop(place);
                            });
                        }
                        Err(_) => shared.lock().await.unsent += 1,
                    }
                }
            });
        }
    }
    tokio::time::sleep(warm_up).await;
    *shared.lock().await = Window::new()?;
    let mut began = Instant::now();
    loop {
        tokio::time::sleep(length).await;
        let mut done = std::mem::replace(&mut *shared.lock().await, Window::new()?);
        done.seconds = began.elapsed().as_secs_f64();
        began = Instant::now();
        if judge(done)? {
            // dropping the senders cancels what is under way
            return Ok(());
        }
    }
}
