//! Results as one self-contained HTML page.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::error::HarnessError;
use crate::plot::{Axis, Line, svg};
use crate::run::headline::{self, Rival};
use crate::run::results::{Emulator, LinkResults, Results, Row, ThroughputResults, TimelineResults};

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1rem;color:#111;background:#fff}\
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}\
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}\
svg{max-width:100%;height:auto}@media (max-width:45rem) and (not print){.plot svg{max-width:none;width:44rem}}.bar{display:flex;height:1rem;min-width:16rem}.bar span{display:block}.encode{background:#005ab5}\
.wire{background:#e69600}.server{background:#00825a}.bad{color:#b00020;font-weight:bold}.good{color:#00643c;font-weight:bold}small{color:#555}\
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem}nav a{white-space:nowrap}@media print{h2{break-after:avoid}svg,table{break-inside:avoid}.wide{overflow:visible}nav{display:none}\
td,th{padding:.1rem .3rem;font-size:.7rem}}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn drawn(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String, HarnessError> {
    Ok(format!("<div class=\"wide plot\">{}</div>", svg(title, x, y, lines).map_err(|e| HarnessError::data("report", e))?))
}

/// Lines by name, their points from left to right.
fn grouped<'a>(points: impl Iterator<Item = (&'a str, (f64, f64))>) -> Vec<Line> {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for (name, point) in points {
        lines.entry(name).or_default().push(point);
    }
    let rising = |mut points: Vec<(f64, f64)>| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    lines.into_iter().map(|(name, points)| Line { name: name.into(), points: rising(points), ..Line::default() }).collect()
}

/// A table: heads, then rows of cells that are HTML already.
fn table(heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut out = format!("<div class=\"wide\"><table><tr><th>{}</tr>", heads.join("<th>"));
    for row in rows {
        out += &format!("<tr><td>{}</tr>", row.join("<td>"));
    }
    out + "</table></div>"
}

/// The page. Writing to a `String` cannot fail, so results of `write!` are left unused.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn html(results: &Results) -> Result<String, HarnessError> {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Isthmus over emulated links</title><style>{STYLE}</style></head><body><h1>Isthmus over emulated links</h1>\
         <p>Bundle {}, {} rounds, seed {}, device slowed down {} times.<br><small>Isthmus {}; {}; {}</small></p><nav>",
        escape(&results.bundle),
        results.rounds,
        results.seed,
        results.device_slowdown,
        escape(&results.revision),
        escape(&results.machine),
        escape(&results.began)
    );
    for link in results.links.iter().map(|l| &l.name) {
        let _ = write!(out, "<a href=\"#link-{0}\">{0}</a>", escape(link));
    }
    for link in results.timelines.iter().map(|l| &l.name) {
        let _ = write!(out, "<a href=\"#time-{0}\">{0} over time</a>", escape(link));
    }
    for link in results.throughput.iter().map(|l| &l.name) {
        let _ = write!(out, "<a href=\"#shared-{0}\">{0}, shared</a>", escape(link));
    }
    out += "</nav>";
    out += &headlines(results);
    let fixed: Vec<(&LinkResults, f64)> = results.links.iter().filter_map(|l| Some((l, l.uplink_mbit_per_s?))).collect();
    if fixed.len() > 1 {
        // the fastest setting of each codec would hide what agreement it costs: all settings, those of one family alike
        let rows = fixed.iter().flat_map(|(link, mbit)| link.rows.iter().filter(|r| r.n > 0).map(move |r| (r, *mbit)));
        let lines = grouped(rows.map(|(r, mbit)| (r.strategy.as_str(), (mbit, r.latency_ms.p50))));
        out += &drawn("Latency against uplink", &Axis::log("uplink, Mbit/s"), &Axis::log("p50 latency, ms"), &lines)?;
    }
    out += &agreement(results)?;
    for link in &results.links {
        out += &section(link)?;
    }
    for t in &results.timelines {
        out += &timeline(t)?;
    }
    for t in &results.throughput {
        out += &throughput(t)?;
    }
    out += "</body></html>";
    Ok(out)
}

