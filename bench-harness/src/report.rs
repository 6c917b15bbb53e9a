//! Comparisons as text, JSON and plots.

use std::fmt::Write;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};

use crate::bd::{Delta, delta_rate};
use crate::compare::{Comparison, OURS, Row};
use crate::error::HarnessError;
use crate::plot::{Axis, Line, chart};
use crate::stats::{Interval, bytes_at};

fn percent(i: &Interval) -> String {
    format!("{:.1} % [{:.0}, {:.0}]", 100.0 * i.mean, 100.0 * i.low, 100.0 * i.high)
}

/// The comparison as a Markdown table with a note on what the numbers are, and the bytes that rivals need
/// for the agreement of each quality level.
pub fn table(c: &Comparison) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["method", "bytes", "agreement with teacher", "KL (nats)", "labelled top-1", "WebP needs", "JPEG needs"]);
    for row in &c.rows {
        let need = |family: &str| match (row.family == OURS, at(c, family, row.agreement.mean)) {
            (true, Some(bytes)) => format!("{bytes:.0} B, {:.2}x", bytes / row.bytes),
            (true, None) if c.rows.iter().any(|r| r.family == family) => "outside its range".into(),
            _ => String::new(),
        };
        table.add_row([
            row.name.clone(),
            format!("{:.0}", row.bytes),
            percent(&row.agreement),
            format!("{:.3} [{:.2}, {:.2}]", row.kl.mean, row.kl.low, row.kl.high),
            row.accuracy.as_ref().map(percent).unwrap_or_default(),
            need("WebP"),
            need("JPEG"),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("## {}: {} crops of {} photos, bundle {}\n\n{table}\n\n", c.set, c.crops, c.photos, c.bundle);
    let _ = writeln!(
        text,
        "Agreement and KL compare with the same backbone on the uncompressed crop (not accuracy); 95 % intervals in brackets, \
         over photos. \"Needs\": bytes of that codec at equal agreement, interpolated, and how many times ours."
    );
    if !c.left_out.is_empty() {
        let _ = writeln!(text, "Left out: {}.", c.left_out.join("; "));
    }
    for (what, quality) in QUALITIES {
        let deltas: Vec<String> = rivals(c)
            .into_iter()
            .filter_map(|rival| delta(c, rival, quality).map(|d| format!("{:+.1} % against {rival}", 100.0 * d.rate)))
            .collect();
        if !deltas.is_empty() {
            let _ = writeln!(
                text,
                "Bytes at equal {what}, mean over the range that both curves cover (BD-rate, Akima): {}.",
                deltas.join(", ")
            );
        }
    }
    if let Some(teacher) = &c.teacher_accuracy {
        let _ = writeln!(text, "Labelled top-1 of the uncompressed teacher: {}.", percent(teacher));
    }
    text
}

/// Families that are plotted and compared with: all that have more than one setting but ours.
fn rivals(c: &Comparison) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for (i, row) in c.rows.iter().enumerate() {
        let several = c.rows[i + 1..].iter().any(|later| later.family == row.family);
        if several && row.family != OURS && !found.contains(&row.family.as_str()) {
            found.push(&row.family);
        }
    }
    found
}

type Value = fn(&Row) -> f64;

type Shown = fn(&Row) -> &Interval;

/// What may be equal; more is better.
const QUALITIES: [(&str, Value); 2] = [("agreement", |r| r.agreement.mean), ("KL", |r| -r.kl.mean.ln())];

/// Bytes of the bundle relative to those of `rival` at equal quality.
fn delta(c: &Comparison, rival: &str, quality: Value) -> Option<Delta> {
    delta_rate(&points(c, rival, quality), &points(c, OURS, quality))
}

/// Bytes and value of each setting of a method.
fn points(c: &Comparison, family: &str, value: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    c.rows.iter().filter(|r| r.family == family).map(|r| (r.bytes, value(r))).collect()
}

fn at(c: &Comparison, family: &str, agreement: f64) -> Option<f64> {
    bytes_at(&points(c, family, |r| r.agreement.mean), agreement)
}

/// Sees whether files can be written to `folder`, or it can be made: before a comparison, not after. It makes nothing: a comparison may be given up.
///
/// # Errors
/// If they cannot.
pub fn prepare(folder: &Path) -> Result<(), HarnessError> {
    let there = folder.ancestors().find(|f| f.exists()).unwrap_or(Path::new("."));
    tempfile::tempfile_in(there).map(drop).map_err(|cause| HarnessError::Io { path: folder.into(), cause })
}

/// Writes `SET.json`, `SET.md`, `SET-agreement.svg` and `SET-kl.svg` into `folder`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(c: &Comparison, folder: &Path) -> Result<(), HarnessError> {
    std::fs::create_dir_all(folder).map_err(|cause| HarnessError::Io { path: folder.into(), cause })?;
    let save = |name: String, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|cause| HarnessError::Io { path, cause })
    };
    let json = serde_json::to_string_pretty(c).map_err(|e| HarnessError::data("results", e.to_string()))?;
    save(format!("{}.json", c.set), json)?;
    save(format!("{}.md", c.set), table(c))?;
    let charts: [(&str, &str, Shown); 2] = [
        ("agreement", "top-1 agreement with the uncompressed teacher", |r| &r.agreement),
        ("kl", "mean KL to the uncompressed teacher (nats)", |r| &r.kl),
    ];
    for (name, label, interval) in charts {
        let line = |family: &str| {
            let of_family = c.rows.iter().filter(|r| r.family == family);
            let intervals = of_family.map(|r| (r.bytes, interval(r).low, interval(r).high)).collect();
            Line { name: family.into(), points: points(c, family, |r| interval(r).mean), intervals }
        };
        let lines: Vec<Line> = std::iter::once(OURS).chain(rivals(c)).map(line).collect();
        let title = format!("{}: {} crops of {} photos, bars are 95 % intervals", c.set, c.crops, c.photos);
        let path = folder.join(format!("{}-{name}.svg", c.set));
        chart(&path, &title, &Axis::log("bytes per 224 x 224 crop"), &Axis::linear(label), &lines)
            .map_err(|why| HarnessError::data(path.display().to_string(), why))?;
    }
    Ok(())
}
