//! `trainer`: fetches photos, distils bottlenecks, evaluates and exports bundles.

mod cli;
mod lr_range;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use bench_harness::compare;
use clap::Parser;
use cli::{Cli, Command, NewBundle, Wanted};
use isthmus_codec::{Trust, folder};
use isthmus_nets::process::{BOUNDED_SPINNING, KEPT_HEAP, with_environment};
use isthmus_nets::{Backbone, EncoderKind, device};
use isthmus_trainer::distill::Run;
use isthmus_trainer::history::History;
use isthmus_trainer::pack::Pack;
use isthmus_trainer::photos::{self, Set};
use isthmus_trainer::recipe::Recipe;
use isthmus_trainer::{adapt, blueprint, contexts, crops, curves, domain, evaluation, export, gain, import, local, own, quick, refine};
use tch::Device;

/// Side of the evaluation crops: that of the Lite0 teacher.
const EVALUATION_SIDE: u32 = 224;
/// Steps from which trying cuDNN's algorithms pays.
const TRYING_PAYS: u64 = 2000;

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let wanted = [&[BOUNDED_SPINNING][..], &KEPT_HEAP].concat();
    match with_environment(&wanted).map_err(anyhow::Error::from).and_then(|()| run(cli)) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("trainer: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Fetch { ref freeze, offline, only } => fetch(&cli, freeze.as_deref(), offline, only),
        Command::Prepare { ref photos } => {
            let entries = own::prepare(photos, EVALUATION_SIDE, &cli.data)?;
            let of = |set: Set| entries.iter().filter(|e| e.set == set).count();
            println!("{} photos to train on, {} held out, in {}", of(Set::Train), of(Set::HeldOut), cli.data.display());
            for line in own::dropped(&entries) {
                println!("{line}");
            }
            Ok(())
        }
        Command::Import { ref out } => Ok(import::run(&cli.third_party, out)?),
        Command::Export { ref run, ref out, ref version, ref backbones } => export_run(&cli, run, out, version, backbones),
        Command::Blueprint { ref run, from: NewBundle { ref bundle, ref out, ref version }, ref backbones } => {
            let recipe = recipe_of(run)?;
            let path = backbones.join(format!("{}.safetensors", recipe.backbone.name()));
            let teacher = Backbone::open(recipe.backbone, &path, Device::Cpu).context("run `make setup` first")?;
            let sha256 = photos::sha256(&std::fs::read(&path)?);
            let opened = folder::open(bundle, |_| true, &Trust::all())?;
            let mut active = Run::open(recipe, run, teacher, Device::Cpu, true)?;
            active.freeze(&opened, None, Device::Cpu)?;
            let manifest = active.with_average(|r| blueprint::add(r, &opened, bundle, version, &sha256, out))?;
            History::carry(bundle, out)?;
            History::keep(run, out, &History::prefix(active.recipe.backbone.name()))?;
            let backbones: Vec<_> = manifest.decoders.iter().map(|d| d.backbone.as_str()).collect();
            println!("{} {} for {} written to {}", manifest.name, manifest.version, backbones.join(" and "), out.display());
            Ok(())
        }
        Command::Contexts(NewBundle { ref bundle, ref out, ref version }) => {
            let old = folder::open(bundle, |_| false, &Trust::all())?.manifest;
            let held_out = own::held_out(&cli.data, &cli.third_party, old.input.size, true)?;
            let manifest = contexts::bundle(bundle, &Pack::open(&cli.data.join("train.pack"))?, &held_out, version, out)?;
            let tables = folder::open(out, |_| false, &Trust::all())?.tables;
            for ((q, level), (before, now)) in (1..).zip(&tables.levels).zip(old.quality.iter().zip(&manifest.quality)) {
                let (coded, all) = (level.order().len(), level.channels.len());
                println!("q{q}  {:.0} B, {:.0} B before; {coded} of {all} channels are coded", now.bytes, before.bytes);
            }
            println!("{} {} written to {}", manifest.name, manifest.version, out.display());
            Ok(())
        }
        Command::Refine { from: NewBundle { ref bundle, ref out, ref version }, ref towards } => {
            let manifest = refine::bundle(bundle, towards, &Pack::open(&cli.data.join("train.pack"))?, version, out)?;
            println!("{} {} written to {}", manifest.name, manifest.version, out.display());
            Ok(())
        }
        Command::Graph { ref encoder, ref out } => {
            let kind = EncoderKind::from_name(encoder)
                .with_context(|| format!("encoder {encoder:?} is unknown: use patch-stem or frankensplit"))?;
            Ok(std::fs::write(out, export::untrained_graph(kind, EVALUATION_SIDE)?).with_context(|| out.display().to_string())?)
        }
        Command::Direct { ref bundle, ref backbones, batch, rounds, threads } => {
            if threads > 0 {
                tch::set_num_threads(threads);
            }
            println!("{}", serde_json::to_string(&local::Local::open(bundle, backbones, None)?.time(batch.into(), rounds as usize))?);
            Ok(())
        }
        Command::Adapt { ref bundle, ref backbones, ref model, ref photos, ref version, ref out, ref key } => {
            let manifest = adapt::release(&adapt::Release { bundle, backbones, model, photos, version, out })?;
            for (q, level) in (1..).zip(&manifest.quality) {
                println!("q{q}  {:>6.0} B  agreement {:.3}  KL {:.3}", level.bytes, level.agreement, level.kl);
            }
            if let Some(key) = key {
                adapt::sign(out, key)?;
            }
            println!("{} {} written to {}", manifest.name, manifest.version, out.display());
            Ok(())
        }
        Command::Gain { ref before, ref after, ref backbones, ref photos, json } => {
            let (crops, of, gains) = gain::compare(before, after, backbones, photos)?;
            if json {
                println!("{}", serde_json::json!({ "crops": crops, "photos": of, "levels": gains }));
                return Ok(());
            }
            println!("{crops} crops of {of} photos; saved at equal KL, 95 % interval over photos");
            for g in &gains {
                let [b, a] =
                    [g.before, g.after].map(|[bytes, agreement, kl]| format!("{bytes:>5.0} B {:>5.1} % KL {kl:.3}", 100.0 * agreement));
                let saved = g.saved.map_or_else(
                    || "beyond the old levels".into(),
                    |[mean, low, high]| format!("saved {:.1} % [{:.1}, {:.1}]", 100.0 * mean, 100.0 * low, 100.0 * high),
                );
                println!("q{}  before {b}  after {a}  {saved}", g.level);
            }
            Ok(())
        }
        Command::Sign { ref bundle, ref key } => Ok(adapt::sign(bundle, key)?),
        Command::Monochrome { ref out, each } => {
            let (train, held_out) =
                domain::monochrome(&Pack::open(&cli.data.join("train.pack"))?, &cli.data.join("eval/held-out"), out, each)?;
            println!("{train} crops in {}, {held_out} in its folder held-out", out.display());
            Ok(())
        }
        Command::Evaluate {
            ref bundle,
            ref backbones,
            ref backbone,
            ref photos,
            ref rival,
            no_codecs,
            prefixes,
            progressive,
            each_level,
            ref out,
        } => {
            let plan = if no_codecs { compare::Plan::ours(each_level) } else { compare::Plan { each_level, ..compare::Plan::default() } };
            let rivals = evaluation::Rivals { bundles: rival, prefixes, progressive, plan };
            evaluation::run(bundle, (backbones, backbone.as_deref()), photos, &rivals, out)?;
            println!("results in {}", out.display());
            Ok(())
        }
        Command::Curves { ref bundles, ref level, ref out } => {
            curves::together(bundles, level, out)?;
            println!("curve-agreement.svg, curve-kl.svg and curve-bytes.svg in {}", out.display());
            Ok(())
        }
        Command::LrRange(ref args) => args.run(&cli.third_party, &cli.data),
        Command::Distill { ref recipe, ref run, resume, ref warm_start, ref start, ref bundle, until, every, ref device, threads } => {
            if threads > 0 {
                tch::set_num_threads(threads);
            }
            let device = device::parse_device(device).map_err(anyhow::Error::msg)?;
            let recipe = Recipe::open(recipe)?;
            // shapes stay the same for all of a run, so half a minute of trying algorithms may pay (docs/decisions/0037)
            tch::Cuda::cudnn_set_benchmark(recipe.steps >= TRYING_PAYS);
            let teacher = Backbone::open(recipe.backbone, &import::weights_path(&cli.third_party, recipe.backbone)?, device)?;
            let until = until.unwrap_or(recipe.steps);
            // before the run folder is made
            let open = |folder: &PathBuf| folder::open(folder, |_| true, &Trust::all());
            let (frozen, beginning) = (bundle.as_ref().map(open).transpose()?, start.as_ref().map(open).transpose()?);
            if let Some(start) = beginning.as_ref().or(frozen.as_ref()) {
                Run::keeps_blocks(&recipe, start)?;
            }
            let goes_on = resume && Run::is_in(run);
            anyhow::ensure!(
                goes_on || start.is_some() || !recipe.keep_bytes,
                "keep_bytes: the bytes of which bundle? give it with --start, or remove that from the recipe"
            );
            if let Some(gone) = warm_start.iter().find(|f| !goes_on && !Run::is_in(f)) {
                anyhow::bail!("--warm-start {}: holds no run with a checkpoint", gone.display());
            }
            let pack = Arc::new(Pack::open(&cli.data.join("train.pack"))?);
            let watched = own::held_out(&cli.data, &cli.third_party, recipe.input_size(), false)?;
            let mut active = Run::open(recipe, run, teacher, device, resume)?;
            let new = !active.is_resumed();
            anyhow::ensure!(
                !(new && resume && start.is_none() && Run::started_from(run).is_some()),
                "{}: stopped before its first checkpoint; give --start again",
                run.display()
            );
            if new && !warm_start.is_empty() {
                let taken = active.warm_start(warm_start, device)?;
                let names: Vec<String> = warm_start.iter().map(|f| f.display().to_string()).collect();
                println!("{taken} tensors taken from {}", names.join(" and "));
            }
            match (&frozen, beginning.as_ref().filter(|_| new)) {
                (Some(frozen), beginning) => active.freeze(frozen, beginning, device)?,
                (None, Some(beginning)) => active.start_from(beginning, device)?,
                (None, None) => (),
            }
            if let Some(folder) = start.as_ref().filter(|_| new) {
                let prefix = frozen.as_ref().map(|_| History::prefix(active.recipe.backbone.name())).unwrap_or_default();
                History::inherit_bundle(folder, &prefix, run)?;
            }
            let curve = run.join("curve.jsonl");
            let evaluate = |run: &mut Run| {
                let point = run.with_average(|r| quick::score(r, &watched))?;
                for l in &point.levels {
                    println!(
                        "{:>8} crops  q{}  {:>6.0} B  agreement {:.3}  KL {:.3}  error {:.3}",
                        point.crops, l.level, l.bytes, l.agreement, l.kl, l.error
                    );
                }
                isthmus_trainer::append_json(&curve, &point)
            };
            // stopped between checkpoint and evaluation
            let scored = curves::scored(&curve)?;
            if active.step > 0 && scored < active.crops() {
                evaluate(&mut active)?;
            }
            if active.step >= until {
                println!("step {until} is reached already");
            }
            active.train(pack, until, every, evaluate)?;
            // a run of no steps, the mean of others, has a point of the learning curve too
            if !curve.exists() {
                evaluate(&mut active)?;
            }
            Ok(())
        }
    }
}

