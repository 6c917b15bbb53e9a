//! The circuits of a round, block by block, for one party.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use isthmus_federate::RoundPlan;
use isthmus_proto::aggregator_v1::Mode;
use isthmus_secagg::boolean3::{Circuit, Exchange, Opened, Party, Shares, ZeroKeys, filter};
use isthmus_secagg::{SecAggError, additive2};

use super::{WINDOW, block_width};
use crate::error::AggregatorError;
use crate::store::Outcome;

/// Blocks of the filter's counting have numbers of their own.
const FILTER_BLOCKS: u32 = 1 << 30;
const FILTER_TOTAL: u32 = 1 << 31;

/// A party's shares of all clients of the set.
pub trait Rows: Sync {
    /// Words `from..from + width` of every client, one row after the other.
    ///
    /// # Errors
    /// If a share cannot be read.
    fn block(&self, from: usize, width: usize) -> Result<Shares, AggregatorError>;
}

/// What a round's circuits depend on, beside the shares.
pub struct Counting<'a> {
    /// The round.
    pub plan: &'a RoundPlan,
    /// This party.
    pub party: Party,
    /// Clients of the set.
    pub clients: usize,
    /// The filter's direction, if there is a filter.
    pub direction: Option<&'a [u64]>,
    /// Keys of this attempt.
    pub keys: &'a ZeroKeys,
}

/// Where a block of words begins and how wide it is.
fn blocks(words: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..words).step_by(width).map(move |from| (from, width.min(words - from)))
}

impl Counting<'_> {
    /// This party's shares of the digits of all counts, block after block; behind them, if there is a filter, those of the number of clients kept
    /// and, if the round reveals them, their flags. `link` makes a connection for each worker.
    ///
    /// # Errors
    /// If a share cannot be read or a neighbour does not answer.
    pub fn run<L: Exchange>(&self, rows: &dyn Rows, link: impl Fn(u32) -> L + Sync) -> Result<Shares, AggregatorError> {
        let words = self.plan.bits().div_ceil(64);
        let all: Vec<(usize, usize)> = blocks(words, block_width(self.clients)).collect();
        let filtered = match (self.plan.filter(), self.direction) {
            (Some(filter), Some(direction)) => Some(self.filter(rows, &link, filter.drop as usize, direction)?),
            (Some(_), None) => return Err(AggregatorError::State("the filter's direction is missing".into())),
            (None, _) => None,
        };
        let counts = in_parallel(all.len(), WINDOW, |block| {
            let (from, width) = all[block as usize];
            let shares = rows.block(from, width)?;
            let mut link = link(block);
            let mut circuit = Circuit::new(self.keys, block, &mut link);
            let shares = match &filtered {
                Some((keep, _)) => filter::kept_rows(&mut circuit, &shares, keep, width)?,
                None => shares,
            };
            Ok(circuit.sum(width, vec![shares])?)
        })?;
        let mut opening = Shares::default();
        counts.iter().for_each(|part| opening.append(part));
        if let Some((keep, size)) = &filtered {
            opening.append(size);
            if self.plan.filter().is_some_and(|f| f.reveal_flags) {
                opening.append(keep);
            }
        }
        Ok(opening)
    }

    /// Keep bits, and their number.
    fn filter<L: Exchange>(
        &self,
        rows: &dyn Rows,
        link: &(impl Fn(u32) -> L + Sync),
        drop: usize,
        direction: &[u64],
    ) -> Result<(Shares, Shares), AggregatorError> {
        let coded = self.plan.coded();
        let all: Vec<(usize, usize)> = blocks(coded.div_ceil(64), block_width(self.clients)).collect();
        let parts = in_parallel(all.len(), WINDOW, |block| {
            let (from, width) = all[block as usize];
            let shares = rows.block(from, width)?;
            let (number, coordinates) = (FILTER_BLOCKS + block, (coded - from * 64).min(width * 64));
            let mut link = link(number);
            let mut circuit = Circuit::new(self.keys, number, &mut link);
            let direction =
                direction.get(from..from + width).ok_or_else(|| AggregatorError::State("the filter's direction is too short".into()))?;
            Ok(filter::agreement(&mut circuit, self.party, shares, self.clients, direction, coordinates)?)
        })?;
        let mut link = link(FILTER_TOTAL);
        let mut circuit = Circuit::new(self.keys, FILTER_TOTAL, &mut link);
        let total = filter::total(&mut circuit, self.clients.div_ceil(64), &parts)?;
        let keep = filter::keep_highest(&mut circuit, self.party, &total, self.clients, drop.min(self.clients - 1))?;
        let size = filter::size(&mut circuit, &keep, self.clients)?;
        Ok((keep, size))
    }
}

