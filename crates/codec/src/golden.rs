//! The golden input: an image that every implementation can make for itself, and the hashes of what must come of it.

use crate::bundle::sha256;

/// Hexadecimal SHA-256 of decoded symbols, little-endian, as the manifest has it.
pub fn symbols_sha256(symbols: &[i32]) -> String {
    sha256(&symbols.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>())
}

/// Hexadecimal SHA-256 of a decoder's input, little-endian, as the manifest has it.
pub fn latent_sha256(latent: &[f32]) -> String {
    sha256(&latent.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}

/// Interleaved RGB bytes of the golden input, `size * size * 3`: smooth waves with some texture, from
/// integer arithmetic alone.
pub fn pixels(size: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity((size * size * 3) as usize);
    let mut noise = 0x9e37_79b9_u32;
    for y in 0..size {
        for x in 0..size {
            for c in 0..3 {
                // xorshift32
                noise ^= noise << 13;
                noise ^= noise >> 17;
                noise ^= noise << 5;
                let wave = triangle(x * (3 + c) + y * 2) / 2 + triangle(y * (4 - c)) / 3;
                out.push((wave + (noise >> 28)).min(255) as u8);
            }
        }
    }
    out
}

fn triangle(t: u32) -> u32 {
    let t = t % 512;
    if t < 256 { t } else { 511 - t }
}
