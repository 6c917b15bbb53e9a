//! Learning curves of a run as SVG.

use std::path::Path;

use bench_harness::plot::{Axis, Line, chart};

use crate::error::TrainError;
use crate::quick::CurvePoint;

/// Draws `curve-agreement.svg` and `curve-bytes.svg` into `out` from `run/curve.jsonl`.
///
/// # Errors
/// If the curve is missing or a file cannot be written.
pub fn plot(run: &Path, out: &Path) -> Result<(), TrainError> {
    let path = run.join("curve.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|e| TrainError::io(&path, e))?;
    let points: Vec<CurvePoint> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .map_err(|e| TrainError::data(path.display().to_string(), e.to_string()))?;
    let levels = points.first().map_or(0, |p| p.levels.len());
    let line = |level: usize, value: &dyn Fn(&crate::quick::LevelScore) -> f64| Line {
        name: format!("quality {}", level + 1),
        points: points.iter().map(|p| (p.crops as f64, value(&p.levels[level]))).collect(),
    };
    let n = points.first().map_or(0, |p| p.photos);
    type Value = fn(&crate::quick::LevelScore) -> f64;
    let charts: [(&str, &str, Value); 2] = [
        ("curve-agreement.svg", "top-1 agreement with the teacher", |l| l.agreement),
        ("curve-bytes.svg", "bytes per photo (ideal code length)", |l| l.bytes),
    ];
    for (file, label, value) in charts {
        let lines: Vec<Line> = (0..levels).map(|l| line(l, &value)).collect();
        let title = format!("Learning curve, {n} held-out centre crops");
        let axes = (Axis::linear("crops seen"), if file.contains("bytes") { Axis::log(label) } else { Axis::linear(label) });
        chart(&out.join(file), &title, &axes.0, &axes.1, &lines).map_err(|e| TrainError::data(file, e))?;
    }
    Ok(())
}