/// Runs blocks 0 to `count` - 1 in order, `threads` at a time, each in a thread: they wait for the network most of the time.
fn in_parallel<T: Send>(
    count: usize,
    threads: usize,
    run: impl Fn(u32) -> Result<T, AggregatorError> + Sync,
) -> Result<Vec<T>, AggregatorError> {
    let next = AtomicU32::new(0);
    let failed = AtomicBool::new(false);
    let results = Mutex::new(Vec::with_capacity(count));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let block = next.fetch_add(1, Ordering::Relaxed);
                    if block as usize >= count {
                        break;
                    }
                    let result = run(block);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((block, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(block, _)| *block);
    let done = results.into_iter().map(|(_, result)| result).collect::<Result<Vec<T>, _>>()?;
    if done.len() == count { Ok(done) } else { Err(AggregatorError::Transport("a worker stopped".into())) }
}

/// Bits of the number of clients.
fn digits(clients: usize) -> usize {
    (usize::BITS - clients.leading_zeros()) as usize
}

/// Words of an opening.
pub fn opening_words(plan: &RoundPlan, clients: usize) -> usize {
    if plan.config().mode() == Mode::Additive2 {
        return plan.bits().div_ceil(2);
    }
    let filter = plan.filter().map_or(0, |f| digits(clients) + if f.reveal_flags { clients.div_ceil(64) } else { 0 });
    digits(clients) * plan.bits().div_ceil(64) + filter
}

/// Counts, flags and the number of clients kept, from an opened result.
///
/// # Errors
/// If it has another size.
pub fn read_opened(plan: &RoundPlan, clients: usize, opened: &[u64]) -> Result<(Outcome, u32), AggregatorError> {
    if opened.len() != opening_words(plan, clients) {
        return Err(AggregatorError::Invalid(format!("a result of {} words instead of {}", opened.len(), opening_words(plan, clients))));
    }
    if plan.config().mode() == Mode::Additive2 {
        let counts = opened.iter().flat_map(|w| w.to_le_bytes()).take(4 * plan.bits()).collect::<Vec<u8>>();
        return Ok((Outcome { counts: counts.into(), flags: Default::default() }, clients as u32));
    }
    let digits = digits(clients);
    let mut counts = Vec::with_capacity(plan.bits() * 4);
    let mut at = 0;
    for (from, width) in blocks(plan.bits().div_ceil(64), block_width(clients)) {
        let part = Opened::new(width, opened[at..at + digits * width].to_vec())?;
        at += digits * width;
        let numbers = part.counts((plan.bits() - from * 64).min(width * 64))?;
        counts.extend(numbers.iter().flat_map(|c| c.to_le_bytes()));
    }
    let (mut kept, mut flags) = (clients as u32, Vec::new());
    if plan.filter().is_some() {
        kept = opened[at..at + digits].iter().enumerate().map(|(w, d)| ((d & 1) as u32) << w).sum();
        flags = opened[at + digits..].iter().flat_map(|w| w.to_le_bytes()).collect();
        flags.truncate(clients.div_ceil(8) * usize::from(!flags.is_empty()));
    }
    Ok((Outcome { counts: counts.into(), flags: flags.into() }, kept))
}

/// Mode A: the sum of both parties' residues, in words of two numbers.
///
/// # Errors
/// If they differ in size.
pub fn open_additive(plan: &RoundPlan, own: &[u64], other: &[u64]) -> Result<Vec<u64>, AggregatorError> {
    if own.len() != other.len() {
        return Err(SecAggError::Size { what: "words of residues", expected: own.len(), found: other.len() }.into());
    }
    let low = (1u64 << additive2::residue_bits(plan.config().max_clients)) - 1;
    let halves = |w: u64| (w & 0xFFFF_FFFF, w >> 32);
    let add = |(a, b): (&u64, &u64)| {
        let ((a0, a1), (b0, b1)) = (halves(*a), halves(*b));
        ((a0 + b0) & low) | ((a1 + b1) & low) << 32
    };
    Ok(own.iter().zip(other).map(add).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn blocks_come_out_in_order_whatever_the_number_of_threads() {
        for threads in 1..=9 {
            // later blocks are ready first
            let run = |block: u32| {
                std::thread::sleep(std::time::Duration::from_millis(u64::from(7 - block % 8)));
                Ok(block)
            };
            assert_eq!(in_parallel(20, threads, run).unwrap(), (0..20).collect::<Vec<u32>>(), "{threads}");
        }
    }

    #[test]
    fn a_failed_block_fails_all() {
        let run = |block: u32| if block == 3 { Err(AggregatorError::Deadline("a block")) } else { Ok(block) };
        assert!(matches!(in_parallel(20, 4, run), Err(AggregatorError::Deadline(_))));
    }
}
