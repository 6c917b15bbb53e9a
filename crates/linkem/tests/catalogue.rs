//! The catalogue that comes with the product, and wrong ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use linkem::Direction;
use linkem::catalogue::Catalogue;

#[test]
fn every_link_of_the_sample_can_be_run() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/links.toml");
    let catalogue = Catalogue::open(&path).unwrap();
    for name in ["ble", "lte-edge", "adsl", "4g", "wifi", "5g", "satellite", "driving", "outages"] {
        let link = &catalogue.link(name).unwrap().link;
        for direction in [&link.up, &link.down] {
            assert!(Direction::<()>::new(direction, path.parent().unwrap(), 1).is_ok(), "{name}");
        }
    }
    let unknown = catalogue.link("dial-up").unwrap_err().to_string();
    assert!(unknown.contains("lte-edge"), "{unknown}");
}

#[test]
fn wrong_files_name_file_link_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("links.toml");
    let error = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Catalogue::open(&path).unwrap_err().to_string()
    };
    let good = "[link.a]\nabout = \"x\"\nup = { mbit_per_s = 1 }\ndown = { mbit_per_s = 1 }\n";
    std::fs::write(&path, good).unwrap();
    assert!(Catalogue::open(&path).is_ok());
    let unknown = error(&good.replace("up = { mbit_per_s", "up = { megabits"));
    assert!(unknown.contains("links.toml") && unknown.contains("megabits"), "{unknown}");
    for misspelt in [format!("{good}upp = {{ mbit_per_s = 1 }}\n"), format!("{good}queue = 5\n")] {
        let unknown = error(&misspelt);
        assert!(unknown.contains("unknown field"), "{unknown}");
    }
    let impossible = error(&good.replace("up = { mbit_per_s = 1 }", "up = { mbit_per_s = 1e9 }"));
    assert!(impossible.contains("link.a.up.mbit_per_s") && impossible.contains("1000000000 Mbit/s"), "{impossible}");
    let trace = error(&good.replace("up = { mbit_per_s = 1 }", "up = { trace = \"missing.trace\" }"));
    assert!(trace.contains("link.a.up.trace") && trace.contains("missing.trace"), "{trace}");
    std::fs::write(folder.path().join("bad.trace"), "1\n2\nx\n").unwrap();
    let line = error(&good.replace("up = { mbit_per_s = 1 }", "up = { trace = \"bad.trace\" }"));
    assert!(line.contains("bad.trace:3"), "{line}");
}
