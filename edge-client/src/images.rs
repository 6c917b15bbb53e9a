//! Crops as image files, for servers that run the whole network.

use image::ImageEncoder;
use image::codecs::png::PngEncoder;
use isthmus_pixels::Rgb;

use crate::ClientError;

/// Baseline JPEG, 4:2:0, optimised Huffman tables; `quality` from 1 to 100.
///
/// # Errors
/// If the encoder fails.
pub fn jpeg(pixels: &Rgb, quality: u8) -> Result<Vec<u8>, ClientError> {
    let failed = |e: String| ClientError::Engine(format!("JPEG: {e}"));
    let side = |n: u32| u16::try_from(n).map_err(|_| failed(format!("{n} pixels are too many")));
    let mut out = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut out, quality);
    encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::R_4_2_0);
    encoder.set_optimized_huffman_tables(true);
    let encoded = encoder.encode(pixels.data(), side(pixels.width())?, side(pixels.height())?, jpeg_encoder::ColorType::Rgb);
    encoded.map_err(|e| failed(e.to_string()))?;
    Ok(out)
}

/// PNG at the library's default compression.
///
/// # Errors
/// If the encoder fails.
pub fn png(pixels: &Rgb) -> Result<Vec<u8>, ClientError> {
    let mut out = Vec::new();
    let encoder = PngEncoder::new(&mut out);
    let encoded = encoder.write_image(pixels.data(), pixels.width(), pixels.height(), image::ExtendedColorType::Rgb8);
    encoded.map_err(|e| ClientError::Engine(format!("PNG: {e}")))?;
    Ok(out)
}
