//! The committed comparison: what the bundle claims against image codecs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bench_harness::stats::bytes_at;
use isthmus_testkit::{bundle, root};
use serde_json::Value;

/// (bytes, agreement) of a family.
fn points(comparison: &Value, family: &str) -> Vec<(f64, f64)> {
    let rows = comparison["rows"].as_array().unwrap().iter().filter(|r| r["family"] == family);
    rows.map(|r| (r["bytes"].as_f64().unwrap(), r["agreement"]["mean"].as_f64().unwrap())).collect()
}

/// Fewest bytes with which any of the bundle's levels reaches an agreement.
fn needed(ours: &[(f64, f64)], agreement: f64) -> f64 {
    ours.iter().filter(|p| p.1 >= agreement - 1e-9).map(|p| p.0).fold(f64::INFINITY, f64::min)
}

#[test]
fn on_held_out_photos_fewer_bytes_than_codecs_at_every_agreement_from_a_half_to_the_highest() {
    let text = std::fs::read(root().join("docs/benchmarks/rate/held-out.json")).unwrap();
    let comparison: Value = serde_json::from_slice(&text).unwrap();
    let manifest: toml::Table = std::fs::read_to_string(bundle().join("manifest.toml")).unwrap().parse().unwrap();
    let committed = format!("{} {}", manifest["name"].as_str().unwrap(), manifest["version"].as_str().unwrap());
    assert_eq!(comparison["bundle"], committed.as_str(), "docs/benchmarks/rate is of the committed bundle");
    assert!(comparison["crops"].as_u64().unwrap() >= 200);
    let ours = points(&comparison, "Isthmus");
    let highest = ours.iter().map(|p| p.1).fold(0.0, f64::max);
    assert!(ours.len() >= 4 && highest > 0.5);
    for family in ["WebP", "JPEG", "AVIF"] {
        let rival = points(&comparison, family);
        let of = |pick: fn(f64, f64) -> f64, value: fn(&(f64, f64)) -> f64| rival.iter().map(value).reduce(pick).unwrap();
        let theirs = |agreement: f64| {
            // below its range a codec needs at least its smallest file, above it more than its largest
            let beyond = if agreement > of(f64::max, |p| p.1) { of(f64::max, |p| p.0) } else { of(f64::min, |p| p.0) };
            bytes_at(&rival, agreement).unwrap_or(beyond)
        };
        // the settings of AVIF end below the bundle's highest agreement
        let highest = if family == "AVIF" { of(f64::max, |p| p.1).min(highest) } else { highest };
        let mut agreement = 0.5;
        while agreement <= highest {
            let (mine, theirs) = (needed(&ours, agreement), theirs(agreement));
            assert!(mine < theirs, "at {agreement:.3}: {mine:.0} bytes, {family} {theirs:.0}");
            agreement += 0.005;
        }
        assert!(needed(&ours, highest) < theirs(highest), "at the highest, {highest:.3}");
    }
}
