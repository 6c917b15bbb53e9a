//! What counting costs one party: `cargo run --release -p isthmus-secagg --example cost -- [CLIENTS] [COORDINATES]`.
//!
//! One thread, block by block as a party would: expanding shares, the levels' messages, the counts; beside it the same sum of plaintext bits, and
//! the client's side. Medians of five turns, JSON on standard output.
use std::error::Error;
use std::time::Instant;

use isthmus_secagg::boolean3::count::{ZeroKeys, zero_keys};
use isthmus_secagg::boolean3::{BlockCount, Party, PartyShare, Upload};
use isthmus_secagg::simulate::{Reports, block_shares};
use isthmus_secagg::{Bits, Quantiser, ReportContext, Scale, SecAggError, Seed, Transform};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;

const TURNS: usize = 5;
const BLOCK_WORDS: usize = 256;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds<T>(f: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = f();
    (start.elapsed().as_secs_f64(), result)
}

/// The same carry-save sum of bits that nobody hides.
fn plain(rows: &[&[u64]], words: usize) -> Vec<Vec<u64>> {
    let mut column: Vec<Vec<u64>> = rows.iter().map(|r| r.to_vec()).collect();
    let mut digits = Vec::new();
    while !column.is_empty() {
        let mut digit = column[0].clone();
        let mut carries = Vec::with_capacity(column.len() / 2);
        for pair in column[1..].chunks(2) {
            let zeros = vec![0; words];
            let (y, z) = (&pair[0], pair.get(1).unwrap_or(&zeros));
            let mut carry = vec![0; words];
            for (((s, c), y), z) in digit.iter_mut().zip(&mut carry).zip(y).zip(z) {
                *c = ((*s ^ z) & (y ^ z)) ^ z;
                *s ^= y ^ z;
            }
            carries.push(carry);
        }
        digits.push(digit);
        column = carries;
    }
    digits
}

fn main() -> Result<(), Box<dyn Error>> {
    let number = |place, name: &str, default| match std::env::args().nth(place) {
        Some(text) => text.parse::<usize>().ok().filter(|n| *n > 0).ok_or_else(|| format!("{name} {text:?}: write a number above 0")),
        None => Ok(default),
    };
    let (clients, dim) = (number(1, "CLIENTS", 1000)?, number(2, "COORDINATES", 1_000_000)?);
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let quantiser = Quantiser::new(dim, Transform::Hadamard, &Seed::from_bytes([1; 32]))?;
    let scale = Scale::public(1.0, Transform::Hadamard)?;
    let x: Vec<f32> = (0..dim).map(|j| ((j * 7919 % 2003) as f32 - 1001.0) * 1e-6).collect();
    let (mut forward, mut rounding, mut splitting) = (Vec::new(), Vec::new(), Vec::new());
    let report = |c: usize| {
        let mut report = [0; 16];
        report[..8].copy_from_slice(&(c as u64).to_le_bytes());
        ReportContext { task: [0; 32], round: 1, report }
    };
    for _ in 0..TURNS {
        let (t, y) = seconds(|| quantiser.forward(&x));
        let y = y?;
        forward.push(t);
        let (t, bits) = seconds(|| quantiser.round(&y, &scale, &mut rng));
        let bits = bits?;
        rounding.push(t);
        splitting.push(seconds(|| Upload::split(&bits, &report(0), &mut rng)).0);
    }
    let coded = quantiser.coded();
    let words = coded.div_ceil(64);
    // party 2 stores a masked vector and expands a seed; all stored vectors are uniform, so one set serves all turns
    let masked: Vec<Bits> = (0..clients).map(|_| Bits::fill(coded, |_| rng.next_u64())).collect();
    let share = |s0: &Bits, k2| PartyShare::Two { k2, s0: s0.clone() };
    let reports: Reports = masked.iter().enumerate().map(|(c, s2)| (report(c), share(s2, Seed::random(&mut rng)))).collect();
    let pairwise = [(); 3].map(|()| Seed::random(&mut rng));
    let (mut expanding, mut counting, mut plaintext) = (Vec::new(), Vec::new(), Vec::new());
    let mut peer_bytes = 0;
    for turn in 0..TURNS {
        let keys = zero_keys(&pairwise, Party::ALL[2], [0; 32], 1, turn as u64);
        let (mut expand, mut count, mut plain_sum) = (0.0, 0.0, 0.0);
        peer_bytes = 0;
        for (block, from) in (0..).zip((0..words).step_by(BLOCK_WORDS)) {
            let width = BLOCK_WORDS.min(words - from);
            let (t, side) = seconds(|| block_shares(&reports, block, from, width));
            expand += t;
            let side = side?;
            let (t, sent) = seconds(|| alone(side, &keys));
            count += t;
            peer_bytes += sent? * 8;
            let rows: Vec<&[u64]> = masked.iter().map(|bits| &bits.words()[from..from + width]).collect();
            plain_sum += seconds(|| plain(&rows, width)).0;
        }
        expanding.push(expand);
        counting.push(count);
        plaintext.push(plain_sum);
    }
    let [forward, rounding, splitting, expanding, counting, plaintext] =
        [forward, rounding, splitting, expanding, counting, plaintext].map(median);
    println!(
        "{{\"clients\": {clients}, \"coordinates\": {dim}, \"coded\": {coded}, \"upload_bytes\": {}, \"block_words\": {BLOCK_WORDS}, \
         \"client_transform_s\": {forward:.4}, \"client_round_s\": {rounding:.4}, \"client_split_s\": {splitting:.4}, \
         \"party_expand_s\": {expanding:.3}, \"party_count_s\": {counting:.3}, \"party_sends_bytes\": {peer_bytes}, \
         \"plaintext_sum_s\": {plaintext:.3}, \"turns\": {TURNS}}}",
        coded.div_ceil(8)
    );
    Ok(())
}

/// All levels of one party, with its own messages in place of its neighbour's: the same work. Words sent.
fn alone(mut side: BlockCount, keys: &ZeroKeys) -> Result<usize, SecAggError> {
    let mut sent = 0;
    while let Some(message) = side.send(keys)? {
        sent += message.len();
        side.receive(&message)?;
    }
    let opening = side.opening()?.to_vec();
    sent += opening.len();
    side.open(&opening)?.counts(1)?;
    Ok(sent)
}
