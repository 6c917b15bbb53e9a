//! The filter on shares picks the clients that a plaintext computation picks.
#![allow(clippy::unwrap_used)]

use isthmus_secagg::boolean3::{Party, Shares, filter};
use isthmus_secagg::simulate::{Round, run};
use isthmus_secagg::{Bits, SecAggError, Seed};
use proptest::prelude::*;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;

fn round(rng: &mut ChaCha20Rng) -> Round {
    Round { task: [3; 32], round: 1, epoch: 0, coded: 0, block_words: 0, pairwise: [(); 3].map(|()| Seed::random(rng)) }
}

/// Replicated shares of words.
fn share(words: &[u64], rng: &mut ChaCha20Rng) -> [Shares; 3] {
    let s: [Vec<u64>; 2] = [(); 2].map(|()| words.iter().map(|_| rng.next_u64()).collect());
    let last: Vec<u64> = words.iter().zip(&s[0]).zip(&s[1]).map(|((w, a), b)| w ^ a ^ b).collect();
    let all = [s[0].clone(), s[1].clone(), last];
    Party::ALL.map(|p| Shares { own: all[usize::from(p.index())].clone(), next: all[usize::from(p.next().index())].clone() })
}

/// Bit j of `bits` summed over digits of `words` words.
fn number(digits: &[u64], words: usize, j: usize) -> usize {
    digits.chunks_exact(words).enumerate().map(|(w, d)| ((d[j / 64] >> (j % 64) & 1) as usize) << w).sum()
}

#[test]
fn agreement_is_counted_for_every_client() {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    for (clients, width, coordinates) in [(1, 1, 1), (3, 2, 100), (64, 1, 64), (65, 3, 190), (130, 2, 128)] {
        let rows: Vec<u64> = (0..clients * width).map(|_| rng.next_u64()).collect();
        let direction: Vec<u64> = (0..width).map(|_| rng.next_u64()).collect();
        let opened = run(&round(&mut rng), 0, &share(&rows, &mut rng), |circuit, party, block| {
            filter::agreement(circuit, party, block.clone(), clients, &direction, coordinates)
        })
        .unwrap();
        let bit = |words: &[u64], j: usize| words[j / 64] >> (j % 64) & 1;
        for c in 0..clients {
            let expected = (0..coordinates).filter(|j| bit(&rows[c * width..], *j) == bit(&direction, *j)).count();
            assert_eq!(number(&opened, clients.div_ceil(64), c), expected, "{clients} clients, client {c}");
        }
    }
}

/// Values as digits with a bit for each client.
fn digits(values: &[usize], weights: usize) -> Vec<u64> {
    let lanes = values.len().div_ceil(64);
    let word = |w: usize, lane: usize| {
        values.iter().skip(lane * 64).take(64).enumerate().fold(0, |word, (j, v)| word | ((v >> w & 1) as u64) << j)
    };
    (0..weights).flat_map(|w| (0..lanes).map(move |lane| (w, lane))).map(|(w, lane)| word(w, lane)).collect()
}

#[test]
fn parts_add_up() {
    let mut rng = ChaCha20Rng::seed_from_u64(2);
    let parts: Vec<Vec<usize>> = (0..7).map(|_| (0..70).map(|_| rng.next_u32() as usize % 1000).collect()).collect();
    let shared: Vec<[Shares; 3]> = parts.iter().map(|p| share(&digits(p, 10), &mut rng)).collect();
    let inputs = [0, 1, 2].map(|i: usize| shared.iter().map(|s| s[i].clone()).collect::<Vec<_>>());
    let opened = run(&round(&mut rng), 0, &inputs, |circuit, _, parts| filter::total(circuit, 2, parts)).unwrap();
    for c in 0..70 {
        assert_eq!(number(&opened, 2, c), parts.iter().map(|p| p[c]).sum::<usize>());
    }
}

/// By plaintext: below the value of rank `drop` are dropped.
fn kept(values: &[usize], drop: usize) -> Vec<bool> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    values.iter().map(|v| *v >= sorted[drop]).collect()
}

fn select(values: &[usize], weights: usize, drop: usize, rng: &mut ChaCha20Rng) -> Result<Vec<bool>, SecAggError> {
    let n = values.len();
    let opened =
        run(&round(rng), 5, &share(&digits(values, weights), rng), |circuit, party, v| filter::keep_highest(circuit, party, v, n, drop))?;
    assert!(opened.last().is_none_or(|last| n.is_multiple_of(64) || last >> (n % 64) == 0), "no flag beyond the last client");
    Ok((0..n).map(|j| opened[j / 64] >> (j % 64) & 1 == 1).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_lowest_are_dropped(seed in any::<u64>(), n in 1usize..140, weights in 1usize..12, part in 0f64..1.0) {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let values: Vec<usize> = (0..n).map(|_| rng.next_u32() as usize % (1 << weights)).collect();
        let drop = (part * n as f64) as usize;
        prop_assert_eq!(select(&values, weights, drop, &mut rng).unwrap(), kept(&values, drop));
    }
}

#[test]
fn ties_are_kept_and_somebody_must_be() {
    let mut rng = ChaCha20Rng::seed_from_u64(4);
    assert_eq!(select(&[5; 9], 3, 4, &mut rng).unwrap(), [true; 9]);
    assert_eq!(select(&[0, 7, 7, 1], 3, 2, &mut rng).unwrap(), [false, true, true, false]);
    assert!(select(&[1, 2], 3, 2, &mut rng).is_err());
}

#[test]
fn rows_of_dropped_clients_count_nothing() {
    let mut rng = ChaCha20Rng::seed_from_u64(5);
    let (clients, width) = (70, 2);
    let rows: Vec<u64> = (0..clients * width).map(|_| rng.next_u64()).collect();
    let keep = Bits::fill(clients, |_| rng.next_u64());
    let (rows_shared, keep_shared) = (share(&rows, &mut rng), share(keep.words(), &mut rng));
    let inputs = [0, 1, 2].map(|i: usize| (rows_shared[i].clone(), keep_shared[i].clone()));
    let round = round(&mut rng);
    let counts = run(&round, 0, &inputs, |circuit, _, (rows, keep)| {
        let rows = filter::kept_rows(circuit, rows, keep, width)?;
        circuit.sum(width, vec![rows])
    })
    .unwrap();
    for j in 0..width * 64 {
        let expected = (0..clients).filter(|c| keep.get(*c) && rows[c * width + j / 64] >> (j % 64) & 1 == 1).count();
        assert_eq!(number(&counts, width, j), expected, "{j}");
    }
    let size = run(&round, 1, &inputs, |circuit, _, (_, keep)| filter::size(circuit, keep, clients)).unwrap();
    assert_eq!(number(&size, 1, 0), (0..clients).filter(|c| keep.get(*c)).count());
}
