//! Leaving the clients out whose bits agree least with a public direction, without learning which.
//!
//! With a public symmetric scale every client's decoded update has the same length, so its cosine with a direction g of signs is
//! fixed by how many of its bits equal those of g: (2 agreement - D) / D. All of it happens on shares: XOR with the signs, a count
//! along each client's vector, selection of the K lowest counts by radix, and an AND of every row with its client's keep bit.
//! The shape (norms, cosine, top-K) is that of ScionFL's Aura; algorithm and circuits are ours (no text of Aura's was at hand).

use crate::bits::WORD;
use crate::boolean3::circuit::Circuit;
use crate::boolean3::{Party, Shares};
use crate::error::{SecAggError, expect_size};

/// How many of some coordinates agree with `direction`, for each client: digits of `rows.div_ceil(64)` words, a bit for each client.
///
/// `block` holds a row of `direction.len()` words for each of `rows` clients; the first `coordinates` are looked at.
///
/// # Errors
/// If sizes differ, or as [`crate::boolean3::Exchange::exchange`].
pub fn agreement(
    circuit: &mut Circuit<'_>,
    party: Party,
    mut block: Shares,
    rows: usize,
    direction: &[u64],
    coordinates: usize,
) -> Result<Shares, SecAggError> {
    expect_size("words of the block", rows * direction.len(), block.len())?;
    if coordinates > direction.len() * WORD {
        return Err(SecAggError::Size { what: "coordinates of the block", expected: direction.len() * WORD, found: coordinates });
    }
    block.xor_public(party, direction.iter().map(|g| !g).cycle().take(rows * direction.len()));
    let lanes = block.map(|words| transposed(words, rows, direction.len(), coordinates));
    circuit.sum(rows.div_ceil(WORD), vec![lanes])
}

/// Adds the agreements of several blocks: digits of `words` words each.
///
/// # Errors
/// As [`Circuit::sum`].
pub fn total(circuit: &mut Circuit<'_>, words: usize, parts: &[Shares]) -> Result<Shares, SecAggError> {
    let digits = parts.iter().map(|p| p.len() / words.max(1)).max().unwrap_or(0);
    let mut columns = vec![Shares::default(); digits];
    for part in parts {
        for (d, column) in columns.iter_mut().enumerate().take(part.len() / words) {
            column.append(&part.part(d * words..(d + 1) * words));
        }
    }
    circuit.sum(words, columns)
}

/// Keep bits, one for each of `clients`: all but the `drop` clients of lowest value. Of equal values at the limit all are kept.
///
/// `values` are digits of `clients.div_ceil(64)` words each, weight 1 first.
///
/// # Errors
/// If nobody would be kept, or as [`crate::boolean3::Exchange::exchange`].
pub fn keep_highest(circuit: &mut Circuit<'_>, party: Party, values: &Shares, clients: usize, drop: usize) -> Result<Shares, SecAggError> {
    if drop >= clients {
        return Err(SecAggError::Config(format!("of {clients} clients {drop} cannot be dropped")));
    }
    let words = clients.div_ceil(WORD);
    let width = (usize::BITS - clients.leading_zeros()) as usize;
    let everyone = all(clients);
    let mut candidates = Shares::zeros(words);
    candidates.xor_public(party, everyone.iter().copied());
    let mut dropped = Shares::zeros(words);
    // how many candidates are below the limit that is being searched, a word for each digit
    let mut rank = Shares::zeros(width);
    rank.xor_public(party, (0..width).map(|w| (drop >> w & 1) as u64));
    for digit in (0..values.len() / words).rev() {
        let mut zero = values.part(digit * words..(digit + 1) * words);
        zero.xor_public(party, everyone.iter().copied());
        let low = circuit.and(&candidates, &zero)?;
        let mut count = circuit.sum(1, vec![single(&low, clients)])?;
        count.append(&Shares::zeros(width - count.len()));
        let (less, rest) = subtract(circuit, party, &rank, &count)?;
        // fewer than rank + 1 are low: the limit's digit is 1, the low ones are below it
        let choose = broadcast(&less, words);
        let mut pick = choose.clone();
        pick.append(&choose);
        pick.append(&broadcast(&less, width));
        let mut difference = rank.clone();
        difference.xor(&rest);
        let mut from = candidates.clone();
        from.append(&low);
        from.append(&difference);
        let chosen = circuit.and(&pick, &from)?;
        candidates.xor(&low);
        candidates.xor(&chosen.part(0..words));
        dropped.xor(&low);
        dropped.xor(&chosen.part(words..2 * words));
        rank = rest;
        rank.xor(&chosen.part(2 * words..2 * words + width));
    }
    dropped.xor_public(party, everyone);
    Ok(dropped)
}