fn headlines(results: &Results) -> String {
    let rival = |r: &Option<Rival<'_>>| {
        r.as_ref().map_or_else(
            || "-".into(),
            |r| {
                let class = if r.ratio >= 1.0 { "good" } else { "bad" };
                format!("{} <span class=\"{class}\">{:.1}x</span>", escape(&r.row.strategy), r.ratio)
            },
        )
    };
    let rows = headline::lines(results).into_iter().map(|l| {
        vec![
            escape(&l.link.name),
            escape(&l.row.strategy),
            format!("{:.0} %", l.agreement * 100.0),
            format!("{:.0}", l.row.latency_ms.p50),
            format!("{:.0}", l.row.latency_ms.p95),
            format!("{:.0}", l.row.latency_ms.p99),
            rival(&l.lossless),
            rival(&l.codec),
            rival(&l.features),
            rival(&l.local),
        ]
    });
    let heads = ["link", "strategy", "agreement", "p50 ms", "p95", "p99", "lossless codec", "any codec", "raw features", "local"];
    format!(
        "<h2>Latency at equal or better agreement</h2><p>How many times as long the fastest rival takes (median) that agrees with the \
         lossless photo at least as often.</p>{}",
        table(&heads, rows)
    )
}

fn agreement(results: &Results) -> Result<String, HarnessError> {
    let sent = results.agreement.iter().filter(|r| r.bytes > 0.0 && !r.lossless && r.family != "features");
    let lines = grouped(sent.map(|r| (r.family.as_str(), (r.bytes, r.agreement.mean))));
    let rows = results.agreement.iter().map(|r| {
        let a = &r.agreement;
        vec![
            escape(&r.strategy),
            format!("{:.0}", r.bytes),
            format!("{:.1} % [{:.0}, {:.0}]", a.mean * 100.0, a.low * 100.0, a.high * 100.0),
            r.n.to_string(),
        ]
    });
    let n = results.agreement.first().map_or(0, |r| r.n);
    let title = format!("Bytes against agreement with the lossless photo, {n} crops");
    let plot = drawn(&title, &Axis::log("bytes"), &Axis::linear("agreement"), &lines)?;
    Ok(format!(
        "<h2>Agreement</h2><p>Top-1 agreement of the same network's answers with those to the lossless photo (not accuracy); 95 % intervals \
         over photos.</p>{plot}{}",
        table(&["strategy", "bytes", "agreement", "n"], rows)
    ))
}

fn emulator(e: &Emulator) -> String {
    let congestion = e.congestion_control.as_deref().map_or_else(String::new, |c| format!(", {}", escape(c)));
    let invalid = if e.valid { "" } else { " <span class=\"bad\">Invalid: more than a tenth of the delay.</span>" };
    format!(
        "<p>{} level{congestion}; emulator late by {} µs (median), {} µs (99th percentile){}.{invalid}</p>",
        escape(&e.level),
        e.late_p50_us,
        e.late_p99_us,
        escape(&e.left_out())
    )
}

