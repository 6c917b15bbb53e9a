//! How close transform and count come to the memory's bandwidth: `cargo run --release -p isthmus-secagg --example bandwidth`.
//!
//! One thread. Reading (sum of 512 MiB) and scaling in place (reads and writes) are the limits; the transform of 2^24 values in single precision is
//! compared with the second, by the bytes that its passes over the memory must move. Medians of five, JSON on standard output.
use std::hint::black_box;
use std::time::Instant;

use isthmus_secagg::quantise::hadamard::transform;

const TURNS: usize = 5;
const READ_WORDS: usize = 64 << 20;
const LOG: u32 = 24;
/// One pass within the cache (2048 values), one for every two of the remaining stages, one for the factor.
const PASSES: f64 = 1.0 + ((LOG - 11) as f64 / 2.0).ceil() + 1.0;

fn median(mut f: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..TURNS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[TURNS / 2]
}

fn main() {
    let words: Vec<u64> = (0..READ_WORDS as u64).collect();
    let read = median(|| {
        black_box(words.iter().fold(0u64, |s, w| s ^ w));
    });
    drop(words);
    let mut x: Vec<f32> = (0..1u32 << LOG).map(|j| (j % 1009) as f32 - 504.0).collect();
    let moved = 2.0 * 4.0 * f64::from(1u32 << LOG) / 1e9;
    let scale = median(|| black_box(&mut x).iter_mut().for_each(|v| *v *= 1.000_000_1));
    let whole = median(|| transform(black_box(&mut x)));
    let mut small: Vec<f32> = x[..1 << 11].to_vec();
    let cached = median(|| (0..1 << (LOG - 11)).for_each(|_| transform(black_box(&mut small))));
    println!(
        "{{\"read_gb_per_s\": {:.1}, \"scale_in_place_gb_per_s\": {:.1}, \"transform_2_24_s\": {whole:.4}, \"passes\": {PASSES}, \
         \"transform_gb_per_s\": {:.1}, \"share_of_limit\": {:.2}, \"transform_in_cache_s\": {cached:.4}}}",
        READ_WORDS as f64 * 8.0 / 1e9 / read,
        moved / scale,
        PASSES * moved / whole,
        PASSES * scale / whole,
    );
}
