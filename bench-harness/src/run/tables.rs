//! Results as Markdown.

use std::fmt::Write;

use crate::run::headline::{self, Rival};
use crate::run::results::{Emulator, Results};

/// One table per part of the run. Writing to a `String` cannot fail, so results of `write!` are left unused.
pub fn markdown(results: &Results) -> String {
    let mut out = format!(
        "Bundle {}, {} rounds, seed {}, device slowed down {} times. Isthmus {}. {}. {}\n",
        results.bundle, results.rounds, results.seed, results.device_slowdown, results.revision, results.machine, results.began
    );
    agreement(results, &mut out);
    headlines(results, &mut out);
    links(results, &mut out);
    timelines(results, &mut out);
    throughput(results, &mut out);
    out
}

fn emulator(e: &Emulator) -> String {
    let congestion = e.congestion_control.as_ref().map_or_else(String::new, |c| format!(", {c}"));
    let invalid = if e.valid { "" } else { " - **INVALID**: more than a tenth of the delay" };
    format!(
        "{} level{congestion}; emulator late by {} us (median), {} us (99th percentile){}{invalid}",
        e.level,
        e.late_p50_us,
        e.late_p99_us,
        e.left_out()
    )
}

fn agreement(results: &Results, out: &mut String) {
    *out += "\n## Agreement with the lossless photo (no link)\n\n| strategy | bytes | agreement [95 %] | n |\n|---|---:|---:|---:|\n";
    for r in &results.agreement {
        let a = &r.agreement;
        let _ = writeln!(
            out,
            "| {} | {:.0} | {:.1} % [{:.0}, {:.0}] | {} |",
            r.strategy,
            r.bytes,
            a.mean * 100.0,
            a.low * 100.0,
            a.high * 100.0,
            r.n
        );
    }
}

fn headlines(results: &Results, out: &mut String) {
    *out += "\n## Latency at equal or better agreement\n\nMedians; how many times as long the fastest rival takes that agrees at least as \
             often.\n\n| link | strategy | agreement | p50 ms | p95 | p99 | lossless codec | any codec | raw features | local |\n\
             |---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n";
    for line in headline::lines(results) {
        let rival = |r: &Option<Rival<'_>>| r.as_ref().map_or_else(|| "-".into(), |r| format!("{} {:.1}x", r.row.strategy, r.ratio));
        let l = &line.row.latency_ms;
        let _ = writeln!(
            out,
            "| {} | {} | {:.0} % | {:.0} | {:.0} | {:.0} | {} | {} | {} | {} |",
            line.link.name,
            line.row.strategy,
            line.agreement * 100.0,
            l.p50,
            l.p95,
            l.p99,
            rival(&line.lossless),
            rival(&line.codec),
            rival(&line.features),
            rival(&line.local)
        );
    }
}

fn links(results: &Results, out: &mut String) {
    for link in &results.links {
        let _ = write!(out, "\n## {}: {}\n\n{}\n\n", link.name, link.about, emulator(&link.emulator));
        *out += "| strategy | bytes | agreement | p50 ms | p95 ms | p99 ms | predicted p50 | encode | server | failed |\n\
                 |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n";
        for r in &link.rows {
            let predicted = r.predicted_ms.map_or_else(String::new, |p| format!("{p:.0}"));
            if r.n == 0 {
                let _ = writeln!(out, "| {} | | | | | | | | | {} |", r.strategy, r.failed);
                continue;
            }
            let chosen: Vec<String> = r.choices.iter().map(|(c, n)| format!("{c} {n}")).collect();
            let chosen = if chosen.is_empty() { String::new() } else { format!(" ({})", chosen.join(", ")) };
            let _ = writeln!(
                out,
                "| {}{chosen} | {:.0} | {:.0} % | {:.0} | {:.0} | {:.0} | {predicted} | {:.1} | {:.1} | {} |",
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
}

fn timelines(results: &Results, out: &mut String) {
    for t in &results.timelines {
        let _ = write!(
            out,
            "\n## {}, a photo every {:.0} ms, {:.0} ms to answer: {}\n\n\
             | strategy | photos | in time | in time and agreeing | mean latency ms (late: the deadline) | bytes | emulator late p99 us |\n\
             |---|---:|---:|---:|---:|---:|---:|\n",
            t.name, t.period_ms, t.deadline_ms, t.about
        );
        for r in &t.rows {
            let invalid = if r.emulator.valid { "" } else { " **INVALID**" };
            let _ = writeln!(
                out,
                "| {} | {} | {:.1} % | {:.1} % | {:.0} | {:.0} | {}{invalid} |",
                r.strategy,
                r.n,
                r.in_time * 100.0,
                r.in_time_and_agreeing * 100.0,
                r.mean_latency_ms,
                r.bytes,
                r.emulator.late_p99_us
            );
        }
    }
}

fn throughput(results: &Results, out: &mut String) {
    for t in &results.throughput {
        let _ = write!(
            out,
            "\n## {} shared by clients: {}\n\n{}\n\n| strategy | clients | photos/s | p50 ms | p95 ms | p99 ms | n | failed |\n\
             |---|---:|---:|---:|---:|---:|---:|---:|\n",
            t.name,
            t.about,
            emulator(&t.emulator)
        );
        for r in &t.rows {
            let l = &r.latency_ms;
            let _ = writeln!(
                out,
                "| {} | {} | {:.1} | {:.0} | {:.0} | {:.0} | {} | {} |",
                r.strategy, r.clients, r.per_second, l.p50, l.p95, l.p99, r.n, r.failed
            );
        }
    }
}
