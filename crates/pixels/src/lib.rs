//! Photo files to network input, the same on the device, on the server and in training.
//!
//! Preprocessing of the EfficientNet-Lite weights: centre crop of `S / (S + 32)` of the shorter side,
//! bicubic (a = -0.5, antialiased) to S x S, `(x - 127) / 128`, RGB, CHW. Decoding is bounded: dimensions
//! are checked from the header before any pixel is allocated.

#![forbid(unsafe_code)]

use std::io::Cursor;

use fast_image_resize as fir;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat};
use jpeg_decoder::PixelFormat;

/// Largest photo accepted, in pixels (width x height).
pub const MAX_PIXELS: u64 = 64 << 20;
/// Largest side accepted.
pub const MAX_SIDE: u32 = 20_000;
/// Memory a decoder may use beside the pixels.
const MAX_DECODER_BYTES: u64 = 512 << 20;

/// Scans of a JPEG. Encoders make some ten; each costs time for every block of the image, however short it is.
const MAX_SCANS: usize = 64;

/// What [`decode`] takes.
const FORMATS: &str = "JPEG, PNG or WebP";

/// Why a photo could not be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PixelError {
    /// The file has no bytes.
    #[error("the image is empty (0 bytes)")]
    Empty,
    /// Not one of the supported formats, which are named.
    #[error("not a {0} image (the first bytes match none of these formats)")]
    UnknownFormat(&'static str),
    /// More than one frame.
    #[error("animated {0} images are not supported: send one frame as a still image")]
    Animated(&'static str),
    /// Larger than the limits.
    #[error("the image is {width} x {height} pixels; at most {max_pixels} pixels and {max_side} a side are accepted")]
    TooLarge {
        /// Claimed width.
        width: u32,
        /// Claimed height.
        height: u32,
        /// Limit on the product.
        max_pixels: u64,
        /// Limit on each side.
        max_side: u32,
    },
    /// The data is damaged.
    #[error("the image cannot be decoded: {0}")]
    Decode(String),
    /// Resizing failed.
    #[error("the image cannot be resized: {0}")]
    Resize(String),
}

/// An 8-bit RGB image, rows top to bottom, interleaved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    width: u32,
    height: u32,
    data: Vec<u8>,
}

