//! The golden input: an image that every implementation can make for itself.

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
