//! What the trainer exports runs the same everywhere: edge engine against libtorch, tables against densities.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use edge_client::{Encoder, open_bundle};
use isthmus_codec::{Container, coder};
use isthmus_nets::weights::Weights;
use isthmus_nets::{Encoder as Network, EncoderKind};
use isthmus_testkit::demo_photos;
use tch::{Device, Tensor, nn};

fn bundles() -> Vec<std::path::PathBuf> {
    let folder = isthmus_testkit::root().join("bundles");
    let mut found: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    found.sort();
    assert!(!found.is_empty());
    found.push(isthmus_testkit::root().join("bench/rivals/lite0-inverted-residual"));
    found
}

/// rten against tch on the 20 demo photos: latents within 1e-3, at least 99.9 % of symbols equal at every
/// level; what decodes is bit-identical to what was rounded.
#[test]
fn edge_engine_equals_libtorch() {
    for folder in bundles() {
        let bundle = open_bundle(&folder).unwrap();
        let kind = EncoderKind::from_name(&bundle.manifest.encoder.kind).unwrap();
        let bytes = std::fs::read(folder.join(&bundle.manifest.encoder.weights)).unwrap();
        let vs = nn::VarStore::new(Device::Cpu);
        let network = Network::new(&vs.root(), kind);
        Weights::from_safetensors(&bytes, "encoder", Device::Cpu).unwrap().copy_to(&vs).unwrap();
        let mut edge = Encoder::new(bundle, 1).unwrap();
        let (mut worst, mut same, mut total) = (0f32, 0usize, 0usize);
        for path in demo_photos() {
            let photo = isthmus_pixels::decode(&std::fs::read(path).unwrap()).unwrap().network_input(224).unwrap();
            let mut pixels = Vec::new();
            photo.normalise_into(&mut pixels);
            let reference = tch::no_grad(|| network.forward(&Tensor::from_slice(&pixels).view([1, 3, 224, 224])));
            let reference = Vec::<f32>::try_from(reference.contiguous().view(-1)).unwrap();
            let latent = edge.latent(&photo).unwrap();
            worst = latent.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
            for quality in 1..=edge.bundle().levels() {
                let level = edge.bundle().tables.level(quality).unwrap();
                let shape = edge.bundle().manifest.latent;
                let (a, b) = (level.quantise(&latent, shape).unwrap(), level.quantise(&reference, shape).unwrap());
                same += a.iter().zip(&b).filter(|(x, y)| x == y).count();
                total += a.len();
                let container = edge.bundle().encode(&latent, quality).unwrap();
                let decoded = Container::parse(&container).unwrap().decode(&edge.bundle().hash, shape, &edge.bundle().tables).unwrap();
                assert_eq!(decoded, a, "decoded symbols are bit-identical");
                let ideal = coder::ideal_bits(&a, &level, shape).unwrap() / 8.0;
                let payload = container.len() - isthmus_codec::container::OVERHEAD;
                assert!(payload as f64 <= ideal * 1.01 + 32.0, "payload {payload}, ideal {ideal}");
            }
        }
        let share = same as f64 / total as f64;
        println!("{}: largest difference {worst:e}, {:.4} % of symbols equal", folder.display(), 100.0 * share);
        assert!(worst < 1e-3, "{worst}");
        assert!(share >= 0.999, "{share}");
    }
}

#[test]
fn encoders_have_the_stated_size() {
    let patch = EncoderKind::PatchStem;
    assert!(patch.parameters() <= 200_000 && patch.macs(224) <= 130_000_000);
    assert_eq!(patch.parameters(), 149_232);
    let head = EncoderKind::InvertedResidual;
    assert_eq!((head.parameters(), head.latent(224)), (73_408, [40, 28, 28]));
    assert!(head.macs(224) <= 130_000_000);
    let reference = EncoderKind::Frankensplit;
    assert_eq!(reference.parameters(), 141_696);
    assert_eq!(reference.macs(224) / 1_000_000, 530);
    // Entropic Student's own numbers (torchdistill's sc2 benchmark)
    let rival = EncoderKind::EntropicStudent;
    assert_eq!(rival.parameters(), 138_672);
    assert_eq!((rival.macs(224) / 1_000_000, rival.latent(224)), (588, [24, 55, 55]));
}

