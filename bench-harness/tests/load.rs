//! `bench-harness load` against a real server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use isthmus_testkit::{Server, binary, bundle, demo_photos};
use serde_json::Value;

/// Exit status, standard output, standard error.
fn load(server: &Server, extra: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(binary("bench-harness"));
    command.arg("load").arg(&demo_photos()[0]).args(["--server", &server.url()]).arg("--bundle").arg(bundle());
    command.args(["--warm-up", "200ms", "--window", "500ms", "--most-windows", "3"]).args(extra);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn points(out: &str) -> Value {
    serde_json::from_str::<Value>(out).unwrap()["points"].clone()
}

#[test]
fn closed_and_open_loops_and_schedules_are_measured() {
    let server = Server::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("load.csv");
    let (ok, out, error) = load(&server, &["--concurrency", "1:4", "--json", "--csv", csv.to_str().unwrap()]);
    assert!(ok, "{error}");
    let closed = points(&out);
    assert_eq!(
        closed.as_array().unwrap().iter().map(|p| p["load"].as_str().unwrap()).collect::<Vec<_>>(),
        ["1 under way", "2 under way", "4 under way"]
    );
    for p in closed.as_array().unwrap() {
        assert!(p["n"].as_u64().unwrap() > 0 && p["per_second"].as_f64().unwrap() > 1.0, "{p}");
        assert!(p["server_ms"]["p50"].as_f64().unwrap() <= p["latency_ms"]["p99"].as_f64().unwrap(), "{p}");
    }
    assert!(closed[2]["batch_size"].as_f64().unwrap() > closed[0]["batch_size"].as_f64().unwrap(), "{closed}");
    let text = std::fs::read_to_string(csv).unwrap();
    assert!(text.starts_with("load,n,per_second") && text.lines().count() == 4, "{text}");
    let (ok, out, error) = load(&server, &["--rate", "10", "--json", "--image", "jpeg:75"]);
    assert!(ok, "{error}");
    let rate = points(&out)[0]["per_second"].as_f64().unwrap();
    assert!((3.0..20.0).contains(&rate), "{rate}");
    let schedule = folder.path().join("schedule");
    std::fs::write(&schedule, "0\n1\n2\n100\n").unwrap();
    let (ok, out, error) = load(&server, &["--schedule", schedule.to_str().unwrap()]);
    assert!(ok && out.contains("schedule of 4"), "{out}{error}");
}

/// More requests than the server can answer: what waits to be sent counts, however fast each answer is once sent.
#[test]
fn an_overload_shows_in_the_latency_and_the_search_stays_below_it() {
    let server = Server::start(&[]);
    let (ok, out, error) = load(&server, &["--rate", "1500", "--even", "--json", "--deadline", "500ms"]);
    assert!(ok, "{error}");
    let over = &points(&out)[0];
    let failed = over["failed"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>() + over["unsent"].as_u64().unwrap();
    assert!((0.1..1000.0).contains(&over["per_second"].as_f64().unwrap()) && failed > 0, "{over}");
    let (ok, out, error) = load(&server, &["--search", "1:2000", "--objective", "2s", "--json"]);
    assert!(ok, "{error}");
    let found: Value = serde_json::from_str(&out).unwrap();
    let best = found["best"]["per_second"].as_f64().unwrap();
    assert!(best < 1500.0 && found["points"].as_array().unwrap().len() > 3, "{found}");
    let (ok, out, _) = load(&server, &["--search", "1:4", "--objective", "1us"]);
    assert!(ok && out.contains("at the lowest rate already"), "{out}");
}

#[test]
fn wrong_options_are_explained() {
    let server = Server::start(&[]);
    for (extra, why) in [
        (vec!["--concurrency", "0"], "1 to 4096"),
        (vec!["--concurrency", "8:2"], "1:16"),
        (vec!["--rate", "0"], "more than 0"),
        (vec!["--rate", "5", "--schedule", "x"], "cannot be used with"),
        (vec!["--schedule", "nowhere"], "nowhere"),
        (vec!["--search", "5:2", "--objective", "1s"], "LOW:HIGH"),
        (vec!["--search", "1:2"], "--objective"),
        (vec!["--image", "gif"], "there are jpeg, webp, avif, png"),
        (vec!["--image", "webp:101"], "0 to 100"),
        (vec!["--quality", "99"], "99"),
        (vec!["--percentile", "101"], "0 to 100"),
        (vec!["--stability", "0"], "must be positive"),
    ] {
        let (ok, _, error) = load(&server, &extra);
        assert!(!ok && error.contains(why), "{extra:?}: {error}");
    }
}
