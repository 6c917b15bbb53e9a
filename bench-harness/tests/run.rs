//! `bench-harness run`: real client and server over an emulated link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use isthmus_testkit::{binary, bundle, demo_photos, root};
use serde_json::Value;

/// A folder with three photos, a catalogue of one slow link, and a run of it.
fn folder(change: impl Fn(String) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("photos")).unwrap();
    for photo in demo_photos().iter().take(2) {
        std::fs::copy(photo, folder.path().join("photos").join(photo.file_name().unwrap())).unwrap();
    }
    let catalogue =
        "[link.slow]\nabout = \"slow\"\nup = { mbit_per_s = 2, delay = \"30ms\" }\ndown = { mbit_per_s = 20, delay = \"30ms\" }\n";
    std::fs::write(folder.path().join("links.toml"), catalogue).unwrap();
    let run = format!(
        "bundle = {:?}\nphotos = \"photos\"\nmost_photos = 2\ncatalogue = \"links.toml\"\nlinks = [\"slow\"]\nemulation = \"stream\"\n\
         rounds = 1\ndeadline = \"20s\"\n[strategies]\nbottleneck = [1, 4]\nwebp = [50]\npng = true\n",
        bundle().display().to_string()
    );
    std::fs::write(folder.path().join("run.toml"), change(run)).unwrap();
    folder
}

fn run(folder: &Path) -> Output {
    let mut command = Command::new(binary("bench-harness"));
    // the server looks for its backbones here
    command.current_dir(root()).arg("run").arg(folder.join("run.toml")).arg("--out").arg(folder.join("out"));
    command.output().unwrap()
}

fn check(results: &Value, emulation: &str) {
    let link = &results["links"][0];
    assert_eq!(link["emulation"], emulation);
    let rows = link["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|r| r["strategy"].as_str().unwrap()).collect();
    assert_eq!(names, ["Isthmus q1", "Isthmus q4", "WebP q50", "PNG"]);
    for row in rows {
        assert_eq!((row["n"].as_u64(), row["failed"].as_u64()), (Some(2), Some(0)), "{row}");
        // no answer can come before its bytes have gone up and a round trip is over
        let least = row["bytes"].as_f64().unwrap() * 8.0 / 2e3 * 0.5 + 60.0;
        assert!(row["latency_ms"]["p50"].as_f64().unwrap() >= least, "{row}");
        assert!(row["predicted_ms"].as_f64().unwrap() > 60.0);
    }
    assert_eq!(rows[3]["agreement"], 1.0, "the lossless photo agrees with itself");
    let p50 = |i: usize| rows[i]["latency_ms"]["p50"].as_f64().unwrap();
    assert!(p50(0) < p50(3), "few bytes arrive sooner than many");
}

#[test]
fn strategies_are_measured_over_shaped_streams() {
    let folder = folder(|run| run);
    let output = run(folder.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let results = std::fs::read(folder.path().join("out/results.json")).unwrap();
    check(&serde_json::from_slice(&results).unwrap(), "stream");
    let tables = std::fs::read_to_string(folder.path().join("out/results.md")).unwrap();
    let page = std::fs::read_to_string(folder.path().join("out/report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("Isthmus q4") && !page.contains("http-equiv"), "{page}");
    std::fs::remove_file(folder.path().join("out/report.html")).unwrap();
    let again = Command::new(binary("bench-harness")).arg("report").arg(folder.path().join("out")).output().unwrap();
    assert!(again.status.success() && folder.path().join("out/report.html").exists());
    assert!(tables.contains("## slow: slow") && tables.contains("| PNG |"), "{tables}");
}

#[test]
fn strategies_are_measured_over_packets() {
    if let Some(why) = linkem::driver::namespace::missing() {
        isthmus_testkit::skipped(&format!("packet-level emulation: {why}"));
        return;
    }
    let folder = folder(|run| run.replace("\"stream\"", "\"packet\""));
    let output = run(folder.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let results = std::fs::read(folder.path().join("out/results.json")).unwrap();
    check(&serde_json::from_slice(&results).unwrap(), "packet");
}

#[test]
fn wrong_descriptions_stop_before_anything_starts() {
    let error = |change: fn(String) -> String| {
        let folder = folder(change);
        let output = run(folder.path());
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(error(|r| r.replace("rounds", "runds")).contains("runds"));
    assert!(error(|r| r.replace("[\"slow\"]", "[\"fast\"]")).contains("there are slow"));
    assert!(error(|r| r.replace("webp = [50]", "webp = [200]")).contains("at most 100"));
    assert!(error(|r| r.replace("[1, 4]", "[99]")).contains("levels 1 to"));
    assert!(error(|r| r.replace("\"photos\"", "\"nowhere\"")).contains("nowhere"));
}

/// Namespaces of the process `pid`, and the processes inside them.
fn namespaces(pid: u32) -> Vec<(String, Vec<String>)> {
    let ip = |args: &[&str]| String::from_utf8(Command::new("ip").args(args).output().unwrap().stdout).unwrap();
    let names = ip(&["netns", "list"]);
    let ours = names.lines().filter_map(|l| l.split_whitespace().next()).filter(|n| n.starts_with(&format!("isthmus-{pid}-")));
    ours.map(|n| (n.to_owned(), ip(&["netns", "pids", n]).split_whitespace().map(str::to_owned).collect())).collect()
}

/// However the harness ends, its namespaces and the server inside go too.
#[test]
fn nothing_is_left_after_an_interrupt_or_a_kill() {
    if let Some(why) = linkem::driver::namespace::missing() {
        return isthmus_testkit::skipped(&format!("packet-level emulation: {why}"));
    }
    for signal in ["-INT", "-KILL"] {
        let folder = folder(|run| run.replace("\"stream\"", "\"packet\"").replace("rounds = 1", "rounds = 500"));
        let mut command = Command::new(binary("bench-harness"));
        command.current_dir(root()).arg("run").arg(folder.path().join("run.toml")).arg("--out").arg(folder.path().join("out"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let began = Instant::now();
        // the link's two namespaces, with the server in one of them
        let inside = loop {
            let found = namespaces(child.id());
            let pids: Vec<String> = found.iter().flat_map(|(_, pids)| pids.clone()).collect();
            if found.len() == 2 && !pids.is_empty() {
                break pids;
            }
            assert!(began.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(), "no server appeared: {found:?}");
            std::thread::sleep(Duration::from_millis(50));
        };
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert!(!child.wait().unwrap().success());
        let ended = Instant::now();
        let left = || {
            let alive = inside.iter().filter(|pid| Path::new("/proc").join(pid).exists()).count();
            (namespaces(child.id()), alive)
        };
        while left() != (Vec::new(), 0) {
            assert!(ended.elapsed() < Duration::from_secs(15), "left after {signal}: {:?}", left());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
