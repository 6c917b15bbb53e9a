//! `offload-server --profile`: what each layer costs, before anything runs.

use std::fmt::Write;

use isthmus_nets::device::parse_device;
use isthmus_nets::profile::{LayerCost, Machine};
use isthmus_nets::{BackboneKind, DecoderSpec, Layer};

use crate::repository::open_all_bundles;
use crate::{Config, ServerError};

/// A table for each model and each way into it: multiply-accumulates, bytes moved, operations for each byte, and the roofline's time,
/// for one photo and in a batch of the largest size.
///
/// # Errors
/// If a model is unknown or a bundle cannot be read.
pub fn report(config: &Config) -> Result<String, ServerError> {
    let device = parse_device(&config.device).map_err(ServerError::Config)?;
    tch::set_num_threads(config.network_threads() as i32);
    let machine = Machine::measure(device);
    let bundles = open_all_bundles(config)?;
    let mut text = format!(
        "machine: {:.1} GFLOP/s (product of matrices), {:.1} GB/s (copy), {device:?}, {} threads\n",
        machine.flops / 1e9,
        machine.bytes_per_second / 1e9,
        config.network_threads()
    );
    for name in &config.models {
        let kind = BackboneKind::from_name(name).ok_or_else(|| ServerError::Config(format!("model {name:?} is unknown")))?;
        table(&mut text, &format!("{name}, pixels"), &kind.layers(Layer::Input), machine, config.max_batch as u64);
        for bundle in &bundles {
            for entry in bundle.manifest.decoders.iter().filter(|d| d.backbone == *name) {
                let latent = bundle.manifest.latent;
                let mut layers = DecoderSpec::from_entry(entry).layers(latent.height.into(), latent.width.into());
                layers.extend(kind.layers(Layer::from_block(entry.split_block)));
                let title = format!("{name}, bitstreams of {} {}", bundle.manifest.name, bundle.manifest.version);
                table(&mut text, &title, &layers, machine, config.max_batch as u64);
            }
        }
    }
    Ok(text)
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
