//! A fleet fits the deployed bundle; the new one is signed, and client and server take it up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use aggregator::train::TrainConfig;
use isthmus_codec::folder;
use isthmus_testkit::{Server, backbones, binary, bundle, demo_photos, root};

fn run(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(binary(program)).args(args.iter().map(|a| a.as_ref())).stdin(Stdio::null()).output().unwrap()
}

fn good(output: Output) -> String {
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Hash of the bundle that a photo was encoded with.
fn used(folder: &Path, photo: &Path, out: &Path) -> String {
    good(run("edge-client", &[&"encode", &photo, &"--output", &out, &"--bundle", &folder]));
    let text = good(run("edge-client", &[&"inspect", &out]));
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["bundle"].as_str().unwrap().to_owned()
}

#[test]
fn a_fleet_fits_the_bundle_and_everybody_takes_the_signed_result() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let demo = demo_photos();
    std::fs::create_dir_all(at("photos/held-out")).unwrap();
    for (i, photo) in demo.iter().enumerate() {
        let to = if i < 12 { "photos" } else { "photos/held-out" };
        std::fs::copy(photo, at(to).join(photo.file_name().unwrap())).unwrap();
    }
    let hash = folder::open(&bundle(), |_| false, &isthmus_codec::Trust::all()).unwrap().hash.to_string();
    let config = format!(
        "data = \"photos\"\nbundle = {:?}\nbackbones = {:?}\nout = \"run\"\nrounds = 2\nseed = 1\n[training]\ntask = \"bundle\"\nepochs = 1\n\
         batch_size = 3\nlearning_rate = 1e-4\n[training.bundle]\nmeasure_block = 4\n[fleet]\nsimulated = 4\nsplit = \"natural\"\n\
         [aggregation]\nkind = \"secure\"\nnorm = 0.05\nmin_clients = 3\nupload = \"2m\"\ncompute = \"1m\"\n[parties]\nlocal = \"parties\"\n",
        bundle(),
        backbones()
    );
    std::fs::write(at("adapt.toml"), &config).unwrap();
    // a new bundle needs no new configuration, neither here nor in the repository
    for path in [at("adapt.toml"), root().join("configs/adapt.toml")] {
        assert_eq!(TrainConfig::open(&path).unwrap().training.bundle.unwrap().sha256, hash);
    }
    std::fs::write(at("nowhere.toml"), config.replace(&format!("{:?}", bundle()), "\"nowhere\"")).unwrap();
    let nowhere = TrainConfig::open(&at("nowhere.toml")).unwrap_err().to_string();
    assert!(nowhere.contains("nowhere") && nowhere.contains("manifest.toml"), "{nowhere}");
    let text = good(run("aggregator", &[&"train", &at("adapt.toml"), &"--json"]));
    let last = text.lines().rfind(|l| l.contains("\"round\":2")).unwrap();
    let progress: serde_json::Value = serde_json::from_str(last).unwrap();
    assert!(progress["progress"]["bytes"].as_f64().unwrap() > 500.0 && progress["progress"]["examples"] == 8, "{last}");
    // other bundles' rounds are none of a client's business
    let named = format!("[training.bundle]\nsha256 = \"{}\"", "0".repeat(64));
    let other = config.replace("[training.bundle]", &named).replace("\"run\"", "\"other\"");
    std::fs::write(at("other.toml"), other).unwrap();
    let other = run("aggregator", &[&"train", &at("other.toml")]);
    assert!(!other.status.success() && String::from_utf8_lossy(&other.stderr).contains("is for bundle 000"));

    // two versions side by side, both signed
    let version = folder::open(&bundle(), |_| false, &isthmus_codec::Trust::all()).unwrap().manifest.version;
    let newer = format!("{version}.1");
    let public = good(run("aggregator", &[&"keys", &"authority", &"--out", &at("signer.key")])).trim().to_owned();
    copy(&bundle(), &at("bundles/old"));
    good(run("trainer", &[&"sign", &"--bundle", &at("bundles/old"), &"--key", &at("signer.key")]));
    let model = at("run/model.safetensors");
    let (old, new) = (bundle(), at("bundles/new"));
    let parts: [&dyn AsRef<std::ffi::OsStr>; 7] = [&"adapt", &"--bundle", &old, &"--backbones", &backbones(), &"--model", &model];
    let more: [&dyn AsRef<std::ffi::OsStr>; 8] =
        [&"--photos", &at("photos"), &"--version", &newer, &"--out", &new, &"--key", &at("signer.key")];
    good(run("trainer", &[&parts[..], &more[..]].concat()));
    let adapted = folder::open(&new, |_| true, &isthmus_codec::Trust::keys([public.as_str()]).unwrap()).unwrap();
    assert_eq!(adapted.manifest.training.adapted_from.as_deref(), Some(hash.as_str()));
    assert_ne!(adapted.hash.to_string(), hash);
    // decoders of other backbones were not fitted to it
    assert_eq!((adapted.manifest.decoders.len(), adapted.manifest.golden.logits.len()), (1, 1));
    assert!(adapted.refinements.is_none(), "they were made for the old gains");

    // the newest version is used; by the server too, beside the old one
    let (photo, out) = (&demo[0], at("photo.isth"));
    assert!(adapted.hash.to_string().starts_with(&used(&at("bundles"), photo, &out)));
    assert!(hash.starts_with(&used(&bundle(), photo, &out)));
    let trusting = format!("trusted_bundle_keys = [{public:?}]\nbundles = [{:?}]\n", at("bundles"));
    std::fs::write(at("server.toml"), &trusting).unwrap();
    let server = |bundles: &Path| {
        std::fs::write(at("server.toml"), trusting.replace(&format!("{:?}", at("bundles")), &format!("{bundles:?}"))).unwrap();
        Server::configured(&at("server.toml"), &backbones())
    };
    let both = server(&at("bundles"));
    let classify = |url: &str, bundles: &Path| {
        run("edge-client", &[&"classify", photo, &"--server", &url, &"--bundle", &bundles, &"--trust", &public])
    };
    for bundles in [at("bundles"), at("bundles/old")] {
        good(classify(&both.url(), &bundles));
    }
    // a server that has the old one only: the client falls back to it
    let behind = server(&at("bundles/old"));
    good(classify(&behind.url(), &at("bundles")));

    // a changed manifest is refused by both
    let manifest = std::fs::read_to_string(new.join("manifest.toml")).unwrap();
    std::fs::write(new.join("manifest.toml"), manifest.replace(&format!("version = {newer:?}"), &format!("version = \"{version}.2\"")))
        .unwrap();
    let refused = classify(&both.url(), &at("bundles"));
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("not of a trusted key"));
    std::fs::write(at("server.toml"), &trusting).unwrap();
    let refused = run("offload-server", &[&"--config", &at("server.toml"), &"--backbones", &backbones(), &"--listen", &"127.0.0.1:0"]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("not of a trusted key"));
}
