//! The container: one coded latent as it goes over the wire.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 2 | magic `IS` |
//! | 2 | 1 | version: 3 |
//! | 3 | 8 | first 8 bytes of the bundle's hash |
//! | 11 | 1 | quality level, from 1 |
//! | 12 | 1 | 256ths of the way to the next level |
//! | 13 | 3 | payload length n |
//! | 16 | n | payload |
//! | 16 + n | 4 | CRC-32C of everything before |
//!
//! All integers are little-endian. Shape and way of coding are the bundle's: a payload that decodes to anything but as many symbols as it has is
//! refused. Limits come from the registered bundle: the header is compared with it before anything is allocated. Versions 1 and 2 are read too (`earlier`).

mod earlier;

use crate::bundle::BundleHash;
use crate::quality::Quality;
use crate::tables::{LatentShape, Level, Tables};
use crate::{CodecError, coder};

pub use earlier::Stated;

/// First bytes of every container.
pub const MAGIC: &[u8; 2] = b"IS";
/// Version of the layout that is written.
pub const VERSION: u8 = 3;
/// Bytes before the payload.
pub const HEADER_LEN: usize = 16;
/// Bytes around the payload.
pub const OVERHEAD: usize = HEADER_LEN + SUM_LEN;
/// Length of the hash prefix.
pub const HASH_PREFIX: usize = 8;
/// Length of the checksum.
const SUM_LEN: usize = 4;
/// Most payload bytes that the header can state.
const LARGEST: usize = (1 << 24) - 1;

/// Fields before the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Prefix of the bundle's hash.
    pub bundle: [u8; HASH_PREFIX],
    /// Quality.
    pub quality: Quality,
    /// Payload bytes.
    pub payload_len: u32,
    /// What versions 1 and 2 repeat of the bundle.
    pub stated: Option<Stated>,
}

impl Header {
    /// The header in the beginning of `bytes`, and where the payload starts.
    fn read(bytes: &[u8]) -> Result<(Self, usize), CodecError> {
        if !bytes.starts_with(MAGIC) {
            return Err(CodecError::malformed("wrong magic: not an Isthmus container"));
        }
        if bytes.starts_with(earlier::MAGIC) {
            return earlier::read(bytes);
        }
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or_else(|| too_short(bytes.len()))?;
        let &[_, _, version, bundle @ .., level, fraction, a, b, c] = header;
        if version != VERSION {
            return Err(CodecError::malformed(format!("version {version}, this software reads 1 to {VERSION}")));
        }
        let payload_len = u32::from_le_bytes([a, b, c, 0]);
        Ok((Self { bundle, quality: Quality { level, fraction }, payload_len, stated: None }, HEADER_LEN))
    }
}

fn too_short(len: usize) -> CodecError {
    CodecError::malformed(format!("{len} bytes; a container has at least {OVERHEAD}"))
}

/// A checked view of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container<'a> {
    /// Its header.
    pub header: Header,
    /// The entropy-coded symbols.
    pub payload: &'a [u8],
}

/// Length of the container that `bytes` begin with, as its header claims; none if it says nothing.
pub(crate) fn claimed_len(bytes: &[u8]) -> Option<usize> {
    let (header, start) = Header::read(bytes).ok()?;
    (start + SUM_LEN).checked_add(header.payload_len as usize)
}

/// Upper bound on the payload of a latent: every symbol an escape of full length.
pub fn max_payload(shape: LatentShape) -> usize {
    shape.symbols() * 6 + 16
}

