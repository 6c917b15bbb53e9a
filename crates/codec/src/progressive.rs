//! The progressive bitstream: a container of level 1, followed by any number of its refinements. Whoever has its beginning, up to the end of any of them,
//! can decode that; the more there is, the finer is the latent.
//!
//! | size | field |
//! |---|---|
//! | c | the container ([`crate::container`]) |
//! | then for each refinement | |
//! | 1 | its number, from 1 |
//! | 3 | payload length n |
//! | n | payload |
//! | 4 | CRC-32C of everything before, from the container's first byte on, but for the checksums |
//!
//! All integers are little-endian. The checksum binds a refinement to just what it refines. (The sum of bytes with their own sum behind them is always
//! the same: that is why sums are left out.)

use crate::CodecError;
use crate::bundle::BundleHash;
use crate::container::{self, Container, max_payload};
use crate::refinement::{self, MAX_STEPS, Refinements};
use crate::tables::{LatentShape, Tables};

/// Bytes around the payload of a refinement.
pub const OVERHEAD: usize = 8;

/// The level that is refined.
pub const BASE: u8 = 1;

/// A checked view of the beginning of a progressive bitstream; without refinements it is just a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progressive<'a> {
    /// What it begins with.
    pub container: Container<'a>,
    /// Payloads of the refinements.
    refinements: Vec<&'a [u8]>,
}

impl<'a> Progressive<'a> {
    /// Parses the container and what follows it, and checks lengths and checksums. No bundle is needed.
    ///
    /// # Errors
    /// [`CodecError::Malformed`] says which check failed.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CodecError> {
        let claimed = container::claimed_len(bytes).unwrap_or(bytes.len());
        let (first, mut rest) = bytes.split_at_checked(claimed).unwrap_or((bytes, &[]));
        let container = Container::parse(first)?;
        // what the container ends with is the sum of all before
        let mut sum = checksum(first);
        let mut refinements = Vec::new();
        while !rest.is_empty() {
            let number = refinements.len() + 1;
            let short = || CodecError::malformed(format!("refinement {number} is incomplete"));
            let (&[step, a, b, c], behind) = rest.split_first_chunk::<4>().ok_or_else(short)?;
            if usize::from(step) != number || number > MAX_STEPS {
                return Err(CodecError::malformed(format!("refinement {step} follows the container in place {number}")));
            }
            let len = u32::from_le_bytes([a, b, c, 0]) as usize;
            let (payload, behind) = behind.split_at_checked(len).ok_or_else(short)?;
            let (expected, behind) = behind.split_first_chunk::<4>().ok_or_else(short)?;
            sum = crc32c::crc32c_append(sum, &rest[..4 + len]);
            if sum != u32::from_le_bytes(*expected) {
                return Err(CodecError::malformed(format!("refinement {number} was damaged, or refines another bitstream")));
            }
            refinements.push(payload);
            rest = behind;
        }
        Ok(Self { container, refinements })
    }

    /// Refinements that are there.
    pub fn refinements(&self) -> usize {
        self.refinements.len()
    }

    /// Decodes and de-quantises into the decoder's input (channel-major), appended to `out`, as fine as what is there allows.
    ///
    /// # Errors
    /// As [`Container::decode`], and [`CodecError::UnknownRefinement`] if the bundle has fewer refinements; `out` is then as it was.
    pub fn decode_into(
        &self,
        hash: &BundleHash,
        shape: LatentShape,
        (tables, refinements): (&Tables, Option<&Refinements>),
        out: &mut Vec<f32>,
    ) -> Result<(), CodecError> {
        let Some(last) = self.refinements.len().checked_sub(1) else {
            return self.container.decode_into(hash, shape, tables, out);
        };
        let known = refinements.map_or(&[][..], Refinements::steps);
        let finest = known.get(last).ok_or(CodecError::UnknownRefinement { step: last + 1, steps: known.len() })?;
        if self.container.header.quality != BASE.into() {
            return Err(CodecError::malformed(format!(
                "refinements follow quality {}; they refine level {BASE}",
                self.container.header.quality
            )));
        }
        let mut symbols = self.container.decode(hash, shape, tables)?;
        for (refinement, payload) in known.iter().zip(&self.refinements) {
            if payload.len() > max_payload(shape) {
                return Err(CodecError::malformed("a refinement is longer than any coded latent"));
            }
            symbols = refinement.decode(payload, &symbols, shape)?;
        }
        finest.dequantise_into(&symbols, shape, out)
    }
}

