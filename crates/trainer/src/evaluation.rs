//! A bundle beside image codecs and other bundles, on folders of photos, in this process.

use std::path::{Path, PathBuf};

use bench_harness::photos::PhotoSet;
use bench_harness::{compare, report};
use isthmus_codec::Trust;

use crate::error::TrainError;
use crate::local::Local;

/// What is compared with the bundle.
pub struct Rivals<'a> {
    /// Bundle folders, or folders of versions.
    pub bundles: &'a [PathBuf],
    /// The level whose bitstreams' first parts are compared.
    pub prefixes: Option<u8>,
    /// Whether progressive bitstreams are compared.
    pub progressive: bool,
    /// Codecs and qualities.
    pub plan: compare::Plan,
}

/// Prints a table for each folder of photos and writes results and plots to `out`; `backbone` of the bundle's backbones answers (the first, if none
/// is named), with weights from the folder `backbones`.
///
/// # Errors
/// Names the bundle, folder or photo that is wrong.
pub fn run(
    bundle: &Path,
    (backbones, backbone): (&Path, Option<&str>),
    photos: &[PathBuf],
    rivals: &Rivals<'_>,
    out: &Path,
) -> Result<(), TrainError> {
    let mut names = std::collections::BTreeSet::new();
    if let Some(twice) = photos.iter().find(|p| !names.insert(p.file_name())) {
        let why = "another of the folders has the same name, which names the results too; evaluate them one by one (--out)";
        return Err(TrainError::data(twice.display().to_string(), why));
    }
    report::prepare(out)?;
    let opened = edge_client::open_bundle(bundle)?;
    let mut backend = Local::open(bundle, backbones, backbone)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|e| TrainError::data("run time", e.to_string()))?;
    let sets = photos.iter().map(|p| PhotoSet::open_readable(p, opened.manifest.input.size)).collect::<Result<Vec<_>, _>>()?;
    runtime.block_on(async {
        let mut encoder = edge_client::Encoder::new(opened, 1)?;
        for set in &sets {
            let mut comparison = compare::run(set, &mut encoder, &mut backend, &rivals.plan).await?;
            if let Some(level) = rivals.prefixes {
                compare::add_prefixes(&mut comparison, set, &mut encoder, &mut backend, level).await?;
            }
            if rivals.progressive {
                compare::add_progressive(&mut comparison, set, &mut encoder, &mut backend).await?;
            }
            for folder in rivals.bundles {
                for version in edge_client::bundle_versions(folder)?.into_iter().rev() {
                    let mut rival = edge_client::Encoder::new(edge_client::open_version(&version, &Trust::all())?, 1)?;
                    let mut its = Local::open(&version, backbones, backbone)?;
                    compare::add(&mut comparison, set, &mut rival, &mut its, &rivals.plan).await?;
                }
            }
            println!("{}", report::table(&comparison));
            report::write(&comparison, out)?;
        }
        Ok(())
    })
}
