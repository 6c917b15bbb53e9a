//! Learning curves of a run as SVG.

use std::path::Path;

use bench_harness::plot::{Axis, Line, chart};

use crate::error::TrainError;
use crate::history::History;
use crate::quick::CurvePoint;

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

/// Draws `curve-agreement.svg`, `curve-kl.svg` and `curve-bytes.svg` into `out` from the learning curve in `run`.
///
/// # Errors
/// If the curve is missing or a file cannot be written.
pub fn plot(run: &Path, out: &Path) -> Result<(), TrainError> {
    let points = whole(run)?;
    let levels = points.first().map_or(0, |p| p.levels.len());
    let line = |level: usize, value: &dyn Fn(&crate::quick::LevelScore) -> f64| Line {
        name: format!("quality {}", level + 1),
        points: points.iter().map(|p| (p.crops as f64, value(&p.levels[level]))).collect(),
    };
    // the last run's; earlier ones may have watched others
    let n = points.last().map_or(0, |p| p.photos);
    type Value = fn(&crate::quick::LevelScore) -> f64;
    let charts: [(&str, Axis, Value); 3] = [
        ("curve-agreement.svg", Axis::linear("top-1 agreement with the teacher"), |l| l.agreement),
        ("curve-kl.svg", Axis::log("KL to the teacher (nats)"), |l| l.kl),
        ("curve-bytes.svg", Axis::log("bytes per photo (ideal code length)"), |l| l.bytes),
    ];
    for (file, axis, value) in charts {
        let lines: Vec<Line> = (0..levels).map(|l| line(l, &value)).collect();
        let title = format!("Learning curve, {n} held-out centre crops (last run)");
        chart(&out.join(file), &title, &Axis::linear("crops seen"), &axis, &lines).map_err(|e| TrainError::data(file, e))?;
    }
    Ok(())
}