impl<'a> Container<'a> {
    /// Parses a container and checks its magic, version, lengths and checksum. No bundle is needed.
    ///
    /// # Errors
    /// [`CodecError::Malformed`] says which check failed.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CodecError> {
        let (header, start) = Header::read(bytes)?;
        let (summed, sum) = bytes.split_last_chunk::<SUM_LEN>().ok_or_else(|| too_short(bytes.len()))?;
        let payload = summed.get(start..).ok_or_else(|| too_short(bytes.len()))?;
        if payload.len() as u64 != u64::from(header.payload_len) {
            let why = format!("the header claims {} payload bytes, {} are there", header.payload_len, payload.len());
            return Err(CodecError::malformed(why));
        }
        if crc32c::crc32c(summed) != u32::from_le_bytes(*sum) {
            return Err(CodecError::malformed("checksum mismatch: the container was damaged"));
        }
        Ok(Self { header, payload })
    }

    /// Decodes the symbols with the tables of the bundle whose hash and latent shape are given.
    ///
    /// # Errors
    /// [`CodecError::WrongBundle`], [`CodecError::WrongShape`], [`CodecError::UnknownQuality`] if the
    /// container does not belong to the bundle, [`CodecError::Malformed`] if the payload is damaged.
    pub fn decode(&self, hash: &BundleHash, shape: LatentShape, tables: &Tables) -> Result<Vec<i32>, CodecError> {
        let level = self.level(hash, shape, tables)?;
        coder::decode(self.payload, &level, shape)
    }

    /// Decodes and de-quantises into the decoder's input (channel-major), appended to `out`.
    ///
    /// # Errors
    /// As [`Self::decode`]; `out` is then as it was.
    pub fn decode_into(&self, hash: &BundleHash, shape: LatentShape, tables: &Tables, out: &mut Vec<f32>) -> Result<(), CodecError> {
        let level = self.level(hash, shape, tables)?;
        let (start, positions) = (out.len(), shape.positions());
        out.resize(start + shape.symbols(), 0.0);
        let latent = &mut out[start..];
        for channel in level.silent().map(usize::from) {
            latent[channel * positions..][..positions].fill(level.of_zero(channel));
        }
        let decoded = coder::decode_planes(self.payload, &level, shape, |channel, plane| {
            level.dequantise_plane(channel, plane, &mut latent[channel * positions..][..positions]);
        });
        if decoded.is_err() {
            out.truncate(start);
        }
        decoded
    }

    /// The quality's tables, once everything that the header says fits.
    fn level<'t>(&self, hash: &BundleHash, shape: LatentShape, tables: &'t Tables) -> Result<Level<'t>, CodecError> {
        if self.header.bundle != hash.prefix() {
            let found = crate::bundle::hex(&self.header.bundle);
            return Err(CodecError::WrongBundle { expected: crate::bundle::hex(&hash.prefix()), found });
        }
        let level = tables.level(self.header.quality)?;
        if let Some(stated) = &self.header.stated {
            stated.check(shape, &level)?;
        }
        if self.payload.len() > max_payload(shape) {
            return Err(CodecError::malformed("the payload is longer than any coded latent"));
        }
        Ok(level)
    }
}

/// Codes symbols into a container.
///
/// # Errors
/// [`CodecError::UnknownQuality`] or [`CodecError::BadLatent`].
pub fn encode(
    symbols: &[i32],
    quality: impl Into<Quality>,
    hash: &BundleHash,
    shape: LatentShape,
    tables: &Tables,
) -> Result<Vec<u8>, CodecError> {
    let quality = quality.into();
    let level = tables.level(quality)?;
    let payload = coder::encode(symbols, &level, shape)?;
    if payload.len() > LARGEST {
        return Err(CodecError::BadLatent(format!("it takes {} bytes, a container holds {LARGEST}", payload.len())));
    }
    let mut out = Vec::with_capacity(payload.len() + OVERHEAD);
    out.extend(MAGIC);
    out.push(VERSION);
    out.extend(hash.prefix());
    out.extend([quality.level, quality.fraction]);
    out.extend(&(payload.len() as u32).to_le_bytes()[..3]);
    out.extend(payload);
    out.extend(crc32c::crc32c(&out).to_le_bytes());
    Ok(out)
}
