//! The binary as users meet it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use isthmus_testkit::{Server, binary, bundle, demo_photos, root};

fn client(args: &[&str]) -> Output {
    Command::new(binary("edge-client")).args(args).stdin(Stdio::null()).current_dir(root()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn lines(output: &Output) -> Vec<serde_json::Value> {
    text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn classify_prints_json_lines_in_a_pipe_and_keeps_going_after_a_bad_file() {
    let server = Server::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.jpg");
    std::fs::write(&broken, b"no photo").unwrap();
    let photos = demo_photos();
    let args = ["classify", photos[0].to_str().unwrap(), broken.to_str().unwrap(), "/nonexistent.png", photos[1].to_str().unwrap()];
    let output = client(&[&args[..], &["--server", &server.url(), "--quality", "2"]].concat());
    assert!(!output.status.success(), "a failed photo shows in the exit status");
    let lines = lines(&output);
    assert_eq!(lines.len(), 4);
    assert!(lines[1]["error"].as_str().unwrap().contains("not a JPEG, PNG or WebP"));
    assert!(lines[2]["error"].as_str().unwrap().contains("/nonexistent.png"));
    for good in [&lines[0], &lines[3]] {
        assert_eq!(good["quality"], 2);
        assert_eq!(good["labels"].as_array().unwrap().len(), 3);
        assert!(good["bytes"].as_u64().unwrap() < 3000 && good["server_ms"].as_f64().unwrap() > 0.0);
    }
    let whole = client(&["classify", photos[0].to_str().unwrap(), "--whole-image", "--server", &server.url()]);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
}

#[test]
fn quality_levels_trade_bytes() {
    let photo = demo_photos()[2].clone();
    let folder = tempfile::tempdir().unwrap();
    let mut last = 0;
    for quality in ["1", "3", "6"] {
        let out = folder.path().join(quality);
        let output = client(&["encode", photo.to_str().unwrap(), "-o", out.to_str().unwrap(), "--quality", quality]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let bytes = std::fs::metadata(&out).unwrap().len();
        assert!(bytes > last, "level {quality}: {bytes} bytes after {last}");
        last = bytes;
    }
    let inspect = |args: &[&str]| client(&[&["inspect", folder.path().join("3").to_str().unwrap()], args].concat());
    let plain: serde_json::Value = serde_json::from_slice(&inspect(&[]).stdout).unwrap();
    assert_eq!(plain["quality"], 3);
    let decoded: serde_json::Value = serde_json::from_slice(&inspect(&["--bundle", bundle().to_str().unwrap()]).stdout).unwrap();
    assert_eq!((&decoded["decodes"], decoded["symbols"].as_u64()), (&true.into(), Some(37_632)));
    let mut bytes = std::fs::read(folder.path().join("3")).unwrap();
    bytes[40] ^= 1;
    std::fs::write(folder.path().join("3"), bytes).unwrap();
    let damaged = inspect(&[]);
    assert!(!damaged.status.success() && text(&damaged.stderr).contains("checksum"), "{}", text(&damaged.stderr));
}

#[test]
fn stream_answers_every_photo_within_its_memory() {
    let server = Server::start(&[]);
    let folder = demo_photos()[0].parent().unwrap().to_path_buf();
    let photos = tempfile::tempdir().unwrap();
    for p in demo_photos() {
        std::fs::copy(&p, photos.path().join(p.file_name().unwrap())).unwrap();
    }
    assert!(folder.exists());
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(binary("edge-client"))
        .args(["stream", photos.path().to_str().unwrap(), "--fps", "30", "--repeat", "4", "--server", &server.url()])
        .current_dir(root())
        .stdout(out.reopen().unwrap())
        .spawn()
        .unwrap();
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        let memory = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let rss = memory.lines().find_map(|l| l.strip_prefix("VmHWM:")).and_then(|v| v.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(rss.unwrap_or(0u64));
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success());
    let printed = std::fs::read_to_string(out.path()).unwrap();
    assert_eq!(printed.lines().count(), 80);
    assert!(printed.lines().all(|l| l.contains("\"labels\"")));
    println!("peak resident memory while streaming: {peak} kB");
    assert!(peak > 0 && peak <= 80 * 1024, "{peak} kB");
}

#[test]
fn stream_says_so_when_the_server_dies() {
    let server = Server::start(&[]);
    let photos = demo_photos()[0].parent().unwrap().to_path_buf();
    let child = Command::new(binary("edge-client"))
        .args(["stream", photos.to_str().unwrap(), "--fps", "20", "--deadline", "3s", "--server", &server.url()])
        .current_dir(root())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(700));
    drop(server);
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output.stderr).starts_with("edge-client: "), "{}", text(&output.stderr));
}

#[test]
fn doctor_passes_on_a_good_set_up_and_names_what_is_wrong() {
    let server = Server::start(&[]);
    let good = client(&["doctor", "--server", &server.url()]);
    assert!(good.status.success(), "{}", text(&good.stdout));
    let names: Vec<String> = lines(&good).iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["bundle", "encoder", "connection", "server", "bundle hash", "round trip"]);

    // another bundle: one byte of its manifest differs
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(bundle()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let manifest = folder.path().join("manifest.toml");
    let changed = std::fs::read_to_string(&manifest).unwrap().replacen("version = \"", "version = \"x", 1);
    std::fs::write(&manifest, changed).unwrap();
    let other = client(&["doctor", "--server", &server.url(), "--bundle", folder.path().to_str().unwrap()]);
    assert!(!other.status.success());
    assert!(lines(&other).iter().any(|c| c["name"] == "bundle hash" && c["ok"] == false), "{}", text(&other.stdout));
    let refused =
        client(&["classify", demo_photos()[0].to_str().unwrap(), "--server", &server.url(), "--bundle", folder.path().to_str().unwrap()]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("not loaded"), "{}", text(&refused.stderr));

    let dead = client(&["doctor", "--server", "http://127.0.0.1:1"]);
    assert!(!dead.status.success());
    assert!(lines(&dead).iter().any(|c| c["name"] == "connection" && c["ok"] == false));
}

#[test]
fn wrong_uses_get_a_clear_error() {
    let photo = demo_photos()[0].to_str().unwrap().to_owned();
    let error = |args: &[&str]| {
        let output = client(args);
        assert!(!output.status.success(), "{args:?}");
        text(&output.stderr)
    };
    assert!(error(&["classify", &photo, "--server", "http://127.0.0.1:1"]).contains("127.0.0.1:1"));
    assert!(error(&["classify", &photo, "--server", "ftp://x"]).contains("http://HOST:PORT"));
    assert!(error(&["classify", &photo, "--server", "http://192.0.2.1:9"]).contains("--insecure"));
    assert!(error(&["classify", &photo, "--server", "http://127.0.0.1:99999"]).contains("1 to 65535"));
    assert!(error(&["classify", &photo, "--server", "http://127.0.0.1:50051/v2"]).contains("nothing after the port"));
    assert!(error(&["classify", &photo, "--server", "http://127.0.0.1:1"]).contains("nothing listens there"));
    let no_pem = ["classify", &photo, "--server", "https://127.0.0.1:1", "--ca", &photo];
    assert!(error(&no_pem).contains("no PEM certificate"));
    assert!(error(&["encode", root().to_str().unwrap()]).contains("is a folder"));
    assert!(error(&["encode", &photo, "--quality", "99"]).contains("levels 1 to"));
    assert!(error(&["encode", &photo, "--bundle", "/nonexistent"]).contains("/nonexistent"));
    assert!(error(&["classify", &photo, "--deadline", "soon"]).contains("deadline"));
    assert!(error(&["stream", "/nonexistent"]).contains("/nonexistent"));
    assert!(error(&["inspect", &photo]).contains("magic"));
    assert!(error(&["classify"]).contains("FILES"));
    let nowhere = client(&["classify", "/nonexistent.jpg", "--server", "http://127.0.0.1:1"]);
    assert!(!nowhere.status.success() && text(&nowhere.stdout).contains("/nonexistent.jpg"), "no server is needed to say so: {nowhere:?}");
}

/// The right machine but the wrong port or scheme: the answer names the likely mistake.
#[test]
fn servers_of_another_kind_are_named() {
    let server = Server::start(&[]);
    let photo = demo_photos()[0].to_str().unwrap().to_owned();
    let error = |url: &str| text(&client(&["classify", &photo, "--server", url]).stderr);
    let admin = error(&format!("http://{}", server.admin));
    assert!(admin.contains("no offload-server"), "{admin}");
    let plain = error(&server.url().replace("http:", "https:"));
    assert!(plain.contains("use http://"), "{plain}");
}

#[test]
fn a_damaged_bundle_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(bundle()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let photo = demo_photos()[0].clone();
    let run = || client(&["encode", photo.to_str().unwrap(), "--bundle", folder.path().to_str().unwrap(), "-o", "/dev/null"]);
    assert!(run().status.success());
    for file in ["encoder.onnx", "tables.istb", "golden.isth", "manifest.toml"] {
        let path = folder.path().join(file);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = good.len() / 2;
        bad[at] ^= 0x20;
        std::fs::write(&path, bad).unwrap();
        let output = run();
        assert!(!output.status.success() || file == "manifest.toml", "{file}");
        std::fs::write(&path, good).unwrap();
        std::fs::rename(&path, folder.path().join("away")).unwrap();
        let output = run();
        assert!(!output.status.success() && text(&output.stderr).contains(file), "{file}: {}", text(&output.stderr));
        std::fs::rename(folder.path().join("away"), &path).unwrap();
    }
}

#[test]
fn the_client_is_small_and_free_of_libtorch() {
    let size = std::fs::metadata(binary("edge-client")).unwrap().len();
    println!("edge-client: {size} bytes");
    if !cfg!(debug_assertions) {
        assert!(size <= 12_000_000, "{size} bytes");
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let tree = Command::new(cargo).args(["tree", "-p", "edge-client", "--edges", "normal,build"]).current_dir(root()).output().unwrap();
    assert!(tree.status.success(), "{}", text(&tree.stderr));
    let tree = text(&tree.stdout);
    assert!(tree.contains("rten") && !tree.contains("torch-sys") && !tree.contains("tch v"), "{tree}");
    assert!(Path::new(&binary("edge-client")).exists());
}

#[test]
fn a_budget_of_bytes_is_kept_by_lower_qualities() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("photo.isth");
    let encode = |photo: &Path, more: &[&str]| {
        let fixed = ["encode", photo.to_str().unwrap(), "--output", out.to_str().unwrap()];
        client(&[&fixed[..], more].concat())
    };
    let photo = demo_photos()[0].clone();
    let of = |output: &Output| (lines(output)[0]["quality"].as_f64().unwrap(), lines(output)[0]["bytes"].as_u64().unwrap());
    let all: Vec<_> = (1..=6).map(|q: u32| of(&encode(&photo, &["--quality", &q.to_string()]))).collect();
    assert!(all.windows(2).all(|w| w[0].1 < w[1].1), "{all:?}");
    let halves: Vec<_> = (1..6).map(|q: u32| of(&encode(&photo, &["--quality", &format!("{q}.5")]))).collect();
    for (i, (quality, bytes)) in halves.iter().enumerate() {
        assert!(*quality == i as f64 + 1.5 && (all[i].1..all[i + 1].1).contains(bytes), "{halves:?} between {all:?}");
    }
    for (level, bytes) in &all {
        // exactly that many bytes are allowed, and one less is just below the level
        let (quality, used) = of(&encode(&photo, &["--target-bytes", &bytes.to_string()]));
        assert!(quality >= *level && used <= *bytes, "{quality}, {used} bytes of {bytes}");
        let less = (bytes - 1).to_string();
        let below = of(&encode(&photo, &["--target-bytes", &less]));
        let bounded = encode(&photo, &["--quality", "6", "--max-bytes", &less]);
        if *level == 1.0 {
            assert_eq!(below, all[0], "the lowest, if none fits");
            assert!(text(&bounded.stderr).contains("even at the lowest quality level"), "{}", text(&bounded.stderr));
        } else {
            assert!((level - 0.2..*level).contains(&below.0) && (bytes * 93 / 100..*bytes).contains(&below.1), "{below:?} for {less}");
            assert_eq!(of(&bounded), below);
        }
    }
    // blocks of saturated colours, which take several times the bytes of a photo (plain noise does not: 1.7 times)
    let blocks = folder.path().join("blocks.png");
    let pixels = image::RgbImage::from_fn(224, 224, |x, y| {
        image::Rgb([0, 1, 2].map(|channel| {
            let place = ((x / 4) * 56 + y / 4) * 3 + channel;
            let mixed = (place.wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995).wrapping_mul(0x85eb_ca6b);
            if mixed >> 31 == 0 { 0 } else { 255 }
        }))
    });
    pixels.save(&blocks).unwrap();
    let (_, unbounded) = of(&encode(&blocks, &["--quality", "6", "--max-bytes", "1000000"]));
    let usual = all[5].1;
    println!("blocks of colours take {unbounded} bytes, a photo {usual}");
    // without a budget, twice what is usual
    let opened = isthmus_codec::folder::open(&bundle(), |_| false, &isthmus_codec::Trust::all()).unwrap();
    let most = (2.0 * opened.manifest.quality[5].bytes) as u64;
    let by_default = encode(&blocks, &["--quality", "6"]);
    let (quality, used) = of(&by_default);
    assert!(unbounded > most && used <= most && quality < 6.0, "{unbounded} bytes unbounded, {used} of {most} at {quality}");
    // at the lowest quality there is nothing to fall to
    let lowest = encode(&blocks, &["--quality", "1"]);
    assert!(of(&lowest).0 == 1.0 && lines(&lowest)[0]["over_target"] == true, "{}", text(&lowest.stdout));
    let over = encode(&blocks, &["--target-bytes", "1"]);
    assert!(of(&over).0 == 1.0 && lines(&over)[0]["over_target"] == true, "{}", text(&over.stdout));
    assert!(lines(&encode(&photo, &["--target-bytes", "9000"]))[0].get("over_target").is_none());
    let bounded = encode(&blocks, &["--quality", "6", "--max-bytes", &usual.to_string()]);
    if bounded.status.success() {
        assert!(of(&bounded).1 <= usual);
    } else {
        assert!(text(&bounded.stderr).contains("may be sent") && bounded.stdout.is_empty());
    }
    for (wrong, why) in [("6.5", "1 to 6"), ("0", "begin with 1"), ("low", "a number such as")] {
        assert!(text(&encode(&photo, &["--quality", wrong]).stderr).contains(why), "{wrong}");
    }
    assert!(text(&encode(&photo, &["--target-bytes", "2000", "--quality", "3"]).stderr).contains("cannot be used with"));
    for option in ["--target-bytes", "--max-bytes"] {
        assert!(text(&encode(&photo, &[option, "0"]).stderr).contains("would be zero"), "{option}");
    }
}
