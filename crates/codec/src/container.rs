//! The container: one coded latent as it goes over the wire.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `ISTH` |
//! | 4 | 1 | version: 1, or 2 for a quality between two levels |
//! | 5 | 1 | codec id: 1 = ANS with static tables, 2 = ANS with tables chosen by earlier symbols |
//! | 6 | 8 | first 8 bytes of the bundle's hash |
//! | 14 | 1 | quality level, from 1 |
//! | 15 | 6 | C, H, W, u16 each |
//! | 21 | 4 | symbol count, u32 |
//! | 25 | 4 | payload length, u32 |
//! | 29 | 1 | version 2 only: 256ths of the way to the next level, not 0 |
//! | h | n | payload; h is 29, or 30 in version 2 |
//! | h + n | 4 | CRC-32C of everything before |
//!
//! All integers are little-endian. Limits come from the registered bundle: the header is compared with
//! it before anything is allocated.

use crate::bundle::BundleHash;
use crate::quality::Quality;
use crate::tables::{LatentShape, Level, LevelTables, Tables};
use crate::{CodecError, coder};

/// First bytes of every container.
pub const MAGIC: &[u8; 4] = b"ISTH";
/// Versions of the layout: for the levels themselves, and for what lies between them.
pub const VERSION: u8 = 1;
/// See [`VERSION`].
pub const VERSION_BETWEEN: u8 = 2;
/// ANS with static integer tables.
pub const CODEC_ANS_STATIC: u8 = 1;
/// ANS with integer tables chosen by earlier symbols.
pub const CODEC_ANS_CONTEXT: u8 = 2;
/// Bytes before the payload in version 1.
pub const HEADER_LEN: usize = 29;
/// Bytes around the payload in version 1; one more in version 2.
pub const OVERHEAD: usize = HEADER_LEN + 4;
/// Length of the hash prefix.
pub const HASH_PREFIX: usize = 8;

/// Fields before the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// How the payload is coded.
    pub codec: u8,
    /// Prefix of the bundle's hash.
    pub bundle: [u8; HASH_PREFIX],
    /// Quality.
    pub quality: Quality,
    /// Shape of the latent.
    pub shape: LatentShape,
    /// Symbols coded.
    pub symbols: u32,
    /// Payload bytes.
    pub payload_len: u32,
}

/// A checked view of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container<'a> {
    /// Its header.
    pub header: Header,
    /// The entropy-coded symbols.
    pub payload: &'a [u8],
}

/// Length of the container that `bytes` begin with, as its header claims; none if they are too short to say.
pub(crate) fn claimed_len(bytes: &[u8]) -> Option<usize> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk()?;
    let payload = u32::from_le_bytes([header[25], header[26], header[27], header[28]]);
    let between = usize::from(header[4] == VERSION_BETWEEN);
    (OVERHEAD + between).checked_add(payload as usize)
}

/// Upper bound on the payload of a latent: every symbol an escape of full length.
pub fn max_payload(shape: LatentShape) -> usize {
    shape.symbols() * 6 + 16
}

impl<'a> Container<'a> {
    /// Parses a container and checks its magic, version, codec, lengths and checksum. No bundle is needed.
    ///
    /// # Errors
    /// [`CodecError::Malformed`] says which check failed.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CodecError> {
        if bytes.len() < OVERHEAD {
            return Err(CodecError::malformed(format!("{} bytes; a container has at least {OVERHEAD}", bytes.len())));
        }
        if &bytes[..4] != MAGIC {
            return Err(CodecError::malformed("wrong magic: not an Isthmus container"));
        }
        let between = match bytes[4] {
            VERSION => 0,
            VERSION_BETWEEN => 1,
            other => return Err(CodecError::malformed(format!("version {other}, this software reads {VERSION} and {VERSION_BETWEEN}"))),
        };
        let start = HEADER_LEN + between;
        let codec = bytes[5];
        if ![CODEC_ANS_STATIC, CODEC_ANS_CONTEXT].contains(&codec) {
            return Err(CodecError::malformed(format!("codec {codec} is unknown")));
        }
        let u16_at = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let mut bundle = [0; HASH_PREFIX];
        bundle.copy_from_slice(&bytes[6..14]);
        let shape = LatentShape { channels: u16_at(15), height: u16_at(17), width: u16_at(19) };
        // a container of version 2 that has no room for the fraction fails the check of its length
        let fraction = if between == 1 { bytes[HEADER_LEN] } else { 0 };
        let quality = Quality { level: bytes[14], fraction };
        let header = Header { codec, bundle, quality, shape, symbols: u32_at(21), payload_len: u32_at(25) };
        let there = bytes.len() as u64 - 4;
        if start as u64 + u64::from(header.payload_len) != there {
            let why = format!("the header claims {} payload bytes, {} are there", header.payload_len, there.saturating_sub(start as u64));
            return Err(CodecError::malformed(why));
        }
        let end = bytes.len() - 4;
        if crc32c::crc32c(&bytes[..end]) != u32_at(end) {
            return Err(CodecError::malformed("checksum mismatch: the container was damaged"));
        }
        if between == 1 && fraction == 0 {
            return Err(CodecError::malformed("version 2 is for qualities between two levels"));
        }
        if u64::from(header.symbols) != shape.symbols() as u64 {
            return Err(CodecError::malformed("the symbol count does not fit the shape"));
        }
        Ok(Self { header, payload: &bytes[start..end] })
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
        if self.header.shape != shape {
            let found = self.header.shape.to_string();
            return Err(CodecError::WrongShape { expected: shape.to_string(), found });
        }
        let level = tables.level(self.header.quality)?;
        if self.header.codec != codec_of(&level) {
            let why = format!("codec {}, but level {} of the bundle uses {}", self.header.codec, self.header.quality, codec_of(&level));
            return Err(CodecError::malformed(why));
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
    Ok(wrap(codec_of(&level), quality, hash, shape, &payload))
}

fn codec_of(level: &LevelTables) -> u8 {
    if level.is_static() { CODEC_ANS_STATIC } else { CODEC_ANS_CONTEXT }
}

fn wrap(codec: u8, quality: Quality, hash: &BundleHash, shape: LatentShape, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + OVERHEAD + 1);
    out.extend(MAGIC);
    out.extend([if quality.is_level() { VERSION } else { VERSION_BETWEEN }, codec]);
    out.extend(hash.prefix());
    out.push(quality.level);
    for extent in [shape.channels, shape.height, shape.width] {
        out.extend(extent.to_le_bytes());
    }
    out.extend((shape.symbols() as u32).to_le_bytes());
    out.extend((payload.len() as u32).to_le_bytes());
    if !quality.is_level() {
        out.push(quality.fraction);
    }
    out.extend(payload);
    out.extend(crc32c::crc32c(&out).to_le_bytes());
    out
}