fn fetch(cli: &Cli, freeze: Option<&Path>, offline: bool, only: Option<Wanted>) -> Result<()> {
    if !offline {
        let status = std::process::Command::new("python3")
            .arg("setup/fetch.py")
            .args(Wanted::packages(only))
            .status()
            .context("python3 setup/fetch.py could not be started; run from the repository's root")?;
        anyhow::ensure!(status.success(), "setup/fetch.py failed; its message is above");
    }
    if let Some(path) = freeze {
        let found = photos::find(&cli.third_party, None)?;
        let entries = photos::split(&found)?;
        for set in [Set::Demo, Set::HeldOut, Set::Labelled, Set::Train, Set::Dropped] {
            println!("{set:?}: {}", entries.iter().filter(|e| e.set == set).count());
        }
        std::fs::write(path, serde_json::to_string_pretty(&entries)? + "\n")?;
        let content = |name: &str| found.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice());
        let crops = photos::evaluation_crops(&entries, content, EVALUATION_SIDE)?;
        println!("evaluation crops: {}", crops.len());
        for (photo, crop) in photos::trained_on_crops(&entries, &crops)? {
            println!("{photo}: trained on, near to {crop}");
        }
        std::fs::write(path.with_file_name("evaluation-crops.json"), serde_json::to_string_pretty(&crops)? + "\n")?;
        return Ok(());
    }
    let sets = Wanted::sets(only);
    let (entries, contents): (Vec<_>, Vec<_>) = photos::load(&cli.third_party, sets)?.into_iter().unzip();
    println!("{} photos match the frozen split", entries.len());
    std::fs::create_dir_all(&cli.data)?;
    crops::write(&entries, |i| Ok(contents[i].as_slice().into()), EVALUATION_SIDE, &cli.data.join("eval"), sets)?;
    println!("evaluation crops in {}", cli.data.join("eval").display());
    if !sets.contains(&Set::Train) {
        return Ok(());
    }
    let train = entries.into_iter().zip(contents).filter(|(e, _)| e.set == Set::Train).map(|(e, b)| Ok((e.name, b)));
    let path = cli.data.join("train.pack");
    let pack = Pack::write(train, &path)?;
    println!("{} training photos packed in {}", pack.len(), path.display());
    Ok(())
}

