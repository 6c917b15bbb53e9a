//! Container and coder: round trips, sizes, and every way in which bytes can be wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use isthmus_codec::{BundleHash, ChannelTable, CodecError, Container, LatentShape, LevelTables, Quality, Tables, coder, container, pmf};
use proptest::prelude::*;

const SHAPE: LatentShape = LatentShape { channels: 6, height: 7, width: 5 };
const HASH: BundleHash = BundleHash([7; 32]);

/// Two-sided geometric tables, wider for later channels.
fn tables() -> Tables {
    let channel = |c: usize, gain: f32| {
        let (half, decay) = (3 + 4 * c as i32, 0.4f64 + 0.08 * c as f64);
        let raw: Vec<f64> = (-half..=half).map(|s| decay.powi(s.abs())).collect();
        let total: f64 = raw.iter().sum::<f64>() * 1.001;
        let pmf: Vec<f64> = raw.iter().map(|p| p / total).collect();
        let widths = pmf::quantise(&pmf, 0.001).unwrap();
        ChannelTable::new(gain, 1.0 / gain, 0.25, -half, widths).unwrap()
    };
    let level = |gain| LevelTables::new((0..6).map(|c| channel(c, gain)).collect()).unwrap();
    Tables { levels: vec![level(1.5), level(6.0)] }
}

fn symbols(seed: u64, escapes: bool) -> Vec<i32> {
    let mut state = seed | 1;
    (0..SHAPE.symbols())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match state % 40 {
                0 if escapes => (state >> 20) as i32 % 32768,
                r => (r % 5) as i32 - 2,
            }
        })
        .collect()
}

/// The same container as versions 1 and 2 had it.
fn earlier(container: &[u8], codec: u8, shape: LatentShape) -> Vec<u8> {
    let Container { header, payload } = Container::parse(container).unwrap();
    let mut out = b"ISTH".to_vec();
    out.extend([if header.quality.is_level() { 1 } else { 2 }, codec]);
    out.extend(header.bundle);
    out.push(header.quality.level);
    for extent in [shape.channels, shape.height, shape.width] {
        out.extend(extent.to_le_bytes());
    }
    out.extend((shape.symbols() as u32).to_le_bytes());
    out.extend(header.payload_len.to_le_bytes());
    if !header.quality.is_level() {
        out.push(header.quality.fraction);
    }
    out.extend(payload);
    out.extend([0; 4]);
    reseal(&mut out);
    out
}

/// A container in each layout that is read, that of today first.
fn layouts(seed: u64, escapes: bool, quality: f64) -> [Vec<u8>; 2] {
    let new = container::encode(&symbols(seed, escapes), Quality::nearest(quality), &HASH, SHAPE, &tables()).unwrap();
    let old = earlier(&new, 1, SHAPE);
    [new, old]
}

fn decode(bytes: &[u8]) -> Result<Vec<i32>, CodecError> {
    Container::parse(bytes)?.decode(&HASH, SHAPE, &tables())
}

#[test]
fn threat_corruption_every_single_bit_flip_is_refused() {
    for good in [1.0, 1.75].into_iter().flat_map(|quality| layouts(3, true, quality)) {
        assert!(decode(&good).is_ok());
        for byte in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[byte] ^= 1 << bit;
                assert!(decode(&bad).is_err(), "flip of bit {bit} of byte {byte} went unnoticed");
            }
        }
    }
}

