//! Results as one self-contained HTML page.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::error::HarnessError;
use crate::plot::{Axis, Line, svg};
use crate::run::measure::{LinkResults, Results, Row};

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#111;background:#fff}\
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}\
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}\
svg{max-width:100%;height:auto}.bar{display:flex;height:1rem;min-width:16rem}.bar span{display:block}.encode{background:#005ab5}\
.wire{background:#e69600}.server{background:#00825a}.bad{color:#b00020;font-weight:bold}small{color:#555}\
@media print{h2{break-before:page}.wide{overflow:visible}}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The strategy's name without its setting.
fn family(strategy: &str) -> &str {
    strategy.split(" q").next().unwrap_or(strategy)
}

fn drawn(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String, HarnessError> {
    svg(title, x, y, lines).map_err(|e| HarnessError::data("report", e))
}

/// Points of each family, in order of first appearance of their names.
fn by_family<'a>(rows: impl Iterator<Item = (&'a Row, (f64, f64))>) -> Vec<Line> {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for (row, point) in rows {
        lines.entry(family(&row.strategy)).or_default().push(point);
    }
    let rising = |mut points: Vec<(f64, f64)>| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    lines.into_iter().map(|(name, points)| Line { name: name.into(), points: rising(points) }).collect()
}

/// The page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn html(results: &Results) -> Result<String, HarnessError> {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Isthmus over emulated links</title><style>{STYLE}</style></head><body><h1>Isthmus over emulated links</h1>\
         <p>Bundle {}, {} photos, {} rounds, seed {}.<br><small>{}; {}</small></p>",
        escape(&results.bundle),
        results.photos,
        results.rounds,
        results.seed,
        escape(&results.machine),
        escape(&results.began)
    );
    let fixed: Vec<(&LinkResults, f64)> = results.links.iter().filter_map(|l| Some((l, l.uplink_mbit_per_s?))).collect();
    if fixed.len() > 1 {
        let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
        for (link, mbit) in &fixed {
            for row in link.rows.iter().filter(|r| r.n > 0) {
                lines.entry(&row.strategy).or_default().push((*mbit, row.latency_ms.p50));
            }
        }
        let lines: Vec<Line> = lines.into_iter().map(|(name, points)| Line { name: name.into(), points }).collect();
        out += &drawn("Latency against uplink", &Axis::log("uplink, Mbit/s"), &Axis::log("p50 latency, ms"), &lines)?;
    }
    if let Some(link) = results.links.first() {
        let rows = link.rows.iter().filter(|r| r.n > 0 && r.strategy != "PNG");
        let lines = by_family(rows.map(|r| (r, (r.bytes, r.agreement))));
        out += &drawn("Bytes against agreement with the lossless photo", &Axis::log("bytes"), &Axis::linear("agreement"), &lines)?;
    }
    for link in &results.links {
        out += &section(link)?;
    }
    out += "</body></html>";
    Ok(out)
}

fn section(link: &LinkResults) -> Result<String, HarnessError> {
    let mut out = format!("<h2>{}: {}</h2>", escape(&link.name), escape(&link.about));
    let congestion = link.congestion_control.as_deref().map_or_else(String::new, |c| format!(", {}", escape(c)));
    // writing to a String cannot fail
    let _ = write!(
        out,
        "<p>{} level{congestion}; emulator late by {} µs (median), {} µs (99th percentile).{}</p>",
        escape(&link.emulation),
        link.lateness.p50_us,
        link.lateness.p99_us,
        if link.valid { "" } else { " <span class=\"bad\">Invalid: more than a tenth of the delay.</span>" }
    );
    let lines: Vec<Line> = link
        .rows
        .iter()
        .filter(|r| r.n > 0)
        .map(|r| {
            let share = |i: usize| (i + 1) as f64 / r.latencies_ms.len() as f64;
            Line { name: r.strategy.clone(), points: r.latencies_ms.iter().enumerate().map(|(i, &l)| (l, share(i))).collect() }
        })
        .collect();
    out += &drawn("Distribution of latency", &Axis::log("latency, ms"), &Axis::linear("share of requests"), &lines)?;
    out += "<p><small>Bars: <span style=\"color:#005ab5\">encode</span>, <span style=\"color:#b07000\">wire</span>, \
            <span style=\"color:#00825a\">server</span> (medians)</small></p><div class=\"wide\"><table><tr><th>strategy<th>bytes<th>agreement\
            <th>p50 ms<th>p95<th>p99<th>predicted p50<th>failed<th></tr>";
    let longest = link.rows.iter().map(|r| r.latency_ms.p50).fold(1.0, f64::max);
    for r in &link.rows {
        let part = |ms: f64| ms / longest * 100.0;
        let wire = (r.latency_ms.p50 - r.encode_ms - r.server_ms).max(0.0);
        let _ = write!(
            out,
            "<tr><td>{}<td>{:.0}<td>{:.0} %<td>{:.0}<td>{:.0}<td>{:.0}<td>{}<td>{}<td><div class=\"bar\">\
             <span class=\"encode\" style=\"width:{:.2}%\"></span><span class=\"wire\" style=\"width:{:.2}%\"></span>\
             <span class=\"server\" style=\"width:{:.2}%\"></span></div></tr>",
            escape(&r.strategy),
            r.bytes,
            r.agreement * 100.0,
            r.latency_ms.p50,
            r.latency_ms.p95,
            r.latency_ms.p99,
            r.predicted_ms.map_or_else(String::new, |p| format!("{p:.0}")),
            r.failed,
            part(r.encode_ms),
            part(wire),
            part(r.server_ms)
        );
    }
    out += "</table></div>";
    Ok(out)
}
