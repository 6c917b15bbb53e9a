//! Error of the mean: `cargo run --release -p isthmus-secagg --example nmse -- [LARGEST_DIMENSION] [LARGEST_N]`.
//!
//! Independent LogNormal(0, 1) vectors; NMSE = |mean - decoded mean|^2 / mean |x|^2. Local scales: each client's own smallest and largest coded value.
//! Global: those of all clients. Public: a norm limit at the largest norm. Sums of decoded values, as the parties' counts would give them. A Markdown table
//! on standard output; the mean over repetitions for small dimensions.
use std::error::Error;

use isthmus_secagg::quantise::norm;
use isthmus_secagg::quantise::scale::Range;
use isthmus_secagg::{Quantiser, Scale, Seed, Transform};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use rand_distr::{Distribution, LogNormal};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq)]
enum Scales {
    Local,
    Global,
    Public,
}

/// NMSE at each number of clients.
fn nmse(dim: usize, transform: Transform, scales: Scales, numbers: &[usize], seed: u8) -> Result<Vec<f64>> {
    let quantiser = Quantiser::new(dim, transform, &Seed::from_bytes([seed; 32]))?;
    let law = LogNormal::new(0.0f32, 1.0)?;
    let vector = |client: usize| -> Vec<f32> {
        let mut rng = ChaCha20Rng::seed_from_u64((u64::from(seed) << 32) + client as u64);
        (0..dim).map(|_| law.sample(&mut rng)).collect()
    };
    let mut results = Vec::new();
    let most = numbers.iter().copied().max().unwrap_or(0);
    let mut rng = ChaCha20Rng::seed_from_u64(99 + u64::from(seed));
    let (mut mean, mut coded, mut squares) = (vec![0.0; dim], vec![0.0; quantiser.coded()], 0.0);
    // the scale of all clients must be known before the first is rounded
    let shared = |n: usize| -> Result<Option<Scale>> {
        Ok(match scales {
            Scales::Local => None,
            Scales::Public => Some(Scale::public((0..n).map(|c| norm(&vector(c))).fold(0.0, f64::max) as f32, transform)?),
            Scales::Global => {
                let ranges = (0..n).map(|c| quantiser.forward(&vector(c)).map(|y| Range::of(&y)));
                let all = ranges.collect::<std::result::Result<Vec<_>, _>>()?.into_iter().reduce(Range::union);
                Some(Scale::Range(all.ok_or("no clients")?))
            }
        })
    };
    for &n in numbers {
        let all = shared(n)?;
        if all.is_some() {
            // another scale for every number of clients: all over again
            (mean, coded, squares) = (vec![0.0; dim], vec![0.0; quantiser.coded()], 0.0);
        }
        let from = if all.is_some() { 0 } else { results.len().checked_sub(1).map_or(0, |i| numbers[i]) };
        for client in from..n.min(most) {
            let x = vector(client);
            let y = quantiser.forward(&x)?;
            let scale = all.clone().unwrap_or_else(|| Scale::Range(Range::of(&y)));
            let bits = quantiser.round(&y, &scale, &mut rng)?;
            let mut at = 0;
            for (block, range) in quantiser.blocks().iter().zip(scale.ranges(quantiser.blocks())?) {
                for (j, sum) in (at..).zip(&mut coded[at..at + block.coded]) {
                    *sum += f64::from(range.min) + if bits.get(j) { f64::from(range.step) } else { 0.0 };
                }
                at += block.coded;
            }
            mean.iter_mut().zip(&x).for_each(|(m, v)| *m += f64::from(*v));
            squares += norm(&x).powi(2);
        }
        let count = n as f64;
        let decoded = quantiser.inverse(&coded.iter().map(|v| v / count).collect::<Vec<_>>())?;
        let error: f64 = decoded.iter().zip(&mean).map(|(d, m)| (d - m / count).powi(2)).sum();
        results.push(error / (squares / count));
    }
    Ok(results)
}

fn main() -> Result<()> {
    let number = |place, default| std::env::args().nth(place).map_or(Ok(default), |text| text.parse::<usize>());
    let (largest, most) = (number(1, 1 << 20)?, number(2, 1000)?);
    let numbers: Vec<usize> = [10, 100, 1000].into_iter().filter(|n| *n <= most).collect();
    let heads: Vec<String> = numbers.iter().map(|n| format!("n = {n}")).collect();
    println!("| d | method | scales | bits a coordinate | {} |\n|---|---|---|---:|{}", heads.join(" | "), "---:|".repeat(numbers.len()));
    for dim in [1024, 32_768, 1 << 20].into_iter().filter(|d| *d <= largest) {
        let repetitions = if dim == 1024 {
            10
        } else if dim == 32_768 {
            3
        } else {
            1
        };
        for (name, transform) in [("SQ", Transform::Identity), ("Hadamard", Transform::Hadamard), ("Kashin", Transform::Kashin)] {
            for scales in [Scales::Local, Scales::Global, Scales::Public] {
                if scales == Scales::Public && transform == Transform::Identity {
                    continue;
                }
                let mut mean = vec![0.0; numbers.len()];
                for seed in 0..repetitions {
                    let found = nmse(dim, transform, scales, &numbers, seed + 1)?;
                    mean.iter_mut().zip(found).for_each(|(m, f)| *m += f / f64::from(repetitions));
                }
                let bits = Quantiser::new(dim, transform, &Seed::from_bytes([1; 32]))?.coded() as f64 / dim as f64;
                let label = match scales {
                    Scales::Local => "local",
                    Scales::Global => "global",
                    Scales::Public => "public",
                };
                let values: Vec<String> = mean.iter().map(|m| format!("{m:.4}")).collect();
                println!("| {dim} | {name} | {label} | {bits:.2} | {} |", values.join(" | "));
            }
        }
    }
    Ok(())
}
