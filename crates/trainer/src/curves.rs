//! Learning curves of a run as SVG.

use std::path::{Path, PathBuf};

use bench_harness::plot::{Axis, Line, chart};
use isthmus_codec::Trust;

use crate::error::TrainError;
use crate::history::History;
use crate::quick::{CurvePoint, LevelScore};

fn read(path: &Path) -> Result<Vec<CurvePoint>, TrainError> {
    let text = std::fs::read_to_string(path).map_err(|e| TrainError::io(path, e))?;
    let points = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
    points.map_err(|e| TrainError::data(path.display().to_string(), e.to_string()))
}

/// The learning curve of a run and of those it was started from, over all crops seen.
fn whole(run: &Path) -> Result<Vec<CurvePoint>, TrainError> {
    let history = History::open(run)?;
    let mut points = Vec::new();
    let mut before = 0;
    let stages = history.stage.iter().map(|s| (s.curve.as_str(), s.crops));
    for (file, crops) in stages.chain([("curve.jsonl", u64::MAX)]) {
        let of_stage = read(&run.join(file))?.into_iter().filter(|p| p.crops <= crops);
        points.extend(of_stage.map(|p| CurvePoint { crops: p.crops + before, ..p }));
        before = before.saturating_add(crops);
    }
    Ok(points)
}

/// Crops seen at the last point of a learning curve; none if there is no curve yet.
///
/// # Errors
/// If the file is damaged.
pub fn scored(curve: &Path) -> Result<u64, TrainError> {
    if !curve.exists() {
        return Ok(0);
    }
    Ok(read(curve)?.last().map_or(0, |p| p.crops))
}

type Value = fn(&LevelScore) -> f64;

/// Draws `curve-agreement.svg`, `curve-kl.svg` and `curve-bytes.svg` into `out` from the learning curve in `run`.
///
/// # Errors
/// If the curve is missing or a file cannot be written.
pub fn plot(run: &Path, out: &Path) -> Result<(), TrainError> {
    let points = whole(run)?;
    // the last run's; earlier ones may have watched others
    let n = points.last().map_or(0, |p| p.photos);
    let levels = points.first().map_or(0, |p| p.levels.len());
    let lines = (0..levels).map(|level| (format!("quality {}", level + 1), points.as_slice(), level)).collect::<Vec<_>>();
    draw(&format!("Learning curve, {n} held-out centre crops (last run)"), &lines, out)
}

/// The same charts with the learning curves of several bundles, or of all versions in a folder; `levels` of those that have several, all
/// if empty.
///
/// # Errors
/// If a folder is no bundle with a curve, or a file cannot be written.
pub fn together(folders: &[PathBuf], levels: &[usize], out: &Path) -> Result<(), TrainError> {
    let mut bundles = Vec::new();
    for folder in folders {
        for version in isthmus_codec::folder::versions(folder)? {
            let manifest = isthmus_codec::folder::open(&version, |_| false, &Trust::all())?.manifest;
            bundles.push((format!("{} {}", manifest.name, manifest.version), whole(&version)?));
        }
    }
    let most = bundles.iter().filter_map(|(_, points)| Some(points.first()?.levels.len())).max().unwrap_or(0);
    if let Some(level) = levels.iter().find(|l| !(1..=most).contains(l)) {
        return Err(TrainError::data("--level", format!("{level}: levels are 1 to {most}")));
    }
    let mut lines = Vec::new();
    for (name, points) in &bundles {
        let count = points.first().map_or(0, |p| p.levels.len());
        for level in (0..count).filter(|l| count == 1 || levels.is_empty() || levels.contains(&(l + 1))) {
            let bytes = points.last().map_or(0.0, |p| p.levels[level].bytes);
            lines.push((format!("{name} q{} ({bytes:.0} B)", level + 1), points.as_slice(), level));
        }
    }
    std::fs::create_dir_all(out).map_err(|e| TrainError::io(out, e))?;
    draw("Learning curves, held-out centre crops", &lines, out)
}

/// One line for each name, curve and level.
fn draw(title: &str, curves: &[(String, &[CurvePoint], usize)], out: &Path) -> Result<(), TrainError> {
    let charts: [(&str, Axis, Value); 3] = [
        ("curve-agreement.svg", Axis::linear("top-1 agreement with the teacher"), |l| l.agreement),
        ("curve-kl.svg", Axis::log("KL to the teacher (nats)"), |l| l.kl),
        ("curve-bytes.svg", Axis::log("bytes per photo (ideal code length)"), |l| l.bytes),
    ];
    for (file, axis, value) in charts {
        let lines: Vec<Line> = curves
            .iter()
            .map(|(name, points, level)| Line {
                name: name.clone(),
                points: points.iter().filter_map(|p| Some((p.crops as f64, value(p.levels.get(*level)?)))).collect(),
                ..Line::default()
            })
            .collect();
        chart(&out.join(file), title, &Axis::linear("crops seen"), &axis, &lines).map_err(|e| TrainError::data(file, e))?;
    }
    Ok(())
}