/// The sum at the end of a container.
fn checksum(container: &[u8]) -> u32 {
    container.last_chunk::<4>().map_or(0, |sum| u32::from_le_bytes(*sum))
}

/// Codes a latent (channel-major): the container of level 1, then the refinements. They belong together in this order.
///
/// # Errors
/// [`CodecError::BadLatent`] if the latent does not fit or a value is not finite.
pub fn encode(
    latent: &[f32],
    hash: &BundleHash,
    shape: LatentShape,
    (tables, refinements): (&Tables, &Refinements),
) -> Result<Vec<Vec<u8>>, CodecError> {
    let base = tables.level(BASE)?;
    let symbols = refinement::quantise(&base, refinements.steps(), latent, shape)?;
    let mut parts = Vec::with_capacity(symbols.len());
    let mut sum = 0;
    if let Some(coarsest) = symbols.first() {
        let container = container::encode(coarsest, BASE, hash, shape, tables)?;
        sum = checksum(&container);
        parts.push(container);
    }
    for ((step, pair), number) in refinements.steps().iter().zip(symbols.windows(2)).zip(1u8..) {
        let payload = step.encode(&pair[0], &pair[1], shape)?;
        let mut part = Vec::with_capacity(payload.len() + OVERHEAD);
        part.push(number);
        part.extend(&(payload.len() as u32).to_le_bytes()[..3]);
        part.extend(payload);
        sum = crc32c::crc32c_append(sum, &part);
        part.extend(sum.to_le_bytes());
        parts.push(part);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::pmf::TOTAL;
    use crate::refinement::Refinement;
    use crate::tables::{ChannelTable, LevelTables};

    const SHAPE: LatentShape = LatentShape { channels: 3, height: 4, width: 5 };
    const HASH: BundleHash = BundleHash([7; 32]);

    fn channel(gain: f32, median: f32) -> ChannelTable {
        // -2 to 2, all else escapes
        let each = TOTAL / 8;
        ChannelTable::new(gain, 1.0 / gain, median, -2, vec![each, each, each, each, each, TOTAL - 5 * each]).unwrap()
    }

    /// Channel 2 is silent at level 1 and in the first refinement.
    fn tables() -> (Tables, Refinements) {
        let base = LevelTables::in_order(vec![channel(1.0, 0.25), channel(0.5, 0.0), channel(4.0, 0.0)], vec![1, 0]).unwrap();
        let step = |gains: [(f32, f32); 3], factors: Vec<u16>, order: Vec<u16>| {
            let known = (0..3).map(|_| channel(1.0, 0.0));
            let all = known.chain(gains.into_iter().map(|(gain, median)| channel(gain, median))).collect();
            Refinement::new(factors, LevelTables::with_given(all, order, 3).unwrap()).unwrap()
        };
        // says nothing of channel 1, whose symbols grow all the same
        let first = step([(3.0, 0.75), (1.5, 0.0), (4.0, 0.0)], vec![3, 3, 1], vec![3]);
        let second = step([(9.0, 2.25), (7.5, 0.0), (4.0, 0.0)], vec![3, 5, 1], vec![5, 3, 4]);
        (Tables { levels: vec![base] }, Refinements::new(vec![first, second]).unwrap())
    }

    fn latent() -> Vec<f32> {
        (0..SHAPE.symbols()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 9.0).collect()
    }

    #[test]
    fn every_beginning_decodes_and_more_is_finer() {
        let (tables, refinements) = tables();
        let parts = encode(&latent(), &HASH, SHAPE, (&tables, &refinements)).unwrap();
        assert_eq!(parts.len(), 3);
        // the container is just the one of level 1
        let plain = container::encode(&tables.level(1).unwrap().quantise(&latent(), SHAPE).unwrap(), 1, &HASH, SHAPE, &tables).unwrap();
        assert_eq!(parts[0], plain);
        let mut last = f32::INFINITY;
        for n in 1..=3 {
            let bytes = parts[..n].concat();
            let parsed = Progressive::parse(&bytes).unwrap();
            assert_eq!(parsed.refinements(), n - 1);
            let mut out = vec![0.5];
            parsed.decode_into(&HASH, SHAPE, (&tables, Some(&refinements)), &mut out).unwrap();
            assert_eq!(out.len(), 1 + SHAPE.symbols());
            let error: f32 = out[1..].iter().zip(latent()).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(error < last, "{error} after {last}");
            last = error;
        }
        let steps: Vec<f32> = [9.0, 7.5, 4.0].into_iter().flat_map(|gain: f32| vec![0.5 / gain; SHAPE.positions()]).collect();
        let mut out = Vec::new();
        Progressive::parse(&parts.concat()).unwrap().decode_into(&HASH, SHAPE, (&tables, Some(&refinements)), &mut out).unwrap();
        assert!(out.iter().zip(latent()).zip(steps).all(|((a, b), half)| (a - b).abs() <= half + 1e-5), "within half a step of the finest");
    }

    #[test]
    fn any_finite_latent_is_coded_and_decoded() {
        let (tables, refinements) = tables();
        refinements.check(&tables.levels[0]).unwrap();
        for huge in [1e4, 1e9, f32::MAX] {
            let latent: Vec<f32> = latent().iter().map(|v| v * huge).map(|v| v.clamp(f32::MIN / 16.0, f32::MAX / 16.0)).collect();
            let bytes = encode(&latent, &HASH, SHAPE, (&tables, &refinements)).unwrap().concat();
            let mut out = Vec::new();
            Progressive::parse(&bytes).unwrap().decode_into(&HASH, SHAPE, (&tables, Some(&refinements)), &mut out).unwrap();
            assert!(out.iter().zip(&latent).all(|(a, b)| a * b >= 0.0 || b.abs() < 1.0));
        }
        // of other tables
        let mut other = tables.clone();
        other.levels[0].channels[0].gain *= 1.01;
        assert!(refinements.check(&other.levels[0]).unwrap_err().to_string().contains("nested"));
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        let (tables, refinements) = tables();
        let parts = encode(&latent(), &HASH, SHAPE, (&tables, &refinements)).unwrap();
        let other: Vec<f32> = latent().iter().map(|v| -v).collect();
        let others = encode(&other, &HASH, SHAPE, (&tables, &refinements)).unwrap();
        let malformed = |bytes: &[u8], why: &str| match Progressive::parse(bytes) {
            Err(CodecError::Malformed(said)) => assert!(said.contains(why), "{said}"),
            parsed => panic!("{parsed:?}"),
        };
        malformed(&[&parts[0][..], &parts[2]].concat(), "in place 1");
        malformed(&[&parts[0][..], &others[1]].concat(), "refines another");
        malformed(&[&parts[0][..], &parts[1], &parts[1]].concat(), "in place 2");
        let whole = parts.concat();
        for end in parts[0].len() + 1..whole.len() {
            if end != parts[0].len() + parts[1].len() {
                malformed(&whole[..end], "");
            }
        }
        for at in parts[0].len()..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            malformed(&damaged, "");
        }
        // a bundle without refinements, or with fewer
        let parsed = Progressive::parse(&whole).unwrap();
        let refused = parsed.decode_into(&HASH, SHAPE, (&tables, None), &mut Vec::new());
        assert!(matches!(refused, Err(CodecError::UnknownRefinement { step: 2, steps: 0 })), "{refused:?}");
        // of another bundle
        let refused = parsed.decode_into(&BundleHash([8; 32]), SHAPE, (&tables, Some(&refinements)), &mut Vec::new());
        assert!(matches!(refused, Err(CodecError::WrongBundle { .. })), "{refused:?}");
        // values that are no numbers
        let refused = encode(&vec![f32::NAN; SHAPE.symbols()], &HASH, SHAPE, (&tables, &refinements));
        assert!(matches!(refused, Err(CodecError::BadLatent(_))));
    }

    #[test]
    fn files_of_refinements_are_read_as_they_were_written() {
        let (_, refinements) = tables();
        let bytes = refinements.to_bytes();
        let again = Refinements::from_bytes(&bytes).unwrap();
        assert_eq!(again.to_bytes(), bytes);
        assert_eq!(again.steps()[1].factors(), [3, 5, 1]);
        for end in 0..bytes.len() {
            assert!(Refinements::from_bytes(&bytes[..end]).is_err(), "{end}");
        }
        let mut even = bytes.clone();
        even[8] = 2;
        assert!(Refinements::from_bytes(&even).unwrap_err().to_string().contains("odd"));
    }
}