fn section(link: &LinkResults) -> Result<String, HarnessError> {
    let name = escape(&link.name);
    let mut out = format!("<h2 id=\"link-{name}\">{name}: {}</h2>{}", escape(&link.about), emulator(&link.emulator));
    let share = |i: usize, r: &Row| (i + 1) as f64 / r.latencies_ms.len() as f64;
    let answered = link.rows.iter().filter(|r| r.n > 0);
    let line = |r: &Row| Line {
        name: r.strategy.clone(),
        points: r.latencies_ms.iter().enumerate().map(|(i, &l)| (l, share(i, r))).collect(),
        ..Line::default()
    };
    let lines: Vec<Line> = answered.map(line).collect();
    out += &drawn("Distribution of latency", &Axis::log("latency, ms"), &Axis::linear("share of requests"), &lines)?;
    out += "<p><small>Bars: <span style=\"color:#005ab5\">encode</span>, <span style=\"color:#b07000\">wire</span>, \
            <span style=\"color:#00825a\">server</span> (medians)</small></p>";
    let longest = link.rows.iter().map(|r| r.latency_ms.p50).fold(1.0, f64::max);
    let rows = link.rows.iter().map(|r| {
        let part = |class: &str, ms: f64| format!("<span class=\"{class}\" style=\"width:{:.2}%\"></span>", ms / longest * 100.0);
        let wire = (r.latency_ms.p50 - r.encode_ms - r.server_ms).max(0.0);
        let chosen: Vec<String> = r.choices.iter().map(|(c, n)| format!("{c} {n}")).collect();
        let name = escape(&r.strategy);
        let name = if chosen.is_empty() { name } else { format!("{name}<br><small>{}</small>", escape(&chosen.join(", "))) };
        if r.n == 0 {
            let nothing = String::new;
            return vec![name, nothing(), nothing(), nothing(), nothing(), nothing(), r.failed.to_string(), "no answer in time".into()];
        }
        vec![
            name,
            format!("{:.0}", r.bytes),
            format!("{:.0}", r.latency_ms.p50),
            format!("{:.0}", r.latency_ms.p95),
            format!("{:.0}", r.latency_ms.p99),
            r.predicted_ms.map_or_else(String::new, |p| format!("{p:.0}")),
            r.failed.to_string(),
            format!("<div class=\"bar\">{}{}{}</div>", part("encode", r.encode_ms), part("wire", wire), part("server", r.server_ms)),
        ]
    });
    out += &table(&["strategy", "bytes", "p50 ms", "p95", "p99", "predicted p50", "failed", ""], rows);
    Ok(out)
}

fn timeline(t: &TimelineResults) -> Result<String, HarnessError> {
    let name = escape(&t.name);
    let mut out = format!(
        "<h2 id=\"time-{name}\">{name} over time: {}</h2><p>A photo every {:.0} ms, {:.0} ms to answer. Photos without an answer in time are \
         drawn at the deadline.</p>",
        escape(&t.about),
        t.period_ms,
        t.deadline_ms
    );
    for r in &t.rows {
        // a client that chooses: one line per way taken
        let points = r.samples.iter().map(|s| {
            let what = if s.latency_ms.is_none() { "late" } else { s.choice.as_str() };
            (what, (s.at_s, s.latency_ms.unwrap_or(t.deadline_ms)))
        });
        let mut lines = grouped(points);
        lines.iter_mut().for_each(|l| l.name = l.name.replace("Isthmus ", ""));
        out += &crate::plot::scatter(&r.strategy, &Axis::linear("s"), &Axis::linear("latency, ms"), &lines)
            .map_err(|e| HarnessError::data("report", e))?;
    }
    let rows = t.rows.iter().map(|r| {
        vec![
            escape(&r.strategy),
            r.n.to_string(),
            format!("{:.1} %", r.in_time * 100.0),
            format!("{:.1} %", r.in_time_and_agreeing * 100.0),
            format!("{:.0}", r.mean_latency_ms),
            format!("{:.0}", r.bytes),
            format!("{}{}", r.emulator.late_p99_us, if r.emulator.valid { "" } else { " <span class=\"bad\">invalid</span>" }),
        ]
    });
    out += &table(&["strategy", "photos", "in time", "in time and agreeing", "mean ms", "bytes", "emulator late p99, µs"], rows);
    Ok(out)
}

fn throughput(t: &ThroughputResults) -> Result<String, HarnessError> {
    let name = escape(&t.name);
    let mut out = format!("<h2 id=\"shared-{name}\">{name} shared by clients: {}</h2>{}", escape(&t.about), emulator(&t.emulator));
    let lines = grouped(t.rows.iter().map(|r| (r.strategy.as_str(), (r.clients as f64, r.per_second.max(1e-3)))));
    out += &drawn("Answers per second of all clients", &Axis::log("clients"), &Axis::log("photos/s"), &lines)?;
    let rows = t.rows.iter().map(|r| {
        let l = &r.latency_ms;
        vec![
            escape(&r.strategy),
            r.clients.to_string(),
            format!("{:.1}", r.per_second),
            format!("{:.0}", l.p50),
            format!("{:.0}", l.p95),
            format!("{:.0}", l.p99),
            r.failed.to_string(),
        ]
    });
    out += &table(&["strategy", "clients", "photos/s", "p50 ms", "p95", "p99", "failed"], rows);
    Ok(out)
}
