//! Points as a table, and as CSV.

use comfy_table::{CellAlignment, Table, presets};

use crate::load::{Point, Summary};

/// For people.
pub fn markdown(points: &[Point]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "load",
        "answers/s",
        "p50 ms",
        "p95",
        "p99",
        "server p50",
        "queue p99",
        "overhead p99",
        "lag p99",
        "batch",
        "n",
        "failed",
        "windows",
    ]);
    for p in points {
        let failed = p.failed.values().sum::<u64>() + p.unsent;
        table.add_row([
            p.load.clone(),
            format!("{:.1}", p.per_second),
            format!("{:.1}", p.latency_ms.p50),
            format!("{:.1}", p.latency_ms.p95),
            format!("{:.1}", p.latency_ms.p99),
            format!("{:.1}", p.server_ms.p50),
            format!("{:.1}", p.queue_ms.p99),
            format!("{:.2}", p.overhead_ms.p99),
            format!("{:.1}", p.lag_ms.p99),
            format!("{:.1}", p.batch_size),
            p.n.to_string(),
            failed.to_string(),
            format!("{}{}", p.windows, if p.stable { "" } else { ", not stable" }),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// One line a point, with a head.
pub fn csv(points: &[Point]) -> String {
    let names = ["latency", "lag", "server", "queue", "serving", "server_overhead", "overhead"];
    let columns: Vec<String> = names.iter().flat_map(|n| ["mean", "p50", "p95", "p99", "max"].map(|s| format!("{n}_{s}_ms"))).collect();
    let mut out =
        format!("load,n,per_second,percentile_ms,batch_size,outside_network,failed,unsent,windows,stable,{}\n", columns.join(","));
    for p in points {
        let of = |s: &Summary| [s.mean, s.p50, s.p95, s.p99, s.max].map(|v| format!("{v:.3}")).join(",");
        let failed = p.failed.values().sum::<u64>();
        out += &format!(
            "{},{},{:.3},{:.3},{:.3},{:.4},{failed},{},{},{},{},{},{},{},{},{},{}\n",
            p.load,
            p.n,
            p.per_second,
            p.percentile_ms,
            p.batch_size,
            p.outside_network,
            p.unsent,
            p.windows,
            p.stable,
            of(&p.latency_ms),
            of(&p.lag_ms),
            of(&p.server_ms),
            of(&p.queue_ms),
            of(&p.serving_ms),
            of(&p.server_overhead_ms),
            of(&p.overhead_ms)
        );
    }
    out
}
