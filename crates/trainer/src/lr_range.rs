//! `trainer lr-range`: which peak learning rate a recipe can bear.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use bench_harness::plot::{Axis, Line, chart};
use isthmus_nets::Backbone;
use isthmus_nets::device::parse_device;
use isthmus_trainer::distill::{Run, suggested};
use isthmus_trainer::import;
use isthmus_trainer::pack::Pack;
use isthmus_trainer::recipe::Recipe;

/// Lowest and highest rate that make sense.
const RATES: (f64, f64) = (1e-9, 1e3);

/// Flags.
#[derive(clap::Args)]
pub struct LrRange {
    /// What would be trained.
    #[arg(long)]
    recipe: PathBuf,
    /// Start from the weights of this run, as far as they fit.
    #[arg(long)]
    warm_start: Option<PathBuf>,
    /// First learning rate.
    #[arg(long, default_value_t = 1e-5)]
    from: f64,
    /// Last one, unless the loss blows up before.
    #[arg(long, default_value_t = 0.3)]
    to: f64,
    /// Batches.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(10..=100_000))]
    steps: u64,
    /// auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// New folder for lr-range.jsonl and lr-range.svg.
    #[arg(long)]
    out: PathBuf,
}

impl LrRange {
    /// Runs the test, with the packed photos in `data`.
    ///
    /// # Errors
    /// What is missing or wrong.
    pub fn run(&self, third_party: &Path, data: &Path) -> Result<()> {
        let sensible = |rate: f64| (RATES.0..=RATES.1).contains(&rate);
        anyhow::ensure!(
            sensible(self.from) && sensible(self.to) && self.from < self.to,
            "--from and --to: learning rates from {:e} to {:e}, the first below the last",
            RATES.0,
            RATES.1
        );
        let occupied = std::fs::read_dir(&self.out).is_ok_and(|mut files| files.next().is_some());
        anyhow::ensure!(!occupied, "{}: is not empty; name a new folder (--out)", self.out.display());
        let device = parse_device(&self.device).map_err(anyhow::Error::msg)?;
        let recipe = Recipe::open(&self.recipe)?;
        let configured = recipe.learning_rate;
        let teacher = Backbone::open(recipe.backbone, &import::weights_path(third_party, recipe.backbone)?, device)?;
        let pack = Arc::new(Pack::open(&data.join("train.pack"))?);
        let mut run = Run::open(recipe, &self.out, teacher, device, false)?;
        if let Some(other) = &self.warm_start {
            println!("{} tensors taken from {}", run.warm_start(std::slice::from_ref(other), device)?, other.display());
        }
        let points = run.range_test(pack, (self.from, self.to), self.steps)?;
        for point in &points {
            isthmus_trainer::append_json(&self.out.join("lr-range.jsonl"), point)?;
        }
        let line = |name: &str, of: fn(&isthmus_trainer::distill::RangePoint) -> f64| Line {
            name: name.into(),
            points: points.iter().map(|p| (p.rate, of(p))).collect(),
            ..Line::default()
        };
        let lines = [line("each batch", |p| p.loss), line("smoothed", |p| p.smoothed)];
        let path = self.out.join("lr-range.svg");
        let drawn = chart(&path, "Learning-rate range test", &Axis::log("learning rate"), &Axis::log("loss"), &lines);
        drawn.map_err(anyhow::Error::msg).with_context(|| path.display().to_string())?;
        match suggested(&points) {
            Some(rate) => println!("{} batches; a peak of {rate:.1e} would do, the recipe has {configured:.1e}", points.len()),
            None => println!("{} batches; the loss never fell: begin lower (--from)", points.len()),
        }
        println!("lr-range.jsonl and lr-range.svg in {}", self.out.display());
        Ok(())
    }
}
