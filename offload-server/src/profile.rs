//! `offload-server --profile`: what each layer costs before anything runs, and what batches take.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use isthmus_nets::profile::{LayerCost, Machine};

use crate::model::{Model, Stage};
use crate::repository::{backbone_path, open_all_bundles};
use crate::{Config, ServerError, placement};

/// Batches of each size that are timed.
const TIMED: usize = 7;

/// For each model, where it runs and what that can do; a table for each way into it (multiply-accumulates, bytes moved, operations for each byte, and
/// the roofline's time, for one photo and in a batch of the largest size); and what batches take when run.
///
/// # Errors
/// If a model is unknown, its device is not there, or a bundle cannot be read.
pub fn report(config: &Config) -> Result<String, ServerError> {
    let bundles: Vec<_> = open_all_bundles(config)?.into_iter().map(Arc::new).collect();
    let mut text = String::new();
    for name in &config.models {
        let mut instances = placement::instances(config, name)?;
        instances.dedup();
        for instance in instances {
            tch::set_num_threads(instance.threads as i32);
            let machine = Machine::measure(instance.device, instance.precision.kind());
            let model = Model::load(name, &backbone_path(config, name), &bundles, instance, true)?;
            let _ = writeln!(
                text,
                "{name} on {}, {:?}, {} threads: {:.1} GFLOP/s (product of matrices of that precision), {:.1} GB/s (copy)",
                instance.device_name(),
                instance.precision,
                instance.threads,
                machine.flops / 1e9,
                machine.bytes_per_second / 1e9
            );
            let ways = std::iter::once((Stage::Pixels, "pixels".to_owned())).chain(bundles.iter().filter_map(|b| {
                let title = format!("bitstreams of {} {}", b.manifest.name, b.manifest.version);
                model.stage(&b.hash).map(|stage| (stage, title))
            }));
            for (stage, title) in ways {
                eprintln!("measuring {title} on {}", instance.device_name());
                let layers = model.layers(stage);
                table(&mut text, &format!("{name}, {title}"), &layers, machine, config.max_batch as u64);
                measured(&mut text, &model, stage, &layers, machine, config.max_batch)?;
            }
        }
    }
    Ok(text)
}

/// Median time of batches of 1, 2, 4, ... photos, and the share of the machine's peak that they reach.
fn measured(
    text: &mut String,
    model: &Model,
    stage: Stage,
    layers: &[LayerCost],
    machine: Machine,
    max_batch: usize,
) -> Result<(), ServerError> {
    let input = vec![0.0; model.input_len(stage)];
    let macs: u64 = layers.iter().map(|l| l.macs).sum();
    let _ = writeln!(text, "\n{:<8} {:>10} {:>10} {:>10}", "batch", "ms", "photos/s", "% of peak");
    let mut sizes: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < max_batch).collect();
    sizes.push(max_batch);
    for n in sizes {
        let batch = vec![input.as_slice(); n];
        let mut times = Vec::with_capacity(TIMED);
        for _ in 0..=TIMED {
            let start = Instant::now();
            model.run(stage, &batch)?;
            times.push(start.elapsed().as_secs_f64());
        }
        // the first one warms up
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let median = times[TIMED / 2];
        let (rate, reached) = (n as f64 / median, 2.0 * (n as u64 * macs) as f64 / median / machine.flops);
        let _ = writeln!(text, "{n:<8} {:>10.2} {rate:>10.1} {:>10.1}", 1e3 * median, 100.0 * reached);
    }
    let _ = writeln!(text);
    Ok(())
}

fn table(text: &mut String, title: &str, layers: &[LayerCost], machine: Machine, batch: u64) {
    let all = LayerCost {
        name: "all".into(),
        macs: layers.iter().map(|l| l.macs).sum(),
        weight_bytes: layers.iter().map(|l| l.weight_bytes).sum(),
        activation_bytes: layers.iter().map(|l| l.activation_bytes).sum(),
    };
    let together = format!("of {batch}");
    let head = ["layer", "MMAC", "MB moved", "FLOP/byte", &together, "us", &together];
    let _ = writeln!(
        text,
        "\n{title}\n{:<26} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6]
    );
    for layer in layers.iter().chain([&all]) {
        let part = if layer.name == "all" { layers } else { std::slice::from_ref(layer) };
        let micros = |n: u64| machine.time(part, n).as_secs_f64() * 1e6 / n as f64;
        let (macs, moved) = (layer.macs as f64 / 1e6, layer.bytes(1) as f64 / 1e6);
        let (one, many) = (layer.intensity(1), layer.intensity(batch));
        let _ =
            writeln!(text, "{:<26} {macs:>9.2} {moved:>9.3} {one:>9.1} {many:>9.1} {:>9.1} {:>9.1}", layer.name, micros(1), micros(batch));
    }
}
