//! Results as Markdown.

use std::fmt::Write;

use crate::run::measure::Results;

/// One table per link.
pub fn markdown(results: &Results) -> String {
    let mut out = format!(
        "Bundle {}, {} photos, {} rounds, seed {}. {}. {}\n",
        results.bundle, results.photos, results.rounds, results.seed, results.machine, results.began
    );
    for link in &results.links {
        let congestion = link.congestion_control.as_ref().map_or_else(String::new, |c| format!(", {c}"));
        // writing to a String cannot fail
        let _ = write!(
            out,
            "\n## {}: {}\n\n{} level{congestion}; emulator late by {} us (median), {} us (99th percentile){}\n\n",
            link.name,
            link.about,
            link.emulation,
            link.lateness.p50_us,
            link.lateness.p99_us,
            if link.valid { "" } else { " - **INVALID**: more than a tenth of the delay" }
        );
        out += "| strategy | bytes | agreement | p50 ms | p95 ms | p99 ms | predicted p50 | encode | server | failed |\n";
        out += "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n";
        for r in &link.rows {
            let predicted = r.predicted_ms.map_or_else(String::new, |p| format!("{p:.0}"));
            let _ = writeln!(
                out,
                "| {} | {:.0} | {:.0} % | {:.0} | {:.0} | {:.0} | {predicted} | {:.1} | {:.1} | {} |",
                r.strategy,
                r.bytes,
                r.agreement * 100.0,
                r.latency_ms.p50,
                r.latency_ms.p95,
                r.latency_ms.p99,
                r.encode_ms,
                r.server_ms,
                r.failed
            );
        }
    }
    out
}
