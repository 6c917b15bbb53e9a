//! Counting under secret shares equals the plaintext sum.
#![allow(clippy::unwrap_used)]

use isthmus_secagg::boolean3::{Party, Upload};
use isthmus_secagg::simulate::{Reports, Round};
use isthmus_secagg::{Bits, ReportContext, Seed, additive2};
use proptest::prelude::*;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;

const TASK: [u8; 32] = [9; 32];

fn report(client: usize) -> ReportContext {
    let mut report = [0; 16];
    report[..8].copy_from_slice(&(client as u64).to_le_bytes());
    ReportContext { task: TASK, round: 4, report }
}

fn shared(clients: &[Bits], rng: &mut ChaCha20Rng) -> [Reports; 3] {
    let uploads: Vec<Upload> = clients.iter().enumerate().map(|(c, bits)| Upload::split(bits, &report(c), rng)).collect();
    Party::ALL.map(|party| uploads.iter().enumerate().map(|(c, u)| (report(c), u.part(party))).collect())
}

fn round(coded: usize, block_words: usize, rng: &mut ChaCha20Rng) -> Round {
    let pairwise = [Seed::random(rng), Seed::random(rng), Seed::random(rng)];
    Round { task: TASK, round: 4, epoch: 0, coded, block_words, pairwise }
}

fn plain(clients: &[Bits], coded: usize) -> Vec<u32> {
    (0..coded).map(|j| clients.iter().map(|b| u32::from(b.get(j))).sum()).collect()
}

fn random_bits(coded: usize, rng: &mut ChaCha20Rng) -> Bits {
    Bits::fill(coded, |_| rng.next_u64())
}

/// Bits of each client, by the name of the input.
fn inputs(n: usize, coded: usize, rng: &mut ChaCha20Rng) -> Vec<(&'static str, Vec<Bits>)> {
    vec![
        ("random", (0..n).map(|_| random_bits(coded, rng)).collect()),
        ("all 0", vec![Bits::zeros(coded); n]),
        ("all 1", vec![Bits::fill(coded, |_| u64::MAX); n]),
        ("one-hot", (0..n).map(|c| Bits::fill(coded, |k| if k == c % coded / 64 { 1 << (c % coded % 64) } else { 0 })).collect()),
    ]
}

#[test]
fn counts_equal_the_plaintext_for_every_number_of_clients() {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    for n in [1, 2, 3, 63, 64, 65, 127, 128, 1000] {
        for coded in [1, 7, 77, 200] {
            for (name, clients) in inputs(n, coded, &mut rng) {
                let counts = round(coded, 3, &mut rng).count(&shared(&clients, &mut rng), |_, _| ()).unwrap();
                assert_eq!(counts, plain(&clients, coded), "{n} clients, {coded} bits, {name}");
            }
        }
    }
}

#[test]
fn block_size_and_order_of_uploads_change_nothing() {
    let mut rng = ChaCha20Rng::seed_from_u64(2);
    let clients: Vec<Bits> = (0..37).map(|_| random_bits(2000, &mut rng)).collect();
    let expected = plain(&clients, 2000);
    for block_words in [1, 2, 31, 32, 33, 1000] {
        let mut parties = shared(&clients, &mut rng);
        parties.iter_mut().for_each(|p| p.rotate_left(block_words % 37));
        assert_eq!(round(2000, block_words, &mut rng).count(&parties, |_, _| ()).unwrap(), expected, "{block_words}");
    }
}

#[test]
fn ands_levels_and_bytes_are_those_of_the_schedule() {
    for (n, ands, depth) in [(10, 8, 3), (50, 47, 5), (100, 97, 6), (128, 127, 7), (1000, 994, 9), (10_000, 9_995, 13)] {
        let sizes = isthmus_secagg::boolean3::count::level_sizes(n, 1);
        assert_eq!((sizes.iter().sum::<usize>(), sizes.len()), (ands, depth), "{n}");
    }
    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let clients: Vec<Bits> = (0..100).map(|_| random_bits(640, &mut rng)).collect();
    let mut received = 0;
    round(640, 10, &mut rng).count(&shared(&clients, &mut rng), |_, m| received += m.len()).unwrap();
    assert_eq!(received, 3 * (97 * 10 + 7 * 10), "97 ANDs and 7 digits of 10 words for each party");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn modes_agree(seed in any::<u64>(), n in 1usize..40, coded in 1usize..300, block_words in 1usize..6) {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let clients: Vec<Bits> = (0..n).map(|_| random_bits(coded, &mut rng)).collect();
        let expected = plain(&clients, coded);
        let counts = round(coded, block_words, &mut rng).count(&shared(&clients, &mut rng), |_, _| ()).unwrap();
        prop_assert_eq!(&counts, &expected);
        let (mut a, mut b) = (additive2::Sum::new(coded, n as u32).unwrap(), additive2::Sum::new(coded, n as u32).unwrap());
        for (c, bits) in clients.iter().enumerate() {
            let upload = additive2::split(bits, n as u32, &report(c), &mut rng).unwrap();
            a.add_seed(&upload.k0, &report(c));
            b.add_residues(&upload.residues).unwrap();
        }
        prop_assert_eq!(&a.open(&b).unwrap(), &expected);
    }

    #[test]
    fn shares_rebuild_the_bits(seed in any::<u64>(), coded in 1usize..300) {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let bits = random_bits(coded, &mut rng);
        let upload = Upload::split(&bits, &report(0), &mut rng);
        let words = coded.div_ceil(64);
        let held = Party::ALL.map(|party| {
            let (mut own, mut next) = (vec![0; words], vec![0; words]);
            upload.part(party).expand(&report(0), 0, &mut own, &mut next).unwrap();
            (own, next)
        });
        for party in Party::ALL {
            let (mine, following) = (&held[usize::from(party.index())], &held[usize::from(party.next().index())]);
            prop_assert_eq!(&mine.1, &following.0);
        }
        let rebuilt = Bits::fill(coded, |k| held[0].0[k] ^ held[1].0[k] ^ held[2].0[k]);
        prop_assert_eq!(rebuilt, bits);
    }
}

#[test]
fn calls_out_of_turn_and_wrong_sizes_are_refused() {
    let mut rng = ChaCha20Rng::seed_from_u64(5);
    let clients: Vec<Bits> = (0..3).map(|_| random_bits(64, &mut rng)).collect();
    let parties = shared(&clients, &mut rng);
    let keys = isthmus_secagg::boolean3::count::zero_keys(&round(64, 1, &mut rng).pairwise, Party::ALL[0], TASK, 4, 0);
    let mut block = isthmus_secagg::simulate::block_shares(&parties[0], 0, 0, 1).unwrap();
    assert!(block.receive(&[0]).is_err() && block.opening().is_err());
    assert_eq!(block.send(&keys).unwrap().unwrap().len(), 1);
    assert!(block.send(&keys).is_err(), "no stream of the zero-sharing is used twice");
    assert!(block.receive(&[0, 0]).is_err() && block.opening().is_err());
    block.receive(&[0]).unwrap();
    assert!(block.receive(&[0]).is_err());
    assert!(block.send(&keys).unwrap().is_none());
    assert!(block.opening().is_ok() && block.open(&[0]).is_err());
    assert!(isthmus_secagg::simulate::block_shares(&Vec::new(), 0, 0, 1).is_err());
    assert!(isthmus_secagg::simulate::block_shares(&parties[0], 0, 0, 2).is_err(), "past the end of the vector");
}
