//! Image codecs as rivals: the network's input, already cropped and resized, as a file. [`REGISTRY`] lists them; a codec is
//! added by an entry there, and the server must be able to decode it.

use std::ops::RangeInclusive;

use edge_client::images;
use isthmus_pixels::Rgb;

use crate::error::HarnessError;

type Encode = fn(&Rgb, u8) -> Result<Vec<u8>, String>;

/// A codec.
pub struct Family {
    /// Key in descriptions of runs.
    pub key: &'static str,
    /// Name for people.
    pub name: &'static str,
    /// Its settings; none if it is lossless.
    pub qualities: Option<RangeInclusive<u8>>,
    encode: Encode,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.key)
    }
}

/// Every codec there is.
pub static REGISTRY: [&Family; 4] = [&JPEG, &WEBP, &AVIF, &PNG];

/// Baseline, 4:2:0, optimised Huffman tables.
static JPEG: Family =
    Family { key: "jpeg", name: "JPEG", qualities: Some(1..=100), encode: |p, q| images::jpeg(p, q).map_err(|e| e.to_string()) };
static WEBP: Family = Family { key: "webp", name: "WebP", qualities: Some(0..=100), encode: webp };
static AVIF: Family = Family { key: "avif", name: "AVIF", qualities: Some(1..=100), encode: avif };
/// What the uncompressed teacher sees.
static PNG: Family = Family { key: "png", name: "PNG", qualities: None, encode: |p, _| images::png(p).map_err(|e| e.to_string()) };

/// libwebp, method 6 (slowest, smallest).
fn webp(pixels: &Rgb, quality: u8) -> Result<Vec<u8>, String> {
    let mut config = webp::WebPConfig::new().map_err(|()| "no configuration")?;
    config.quality = f32::from(quality);
    config.method = 6;
    let encoded = webp::Encoder::from_rgb(pixels.data(), pixels.width(), pixels.height()).encode_advanced(&config);
    Ok(encoded.map_err(|e| format!("{e:?}"))?.to_vec())
}

/// rav1e at speed 6, 8 bits, 4:4:4, one thread.
fn avif(pixels: &Rgb, quality: u8) -> Result<Vec<u8>, String> {
    let rgb: Vec<ravif::RGB8> = pixels.data().chunks_exact(3).map(|p| ravif::RGB8::new(p[0], p[1], p[2])).collect();
    let encoder = ravif::Encoder::new().with_quality(f32::from(quality)).with_speed(6).with_bit_depth(ravif::BitDepth::Eight);
    let image = ravif::Img::new(rgb.as_slice(), pixels.width() as usize, pixels.height() as usize);
    Ok(encoder.with_num_threads(Some(1)).encode_rgb(image).map_err(|e| e.to_string())?.avif_file)
}

/// A codec at one setting.
#[derive(Debug, Clone, Copy)]
pub struct Codec {
    family: &'static Family,
    quality: u8,
}

impl PartialEq for Codec {
    fn eq(&self, other: &Self) -> bool {
        (self.family.key, self.quality) == (other.family.key, other.quality)
    }
}

impl Eq for Codec {}

impl Codec {
    /// The codec called `key` at `quality`, which lossless ones do not have.
    ///
    /// # Errors
    /// Says which codecs there are, or which settings.
    pub fn new(key: &str, quality: Option<u8>) -> Result<Self, HarnessError> {
        let known = || REGISTRY.iter().map(|f| f.key).collect::<Vec<_>>().join(", ");
        let family = REGISTRY.iter().find(|f| f.key == key);
        let family = family.ok_or_else(|| HarnessError::data(format!("codec {key:?}"), format!("is unknown; there are {}", known())))?;
        match (&family.qualities, quality) {
            (Some(range), Some(q)) if range.contains(&q) => Ok(Self { family, quality: q }),
            (None, None) => Ok(Self { family, quality: 0 }),
            (Some(range), _) => {
                Err(HarnessError::data(format!("codec {key}"), format!("qualities are {} to {}", range.start(), range.end())))
            }
            (None, Some(_)) => Err(HarnessError::data(format!("codec {key}"), "is lossless and has no qualities")),
        }
    }

    /// Lossless.
    pub fn png() -> Self {
        Self { family: &PNG, quality: 0 }
    }

    /// True if nothing is lost.
    pub fn is_lossless(self) -> bool {
        self.family.qualities.is_none()
    }

    /// Name and setting.
    pub fn name(self) -> String {
        if self.is_lossless() { self.family.name.into() } else { format!("{} q{}", self.family.name, self.quality) }
    }

    /// Name without the setting.
    pub fn family(self) -> &'static str {
        self.family.name
    }

    /// Encodes `pixels`.
    ///
    /// # Errors
    /// If the codec fails.
    pub fn encode(self, pixels: &Rgb) -> Result<Vec<u8>, HarnessError> {
        (self.family.encode)(pixels, self.quality).map_err(|why| HarnessError::data(self.name(), why))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn psnr(a: &Rgb, b: &Rgb) -> f64 {
        let squared: f64 = a.data().iter().zip(b.data()).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
        10.0 * (255.0 * 255.0 * a.data().len() as f64 / squared.max(1e-9)).log10()
    }

    #[test]
    fn every_codec_gives_the_picture_back() {
        let smooth = |x: u32, y: u32, c: u32| (128.0 + 100.0 * (f64::from(x * (c + 1) + y * 2) * 0.02).sin()) as u8;
        let data = (0..224 * 224 * 3).map(|i| smooth(i / 3 % 224, i / 672, i % 3)).collect();
        let picture = Rgb::new(224, 224, data).unwrap();
        for (key, quality) in [("png", None), ("webp", Some(50)), ("jpeg", Some(10)), ("jpeg", Some(50)), ("avif", Some(40))] {
            let codec = Codec::new(key, quality).unwrap();
            let file = codec.encode(&picture).unwrap();
            let quality = psnr(&picture, &isthmus_avif::decode_any(&file).unwrap());
            assert!(quality > 24.0, "{}: {quality} dB in {} bytes", codec.name(), file.len());
        }
        assert!(Codec::png().is_lossless() && Codec::png().name() == "PNG");
    }

    #[test]
    fn unknown_codecs_and_qualities_are_refused() {
        assert!(Codec::new("gif", None).unwrap_err().to_string().contains("there are jpeg, webp, avif, png"));
        assert!(Codec::new("jpeg", Some(0)).unwrap_err().to_string().contains("1 to 100"));
        assert!(Codec::new("webp", None).is_err() && Codec::new("png", Some(3)).is_err());
    }
}
