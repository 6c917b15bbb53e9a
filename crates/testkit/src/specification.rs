//! Compares exported metrics with the tables of docs/metrics.md.

use std::collections::{BTreeMap, BTreeSet};

/// Type and labels of a metric, and the values of those labels: found ones, or all that there may be (none: any).
type Described = (String, BTreeMap<String, BTreeSet<String>>);

const CODES: [&str; 17] = [
    "Ok",
    "Cancelled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// The names between backticks, with the values that stand in brackets behind each: a list of words is all of them, anything else says where they come from.
fn quoted(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let parts: Vec<&str> = text.split('`').collect();
    let pairs = parts.iter().skip(1).step_by(2).zip(parts.iter().skip(2).step_by(2));
    let values = |behind: &str| -> BTreeSet<String> {
        let inside = behind.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map_or("", |(inside, _)| inside);
        let words: Vec<&str> = inside.split(", ").collect();
        match inside {
            "gRPC code" => CODES.map(str::to_owned).into(),
            _ if words.iter().all(|w| w.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')) => {
                words.into_iter().filter(|w| !w.is_empty()).map(str::to_owned).collect()
            }
            _ => BTreeSet::new(),
        }
    };
    pairs.map(|(name, behind)| ((*name).to_owned(), values(behind))).collect()
}

/// The rows of the table under `# Metrics of PROGRAM`: name, type, labels, meaning.
fn documented(program: &str) -> BTreeMap<String, Described> {
    let text = std::fs::read_to_string(super::root().join("docs/metrics.md")).expect("docs/metrics.md");
    let section = text.split("# Metrics of ").find(|s| s.lines().next() == Some(program)).expect("a section of the program");
    let rows = section.lines().filter_map(|l| l.strip_prefix("| `")).map(|l| l.split('|').collect::<Vec<_>>());
    rows.map(|row| (row[0].trim().trim_end_matches('`').to_owned(), (row[1].trim().to_owned(), quoted(row[2])))).collect()
}

/// Labels of a line such as `name_bucket{stage="latent",le="1"} 5`, without those of the format itself.
fn labels(line: &str) -> BTreeMap<String, String> {
    let inside = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(inside, _)| inside);
    let pairs = inside.split("\",").filter_map(|pair| pair.split_once("=\""));
    pairs.filter(|(name, _)| *name != "le").map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned())).collect()
}

/// Checks that a metrics page has the names, types and labels that docs/metrics.md gives for `program`, no more, and no fewer but for
/// those in `optional`; and that labels have no value beside those that are listed there.
///
/// # Panics
/// Says which metric differs.
pub fn check_metrics(program: &str, page: &str, optional: &[&str]) {
    let documented = documented(program);
    assert!(documented.len() >= 8, "docs/metrics.md lists the metrics of {program}");
    let mut exported: BTreeMap<String, Described> = BTreeMap::new();
    for (name, kind) in page.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' ')) {
        let series = page.lines().filter(|l| {
            let rest = l.strip_prefix(name).unwrap_or("#");
            let rest = ["_bucket", "_sum", "_count"].iter().find_map(|s| rest.strip_prefix(s)).unwrap_or(rest);
            rest.starts_with([' ', '{'])
        });
        let series: Vec<_> = series.map(labels).collect();
        let sets: BTreeSet<Vec<&String>> = series.iter().map(|labels| labels.keys().collect()).collect();
        assert_eq!(sets.len(), 1, "series of {name} have different labels: {sets:?}");
        let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (label, value) in series.into_iter().flatten() {
            values.entry(label).or_default().insert(value);
        }
        exported.insert(name.into(), (kind.into(), values));
    }
    for (name, (kind, labels)) in &exported {
        let (wanted_kind, wanted) = documented.get(name).unwrap_or_else(|| panic!("{name} is not in docs/metrics.md"));
        assert_eq!(kind, wanted_kind, "{name}: exported (left) and in docs/metrics.md (right)");
        assert!(labels.keys().eq(wanted.keys()), "{name}: exported {labels:?}, in docs/metrics.md {wanted:?}");
        for (label, values) in labels {
            let listed = &wanted[label];
            assert!(listed.is_empty() || values.is_subset(listed), "{name}: {label} is {values:?}, docs/metrics.md lists {listed:?}");
        }
    }
    for name in documented.keys().filter(|n| !optional.contains(&n.as_str())) {
        assert!(exported.contains_key(name), "{name} of docs/metrics.md is not exported");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_told_from_descriptions() {
        let row = quoted(" `payload` (image, pixels), `code` (gRPC code), `tenant` (configured names, or anonymous), `model` ");
        assert_eq!(row["payload"], ["image", "pixels"].map(str::to_owned).into());
        assert!(row["code"].contains("DataLoss"));
        assert!(row["tenant"].is_empty() && row["model"].is_empty());
        assert_eq!(labels("a_bucket{stage=\"latent\",le=\"1\"} 5"), [("stage".to_owned(), "latent".to_owned())].into());
    }
}
