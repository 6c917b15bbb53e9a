//! Batches of crops, made ahead of the training loop. Batch `i` depends on the seed and `i` alone, so a
//! resumed run sees the same data.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::augment::{self, Augment};
use crate::error::TrainError;
use crate::pack::Pack;
use crate::recipe::Recipe;

/// Batches that each thread keeps ready.
const AHEAD: usize = 4;
/// Most threads that make batches: one is enough for a CPU, a GPU wants more.
const MOST_THREADS: usize = 6;

/// Pixels (N x 3 x S x S, normalised) and the quality level of each sample.
pub struct Batch {
    /// Row-major NCHW values.
    pub pixels: Vec<f32>,
    /// One level per sample.
    pub levels: Vec<i64>,
}

/// What batches are made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Samples per batch.
    pub batch: usize,
    /// Side of a crop.
    pub side: u32,
    /// Quality levels of the samples, in turn; one that is to come more often stands there more often.
    pub levels: Vec<i64>,
    /// How crops are changed.
    pub augment: Augment,
    /// Seed of every draw.
    pub seed: u64,
}

impl Plan {
    /// The batches of a recipe.
    pub fn of(r: &Recipe) -> Self {
        Self { batch: r.batch, side: r.input_size(), levels: r.drawn_levels(), augment: r.augment, seed: r.seed }
    }
}

/// Batches in the order of their steps, made by threads that take turns.
pub struct Batches {
    threads: Vec<Receiver<Result<Batch, TrainError>>>,
    next: usize,
}

impl Batches {
    /// The next batch.
    ///
    /// # Errors
    /// If it could not be made.
    pub fn recv(&mut self) -> Result<Batch, TrainError> {
        let turn = self.next % self.threads.len();
        self.next += 1;
        self.threads[turn].recv().map_err(|_| TrainError::data("loader", "stopped early"))?
    }
}

/// Starts threads that make batches from `first` on.
pub fn start(pack: Arc<Pack>, plan: Plan, first: u64) -> Batches {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = (cores / 4).clamp(1, MOST_THREADS);
    let thread = |turn: usize| {
        let (send, receive) = sync_channel(AHEAD);
        let (pack, plan) = (pack.clone(), plan.clone());
        std::thread::spawn(move || {
            for step in (first + turn as u64..).step_by(count) {
                if send.send(make(&pack, &plan, step)).is_err() {
                    return;
                }
            }
        });
        receive
    };
    Batches { threads: (0..count).map(thread).collect(), next: 0 }
}

/// Batch `step`. Levels are spread evenly over the batch, the remainder drawn at random.
///
/// # Errors
/// If a crop cannot be resized.
pub fn make(pack: &Pack, plan: &Plan, step: u64) -> Result<Batch, TrainError> {
    let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
    rng.set_stream(step);
    let mut pixels = Vec::with_capacity(plan.batch * 3 * (plan.side * plan.side) as usize);
    for _ in 0..plan.batch {
        let from = pixels.len();
        pack.random_crop(&mut rng, plan.side)?.normalise_into(&mut pixels);
        if let Some(weight) = plan.augment.blend_weight(&mut rng) {
            let mut other = Vec::new();
            pack.random_crop(&mut rng, plan.side)?.normalise_into(&mut other);
            augment::blend(&mut pixels[from..], &other, weight);
        }
        plan.augment.recolour(&mut pixels[from..], &mut rng);
    }
    let whole = plan.batch / plan.levels.len().max(1) * plan.levels.len();
    let mut drawn: Vec<i64> = plan.levels.iter().copied().cycle().take(whole).collect();
    drawn.extend(plan.levels.choose_multiple(&mut rng, plan.batch - whole));
    Ok(Batch { pixels, levels: drawn })
}