#[test]
fn the_bundle_is_small_and_its_levels_span_half_a_kilobyte_to_almost_six() {
    let bundle = open_bundle(&isthmus_testkit::bundle()).unwrap();
    let bytes: Vec<f64> = bundle.manifest.quality.iter().map(|q| q.bytes).collect();
    assert!(bytes.len() >= 4 && bytes.windows(2).all(|w| w[0] < w[1]), "{bytes:?}");
    assert!(bytes[0] < 550.0 && bytes[bytes.len() - 1] > 5500.0, "{bytes:?}");
    let files = std::fs::read_dir(isthmus_testkit::bundle()).unwrap().map(|e| e.unwrap().metadata().unwrap().len());
    let size: u64 = files.sum();
    assert!(size <= 20_000_000 && bundle.manifest.decoders.len() == 2, "{size} bytes for {} decoders", bundle.manifest.decoders.len());
}

/// Each beginning of a progressive bitstream comes nearer to the latent, at the price of about a level of that quality.
#[test]
fn refinements_cost_what_their_levels_cost() {
    let mut edge = Encoder::new(open_bundle(&isthmus_testkit::bundle()).unwrap(), 1).unwrap();
    let steps = edge.bundle().refinements.as_ref().expect("the default bundle has refinements").steps().len();
    let (mut bytes, mut errors, mut level) = (vec![0; steps + 1], vec![0.0; steps + 1], 0);
    for path in demo_photos() {
        let photo = isthmus_pixels::decode(&std::fs::read(path).unwrap()).unwrap().network_input(224).unwrap();
        let latent = edge.latent(&photo).unwrap();
        let bundle = edge.bundle();
        level += bundle.encode(&latent, 3).unwrap().len();
        let mut come = Vec::new();
        for (n, part) in bundle.encode_progressive(&latent).unwrap().into_iter().enumerate() {
            come.extend(part);
            bytes[n] += come.len();
            let mut decoded = Vec::new();
            bundle.decode_into(&come, &mut decoded).unwrap();
            errors[n] += decoded.iter().zip(&latent).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
    }
    println!("bytes {bytes:?}, level 3 {level}, squared errors {errors:?}");
    assert!(bytes.is_sorted() && errors.iter().rev().is_sorted());
    assert!(bytes[1] as f64 <= 1.1 * level as f64, "the first refinement goes towards level 3");
}

/// Quantisers of refinements are nested in the level's, and end near the qualities that were asked for.
#[test]
fn refinements_are_fitted_to_the_qualities_asked_for() {
    let bundle = open_bundle(&isthmus_testkit::bundle()).unwrap();
    let shape = bundle.manifest.latent;
    let mut edge = Encoder::new(bundle, 1).unwrap();
    let photos = demo_photos();
    let latents: Vec<f32> =
        photos[..4].iter().flat_map(|path| edge.latent(&isthmus_pixels::decode(&std::fs::read(path).unwrap()).unwrap()).unwrap()).collect();
    let tables = &edge.bundle().tables;
    let target = isthmus_codec::Quality::from(4);
    let fitted = isthmus_trainer::refine::fit(tables, &[target], &latents, shape).unwrap();
    let [step] = fitted.steps() else { panic!("one refinement") };
    let base = tables.level(1).unwrap();
    for (((finer, coarser), factor), channel) in step.finer().iter().zip(&base.channels).zip(step.factors()).zip(0u16..) {
        assert_eq!(factor % 2, 1);
        if base.is_coded(channel) {
            let nested = coarser.gain * f32::from(*factor);
            assert!((finer.gain - nested).abs() <= 1e-5 * nested, "channel {channel}");
        }
    }
    assert!(isthmus_trainer::refine::fit(tables, &[isthmus_codec::Quality::from(9)], &latents, shape).is_err());
}
