//! All three parties of mode B in one process: the oracle for the service, and the base of tests and benchmarks.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::boolean3::count::zero_keys;
use crate::boolean3::{BlockCount, Circuit, Exchange, Party, PartyShare, Shares};
use crate::error::{SecAggError, expect_size};
use crate::prg::{ReportContext, Seed};

/// A round's configuration, as far as counting is concerned.
pub struct Round {
    /// The training task.
    pub task: [u8; 32],
    /// Number of the round.
    pub round: u64,
    /// Attempt at computing it.
    pub epoch: u64,
    /// Bits of an upload.
    pub coded: usize,
    /// Words of a block.
    pub block_words: usize,
    /// Keys of the zero-sharing: `pairwise[i]` is shared by parties i - 1 and i.
    pub pairwise: [Seed; 3],
}

/// A party's shares of all clients in the set, in the same order at every party.
pub type Reports = Vec<(ReportContext, PartyShare)>;

impl Round {
    /// Counts of all coordinates; `observe` sees every message with the party that receives it.
    ///
    /// # Errors
    /// If the parties' reports differ in number or size, or there are none.
    pub fn count(&self, parties: &[Reports; 3], mut observe: impl FnMut(Party, &[u64])) -> Result<Vec<u32>, SecAggError> {
        let words = self.coded.div_ceil(64);
        let mut counts = Vec::with_capacity(self.coded);
        for (block, from) in (0..).zip((0..words).step_by(self.block_words.max(1))) {
            let width = self.block_words.max(1).min(words - from);
            let mut sides = Vec::with_capacity(3);
            for (party, reports) in Party::ALL.into_iter().zip(parties) {
                expect_size("reports", parties[0].len(), reports.len())?;
                let keys = zero_keys(&self.pairwise, party, self.task, self.round, self.epoch);
                sides.push((party, keys, block_shares(reports, block, from, width)?));
            }
            loop {
                let mut sent = Vec::with_capacity(3);
                for (_, keys, side) in &mut sides {
                    sent.push(side.send(keys)?);
                }
                for (party, _, side) in &mut sides {
                    if let Some(message) = &sent[usize::from(party.next().index())] {
                        observe(*party, message);
                        side.receive(message)?;
                    }
                }
                if sent.iter().all(Option::is_none) {
                    break;
                }
            }
            let openings: Vec<Vec<u64>> = sides.iter().map(|(_, _, s)| s.opening().map(<[u64]>::to_vec)).collect::<Result<_, _>>()?;
            let mut results = Vec::with_capacity(3);
            for (party, _, side) in sides {
                let message = &openings[usize::from(party.previous().index())];
                observe(party, message);
                results.push(side.open(message)?.counts((self.coded - from * 64).min(width * 64))?);
            }
            if results[1..].iter().any(|r| *r != results[0]) {
                return Err(SecAggError::Config("the parties opened different counts".into()));
            }
            counts.append(&mut results[0]);
        }
        Ok(counts)
    }
}

/// Runs the same circuit as all three parties, each in a thread with its own shares, and opens what comes out.
///
/// # Errors
/// What a party ran into, or that their results do not fit together.
pub fn run<T: Sync>(
    round: &Round,
    block: u32,
    inputs: &[T; 3],
    circuit: impl Fn(&mut Circuit<'_>, Party, &T) -> Result<Shares, SecAggError> + Sync,
) -> Result<Vec<u64>, SecAggError> {
    let links = [(); 3].map(|()| channel());
    let (sends, receives): (Vec<Sender<_>>, Vec<Receiver<_>>) = links.into_iter().unzip();
    let circuit = &circuit;
    let outputs = std::thread::scope(|scope| {
        let parties = Party::ALL.into_iter().zip(inputs).zip(receives);
        let threads: Vec<_> = parties
            .map(|((party, input), receive)| {
                let mut link = Channels { send: sends[usize::from(party.previous().index())].clone(), receive };
                let keys = zero_keys(&round.pairwise, party, round.task, round.round, round.epoch);
                scope.spawn(move || circuit(&mut Circuit::new(&keys, block, &mut link), party, input))
            })
            .collect();
        drop(sends);
        let ended =
            |t: std::thread::ScopedJoinHandle<'_, _>| t.join().unwrap_or_else(|_| Err(SecAggError::Link("a party panicked".into())));
        threads.into_iter().map(ended).collect::<Result<Vec<Shares>, _>>()
    })?;
    let [a, b, c] = outputs.as_slice() else { return Err(SecAggError::Link("a party is missing".into())) };
    if a.next != b.own || b.next != c.own || c.next != a.own {
        return Err(SecAggError::Config("the parties' shares do not fit together".into()));
    }
    a.open(&c.own)
}

struct Channels {
    send: Sender<Vec<u64>>,
    receive: Receiver<Vec<u64>>,
}

impl Exchange for Channels {
    fn exchange(&mut self, _: u32, message: Vec<u64>) -> Result<Vec<u64>, SecAggError> {
        let gone = |_| SecAggError::Link("a party stopped".into());
        self.send.send(message).map_err(|_| SecAggError::Link("a party stopped".into()))?;
        self.receive.recv().map_err(gone)
    }
}

/// One party's block: the rows of all its reports.
///
/// # Errors
/// If a report is too short for the block, or there are none.
pub fn block_shares(reports: &Reports, block: u32, from: usize, width: usize) -> Result<BlockCount, SecAggError> {
    let (mut own, mut next) = (vec![0; reports.len() * width], vec![0; reports.len() * width]);
    for ((report, share), (own, next)) in reports.iter().zip(own.chunks_exact_mut(width).zip(next.chunks_exact_mut(width))) {
        share.expand(report, from, own, next)?;
    }
    BlockCount::new(block, width, own, next)
}
