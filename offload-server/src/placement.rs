//! Where copies of a model run: device, threads, precision; and the cores that all of them share.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use isthmus_batcher::Load;
use isthmus_nets::device::parse_device;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{Config, ServerError};

/// Copies of a model on one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Whose; absent: every model's that no other placement names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// Copies.
    pub instances: usize,
    /// Threads of libtorch of each copy; 0: an equal part of `network_threads`.
    pub threads: usize,
    /// Of weights and activations.
    pub precision: Precision,
}

impl Default for Placement {
    fn default() -> Self {
        Self { model: None, device: "auto".into(), instances: 1, threads: 0, precision: Precision::Float }
    }
}

/// Type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    Float,
    /// 16 bits (IEEE), for GPUs.
    Half,
    /// 16 bits with the exponent of 32.
    Bfloat16,
}

impl Precision {
    /// libtorch's type.
    pub fn kind(self) -> Kind {
        match self {
            Self::Float => Kind::Float,
            Self::Half => Kind::Half,
            Self::Bfloat16 => Kind::BFloat16,
        }
    }

    /// How far golden logits may lie from the manifest's.
    pub fn tolerance(self) -> f32 {
        match self {
            Self::Float => 2e-2,
            Self::Half => 0.2,
            Self::Bfloat16 => 1.0,
        }
    }
}

/// One copy of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Instance {
    /// Where it runs.
    pub device: Device,
    /// Threads of libtorch.
    pub threads: usize,
    /// Of weights and activations.
    pub precision: Precision,
}

impl Instance {
    /// Name of its device, as in the configuration.
    pub fn device_name(&self) -> String {
        match self.device {
            Device::Cuda(n) => format!("cuda:{n}"),
            _ => "cpu".to_owned(),
        }
    }
}

/// The copies of `model` that `config` asks for.
///
/// # Errors
/// If a device is unknown or not there, or its precision is not computed there.
pub fn instances(config: &Config, model: &str) -> Result<Vec<Instance>, ServerError> {
    let named: Vec<&Placement> = config.placements.iter().filter(|p| p.model.as_deref() == Some(model)).collect();
    let of_all = || config.placements.iter().filter(|p| p.model.is_none()).collect();
    let mut placements: Vec<&Placement> = if named.is_empty() { of_all() } else { named };
    let plain = Placement { device: config.device.clone(), instances: config.instances, ..Placement::default() };
    if placements.is_empty() {
        placements.push(&plain);
    }
    let mut all = Vec::new();
    for p in placements {
        let device = parse_device(&p.device).map_err(ServerError::Config)?;
        if device == Device::Cpu && p.precision == Precision::Half {
            return Err(ServerError::Config("placements: half precision is for GPUs; a CPU takes float or bfloat16".into()));
        }
        all.extend(std::iter::repeat_n(Instance { device, threads: p.threads, precision: p.precision }, p.instances));
    }
    let on_cpu = all.iter().filter(|i| i.device == Device::Cpu).count().max(1);
    for instance in all.iter_mut().filter(|i| i.threads == 0) {
        // a GPU's thread only waits for it
        instance.threads = if instance.device == Device::Cpu { (config.network_threads() / on_cpu).max(1) } else { 1 };
    }
    Ok(all)
}

/// The CPU threads that all networks share: a batch waits until as many are free as it uses. More would take turns on the cores, and
/// libtorch's threads stall each other where they do.
pub struct Cores {
    all: usize,
    turns: Mutex<Turns>,
    changed: Condvar,
    users: Mutex<Vec<Weak<dyn Backlog>>>,
}

/// Somebody who takes cores for batches.
pub trait Backlog: Send + Sync {
    /// What it has to do.
    fn load(&self) -> Load;
}

/// Free threads, and whose turn it is: who came first is served first, or a busy network would starve the others.
struct Turns {
    free: usize,
    next: u64,
    served: u64,
}

/// Threads in use; given back when dropped.
pub struct Held {
    cores: Arc<Cores>,
    threads: usize,
}

impl Cores {
    /// So many threads.
    pub fn new(all: usize) -> Arc<Self> {
        let turns = Mutex::new(Turns { free: all, next: 0, served: 0 });
        Arc::new(Self { all, turns, changed: Condvar::new(), users: Mutex::default() })
    }

