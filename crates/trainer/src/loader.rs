//! Batches of crops, made ahead of the training loop. Batch `i` depends on the seed and `i` alone, so a
//! resumed run sees the same data.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::TrainError;
use crate::pack::Pack;

/// Batches kept ready.
const AHEAD: usize = 4;

/// Pixels (N x 3 x S x S, normalised) and the quality level of each sample.
pub struct Batch {
    /// Row-major NCHW values.
    pub pixels: Vec<f32>,
    /// One level per sample.
    pub levels: Vec<i64>,
}

/// Starts a thread that makes batches from `first` on.
pub fn start(pack: Arc<Pack>, batch: usize, side: u32, levels: i64, seed: u64, first: u64) -> Receiver<Result<Batch, TrainError>> {
    let (send, receive) = sync_channel(AHEAD);
    std::thread::spawn(move || {
        for step in first.. {
            if send.send(make(&pack, batch, side, levels, seed, step)).is_err() {
                return;
            }
        }
    });
    receive
}

/// Batch `step`. Levels are spread evenly over the batch, the remainder drawn at random.
///
/// # Errors
/// If a crop cannot be resized.
pub fn make(pack: &Pack, batch: usize, side: u32, levels: i64, seed: u64, step: u64) -> Result<Batch, TrainError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(step);
    let mut pixels = Vec::with_capacity(batch * 3 * (side * side) as usize);
    for _ in 0..batch {
        pack.random_crop(&mut rng, side)?.normalise_into(&mut pixels);
    }
    let all: Vec<i64> = (0..levels).collect();
    let whole = batch / all.len() * all.len();
    let mut drawn: Vec<i64> = all.iter().copied().cycle().take(whole).collect();
    drawn.extend(all.choose_multiple(&mut rng, batch - whole));
    Ok(Batch { pixels, levels: drawn })
}
