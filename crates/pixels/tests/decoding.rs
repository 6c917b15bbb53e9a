//! Bounded decoding and exact geometry.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use isthmus_pixels::{PixelError, Rgb, decode};

fn gradient(w: u32, h: u32) -> Rgb {
    let data = (0..w * h).flat_map(|i| [(i % w * 255 / w) as u8, (i / w * 255 / h) as u8, 60]).collect();
    Rgb::new(w, h, data).unwrap()
}

#[test]
fn crops_and_resizes_to_the_square() {
    for (w, h) in [(512, 512), (640, 480), (100, 333), (1, 1), (3, 2000)] {
        let square = gradient(w, h).network_input(224).unwrap();
        assert_eq!((square.width(), square.height()), (224, 224));
    }
    let ready = gradient(224, 224);
    assert_eq!(ready.network_input(224).unwrap(), ready, "an input of the network's size is taken as it is");
}

#[test]
fn normalisation_is_channel_first() {
    let rgb = Rgb::new(2, 1, vec![127, 255, 0, 191, 127, 63]).unwrap();
    let mut out = Vec::new();
    rgb.normalise_into(&mut out);
    assert_eq!(out, [0.0, 0.5, 1.0, 0.0, -127.0 / 128.0, -0.5]);
}

#[test]
fn flips_mirror() {
    let mut rgb = gradient(5, 3);
    let before = rgb.clone();
    rgb.flip();
    assert_ne!(rgb, before);
    rgb.flip();
    assert_eq!(rgb, before);
}

#[test]
fn wrong_sizes_and_formats_are_refused() {
    assert!(Rgb::new(2, 2, vec![0; 11]).is_none());
    assert!(Rgb::new(0, 2, vec![]).is_none());
    assert_eq!(decode(&[]), Err(PixelError::Empty));
    assert_eq!(decode(b"GIF89a......"), Err(PixelError::UnknownFormat("JPEG, PNG or WebP")));
    assert!(gradient(4, 4).resize(0, 4).is_err());
}

#[test]
fn corpus_files_of_every_format_decode() {
    for name in ["png", "jpeg", "jpegp", "webp", "webpl", "cmyk"] {
        let bytes = std::fs::read(isthmus_testkit::root().join("fuzz/corpus/image").join(name)).unwrap();
        let rgb = decode(&bytes).unwrap();
        assert_eq!((rgb.width(), rgb.height()), (24, 18), "{name}");
    }
}

/// A scan costs time for every block of an image, and 27 bytes are enough for one.
#[test]
fn threat_bombs_jpegs_of_countless_scans_are_refused() {
    let folder = isthmus_testkit::root().join("fuzz/corpus/image");
    let bomb = std::fs::read(folder.join("scans")).unwrap();
    let refused = |result: Result<(), PixelError>| matches!(&result, Err(PixelError::Decode(why)) if why.contains("64 scans"));
    assert!(refused(decode(&bomb).map(drop)));
    assert!(refused(isthmus_pixels::dimensions(&bomb).map(drop)), "before anything is decoded");
    // the same image with what encoders write, and with another file's scans behind its end
    let progressive = std::fs::read(folder.join("jpegp")).unwrap();
    decode(&[&progressive[..], &bomb].concat()).unwrap();
}
