//! Still AVIF of 8 bits a sample: the container by `avif-parse`, AV1 by `rav1d`, colours by `yuv`. A crate of its own, so that
//! devices do not carry it.

#![forbid(unsafe_code)]

use isthmus_pixels::{MAX_PIXELS, PixelError, Rgb, check_size};
use re_rav1d::dav1d::pixel::{MatrixCoefficients, YUVRange};
use re_rav1d::dav1d::{Decoder, Picture, PixelLayout, PlanarImageComponent, Settings};
use yuv::{YuvGrayImage, YuvPlanarImage, YuvRange, YuvStandardMatrix};

/// True if the first box of a file has AVIF's brand.
pub fn is_avif(bytes: &[u8]) -> bool {
    bytes.get(4..12).is_some_and(|b| b == b"ftypavif" || b == b"ftypavis")
}

fn damaged(e: impl std::fmt::Display) -> PixelError {
    PixelError::Decode(format!("AVIF: {e}"))
}

/// The parsed container of a file that is not animated.
fn still(bytes: &[u8]) -> Result<avif_parse::AvifData, PixelError> {
    if bytes.get(8..12) == Some(b"avis") {
        return Err(PixelError::Animated("AVIF"));
    }
    avif_parse::AvifData::from_reader(&mut &bytes[..]).map_err(damaged)
}

/// Names AVIF among the formats that are known here.
fn with_avif(error: PixelError) -> PixelError {
    match error {
        PixelError::UnknownFormat(_) => PixelError::UnknownFormat("JPEG, PNG, WebP or AVIF"),
        other => other,
    }
}

/// Decodes an AVIF file, or one of the formats of [`isthmus_pixels::decode`].
///
/// # Errors
/// As [`decode`] and [`isthmus_pixels::decode`].
pub fn decode_any(file: &[u8]) -> Result<Rgb, PixelError> {
    if is_avif(file) { decode(file) } else { isthmus_pixels::decode(file).map_err(with_avif) }
}

/// Width and height of an AVIF file, or of one of the formats of [`isthmus_pixels::decode`], from its header.
///
/// # Errors
/// As [`decode_any`].
pub fn dimensions_any(file: &[u8]) -> Result<(u32, u32), PixelError> {
    if !is_avif(file) {
        return isthmus_pixels::dimensions(file).map_err(with_avif);
    }
    let meta = still(file)?.primary_item_metadata().map_err(damaged)?;
    Ok((meta.max_frame_width.get(), meta.max_frame_height.get()))
}

/// Decodes a still AVIF; alpha is dropped.
///
/// # Errors
/// A [`PixelError`] for anything else, before more memory is used than the limits of photos allow.
pub fn decode(bytes: &[u8]) -> Result<Rgb, PixelError> {
    let file = still(bytes)?;
    let meta = file.primary_item_metadata().map_err(damaged)?;
    check_size((meta.max_frame_width.get(), meta.max_frame_height.get()))?;
    if meta.bit_depth != 8 {
        return Err(damaged(format!("{} bits a sample are not supported; use 8", meta.bit_depth)));
    }
    let mut settings = Settings::new();
    settings.set_n_threads(1);
    settings.set_frame_size_limit(MAX_PIXELS as u32);
    let mut decoder = Decoder::with_settings(&settings).map_err(damaged)?;
    decoder.send_data(file.primary_item.to_vec(), None, None, None).map_err(damaged)?;
    picture(&decoder.get_picture().map_err(damaged)?)
}

fn picture(p: &Picture) -> Result<Rgb, PixelError> {
    let (width, height) = (p.width(), p.height());
    check_size((width, height))?;
    let matrix = match p.matrix_coefficients() {
        MatrixCoefficients::BT709 => YuvStandardMatrix::Bt709,
        MatrixCoefficients::BT2020NonConstantLuminance => YuvStandardMatrix::Bt2020,
        // unspecified is BT.601 by convention (MIAF)
        MatrixCoefficients::BT470BG | MatrixCoefficients::ST170M | MatrixCoefficients::Unspecified => YuvStandardMatrix::Bt601,
        other => return Err(damaged(format!("colour matrix {other:?} is not supported"))),
    };
    let range = match p.color_range() {
        YUVRange::Full => YuvRange::Full,
        YUVRange::Limited => YuvRange::Limited,
    };
    let plane = |c| (p.plane(c), p.stride(c));
    let (y, y_stride) = plane(PlanarImageComponent::Y);
    let mut data = vec![0; width as usize * height as usize * 3];
    if p.pixel_layout() == PixelLayout::I400 {
        let grey = YuvGrayImage { y_plane: &y, y_stride, width, height };
        yuv::yuv400_to_rgb(&grey, &mut data, width * 3, range, matrix).map_err(damaged)?;
    } else {
        let ((u, u_stride), (v, v_stride)) = (plane(PlanarImageComponent::U), plane(PlanarImageComponent::V));
        let image = YuvPlanarImage { y_plane: &y, y_stride, u_plane: &u, u_stride, v_plane: &v, v_stride, width, height };
        let convert = match p.pixel_layout() {
            PixelLayout::I420 => yuv::yuv420_to_rgb,
            PixelLayout::I422 => yuv::yuv422_to_rgb,
            _ => yuv::yuv444_to_rgb,
        };
        convert(&image, &mut data, width * 3, range, matrix).map_err(damaged)?;
    }
    Rgb::new(width, height, data).ok_or_else(|| damaged("no pixels"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn picture() -> Rgb {
        let smooth = |x: u32, y: u32, c: u32| (128.0 + 100.0 * (f64::from(x * (c + 1) + y * 2) * 0.03).sin()) as u8;
        Rgb::new(96, 64, (0..96 * 64 * 3).map(|i| smooth(i / 3 % 96, i / 288, i % 3)).collect()).unwrap()
    }

    fn encoded(quality: f32) -> Vec<u8> {
        let source = picture();
        let pixels: Vec<ravif::RGB8> = source.data().chunks_exact(3).map(|p| ravif::RGB8::new(p[0], p[1], p[2])).collect();
        let encoder = ravif::Encoder::new().with_quality(quality).with_speed(8).with_bit_depth(ravif::BitDepth::Eight);
        encoder.encode_rgb(ravif::Img::new(&pixels, 96, 64)).unwrap().avif_file
    }

    #[test]
    fn a_picture_comes_back() {
        let file = encoded(90.0);
        assert!(is_avif(&file));
        let (wanted, found) = (picture(), decode(&file).unwrap());
        assert_eq!((found.width(), found.height()), (96, 64));
        let squared: f64 = wanted.data().iter().zip(found.data()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let psnr = 10.0 * (255.0 * 255.0 * wanted.data().len() as f64 / squared).log10();
        assert!(psnr > 35.0, "{psnr} dB");
    }

    #[test]
    fn damaged_files_are_refused_or_decoded_but_never_panic() {
        let file = encoded(50.0);
        for end in 0..file.len() {
            assert!(decode(&file[..end]).is_err(), "{end} of {} bytes", file.len());
        }
        for at in 0..file.len() {
            let mut broken = file.clone();
            broken[at] ^= 0x41;
            let _ = decode(&broken);
        }
        let mut animated = file;
        animated[11] = b's';
        assert_eq!(decode(&animated), Err(PixelError::Animated("AVIF")));
    }
}
