//! From payload bytes to network input, on a bounded pool of blocking threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// Weight of the last decoding in the predicted speed, and how many times as slow as predicted it counts at most.
const LAST: f64 = 0.1;
const STALL: f64 = 4.0;
/// Smaller payloads count as this many bytes, and nothing is predicted to take longer than so long.
const LEAST_BYTES: usize = 2 << 10;
const LONGEST: f64 = 0.5;
/// A bitstream that is predicted to take less is decoded where its request is: another thread would have to be woken, and be waited for.
const AT_ONCE: f64 = 0.002;

/// The decode pool.
pub struct Intake {
    workers: Arc<Semaphore>,
    size: usize,
    paces: Arc<Mutex<Paces>>,
}

/// How long decoding takes: it grows with the payload, differently for each kind.
#[derive(Default)]
struct Paces {
    /// Seconds a byte, by [`Kind::label`].
    of: BTreeMap<&'static str, f64>,
    /// Predicted seconds of what waits or is being decoded.
    ahead: f64,
}

/// Counts as ahead of others until it is dropped.
struct Expected {
    paces: Arc<Mutex<Paces>>,
    seconds: f64,
}

fn locked(paces: &Mutex<Paces>) -> MutexGuard<'_, Paces> {
    paces.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Paces {
    fn seconds(&self, kind: Kind, bytes: usize) -> f64 {
        (self.of.get(kind.label()).copied().unwrap_or(0.0) * bytes as f64).min(LONGEST)
    }

    fn learn(&mut self, kind: Kind, bytes: usize, took: Duration) {
        // every payload costs something whatever its size: tiny ones say nothing of a byte's price
        let seen = took.as_secs_f64() / bytes.max(LEAST_BYTES) as f64;
        let pace = self.of.entry(kind.label()).or_insert(seen);
        *pace += LAST * (seen.min(STALL * *pace) - *pace);
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut paces = locked(&self.paces);
        paces.ahead = (paces.ahead - self.seconds).max(0.0);
    }
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
        Self { workers: Arc::new(Semaphore::new(workers)), size: workers, paces: Arc::default() }
    }

    /// Predicted time until a payload that comes now is decoded.
    pub fn expected(&self, kind: Kind, bytes: usize) -> Duration {
        let paces = locked(&self.paces);
        Duration::from_secs_f64(paces.ahead / self.size.max(1) as f64 + paces.seconds(kind, bytes))
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
        let expected = {
            let mut paces = locked(&self.paces);
            let seconds = paces.seconds(kind, payload.len());
            paces.ahead += seconds;
            Expected { paces: self.paces.clone(), seconds }
        };
        let worker = tokio::time::timeout_at(deadline.into(), self.workers.clone().acquire_owned());
        let worker = worker.await.map_err(|_| ServerError::Deadline("waiting for the decode pool"))?;
        let worker = worker.map_err(|_| ServerError::Draining)?;
        let waited = asked.elapsed();
        let brief = kind == Kind::Bitstream && expected.seconds > 0.0 && expected.seconds < AT_ONCE;
        let registry = registry.clone();
        let entry = entry.clone();
        let decode = move || {
            let (_worker, expected, bytes) = (worker, expected, payload.len());
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
            locked(&expected.paces).learn(kind, bytes, took);
            Ok(Ready { stage, input, waited, took })
        };
        if brief {
            return decode();
        }
        let decoded = tokio::task::spawn_blocking(decode);
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
    isthmus_avif::decode_any(payload)?.network_input(entry.input_size)?.normalise_into(&mut input);
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