/// Number of set bits among the first `clients`: digits of one word, in its first bit.
///
/// # Errors
/// As [`Circuit::sum`].
pub fn size(circuit: &mut Circuit<'_>, bits: &Shares, clients: usize) -> Result<Shares, SecAggError> {
    circuit.sum(1, vec![single(bits, clients)])
}

/// A block whose rows of `width` words are zero for clients that are not kept.
///
/// # Errors
/// As [`Circuit::and`].
pub fn kept_rows(circuit: &mut Circuit<'_>, block: &Shares, keep: &Shares, width: usize) -> Result<Shares, SecAggError> {
    let rows = block.len() / width.max(1);
    let masks = keep.map(|words| (0..rows).flat_map(|r| std::iter::repeat_n(mask(words, r), width)).collect());
    circuit.and(block, &masks)
}

/// a < b, and a - b, of numbers with a word for each digit.
fn subtract(circuit: &mut Circuit<'_>, party: Party, a: &Shares, b: &Shares) -> Result<(Shares, Shares), SecAggError> {
    let mut borrow = Shares::zeros(1);
    let mut difference = Shares::default();
    for w in 0..a.len() {
        let (x, y) = (a.part(w..w + 1), b.part(w..w + 1));
        let mut digit = x.clone();
        digit.xor(&y);
        digit.xor(&borrow);
        difference.append(&digit);
        // the majority of not x, y and the borrow: ((x ^ borrow ^ 1)(y ^ borrow)) ^ borrow
        let (mut u, mut v) = (x, y);
        u.xor(&borrow);
        u.xor_public(party, [1]);
        v.xor(&borrow);
        let carry = circuit.and(&u, &v)?;
        borrow.xor(&carry);
    }
    Ok((borrow, difference))
}

/// The first `clients` bits set.
fn all(clients: usize) -> Vec<u64> {
    let word = |k: usize| if (k + 1) * WORD <= clients { u64::MAX } else { (1 << (clients % WORD)) - 1 };
    (0..clients.div_ceil(WORD)).map(word).collect()
}

fn bit(words: &[u64], j: usize) -> u64 {
    words[j / WORD] >> (j % WORD) & 1
}

fn mask(words: &[u64], j: usize) -> u64 {
    bit(words, j).wrapping_neg()
}

/// A row for each bit, in the first bit of its word.
fn single(bits: &Shares, clients: usize) -> Shares {
    bits.map(|words| (0..clients).map(|j| bit(words, j)).collect())
}

/// The first bit of the only word in all bits of `words` words.
fn broadcast(single: &Shares, words: usize) -> Shares {
    single.map(|word| vec![mask(word, 0); words])
}

/// Rows of clients with a bit for each coordinate become rows of coordinates with a bit for each client.
fn transposed(rows: &[u64], clients: usize, width: usize, coordinates: usize) -> Vec<u64> {
    let lanes = clients.div_ceil(WORD);
    let mut out = vec![0; coordinates * lanes];
    for lane in 0..lanes {
        for w in 0..coordinates.div_ceil(WORD) {
            let mut square = [0u64; WORD];
            for (r, row) in square.iter_mut().enumerate().take(clients.saturating_sub(lane * WORD)) {
                *row = rows[(lane * WORD + r) * width + w];
            }
            transpose(&mut square);
            for (j, column) in square.iter().enumerate().take(coordinates - w * WORD) {
                out[(w * WORD + j) * lanes + lane] = *column;
            }
        }
    }
    out
}

/// Bit j of word i becomes bit i of word j: swaps of ever smaller squares.
fn transpose(square: &mut [u64; WORD]) {
    let (mut half, mut mask) = (32, 0x0000_0000_FFFF_FFFFu64);
    while half > 0 {
        for i in (0..WORD).filter(|i| i & half == 0) {
            let swap = (square[i] >> half ^ square[i + half]) & mask;
            square[i] ^= swap << half;
            square[i + half] ^= swap;
        }
        half /= 2;
        mask ^= mask << half;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_moves_every_bit() {
        let rows: Vec<u64> = (0..130 * 3u64).map(|k| (k + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
        for coordinates in [1, 63, 64, 65, 192] {
            let out = transposed(&rows, 130, 3, coordinates);
            for j in 0..coordinates {
                for c in 0..130 {
                    assert_eq!(bit(&out[j * 3..], c), bit(&rows[c * 3..], j), "{c} {j}");
                }
                assert_eq!(out[j * 3 + 2] >> 2, 0, "no client beyond the last");
            }
        }
        assert_eq!(all(64), [u64::MAX]);
        assert_eq!(all(65), [u64::MAX, 1]);
    }
}
