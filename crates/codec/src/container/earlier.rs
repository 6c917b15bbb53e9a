//! Containers of versions 1 (levels) and 2 (what lies between them), as clients before version 3 wrote them.
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
//! | 25 | 4 | payload length n, u32 |
//! | 29 | 1 | version 2 only: 256ths of the way to the next level, not 0 |
//! | h | n | payload; h is 29, or 30 in version 2 |
//! | h + n | 4 | CRC-32C of everything before |

use super::{Header, too_short};
use crate::CodecError;
use crate::quality::Quality;
use crate::tables::{LatentShape, Level};

/// First bytes of these containers.
pub const MAGIC: &[u8; 4] = b"ISTH";
const LEVEL: u8 = 1;
const BETWEEN: u8 = 2;
/// Bytes before the payload in version 1.
const HEADER_LEN: usize = 29;
const CODEC_ANS_STATIC: u8 = 1;
const CODEC_ANS_CONTEXT: u8 = 2;

/// What these versions repeat of the bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stated {
    /// How the payload is coded.
    codec: u8,
    /// Shape of the latent.
    pub shape: LatentShape,
}

impl Stated {
    /// Compares it with the bundle's.
    pub(super) fn check(&self, shape: LatentShape, level: &Level<'_>) -> Result<(), CodecError> {
        if self.shape != shape {
            return Err(CodecError::WrongShape { expected: shape.to_string(), found: self.shape.to_string() });
        }
        let expected = if level.is_static() { CODEC_ANS_STATIC } else { CODEC_ANS_CONTEXT };
        if self.codec != expected {
            return Err(CodecError::malformed(format!("codec {}, but this level of the bundle uses {expected}", self.codec)));
        }
        Ok(())
    }
}

/// The header in the beginning of `bytes`, and where the payload starts.
pub(super) fn read(bytes: &[u8]) -> Result<(Header, usize), CodecError> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or_else(|| too_short(bytes.len()))?;
    let codec = header[5];
    if ![CODEC_ANS_STATIC, CODEC_ANS_CONTEXT].contains(&codec) {
        return Err(CodecError::malformed(format!("codec {codec} is unknown")));
    }
    let (start, fraction) = match (header[4], bytes.get(HEADER_LEN)) {
        (LEVEL, _) => (HEADER_LEN, 0),
        (BETWEEN, Some(0)) => return Err(CodecError::malformed("version 2 is for qualities between two levels")),
        (BETWEEN, Some(&fraction)) => (HEADER_LEN + 1, fraction),
        (BETWEEN, None) => return Err(too_short(bytes.len())),
        (other, _) => return Err(CodecError::malformed(format!("version {other}, this software reads 1 to {}", super::VERSION))),
    };
    let u16_at = |i: usize| u16::from_le_bytes([header[i], header[i + 1]]);
    let u32_at = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let shape = LatentShape { channels: u16_at(15), height: u16_at(17), width: u16_at(19) };
    if u64::from(u32_at(21)) != shape.symbols() as u64 {
        return Err(CodecError::malformed("the symbol count does not fit the shape"));
    }
    let mut bundle = [0; super::HASH_PREFIX];
    bundle.copy_from_slice(&header[6..14]);
    let stated = Some(Stated { codec, shape });
    Ok((Header { bundle, quality: Quality { level: header[14], fraction }, payload_len: u32_at(25), stated }, start))
}