impl Rgb {
    /// Wraps `width * height * 3` bytes; `None` if the length does not fit.
    pub fn new(width: u32, height: u32, data: Vec<u8>) -> Option<Self> {
        let fits = data.len() as u64 == u64::from(width) * u64::from(height) * 3 && width > 0 && height > 0;
        fits.then_some(Self { width, height, data })
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Interleaved bytes, `height * width * 3`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The rectangle at (`x`, `y`) of `w` x `h` pixels, clipped to the image.
    pub fn crop(&self, x: u32, y: u32, w: u32, h: u32) -> Self {
        let (x, y) = (x.min(self.width - 1), y.min(self.height - 1));
        let (w, h) = (w.clamp(1, self.width - x), h.clamp(1, self.height - y));
        let mut data = Vec::with_capacity((w * h * 3) as usize);
        for row in y..y + h {
            let from = (row as usize * self.width as usize + x as usize) * 3;
            data.extend_from_slice(&self.data[from..from + w as usize * 3]);
        }
        Self { width: w, height: h, data }
    }

    /// Bicubic, antialiased resize (the filter of the reference preprocessing).
    ///
    /// # Errors
    /// [`PixelError::Resize`] for a zero target.
    pub fn resize(&self, width: u32, height: u32) -> Result<Self, PixelError> {
        self.resize_part([0, 0, self.width, self.height], width, height)
    }

    /// [`Rgb::resize`] of the rectangle (x, y, w, h), which must lie inside, without a copy of it.
    fn resize_part(&self, [x, y, w, h]: [u32; 4], width: u32, height: u32) -> Result<Self, PixelError> {
        if (width, height) == (w, h) {
            return Ok(self.crop(x, y, w, h));
        }
        let fail = |e: String| PixelError::Resize(e);
        // four bytes a pixel: the only layout the resizer is built for (its others triple the binary)
        let mut wide: Vec<u8> = Vec::with_capacity(w as usize * h as usize * 4);
        for row in y..y + h {
            let from = (row as usize * self.width as usize + x as usize) * 3;
            wide.extend(self.data[from..from + w as usize * 3].chunks_exact(3).flat_map(|p| [p[0], p[1], p[2], 0]));
        }
        let source = fir::images::ImageRef::new(w, h, &wide, fir::PixelType::U8x4).map_err(|e| fail(e.to_string()))?;
        let filter = fir::ResizeAlg::Convolution(fir::FilterType::CatmullRom);
        let options = fir::ResizeOptions::new().resize_alg(filter).use_alpha(false);
        // rows first, then columns, rounded in between: the order of the reference (the resizer's own differs)
        let mut rows = fir::images::Image::new(width, h, fir::PixelType::U8x4);
        let mut target = fir::images::Image::new(width, height, fir::PixelType::U8x4);
        let mut resizer = fir::Resizer::new();
        resizer.resize(&source, &mut rows, &options).map_err(|e| fail(e.to_string()))?;
        resizer.resize(&rows, &mut target, &options).map_err(|e| fail(e.to_string()))?;
        let data = target.buffer().chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
        Self::new(width, height, data).ok_or_else(|| fail("zero size".into()))
    }

    /// Centre crop and resize to the network's square input of `side` pixels.
    ///
    /// # Errors
    /// As [`Rgb::resize`].
    pub fn center_square(&self, side: u32) -> Result<Self, PixelError> {
        let shorter = self.width.min(self.height);
        let crop = (u64::from(side) * u64::from(shorter) / u64::from(side + 32)).max(1) as u32;
        let x = (self.width - crop).div_ceil(2);
        let y = (self.height - crop).div_ceil(2);
        self.resize_part([x, y, crop, crop], side, side)
    }

    /// The network's square input: an image that is exactly `side` x `side` is taken as already
    /// preprocessed, any other goes through [`Rgb::center_square`].
    ///
    /// # Errors
    /// As [`Rgb::resize`].
    pub fn network_input(&self, side: u32) -> Result<Self, PixelError> {
        if (self.width, self.height) == (side, side) { Ok(self.clone()) } else { self.center_square(side) }
    }

    /// `(x - 127) / 128` as CHW floats, appended to `out`.
    pub fn normalise_into(&self, out: &mut Vec<f32>) {
        out.reserve(self.data.len());
        for channel in 0..3 {
            out.extend(self.data.iter().skip(channel).step_by(3).map(|&v| (f32::from(v) - 127.0) / 128.0));
        }
    }

    /// Mirrors left and right in place.
    pub fn flip(&mut self) {
        let width = self.width as usize;
        for row in self.data.chunks_exact_mut(width * 3) {
            for x in 0..width / 2 {
                let other = width - 1 - x;
                for c in 0..3 {
                    row.swap(x * 3 + c, other * 3 + c);
                }
            }
        }
    }
}

/// Decodes a still JPEG, PNG or WebP; EXIF orientation is applied, alpha is dropped.
///
/// # Errors
/// A [`PixelError`] for anything else, before more memory is used than the limits allow.
pub fn decode(bytes: &[u8]) -> Result<Rgb, PixelError> {
    if bytes.is_empty() {
        return Err(PixelError::Empty);
    }
    let (image, orientation) = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg(bytes)?,
        Ok(ImageFormat::Png) => {
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits()).map_err(damaged)?;
            check_size(decoder.dimensions())?;
            if decoder.is_apng().map_err(damaged)? {
                return Err(PixelError::Animated("PNG"));
            }
            finish(decoder)?
        }
        Ok(ImageFormat::WebP) => {
            let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(damaged)?;
            if decoder.has_animation() {
                return Err(PixelError::Animated("WebP"));
            }
            finish(decoder)?
        }
        _ => return Err(PixelError::UnknownFormat(FORMATS)),
    };
    let mut image = image;
    image.apply_orientation(orientation);
    let rgb = image.into_rgb8();
    let (width, height) = rgb.dimensions();
    Rgb::new(width, height, rgb.into_raw()).ok_or_else(|| PixelError::Decode("no pixels".into()))
}

/// Width and height of a JPEG, PNG or WebP file, from its header.
///
/// # Errors
/// As [`decode`].
pub fn dimensions(bytes: &[u8]) -> Result<(u32, u32), PixelError> {
    if bytes.is_empty() {
        return Err(PixelError::Empty);
    }
    let size = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => {
            check_scans(bytes)?;
            let mut decoder = jpeg_decoder::Decoder::new(bytes);
            decoder.read_info().map_err(|e| PixelError::Decode(e.to_string()))?;
            let info = decoder.info().ok_or_else(|| PixelError::Decode("the JPEG has no frame".into()))?;
            (u32::from(info.width), u32::from(info.height))
        }
        Ok(ImageFormat::Png) => PngDecoder::with_limits(Cursor::new(bytes), limits()).map_err(damaged)?.dimensions(),
        Ok(ImageFormat::WebP) => WebPDecoder::new(Cursor::new(bytes)).map_err(damaged)?.dimensions(),
        _ => return Err(PixelError::UnknownFormat(FORMATS)),
    };
    Ok(size)
}

