//! What one party sees does not depend on the clients' bits. A statistical test of the code, not a proof.
#![allow(clippy::unwrap_used)]

use isthmus_secagg::boolean3::{Party, Upload};
use isthmus_secagg::simulate::Round;
use isthmus_secagg::{Bits, ReportContext, Seed};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

const RUNS: usize = 10_000;
const CLIENTS: usize = 3;

/// Byte counts of all that a party stores and receives before the counts are opened.
struct View {
    bits: Vec<u32>,
    bytes: Vec<[u32; 256]>,
    /// Pairs of words: how often their first bits differ.
    pairs: Vec<u32>,
}

/// Over many runs, the view of each party when all clients hold `word`. Without zero-sharing if `broken`.
fn views(word: u64, broken: bool) -> [View; 3] {
    let mut rng = ChaCha20Rng::seed_from_u64(word ^ 7);
    let mut seen: [Vec<Vec<u64>>; 3] = Default::default();
    for run in 0..RUNS {
        let report = |c: usize| {
            let mut report = [c as u8; 16];
            report[1..9].copy_from_slice(&(run as u64).to_le_bytes());
            ReportContext { task: [0; 32], round: 1, report }
        };
        let uploads: Vec<Upload> = (0..CLIENTS).map(|c| Upload::split(&Bits::fill(64, |_| word), &report(c), &mut rng)).collect();
        let parties = Party::ALL.map(|p| uploads.iter().enumerate().map(|(c, u)| (report(c), u.part(p))).collect::<Vec<_>>());
        let mut run_views: [Vec<u64>; 3] = Default::default();
        for (view, reports) in run_views.iter_mut().zip(&parties) {
            for (report, share) in reports {
                let (mut own, mut next) = ([0], [0]);
                share.expand(report, 0, &mut own, &mut next).unwrap();
                view.extend([own[0], next[0]]);
            }
        }
        let same = Seed::random(&mut rng);
        // equal keys on both sides cancel: no zero-sharing
        let pairwise = if broken { [same.clone(), same.clone(), same] } else { [(); 3].map(|()| Seed::random(&mut rng)) };
        let round = Round { task: [0; 32], round: 1, epoch: run as u64, coded: 64, block_words: 1, pairwise };
        let mut opened = [false; 3];
        round
            .count(&parties, |party, message| {
                let i = usize::from(party.index());
                // one level for three clients; what follows is the opening
                if !std::mem::replace(&mut opened[i], true) {
                    run_views[i].extend_from_slice(message);
                }
            })
            .unwrap();
        seen.iter_mut().zip(run_views).for_each(|(all, view)| all.push(view));
    }
    seen.map(|runs| {
        let words = runs[0].len();
        let mut view = View { bits: vec![0; words * 64], bytes: vec![[0; 256]; words], pairs: vec![0; words * words] };
        for run in &runs {
            for (w, word) in run.iter().enumerate() {
                (0..64).for_each(|j| view.bits[w * 64 + j] += (word >> j & 1) as u32);
                word.to_le_bytes().iter().for_each(|b| view.bytes[w][usize::from(*b)] += 1);
                run[..w].iter().enumerate().for_each(|(v, other)| view.pairs[w * words + v] += ((word ^ other) & 1) as u32);
            }
        }
        view
    })
}

/// What is not uniform about a view, if anything; the other view is of another input.
fn suspicion(view: &View, other: &View) -> Option<String> {
    let n = RUNS as f64;
    let sigma = (n / 4.0).sqrt();
    let biased = |counts: &[u32], what: &str| {
        let at = counts.iter().enumerate().find(|(_, c)| (f64::from(**c) - n / 2.0).abs() > 4.5 * sigma);
        at.map(|(i, c)| format!("{what} {i}: {c} of {RUNS}"))
    };
    let words = view.bytes.len();
    let pairs: Vec<u32> = (0..words).flat_map(|w| (0..w).map(move |v| (w, v))).map(|(w, v)| view.pairs[w * words + v]).collect();
    if let Some(found) = biased(&view.bits, "bit").or_else(|| biased(&pairs, "pair")) {
        return Some(found);
    }
    for (w, (a, b)) in view.bytes.iter().zip(&other.bytes).enumerate() {
        let expected = n * 8.0 / 256.0;
        let uniform: f64 = a.iter().map(|c| (f64::from(*c) - expected).powi(2) / expected).sum();
        let between: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2) / f64::from((a + b).max(1))).sum();
        // 255 degrees of freedom: p = 1e-6 at 377
        if uniform > 377.0 || between > 377.0 {
            return Some(format!("word {w}: chi-square {uniform} against uniform, {between} against the other input"));
        }
    }
    None
}

#[test]
fn one_partys_view_is_uniform_and_the_same_for_any_input() {
    let (zeros, ones) = (views(0, false), views(u64::MAX, false));
    for (party, (a, b)) in zeros.iter().zip(&ones).enumerate() {
        assert_eq!(suspicion(a, b), None, "party {party}");
        assert_eq!(suspicion(b, a), None, "party {party}");
    }
}

/// The test above would notice: without zero-sharing a message tells something.
#[test]
fn without_zero_sharing_the_test_fails() {
    let (zeros, ones) = (views(0, true), views(u64::MAX, true));
    let noticed = zeros.iter().zip(&ones).filter(|(a, b)| suspicion(a, b).or_else(|| suspicion(b, a)).is_some()).count();
    assert!(noticed > 0);
}
