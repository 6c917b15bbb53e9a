//! The legacy container: strides, truncation, hostile pickles.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use isthmus_nets::pth::read;

fn strided() -> Vec<u8> {
    std::fs::read(isthmus_testkit::root().join("fuzz/corpus/pth/strided")).unwrap()
}

#[test]
fn strides_are_honoured() {
    let tensors = read(&strided()).unwrap();
    assert_eq!(tensors[0].0, "w");
    assert_eq!(tensors[0].1.shape, [2, 3]);
    // stored column by column
    assert_eq!(tensors[0].1.data, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = strided();
    for len in 0..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "length {len}");
    }
}

#[test]
fn code_is_never_called() {
    let bytes = strided();
    let at = bytes.windows(12).position(|w| w == b"ctorch._util").unwrap();
    let mut evil = bytes[..at].to_vec();
    evil.extend(b"cos\nsystem\n(X\x02\0\0\0idtR");
    evil.extend(&bytes[at..]);
    let error = read(&evil).unwrap_err().to_string();
    assert!(error.contains("os.system"), "{error}");
}
