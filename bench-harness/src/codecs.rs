//! Image codecs as rivals: the network's input, already cropped and resized, as a file.

use isthmus_pixels::Rgb;

use crate::error::HarnessError;

/// An image codec at one setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Lossless: what the uncompressed teacher sees.
    Png,
    /// libwebp, method 6 (slowest, smallest), quality 0 to 100.
    Webp(u8),
    /// Baseline JPEG, 4:2:0, optimised Huffman tables, quality 1 to 100.
    Jpeg(u8),
}

impl Codec {
    /// Name and setting.
    pub fn name(self) -> String {
        match self {
            Self::Png => "PNG".into(),
            Self::Webp(q) => format!("WebP q{q}"),
            Self::Jpeg(q) => format!("JPEG q{q}"),
        }
    }

    /// Name without the setting.
    pub fn family(self) -> &'static str {
        match self {
            Self::Png => "PNG",
            Self::Webp(_) => "WebP",
            Self::Jpeg(_) => "JPEG",
        }
    }

    /// Encodes `pixels`.
    ///
    /// # Errors
    /// If the codec fails.
    pub fn encode(self, pixels: &Rgb) -> Result<Vec<u8>, HarnessError> {
        let (w, h) = (pixels.width(), pixels.height());
        let fail = |why: String| HarnessError::data(self.name(), why);
        match self {
            Self::Png => {
                use image::ImageEncoder;
                let mut out = Vec::new();
                let encoder = image::codecs::png::PngEncoder::new(&mut out);
                encoder.write_image(pixels.data(), w, h, image::ExtendedColorType::Rgb8).map_err(|e| fail(e.to_string()))?;
                Ok(out)
            }
            Self::Webp(quality) => {
                let mut config = webp::WebPConfig::new().map_err(|()| fail("no configuration".into()))?;
                config.quality = f32::from(quality);
                config.method = 6;
                let encoded = webp::Encoder::from_rgb(pixels.data(), w, h).encode_advanced(&config);
                Ok(encoded.map_err(|e| fail(format!("{e:?}")))?.to_vec())
            }
            Self::Jpeg(quality) => {
                let mut out = Vec::new();
                let mut encoder = jpeg_encoder::Encoder::new(&mut out, quality);
                encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::R_4_2_0);
                encoder.set_optimized_huffman_tables(true);
                let encoded = encoder.encode(pixels.data(), w as u16, h as u16, jpeg_encoder::ColorType::Rgb);
                encoded.map_err(|e| fail(e.to_string()))?;
                Ok(out)
            }
        }
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
        for codec in [Codec::Png, Codec::Webp(50), Codec::Jpeg(10), Codec::Jpeg(50)] {
            let file = codec.encode(&picture).unwrap();
            let back = isthmus_pixels::decode(&file).unwrap();
            let quality = psnr(&picture, &back);
            assert!(quality > 24.0, "{}: {quality} dB in {} bytes", codec.name(), file.len());
        }
    }
}
