//! Compares exported metrics with the tables of docs/metrics.md.

use std::collections::{BTreeMap, BTreeSet};

/// Type and labels of a metric.
type Described = (String, BTreeSet<String>);

/// The names between backticks.
fn quoted(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The rows of the table under `# Metrics of PROGRAM`: name, type, labels, meaning.
fn documented(program: &str) -> BTreeMap<String, Described> {
    let text = std::fs::read_to_string(super::root().join("docs/metrics.md")).expect("docs/metrics.md");
    let section = text.split("# Metrics of ").find(|s| s.lines().next() == Some(program)).expect("a section of the program");
    let rows = section.lines().filter_map(|l| l.strip_prefix("| `")).map(|l| l.split('|').collect::<Vec<_>>());
    rows.map(|row| (row[0].trim().trim_end_matches('`').to_owned(), (row[1].trim().to_owned(), quoted(row[2])))).collect()
}

/// Labels of a line such as `name_bucket{stage="latent",le="1"} 5`, without those of the format itself.
fn labels(line: &str) -> BTreeSet<String> {
    let inside = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(inside, _)| inside);
    let names = inside.split("\",").filter_map(|pair| pair.split_once("=\"")).map(|(name, _)| name.to_owned());
    names.filter(|name| name != "le").collect()
}

/// Checks that a metrics page has the names, types and labels that docs/metrics.md gives for `program`, no more, and no fewer but for
/// those in `optional`.
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
        let sets: BTreeSet<BTreeSet<String>> = series.map(labels).collect();
        assert_eq!(sets.len(), 1, "series of {name} have different labels: {sets:?}");
        exported.insert(name.into(), (kind.into(), sets.into_iter().next().unwrap_or_default()));
    }
    for (name, found) in &exported {
        let wanted = documented.get(name).unwrap_or_else(|| panic!("{name} is not in docs/metrics.md"));
        assert_eq!(found, wanted, "{name}: exported (left) and in docs/metrics.md (right)");
    }
    for name in documented.keys().filter(|n| !optional.contains(&n.as_str())) {
        assert!(exported.contains_key(name), "{name} of docs/metrics.md is not exported");
    }
}
