//! The parties among each other: [`client`] calls the others, [`service`] answers them, [`forward`] passes reports on.

pub mod client;
pub mod forward;
pub mod service;

use isthmus_proto::aggregator_v1::ReportSet;

use crate::error::AggregatorError;
use crate::store::ReportId;

/// Names of reports from a message: they must ascend.
pub(crate) fn ids(set: &ReportSet) -> Result<Vec<ReportId>, AggregatorError> {
    let (ids, rest) = set.reports.as_chunks::<16>();
    if !rest.is_empty() || ids.windows(2).any(|w| w[0] >= w[1]) {
        return Err(AggregatorError::Invalid("a set of reports is 16 bytes for each, ascending".into()));
    }
    Ok(ids.to_vec())
}
