//! From payload bytes to network input, on a bounded pool of blocking threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_codec::Container;
use isthmus_nets::Layer;
use tokio::sync::Semaphore;

use crate::ServerError;
use crate::features::FeatureMap;
use crate::model::Stage;
use crate::registry::{Entry, Registry};
use crate::telemetry::{self, Kind};

/// The decode pool.
pub struct Intake {
    workers: Arc<Semaphore>,
}

/// A decoded payload.
pub struct Ready {
    /// Where it enters the network.
    pub stage: Stage,
    /// Latent or pixels.
    pub input: Vec<f32>,
    /// Waiting for a worker.
    pub waited: Duration,
    /// Decoding.
    pub took: Duration,
}

impl Intake {
    /// A pool of `workers` decodings at once.
    pub fn new(workers: usize) -> Self {
        Self { workers: Arc::new(Semaphore::new(workers)) }
    }

    /// Decodes `payload` for the model `entry`.
    ///
    /// # Errors
    /// [`ServerError::Deadline`] if no worker is free in time, and whatever is wrong with the payload.
    #[tracing::instrument(level = "debug", skip_all, fields(kind = kind.label(), bytes = payload.len()))]
    pub async fn decode(
        &self,
        registry: &Arc<Registry>,
        entry: &Arc<Entry>,
        kind: Kind,
        payload: Bytes,
        deadline: Instant,
    ) -> Result<Ready, ServerError> {
        let asked = Instant::now();
        let worker = tokio::time::timeout_at(deadline.into(), self.workers.clone().acquire_owned());
        let worker = worker.await.map_err(|_| ServerError::Deadline("waiting for the decode pool"))?;
        let worker = worker.map_err(|_| ServerError::Draining)?;
        let waited = asked.elapsed();
        let registry = registry.clone();
        let entry = entry.clone();
        let decoded = tokio::task::spawn_blocking(move || {
            let _worker = worker;
            let start = Instant::now();
            if start >= deadline {
                return Err(ServerError::Deadline("waiting for the decode pool"));
            }
            let (stage, input) = match kind {
                Kind::Bitstream => bitstream(&registry, &entry, &payload)?,
                Kind::Image => image(&entry, &payload)?,
                Kind::Features(map) => features(&entry, map, &payload)?,
                Kind::Pixels { height, width } => pixels(&entry, (width, height), payload)?,
                Kind::Normalised => normalised(&entry, &payload)?,
            };
            let took = start.elapsed();
            telemetry::decoded(kind, took);
            Ok(Ready { stage, input, waited, took })
        });
        // a decoding cannot be stopped; it keeps its place in the pool, so no more than its worker is lost
        let decoded = tokio::time::timeout_at(deadline.into(), decoded).await;
        let decoded = decoded.map_err(|_| ServerError::Deadline("being decoded"))?;
        decoded.map_err(|e| ServerError::Network(format!("decoding: {e}")))?
    }
}

fn bitstream(registry: &Registry, entry: &Entry, payload: &[u8]) -> Result<(Stage, Vec<f32>), ServerError> {
    let container = Container::parse(payload)?;
    let bundle = registry.bundle(&container.header.bundle)?;
    let stage = entry
        .stage(&bundle.hash)
        .ok_or_else(|| ServerError::UnknownBundle(format!("{} (no decoder for model {})", bundle.manifest.name, entry.name)))?;
    let shape = bundle.manifest.latent;
    let symbols = container.decode(&bundle.hash, shape, &bundle.tables)?;
    let mut input = Vec::new();
    bundle.tables.level(container.header.quality)?.dequantise_into(&symbols, shape, &mut input)?;
    Ok((stage, input))
}

fn features(entry: &Entry, map: FeatureMap, payload: &[u8]) -> Result<(Stage, Vec<f32>), ServerError> {
    let layer = Layer::Block(map.block as usize);
    let shape = entry.kind.layer_shape(layer).ok_or_else(|| {
        let blocks = entry.kind.block_count();
        ServerError::Invalid(format!("features: {} has blocks 0 to {}, not {}", entry.name, blocks - 1, map.block))
    })?;
    Ok((Stage::Features(layer), map.decode(payload, shape.iter().product::<i64>() as usize)?))
}

fn image(entry: &Entry, payload: &[u8]) -> Result<(Stage, Vec<f32>), ServerError> {
    let mut input = Vec::new();
    let decode = if isthmus_avif::is_avif(payload) { isthmus_avif::decode } else { isthmus_pixels::decode };
    decode(payload)?.network_input(entry.input_size)?.normalise_into(&mut input);
    Ok((Stage::Pixels, input))
}

/// RGB values, row by row, cut and scaled as an image file's would be.
fn pixels(entry: &Entry, size: (u32, u32), payload: Bytes) -> Result<(Stage, Vec<f32>), ServerError> {
    isthmus_pixels::check_size(size)?;
    let image = isthmus_pixels::Rgb::new(size.0, size.1, payload.into())
        .ok_or_else(|| ServerError::Invalid("pixels: not three values each".into()))?;
    let mut input = Vec::new();
    image.network_input(entry.input_size)?.normalise_into(&mut input);
    Ok((Stage::Pixels, input))
}

/// Pixels as the network wants them: channels, rows, columns.
fn normalised(entry: &Entry, payload: &[u8]) -> Result<(Stage, Vec<f32>), ServerError> {
    let input: Vec<f32> = payload.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let side = entry.input_size;
    if input.len() != 3 * (side * side) as usize {
        return Err(ServerError::Invalid(format!("pixels: floats have the shape [n, 3, {side}, {side}] for {}", entry.name)));
    }
    if input.iter().any(|v| !v.is_finite()) {
        return Err(ServerError::Invalid("pixels: values must be finite".into()));
    }
    Ok((Stage::Pixels, input))
}