    /// Notes who computes with them.
    pub fn join(&self, user: &Arc<dyn Backlog>) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|u| u.strong_count() > 0);
        users.push(Arc::downgrade(user));
    }

    /// What all but `own` will compute before its `batches`th batch from now. Turns are taken: who computes now comes behind the first of them, all others that
    /// have anything to do may be before it.
    pub fn others(&self, own: &Arc<dyn Backlog>, batches: u32) -> Duration {
        let users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let others = users.iter().filter_map(Weak::upgrade).filter(|u| !Arc::ptr_eq(u, own));
        let before = |load: Load| load.running + load.batch * batches.saturating_sub(u32::from(!load.running.is_zero()));
        others.map(|u| before(u.load())).sum()
    }

    /// Waits for `threads` of them (at most for all there are). Whoever has some computes a batch, so they come back.
    pub fn take(self: &Arc<Self>, threads: usize) -> Held {
        let threads = threads.min(self.all);
        let mut turns = self.turns();
        let turn = turns.next;
        turns.next += 1;
        let waited = self.changed.wait_while(turns, |t| t.served != turn || t.free < threads);
        let mut turns = waited.unwrap_or_else(PoisonError::into_inner);
        turns.served += 1;
        turns.free -= threads;
        drop(turns);
        // the next one may find enough as well
        self.changed.notify_all();
        Held { cores: self.clone(), threads }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.cores.turns().free += self.threads;
        self.cores.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn threads_are_divided_among_the_copies_on_the_cpu() {
        let c = config("network_threads = 8\ndevice = \"cpu\"\ninstances = 2");
        let two = instances(&c, "a").unwrap();
        assert_eq!(two.iter().map(|i| i.threads).collect::<Vec<_>>(), [4, 4]);
        let c = config(
            "network_threads = 8\n[[placements]]\ndevice = \"cpu\"\ninstances = 3\n[[placements]]\nmodel = \"b\"\ndevice = \"cpu\"\nthreads = 5\nprecision = \"bfloat16\"",
        );
        assert_eq!(instances(&c, "a").unwrap().iter().map(|i| i.threads).collect::<Vec<_>>(), [2, 2, 2]);
        let b = instances(&c, "b").unwrap();
        assert_eq!((b.len(), b[0].threads, b[0].precision), (1, 5, Precision::Bfloat16));
    }

    #[test]
    fn what_a_device_cannot_do_is_refused() {
        for bad in ["device = \"cpu\"\nprecision = \"half\"", "device = \"gpu\"", "device = \"cuda:99\""] {
            assert!(matches!(instances(&config(&format!("[[placements]]\n{bad}")), "a"), Err(ServerError::Config(_))), "{bad}");
        }
        assert!(toml::from_str::<Config>("[[placements]]\nprecision = \"int8\"").is_err());
    }

    struct User(Load);

    impl Backlog for User {
        fn load(&self) -> Load {
            self.0
        }
    }

    #[test]
    fn what_others_compute_before_is_what_they_are_at_and_their_turns() {
        const MS: Duration = Duration::from_millis(1);
        let user = |running: u32, batch: u32| -> Arc<dyn Backlog> {
            Arc::new(User(Load { running: running * MS, waiting: 900 * MS, batch: batch * MS, batches: 9 }))
        };
        let before = |others: &[Arc<dyn Backlog>], batches: u32| {
            let (cores, own) = (Cores::new(1), user(0, 70));
            cores.join(&own);
            others.iter().for_each(|other| cores.join(other));
            cores.others(&own, batches)
        };
        assert_eq!(before(&[], 3), Duration::ZERO);
        assert_eq!(before(&[user(0, 0)], 3), Duration::ZERO, "somebody without anything to do");
        // it computes, then comes our first batch; before the second one it has another turn
        assert_eq!(before(&[user(30, 100)], 1), 30 * MS);
        assert_eq!(before(&[user(30, 100)], 2), 130 * MS);
        // it waits for the cores as we do, and may have come first
        assert_eq!(before(&[user(0, 100)], 2), 200 * MS);
        assert_eq!(before(&[user(30, 100), user(0, 40)], 2), (130 + 80) * MS);
    }

    #[test]
    fn no_more_threads_run_than_there_are() {
        let (cores, running) = (Cores::new(3), AtomicUsize::new(0));
        std::thread::scope(|s| {
            for threads in [1, 2, 3, 1, 2, 9] {
                let (cores, running) = (&cores, &running);
                s.spawn(move || {
                    for _ in 0..50 {
                        let _held = cores.take(threads);
                        let now = running.fetch_add(threads.min(3), Ordering::SeqCst) + threads.min(3);
                        assert!(now <= 3, "{now} threads");
                        std::thread::yield_now();
                        running.fetch_sub(threads.min(3), Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(cores.turns().free, 3);
    }
}
