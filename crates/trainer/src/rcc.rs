//! Reader of Qt resource archives (`.rcc`), in which one package keeps its photos.

use std::io::Read;

use crate::error::TrainError;

const COMPRESSED: u16 = 1;
const DIRECTORY: u16 = 2;
const ZSTD: u16 = 4;
const MAX_DEPTH: usize = 32;
const MAX_NAME: usize = 255;
const MAX_FILE: u64 = 64 << 20;
const MAX_TOTAL: usize = 1 << 30;

struct Archive<'a> {
    bytes: &'a [u8],
    node_size: usize,
    tree: usize,
    data: usize,
    names: usize,
}

fn bad(why: &str) -> TrainError {
    TrainError::data("Qt resource archive", why)
}

impl Archive<'_> {
    fn slice(&self, at: usize, n: usize) -> Result<&[u8], TrainError> {
        at.checked_add(n).and_then(|end| self.bytes.get(at..end)).ok_or_else(|| bad("points outside the file"))
    }

    fn u16(&self, at: usize) -> Result<u16, TrainError> {
        let b = self.slice(at, 2)?;
        Ok(u16::from_be_bytes([b[0], b[1]]))
    }

    fn u32(&self, at: usize) -> Result<usize, TrainError> {
        let b = self.slice(at, 4)?;
        Ok(u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize)
    }

    fn name(&self, offset: usize) -> Result<String, TrainError> {
        let at = self.names + offset;
        let units = self.u16(at)? as usize;
        if units > MAX_NAME {
            return Err(bad("file name is too long"));
        }
        let raw = self.slice(at + 6, units * 2)?;
        let wide: Vec<u16> = raw.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]])).collect();
        String::from_utf16(&wide).map_err(|_| bad("file name is not UTF-16"))
    }
}

/// The files of an archive whose path satisfies `wanted`.
///
/// # Errors
/// If the archive is malformed or a wanted file uses an unsupported compression.
pub fn files(bytes: &[u8], wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
    let mut a = Archive { bytes, node_size: 0, tree: 0, data: 0, names: 0 };
    if a.slice(0, 4)? != b"qres" {
        return Err(bad("wrong magic"));
    }
    a.node_size = if a.u32(4)? >= 2 { 22 } else { 14 };
    (a.tree, a.data, a.names) = (a.u32(8)?, a.u32(12)?, a.u32(16)?);
    let mut out = Vec::new();
    let (mut visited, mut total) = (0usize, 0usize);
    let mut pending = vec![(0usize, String::new(), 0usize)];
    while let Some((index, parent, depth)) = pending.pop() {
        visited += 1;
        if depth > MAX_DEPTH || visited * a.node_size > bytes.len() {
            return Err(bad("directories nest in a loop"));
        }
        let at = a.tree + index * a.node_size;
        let flags = a.u16(at + 4)?;
        let name = if index == 0 { String::new() } else { a.name(a.u32(at)?)? };
        let path = if parent.is_empty() { name } else { format!("{parent}/{name}") };
        if flags & DIRECTORY != 0 {
            let (count, first) = (a.u32(at + 6)?, a.u32(at + 10)?);
            if count.saturating_mul(a.node_size) > bytes.len() {
                return Err(bad("directory claims more entries than the file holds"));
            }
            pending.extend((first..first + count).rev().map(|child| (child, path.clone(), depth + 1)));
            continue;
        }
        if !wanted(&path) {
            continue;
        }
        let start = a.data + a.u32(at + 10)?;
        let size = a.u32(start)?;
        let raw = a.slice(start + 4, size)?;
        let content = if flags & ZSTD != 0 {
            return Err(bad(&format!("{path} is zstd-compressed, which is not supported")));
        } else if flags & COMPRESSED != 0 {
            let mut content = Vec::new();
            let stream = raw.get(4..).ok_or_else(|| bad("compressed file without length"))?;
            let inflated = flate2::read::ZlibDecoder::new(stream).take(MAX_FILE).read_to_end(&mut content);
            inflated.map_err(|e| bad(&format!("{path}: {e}")))?;
            total += content.len();
            if content.len() as u64 == MAX_FILE || total > MAX_TOTAL {
                return Err(bad("unpacks to more than the limit"));
            }
            content
        } else {
            raw.to_vec()
        };
        out.push((path, content));
    }
    Ok(out)
}
