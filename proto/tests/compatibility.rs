//! The interfaces are a promise: a change of the descriptors must be deliberate.

use std::path::Path;

#[test]
fn the_descriptor_set_is_the_golden_one() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/isthmus.desc");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, isthmus_proto::DESCRIPTORS).expect("golden file");
    }
    let expected = std::fs::read(&golden).expect("golden file");
    assert!(
        expected == isthmus_proto::DESCRIPTORS,
        "the .proto files changed: if old clients and servers still understand each other, run this test with UPDATE_GOLDEN=1"
    );
}
