//! The public Python client of the Open Inference Protocol works unchanged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

use common::sample;
use isthmus_testkit::{Server, demo_photos, root, skipped};

/// What a child wrote, if it ended well.
fn passed(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn the_public_client_finds_what_it_expects() {
    let packages = root().join("third_party/python-clients");
    if !packages.join("tritonclient").is_dir() {
        return skipped("the conformance list of tritonclient: run `make python-clients` (Python 3.11 to 3.13 with pip)");
    }
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("server.toml");
    std::fs::write(&config, "model_control = true\n").unwrap();
    let server = Server::start(&["--config", config.to_str().unwrap()]);
    let container = folder.path().join("photo.isth");
    std::fs::write(&container, sample().0).unwrap();
    let mut command = Command::new("timeout");
    command.args(["300", "python3"]).arg(root().join("offload-server/tests/conformance/tritonclient_list.py"));
    command.arg(server.address.to_string()).arg(&container).arg(&demo_photos()[0]).env("PYTHONPATH", &packages);
    let text = passed(command);
    assert_eq!(text.lines().filter(|l| l.starts_with("ok ")).count(), 19, "{text}");
}
