//! The queue with threads and the system's clock.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use crate::queue::{Asked, Batch, Entry, Limits, Load, Queue, Refused, Ticket};

/// What a worker thread does. It owns whatever cannot be shared, such as a network.
pub trait Work<K, T>: Send + 'static {
    /// Runs on the worker's thread before the first batch, and before [`Pool::start`] returns: whatever makes the first run of a network slow
    /// is not to be a request's.
    fn warm_up(&mut self) {}

    /// What a worker needs to compute and shares with others, such as cores.
    type Turn;

    /// Waits for that. A batch is closed only then: until then others may join it, leave, or be late.
    fn turn(&self) -> Self::Turn;

    /// Computes a batch.
    fn run(&mut self, batch: Batch<K, T>, turn: Self::Turn);

    /// An entry whose deadline passed while it waited.
    fn expired(&mut self, value: T);
}

struct Shared<K, T> {
    queue: Mutex<Queue<K, T>>,
    changed: Condvar,
}

impl<K, T> Shared<K, T> {
    fn queue(&self) -> MutexGuard<'_, Queue<K, T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue with its worker threads. They finish what waits and end once the pool is gone.
pub struct Pool<K: Clone + PartialEq, T> {
    shared: Arc<Shared<K, T>>,
    at_work: Weak<()>,
}

impl<K: Clone + PartialEq + Send + 'static, T: Send + 'static> Pool<K, T> {
    /// Starts a thread, called `name` and its number, for each worker, and waits until all of them are warm. `make` is called on the thread itself.
    ///
    /// # Errors
    /// If a thread cannot be started, or ends before it is warm.
    pub fn start<W: Work<K, T>>(
        mut limits: Limits,
        name: &str,
        workers: impl IntoIterator<Item = impl FnOnce() -> W + Send + 'static>,
    ) -> std::io::Result<Self> {
        let workers: Vec<_> = workers.into_iter().collect();
        limits.workers = workers.len();
        let shared = Arc::new(Shared { queue: Mutex::new(Queue::new(limits)), changed: Condvar::new() });
        let at_work = Arc::new(());
        let (warm, warmed) = mpsc::channel();
        let count = workers.len();
        let pool = Self { shared, at_work: Arc::downgrade(&at_work) };
        for (i, make) in workers.into_iter().enumerate() {
            let (shared, at_work, warm) = (pool.shared.clone(), at_work.clone(), warm.clone());
            let thread = move || {
                let mut worker = make();
                worker.warm_up();
                let _ = warm.send(());
                drop(warm);
                work(&shared, worker);
                drop(at_work);
            };
            std::thread::Builder::new().name(format!("{name}-{i}")).spawn(thread)?;
        }
        drop(warm);
        if warmed.iter().take(count).count() < count {
            return Err(std::io::Error::other("a worker ended before it was warm"));
        }
        Ok(pool)
    }

    /// Alive until the last worker thread has ended.
    pub fn at_work(&self) -> Weak<()> {
        self.at_work.clone()
    }

    /// Whether an entry would be taken that has yet to be made, with this predicted cost of others that were told so and have not come, and so much time that
    /// the workers will have to wait for what they share with others.
    ///
    /// # Errors
    /// Why not.
    pub fn would_take(&self, asked: &Asked, ahead: Duration, held_up: Duration) -> Result<(), Refused> {
        self.shared.queue().would_take(asked, ahead, held_up, Instant::now())
    }

    /// Queues an entry.
    ///
    /// # Errors
    /// Why it was refused, with the entry.
    pub fn submit(&self, entry: Entry<K, T>) -> Result<Ticket, (Refused, Entry<K, T>)> {
        let taken = self.shared.queue().offer(entry, Instant::now());
        self.shared.changed.notify_one();
        taken
    }

    /// Takes an entry back; none if a worker has it.
    pub fn cancel(&self, ticket: Ticket) -> Option<T> {
        self.shared.queue().cancel(ticket)
    }

    /// What there is to do.
    pub fn load(&self) -> Load {
        self.shared.queue().load(Instant::now())
    }

    /// Predicted time until everything that waits or runs is done.
    pub fn backlog(&self) -> Duration {
        self.shared.queue().backlog(Instant::now())
    }

    /// Entries waiting, by tenant.
    pub fn waiting(&self) -> BTreeMap<u32, usize> {
        self.shared.queue().waiting()
    }
}

impl<K: Clone + PartialEq, T> Drop for Pool<K, T> {
    fn drop(&mut self) {
        self.shared.queue().close();
        self.shared.changed.notify_all();
    }
}

fn work<K: Clone + PartialEq, T>(shared: &Shared<K, T>, mut worker: impl Work<K, T>) {
    let mut queue = shared.queue();
    loop {
        let now = Instant::now();
        if queue.is_ready(now) {
            drop(queue);
            let turn = worker.turn();
            queue = shared.queue();
            let now = Instant::now();
            let next = queue.next(now);
            // what is left may be another worker's
            shared.changed.notify_one();
            drop(queue);
            next.expired.into_iter().for_each(|value| worker.expired(value));
            let done = next.batch.map(|batch| {
                let cost = batch.cost;
                worker.run(batch, turn);
                cost
            });
            queue = shared.queue();
            if let Some(cost) = done {
                queue.done(now, cost);
            }
            continue;
        }
        if queue.is_closed() && queue.is_empty() {
            return;
        }
        // at the same time as above: it is not ready, so nothing is handed out
        let next = queue.next(now);
        queue = match next.ask_again {
            None => shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            Some(at) => {
                let wait = at.saturating_duration_since(Instant::now());
                shared.changed.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0
            }
        };
    }
}
