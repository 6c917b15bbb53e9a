//! Folders of photos as comparisons take them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bench_harness::codecs::Codec;
use bench_harness::photos::PhotoSet;
use bench_harness::report;
use isthmus_pixels::Rgb;

#[test]
fn what_cannot_be_decoded_is_left_out_and_named_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("damaged.jpg"), b"no photo").unwrap();
    assert!(PhotoSet::open_readable(folder.path(), 64).is_err(), "none can be read");
    let pixels = Rgb::new(80, 80, [9, 80, 200].repeat(80 * 80)).unwrap();
    std::fs::write(at("good.png"), Codec::png().encode(&pixels).unwrap()).unwrap();
    let set = PhotoSet::open_readable(folder.path(), 64).unwrap();
    assert_eq!(set.photos.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["good.png"]);
    assert!(set.left_out.len() == 1 && set.left_out[0].contains("damaged.jpg"), "{:?}", set.left_out);
    let error = PhotoSet::open(folder.path(), 64).err().unwrap().to_string();
    assert!(error.contains("damaged.jpg"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_written_is_known_before_the_comparison() {
    let folder = tempfile::tempdir().unwrap();
    report::prepare(&folder.path().join("new/results")).unwrap();
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing is left there");
    let file = folder.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = report::prepare(&file).unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
    assert!(report::prepare(&file.join("below")).is_err());
}
