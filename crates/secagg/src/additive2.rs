//! Mode A: two parties with additive shares modulo 2^w, w enough for the number of clients. Nothing is exchanged but the sums.
//!
//! The simplest deployment and the oracle for mode B. Uploads are w times as large, and nothing bounds what a client adds: a
//! malicious one can move every count to any value.

use rand::CryptoRng;

use crate::bits::Bits;
use crate::error::{SecAggError, expect_size};
use crate::prg::{ReportContext, Seed, Stream};

/// Bits of a residue for up to `clients` clients.
pub fn residue_bits(clients: u32) -> u32 {
    (u32::BITS - clients.leading_zeros()).max(1)
}

/// What a client sends.
pub struct Upload {
    /// Seed of party 0's share.
    pub k0: Seed,
    /// Party 1's share, residues packed without gaps.
    pub residues: Vec<u8>,
}

/// Splits `bits` for a round of at most `clients` clients.
///
/// # Errors
/// If there may be no clients.
pub fn split(bits: &Bits, clients: u32, report: &ReportContext, rng: &mut impl CryptoRng) -> Result<Upload, SecAggError> {
    let width = width(clients)?;
    let k0 = Seed::random(rng);
    let mask = seeded(&k0, report, bits.len(), width);
    let shares: Vec<u32> = mask.iter().enumerate().map(|(j, m)| u32::from(bits.get(j)).wrapping_sub(*m) & low(width)).collect();
    Ok(Upload { k0, residues: pack(&shares, width) })
}

/// Sum of one party's shares.
pub struct Sum {
    width: u32,
    residues: Vec<u32>,
}

impl Sum {
    /// Of nothing, for `coded` coordinates and at most `clients` clients.
    ///
    /// # Errors
    /// If there may be no clients.
    pub fn new(coded: usize, clients: u32) -> Result<Self, SecAggError> {
        Ok(Self { width: width(clients)?, residues: vec![0; coded] })
    }

    /// Party 0: adds a client by its seed.
    pub fn add_seed(&mut self, seed: &Seed, report: &ReportContext) {
        let mask = seeded(seed, report, self.residues.len(), self.width);
        self.add(&mask);
    }

    /// Party 1: adds a client by its residues.
    ///
    /// # Errors
    /// If they have another size or bits after the last are set.
    pub fn add_residues(&mut self, bytes: &[u8]) -> Result<(), SecAggError> {
        let shares = unpack(bytes, self.residues.len(), self.width)?;
        self.add(&shares);
        Ok(())
    }

    /// The sum so far.
    pub fn residues(&self) -> &[u32] {
        &self.residues
    }

    fn add(&mut self, shares: &[u32]) {
        let low = low(self.width);
        self.residues.iter_mut().zip(shares).for_each(|(r, s)| *r = r.wrapping_add(*s) & low);
    }

    /// The counts, from both parties' sums.
    ///
    /// # Errors
    /// If they are of different rounds.
    pub fn open(&self, other: &Self) -> Result<Vec<u32>, SecAggError> {
        expect_size("bits of a residue", self.width as usize, other.width as usize)?;
        expect_size("coordinates", self.residues.len(), other.residues.len())?;
        Ok(self.residues.iter().zip(&other.residues).map(|(a, b)| a.wrapping_add(*b) & low(self.width)).collect())
    }
}

fn width(clients: u32) -> Result<u32, SecAggError> {
    if clients == 0 { Err(SecAggError::Config("a round has at least one client".into())) } else { Ok(residue_bits(clients)) }
}

fn low(width: u32) -> u32 {
    if width >= 32 { u32::MAX } else { (1 << width) - 1 }
}

/// One word of the stream gives two residues.
fn seeded(seed: &Seed, report: &ReportContext, coded: usize, width: u32) -> Vec<u32> {
    let mut words = vec![0; coded.div_ceil(2)];
    Stream::share(seed, report, 0).fill(&mut words);
    let halves = words.iter().flat_map(|w| [*w as u32, (*w >> 32) as u32]);
    halves.take(coded).map(|r| r & low(width)).collect()
}

fn pack(values: &[u32], width: u32) -> Vec<u8> {
    let (mut bytes, mut held, mut bits) = (Vec::with_capacity((values.len() * width as usize).div_ceil(8)), 0u64, 0);
    for v in values {
        held |= u64::from(*v) << bits;
        bits += width;
        while bits >= 8 {
            bytes.push(held as u8);
            held >>= 8;
            bits -= 8;
        }
    }
    if bits > 0 {
        bytes.push(held as u8);
    }
    bytes
}

fn unpack(bytes: &[u8], count: usize, width: u32) -> Result<Vec<u32>, SecAggError> {
    expect_size("bytes of residues", (count * width as usize).div_ceil(8), bytes.len())?;
    let (mut values, mut held, mut bits) = (Vec::with_capacity(count), 0u64, 0);
    for byte in bytes {
        held |= u64::from(*byte) << bits;
        bits += 8;
        while bits >= width && values.len() < count {
            values.push(held as u32 & low(width));
            held >>= width;
            bits -= width;
        }
    }
    if held != 0 { Err(SecAggError::Padding) } else { Ok(values) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residues_hold_every_count() {
        for (clients, bits) in [(1, 1), (2, 2), (3, 2), (4, 3), (1000, 10), (1023, 10), (1024, 11), (u32::MAX, 32)] {
            assert_eq!(residue_bits(clients), bits, "{clients}");
        }
    }

    #[test]
    fn packing_is_undone_and_checked() {
        for width in [1, 2, 7, 8, 10, 31, 32] {
            let values: Vec<u32> = (0..37u32).map(|v| v.wrapping_mul(0x9E37_79B9) & low(width)).collect();
            let bytes = pack(&values, width);
            assert_eq!(unpack(&bytes, 37, width).unwrap(), values, "{width}");
            assert!(unpack(&bytes[1..], 37, width).is_err() && unpack(&bytes, 36, width).is_err() || width == 1);
            if 37 * width % 8 != 0 {
                let mut dirty = bytes;
                *dirty.last_mut().unwrap() |= 0x80;
                assert_eq!(unpack(&dirty, 37, width), Err(SecAggError::Padding), "{width}");
            }
        }
    }
}