#[test]
fn threat_corruption_every_truncation_and_extension_is_refused() {
    for good in [2.0, 1.25].into_iter().flat_map(|quality| layouts(4, true, quality)) {
        for len in 0..good.len() {
            assert!(matches!(decode(&good[..len]), Err(CodecError::Malformed(_))), "length {len}");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert!(decode(&longer).is_err());
    }
}

/// With the checksum made right again, the remaining checks must hold by themselves.
fn reseal(bytes: &mut [u8]) {
    let end = bytes.len() - 4;
    let crc = crc32c::crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn resealed_garbage_never_passes_as_another_latent_of_other_size() {
    for good in [1.0, 1.5].into_iter().flat_map(|quality| layouts(5, false, quality)) {
        for byte in 0..good.len() - 4 {
            let mut bad = good.clone();
            bad[byte] = bad[byte].wrapping_add(1);
            reseal(&mut bad);
            if let Ok(s) = decode(&bad) {
                assert_eq!(s.len(), SHAPE.symbols());
            }
        }
    }
}

#[test]
fn between_two_levels_gains_lie_between_theirs_and_the_nearer_ones_tables_code() {
    let t = tables();
    let latent: Vec<f32> = (0..SHAPE.symbols()).map(|i| (i as f32 * 0.37).sin()).collect();
    for (value, gain, nearer) in [(1.0, 1.5, 1), (1.25, 1.5 * 2f32.sqrt(), 1), (1.5, 3.0, 2), (2.0, 6.0, 2)] {
        let quality = Quality::nearest(value);
        let level = t.level(quality).unwrap();
        let symbols = level.quantise(&latent, SHAPE).unwrap();
        let expected: Vec<i32> = latent.iter().map(|y| (y * gain - 0.25).round_ties_even() as i32).collect();
        assert_eq!(symbols, expected, "{value}");
        let bytes = container::encode(&symbols, quality, &HASH, SHAPE, &t).unwrap();
        let parsed = Container::parse(&bytes).unwrap();
        assert_eq!((parsed.header.quality, parsed.header.stated.is_some()), (quality, false));
        assert_eq!(parsed.decode(&HASH, SHAPE, &t).unwrap(), symbols);
        assert_eq!(parsed.payload, coder::encode(&symbols, &t.level(nearer).unwrap(), SHAPE).unwrap());
        let mut restored = Vec::new();
        level.dequantise_into(&symbols, SHAPE, &mut restored).unwrap();
        assert!(latent.iter().zip(&restored).all(|(a, b)| (a - b).abs() <= 0.5001 / gain), "{value}");
    }
    for outside in [0.5, 2.01, 2.5, 254.5, 255.5] {
        assert!(matches!(t.level(Quality::nearest(outside)), Err(CodecError::UnknownQuality { .. })), "{outside}");
    }
    // a level had one form alone
    let [_, mut twice] = layouts(1, false, 1.5);
    assert_eq!(twice[29], 128);
    twice[29] = 0;
    reseal(&mut twice);
    assert!(matches!(decode(&twice), Err(CodecError::Malformed(_))));
}

#[test]
fn threat_bombs_claims_of_gigabytes_are_refused_before_any_allocation() {
    let [good, old] = layouts(6, false, 1.0);
    let mut bad = good.clone();
    bad[13..16].copy_from_slice(&[0xff; 3]);
    reseal(&mut bad);
    assert!(matches!(decode(&bad), Err(CodecError::Malformed(_))), "payload length");
    for (at, what) in [(21, "symbol count"), (25, "payload length")] {
        let mut bad = old.clone();
        bad[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        reseal(&mut bad);
        assert!(matches!(decode(&bad), Err(CodecError::Malformed(_))), "{what}");
    }
    let mut bad = old.clone();
    bad[15..21].copy_from_slice(&[0xff; 6]);
    bad[21..25].copy_from_slice(&((65535u64.pow(3)) as u32).to_le_bytes());
    reseal(&mut bad);
    assert!(decode(&bad).is_err());
}

#[test]
fn another_bundle_shape_or_level_has_its_own_error() {
    let other = BundleHash([8; 32]);
    let wider = LatentShape { width: 6, ..SHAPE };
    for (good, level_at) in layouts(7, false, 1.0).into_iter().zip([11, 14]) {
        let parsed = Container::parse(&good).unwrap();
        assert!(matches!(parsed.decode(&other, SHAPE, &tables()), Err(CodecError::WrongBundle { .. })));
        let of_other_shape = parsed.decode(&HASH, wider, &tables());
        match parsed.header.stated {
            Some(_) => assert!(matches!(of_other_shape, Err(CodecError::WrongShape { .. }))),
            // the bundle's hash stands for its shape
            None => assert!(!of_other_shape.is_ok_and(|s| s.len() != wider.symbols())),
        }
        for quality in [0, 3, 255] {
            let mut bad = good.clone();
            bad[level_at] = quality;
            reseal(&mut bad);
            assert!(matches!(decode(&bad), Err(CodecError::UnknownQuality { .. })), "quality {quality}");
        }
    }
    assert!(matches!(container::encode(&symbols(7, false), 9, &HASH, SHAPE, &tables()), Err(CodecError::UnknownQuality { .. })));
}

#[test]
fn a_container_of_another_codec_than_its_level_is_refused() {
    let [good, _] = layouts(3, false, 1.0);
    assert!(matches!(decode(&earlier(&good, 2, SHAPE)), Err(CodecError::Malformed(why)) if why.contains("codec 2, but")));
    assert!(matches!(decode(&earlier(&good, 3, SHAPE)), Err(CodecError::Malformed(why)) if why.contains("codec 3 is unknown")));
}

#[test]
fn versions_that_are_not_known_are_named() {
    let [good, old] = layouts(8, false, 1.0);
    for (layout, at) in [(good, 2), (old, 4)] {
        let mut bad = layout.clone();
        bad[at] = 9;
        reseal(&mut bad);
        assert!(matches!(decode(&bad), Err(CodecError::Malformed(why)) if why.contains("version 9")));
    }
}

#[test]
fn latents_that_are_not_finite_or_have_another_size_are_refused() {
    let t = tables();
    let level = t.level(1).unwrap();
    let mut latent = vec![0.5; SHAPE.symbols()];
    assert!(level.quantise(&latent[1..], SHAPE).is_err());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        latent[11] = bad;
        assert!(matches!(level.quantise(&latent, SHAPE), Err(CodecError::BadLatent(_))));
    }
    latent[11] = 1e30;
    assert!(level.quantise(&latent, SHAPE).unwrap()[11] == 1 << 15, "huge but finite values are clamped");
}

#[test]
fn rounding_is_half_to_even_around_the_median_and_undone_exactly() {
    let table = ChannelTable::new(2.0, 0.5, 0.25, -4, pmf::quantise(&[0.1; 9], 0.1).unwrap()).unwrap();
    let level = LevelTables::new(vec![table]).unwrap();
    let shape = LatentShape { channels: 1, height: 1, width: 4 };
    // y * 2 - 0.25 = 0.5, 1.5, -0.5, 2.5
    let symbols = level.quantise(&[0.375, 0.875, -0.125, 1.375], shape).unwrap();
    assert_eq!(symbols, [0, 2, 0, 2]);
    let mut back = Vec::new();
    level.dequantise_into(&symbols, shape, &mut back).unwrap();
    assert_eq!(back, [0.125, 1.125, 0.125, 1.125]);
}

/// The bytes of these containers are part of the format: they must never change.
#[test]
fn golden_bytes() {
    for (bytes, golden) in layouts(1, true, 1.0).into_iter().zip(GOLDEN) {
        let digest = isthmus_codec::bundle::sha256(&bytes);
        assert_eq!((bytes.len(), digest.as_str()), golden, "the container format changed: raise its version");
    }
}

const GOLDEN: [(usize, &str); 2] = [
    (120, "33dd0021b9a5f7c77583ba5968da6dd570b88fd69ddb8ae1dd828ca0e5c9a4bc"),
    (133, "5178fffa21e86fd88f919cb07b95313decd478f50c733fcf532f3b9ca5094793"),
];

#[test]
fn table_files_round_trip_and_truncations_are_refused() {
    let bytes = tables().to_bytes();
    let back = Tables::from_bytes(&bytes).unwrap();
    assert_eq!(back.to_bytes(), bytes);
    for len in 0..bytes.len() {
        assert!(Tables::from_bytes(&bytes[..len]).is_err(), "length {len}");
    }
}

proptest! {
    #[test]
    fn symbols_round_trip(raw in prop::collection::vec(-32768i32..=32768, SHAPE.symbols()), seed: u64, wild: bool) {
        let s = if wild { raw } else { symbols(seed, true) };
        let bytes = container::encode(&s, 2, &HASH, SHAPE, &tables()).unwrap();
        prop_assert_eq!(decode(&earlier(&bytes, 1, SHAPE)).unwrap(), s.clone());
        prop_assert_eq!(decode(&bytes).unwrap(), s);
    }

    #[test]
    fn payload_is_within_one_percent_and_32_bytes_of_ideal(seed: u64, escapes: bool) {
        let t = tables();
        let s = symbols(seed, escapes);
        let payload = coder::encode(&s, &t.level(1).unwrap(), SHAPE).unwrap();
        let ideal = coder::ideal_bits(&s, &t.level(1).unwrap(), SHAPE).unwrap() / 8.0;
        prop_assert!(payload.len() as f64 <= ideal * 1.01 + 32.0, "{} bytes, ideal {ideal}", payload.len());
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
        let _ = Tables::from_bytes(&bytes);
        let _ = coder::decode(&bytes, &tables().level(1).unwrap(), SHAPE);
    }

    #[test]
    fn random_payloads_in_a_sound_frame_never_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = container::encode(&symbols(1, false), 1, &HASH, SHAPE, &tables()).unwrap();
        bytes.truncate(container::HEADER_LEN);
        bytes[13..16].copy_from_slice(&(payload.len() as u32).to_le_bytes()[..3]);
        bytes.extend(&payload);
        bytes.extend([0; 4]);
        reseal(&mut bytes);
        if let Ok(s) = decode(&bytes) {
            prop_assert_eq!(s.len(), SHAPE.symbols());
        }
    }
}

/// File names of a manifest that leave its folder are refused, and nothing is read there.
#[test]
fn threat_path_traversal_in_a_manifest_is_refused() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bundles/lite0-patch-stem");
    let manifest = std::fs::read_to_string(folder.join("manifest.toml")).unwrap();
    for name in ["../tables.istb", "/etc/passwd", ".hidden", "a/b", "a\\\\b", ".."] {
        let altered = manifest.replace("tables.istb", name);
        assert_ne!(altered, manifest);
        let mut asked = Vec::new();
        let read = |file: &str| {
            asked.push(file.to_owned());
            if file == "manifest.toml" { Ok(altered.clone().into_bytes()) } else { std::fs::read(folder.join(file)) }
        };
        let refused = isthmus_codec::Bundle::load(read, |_| true);
        assert!(matches!(&refused, Err(e) if e.to_string().contains("leaves the folder")), "{name}: {:?}", refused.err());
        assert!(asked.iter().all(|file| !file.contains(['/', '\\']) && !file.starts_with('.')), "{asked:?}");
    }
}