/// The recipe of a run that has weights.
fn recipe_of(run: &Path) -> Result<Recipe> {
    let recipe = Recipe::open(&run.join("recipe.toml"))?;
    anyhow::ensure!(Run::is_in(run), "{}: holds no run with a checkpoint; `trainer distill --run {0}` makes one", run.display());
    Ok(recipe)
}

fn export_run(cli: &Cli, run: &Path, out: &Path, version: &str, backbones: &Path) -> Result<()> {
    let recipe = recipe_of(run)?;
    let path = backbones.join(format!("{}.safetensors", recipe.backbone.name()));
    let teacher = Backbone::open(recipe.backbone, &path, Device::Cpu).context("run `make setup` first")?;
    let side = recipe.input_size();
    let held_out = own::held_out(&cli.data, &cli.third_party, side, true)?;
    let backbone_sha256 = photos::sha256(&std::fs::read(&path)?);
    let history = History::open(run)?;
    let pack = Pack::open(&cli.data.join("train.pack"))?;
    let mut active = Run::open(recipe, run, teacher, Device::Cpu, true)?;
    let manifest = active.with_average(|r| {
        let mut point = quick::score(r, &held_out)?;
        point.crops += history.crops();
        let shape = export::latent_shape(&r.recipe);
        let tables = contexts::fit(r, &export::tables(r)?, shape, &pack, contexts::CROPS)?;
        for (score, bytes) in point.levels.iter_mut().zip(export::coded_bytes(&r.net.encoder, Device::Cpu, &tables, shape, &held_out)?) {
            println!("q{}  {:.0} B with static tables, {bytes:.0} B with contexts", score.level, score.bytes);
            score.bytes = bytes;
        }
        let command = history.commands(r.step);
        let (photos, started_from) = (own::listed(&cli.data)?, Run::started_from(run));
        export::bundle(r, &tables, &point, &export::Origin { version, command: &command, backbone_sha256, photos, started_from }, out)
    })?;
    History::keep(run, out, "")?;
    curves::plot(run, out)?;
    println!("{} {} written to {}", manifest.name, manifest.version, out.display());
    Ok(())
}
