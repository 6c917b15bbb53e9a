//! The comparison that matters: latency at equal or better agreement.

use crate::compare::OURS;
use crate::run::results::{AgreementRow, LinkResults, Results, Row};

/// A rival, and how many times as long it takes.
pub struct Rival<'a> {
    /// Its row.
    pub row: &'a Row,
    /// Its median over ours.
    pub ratio: f64,
}

/// One of our rows on one link, against the rivals that agree at least as often.
pub struct Line<'a> {
    /// The link.
    pub link: &'a LinkResults,
    /// Ours.
    pub row: &'a Row,
    /// How often it agrees.
    pub agreement: f64,
    /// The fastest lossless image codec.
    pub lossless: Option<Rival<'a>>,
    /// The fastest image codec, lossless or not.
    pub codec: Option<Rival<'a>>,
    /// Raw features.
    pub features: Option<Rival<'a>>,
    /// The network on the device.
    pub local: Option<Rival<'a>>,
}

/// Agreement as measured without a link; for a client that chooses, that of the options it took (its own few answers over the link
/// say little).
fn agreement(results: &Results, row: &Row) -> f64 {
    known(results, row).map_or_else(|| row.believed_agreement.unwrap_or(row.agreement), |a| a.agreement.mean)
}

fn known<'a>(results: &'a Results, row: &Row) -> Option<&'a AgreementRow> {
    results.agreement.iter().find(|a| a.strategy == row.strategy)
}

/// All of ours on all fixed links.
pub fn lines(results: &Results) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    for link in &results.links {
        for row in link.rows.iter().filter(|r| r.n > 0 && (r.family == OURS || r.family == "auto")) {
            let ours = agreement(results, row);
            let fastest = |fits: &dyn Fn(&Row) -> bool| {
                let rivals = link.rows.iter().filter(|r| r.n > 0 && fits(r) && agreement(results, r) >= ours - 1e-9);
                let best = rivals.min_by(|a, b| a.latency_ms.p50.total_cmp(&b.latency_ms.p50))?;
                Some(Rival { row: best, ratio: best.latency_ms.p50 / row.latency_ms.p50 })
            };
            let is_codec = |r: &Row| crate::codecs::REGISTRY.iter().any(|f| f.name == r.family);
            lines.push(Line {
                link,
                row,
                agreement: ours,
                lossless: fastest(&|r| is_codec(r) && known(results, r).is_some_and(|a| a.lossless)),
                codec: fastest(&is_codec),
                features: fastest(&|r| r.family == "features"),
                local: fastest(&|r| r.family == "local"),
            });
        }
    }
    lines
}
