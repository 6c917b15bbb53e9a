//! The emulator's own validation. What depends on how busy the machine is may be tried again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use isthmus_testkit::binary;
use serde_json::Value;

#[test]
fn the_emulator_is_what_it_says() {
    if let Some(why) = linkem::driver::namespace::missing() {
        return isthmus_testkit::skipped(&format!("validation at packet level: {why}"));
    }
    let mut last = Value::Null;
    for _ in 0..3 {
        let output = Command::new(binary("bench-harness")).args(["validate", "--json"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        last = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
        let left_out = last["left_out"].as_array().unwrap();
        if !left_out.is_empty() {
            return isthmus_testkit::skipped(&format!("parts of the validation: {left_out:?}"));
        }
        // lateness and the rate of TCP are timings of this machine: `bench-harness validate` judges them, this test does not
        let timing = |c: &Value| c["name"].as_str().is_some_and(|n| n.starts_with("lateness") || n.starts_with("TCP"));
        let checks = last["checks"].as_array().unwrap();
        assert!(checks.len() >= 15, "{last}");
        if checks.iter().filter(|c| !timing(c)).all(|c| c["ok"] == true) {
            return;
        }
    }
    panic!("three times: {last}");
}