fn damaged(error: image::ImageError) -> PixelError {
    PixelError::Decode(error.to_string())
}

fn limits() -> image::Limits {
    let mut limits = image::Limits::default();
    limits.max_image_width = None;
    limits.max_image_height = None;
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    limits
}

fn finish(mut decoder: impl ImageDecoder) -> Result<(DynamicImage, Orientation), PixelError> {
    check_size(decoder.dimensions())?;
    decoder.set_limits(limits()).map_err(damaged)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok((DynamicImage::from_decoder(decoder).map_err(damaged)?, orientation))
}

/// JPEG goes through `jpeg-decoder`: it is closest to libjpeg among the decoders in safe Rust, and right on
/// files whose component ids start at 0 (docs/decisions/0003-jpeg-decoder.md).
fn jpeg(bytes: &[u8]) -> Result<(DynamicImage, Orientation), PixelError> {
    let damaged = |e: jpeg_decoder::Error| PixelError::Decode(e.to_string());
    check_scans(bytes)?;
    let mut decoder = jpeg_decoder::Decoder::new(bytes);
    decoder.set_max_decoding_buffer_size(MAX_DECODER_BYTES as usize);
    decoder.read_info().map_err(damaged)?;
    let no_frame = || PixelError::Decode("the JPEG has no frame".into());
    let info = decoder.info().ok_or_else(no_frame)?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    check_size((width, height))?;
    let orientation = decoder.exif_data().and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms);
    let data = decoder.decode().map_err(damaged)?;
    let image = match info.pixel_format {
        PixelFormat::L8 => image::GrayImage::from_raw(width, height, data).map(DynamicImage::from),
        PixelFormat::RGB24 => image::RgbImage::from_raw(width, height, data).map(DynamicImage::from),
        PixelFormat::CMYK32 => {
            let blend = |ink: u8, black: u8| (u16::from(255 - ink) * u16::from(255 - black) / 255) as u8;
            let rgb = data.chunks_exact(4).flat_map(|p| [blend(p[0], p[3]), blend(p[1], p[3]), blend(p[2], p[3])]).collect();
            image::RgbImage::from_raw(width, height, rgb).map(DynamicImage::from)
        }
        PixelFormat::L16 => return Err(PixelError::Decode("16-bit JPEG is not supported".into())),
    };
    Ok((image.ok_or_else(no_frame)?, orientation))
}

/// Refuses JPEGs of more than [`MAX_SCANS`] scans. Damaged ones are the decoder's to refuse.
fn check_scans(bytes: &[u8]) -> Result<(), PixelError> {
    const START_OF_SCAN: u8 = 0xda;
    let mut rest = bytes.get(2..).unwrap_or_default();
    let mut scans = 0;
    // a marker is 0xff and another byte; within a scan's data 0xff is followed by zero or a restart marker
    while let Some(&[marker, ref behind @ ..]) = memchr::memchr(0xff, rest).and_then(|at| rest.get(at + 1..)) {
        // fill: the marker's code may follow
        if marker == 0xff {
            rest = &rest[rest.len() - behind.len() - 1..];
            continue;
        }
        scans += usize::from(marker == START_OF_SCAN);
        if scans > MAX_SCANS {
            return Err(PixelError::Decode(format!("a JPEG of more than {MAX_SCANS} scans: save it again")));
        }
        rest = behind;
        match marker {
            0 | 0xd0..=0xd7 => continue,
            // end of image: what follows is another's
            0xd9 => break,
            // these have no length
            0x01 | 0xd8 => continue,
            _ => {}
        }
        let Some(&[high, low]) = rest.first_chunk() else { break };
        rest = rest.get(usize::from(u16::from_be_bytes([high, low]))..).unwrap_or_default();
    }
    Ok(())
}

/// Refuses sizes beyond [`MAX_PIXELS`] and [`MAX_SIDE`].
///
/// # Errors
/// [`PixelError::TooLarge`].
pub fn check_size((width, height): (u32, u32)) -> Result<(), PixelError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS || width.max(height) > MAX_SIDE {
        return Err(PixelError::TooLarge { width, height, max_pixels: MAX_PIXELS, max_side: MAX_SIDE });
    }
    Ok(())
}
