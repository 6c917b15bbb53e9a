//! `bench-harness run`: real client and server over an emulated link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use isthmus_testkit::{backbones, binary, bundle, demo_photos, root};
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
        "bundle = {:?}\nbackbones = {:?}\nphotos = \"photos\"\nmost_photos = 2\ncatalogue = \"links.toml\"\nlinks = [\"slow\"]\n\
         emulation = \"stream\"\nmost_sent = 2\nrounds = 1\ndeadline = \"20s\"\n[strategies]\nbottleneck = [1, 4]\n\
         features = [\"f32\", \"u8-zstd\"]\nlocal = true\nauto = [{{ aim = \"latency\", local = \"choice\" }}]\n\
         [strategies.images]\navif = [50]\nwebp = [50]\npng = []\n\
         [timeline]\nlinks = [\"slow\"]\nlength = \"2s\"\nperiod = \"200ms\"\ndeadline = \"1s\"\n[timeline.strategies]\n\
         bottleneck = [1]\nauto = [{{ aim = \"agreement\" }}]\n\
         [throughput]\nlinks = [\"slow\"]\nclients = [1, 3]\nlength = \"2s\"\n[throughput.strategies]\nbottleneck = [1]\n",
        bundle().display().to_string(),
        backbones().display().to_string()
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
    assert_eq!(link["emulator"]["level"], emulation);
    let rows = link["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|r| r["strategy"].as_str().unwrap()).collect();
    let sent = ["Isthmus q1", "Isthmus q4", "AVIF q50", "PNG", "WebP q50", "features f32", "features u8+zstd"];
    assert_eq!(names[..7], sent);
    assert_eq!(names[7..], ["local", "auto (latency)"]);
    for row in rows {
        assert_eq!((row["n"].as_u64(), row["failed"].as_u64()), (Some(2), Some(0)), "{row}");
    }
    let p50 = |name: &str| rows[names.iter().position(|n| *n == name).unwrap()]["latency_ms"]["p50"].as_f64().unwrap();
    for (row, name) in rows.iter().zip(sent) {
        // no answer can come before its bytes have gone up and a round trip is over
        let least = row["bytes"].as_f64().unwrap() * 8.0 / 2e3 * 0.5 + 60.0;
        assert!(p50(name) >= least && row["predicted_ms"].as_f64().unwrap() > 60.0, "{row}");
    }
    assert!(p50("Isthmus q1") < p50("PNG") && p50("PNG") < p50("features f32"), "few bytes arrive sooner than many");
    assert!(p50("auto (latency)") < p50("PNG"), "the client chooses something fast");
    let agreement = |name: &str| {
        let rows = results["agreement"].as_array().unwrap();
        rows.iter().find(|r| r["strategy"] == name).unwrap()["agreement"]["mean"].as_f64().unwrap()
    };
    for lossless in ["PNG", "features f32", "local"] {
        assert_eq!(agreement(lossless), 1.0, "{lossless} agrees with the lossless photo");
    }
    let times = &results["timelines"][0]["rows"];
    assert_eq!(times[1]["strategy"], "auto (agreement)");
    for row in times.as_array().unwrap() {
        assert!(row["n"].as_u64().unwrap() >= 4 && row["in_time"].as_f64().unwrap() > 0.7, "{row}");
    }
    let shared = results["throughput"][0]["rows"].as_array().unwrap();
    // how many more three get than one is a measurement, not for a busy machine to fail on
    let answered = |row: &Value| row["n"].as_u64().unwrap() > 0 && row["per_second"].as_f64().unwrap() > 0.0;
    assert!(shared[1]["clients"] == 3 && shared.iter().all(answered), "{shared:?}");
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
    if let Some(shown) = isthmus_testkit::browser::shown(&format!("file://{}", folder.path().join("out/report.html").display())) {
        assert!(shown.matches("<svg").count() >= 3 && shown.contains("</table>"), "plots and tables in a browser");
    }
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
    assert!(error(|r| r.replace("webp = [50]", "webp = [200]")).contains("0 to 100"));
    assert!(error(|r| r.replace("[1, 4]", "[99]")).contains("levels 1 to"));
    assert!(error(|r| r.replace("\"photos\"", "\"nowhere\"")).contains("nowhere"));
    assert!(error(|r| r.replace("avif = [50]", "jpeg2000 = [50]")).contains("there are jpeg, webp, avif, png"));
    assert!(error(|r| r.replace("clients = [1, 3]", "clients = [0]")).contains("throughput.clients"));
    assert!(error(|r| r.replace("period = \"200ms\"", "period = \"0s\"")).contains("timeline.period"));
    assert!(error(|r| r.replace("rounds = 1", "rounds = 1\ndevice_slowdown = 0.5")).contains("device_slowdown"));
    assert!(error(|r| format!("congestion_control = \"nonsense\"\n{r}")).contains("there are"));
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

/// At stream level too: the server ends with the pipe to its input.
#[test]
fn a_server_on_loopback_does_not_outlive_a_killed_run() {
    let folder = folder(|run| run.replace("rounds = 1", "rounds = 500"));
    let mut command = Command::new(binary("bench-harness"));
    command.current_dir(root()).arg("run").arg(folder.path().join("run.toml")).arg("--out").arg(folder.path().join("out"));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let pid = child.id();
    let children = || {
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    };
    let servers: Vec<String> = loop {
        let found: Vec<String> = children();
        if !found.is_empty() {
            break found;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "no server appeared");
        std::thread::sleep(Duration::from_millis(20));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let ended = Instant::now();
    while servers.iter().any(|pid| Path::new("/proc").join(pid).exists()) {
        assert!(ended.elapsed() < Duration::from_secs(25), "{servers:?} are left");
        std::thread::sleep(Duration::from_millis(50));
    }
}
