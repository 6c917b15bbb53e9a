//! From payload bytes to network input, on a bounded pool of blocking threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_codec::Progressive;
use isthmus_nets::Layer;
use isthmus_pixels::{MAX_SIDE, PixelError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ServerError;
use crate::features::FeatureMap;
use crate::model::Stage;
use crate::registry::{Entry, Registry};
use crate::telemetry::{self, Decoding, Kind};
use crate::tenants::Tenant;

/// Weight of the last decoding in the predicted speed, and how many times as slow as predicted it counts at most.
const LAST: f64 = 0.1;
const STALL: f64 = 4.0;
/// Smaller payloads count as so large, and nothing is predicted to take longer than so many seconds.
const LEAST: u64 = 2 << 10;
const LONGEST: f64 = 5.0;
/// A bitstream that is predicted to take less is decoded where its request is: another thread would have to be woken, and be waited for.
const AT_ONCE: f64 = 0.002;

/// The decode pool. A tenant among several has half of it at most: what one sends is not to stop the others. Bitstreams, which are brief,
/// need no place in it.
pub struct Intake {
    workers: Arc<Semaphore>,
    size: usize,
    /// Of each tenant, by its index.
    shares: BTreeMap<u32, Arc<Semaphore>>,
    max_image_pixels: u64,
    paces: Arc<Mutex<Paces>>,
}

/// How long decoding takes: it grows with the payload's size, differently for each kind.
#[derive(Default)]
struct Paces {
    /// Seconds for a pixel of an image or a byte of anything else, by [`Kind::label`].
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
    fn seconds(&self, kind: Kind, size: u64) -> f64 {
        (self.of.get(kind.label()).copied().unwrap_or(0.0) * size as f64).min(LONGEST)
    }

    fn learn(&mut self, kind: Kind, size: u64, took: Duration) {
        // every payload costs something whatever its size: tiny ones say nothing of a byte's price
        let seen = took.as_secs_f64() / size.max(LEAST) as f64;
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

/// Clients end their calls at their deadline, which may be so much earlier here.
const ABOUT: Duration = Duration::from_millis(25);

/// Waits for a decode worker, in vain if it is dropped.
struct Waiting {
    model: &'static str,
    since: Instant,
    deadline: Instant,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        telemetry::queued(self.model, self.since.elapsed());
        telemetry::dropped(if Instant::now() + ABOUT < self.deadline { "cancelled" } else { "decode" });
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
    /// A pool of `workers` decodings at once for the tenants with these indices, and the largest image that it takes.
    pub fn new(workers: usize, tenants: &[u32], max_image_pixels: u64) -> Self {
        let share = if tenants.len() > 1 { workers.div_ceil(2) } else { workers };
        let shares = tenants.iter().map(|index| (*index, Arc::new(Semaphore::new(share)))).collect();
        Self { workers: Arc::new(Semaphore::new(workers)), size: workers, shares, max_image_pixels, paces: Arc::default() }
    }

    /// What decoding a payload depends on: the pixels of an image, the bytes of anything else.
    ///
    /// # Errors
    /// If it is an image that is damaged or too large: nothing has been decoded.
    pub fn size(&self, kind: Kind, payload: &[u8]) -> Result<u64, ServerError> {
        let (width, height) = match kind {
            Kind::Image => isthmus_avif::dimensions_any(payload)?,
            Kind::Pixels { height, width } => (width, height),
            _ => return Ok(payload.len() as u64),
        };
        let (pixels, max_pixels) = (u64::from(width) * u64::from(height), self.max_image_pixels);
        if pixels > max_pixels {
            return Err(PixelError::TooLarge { width, height, max_pixels, max_side: MAX_SIDE }.into());
        }
        Ok(pixels)
    }

    /// Predicted time until a payload of this size that comes now is decoded.
    pub fn expected(&self, kind: Kind, size: u64) -> Duration {
        let paces = locked(&self.paces);
        let ahead = if brief(kind, paces.seconds(kind, size)) { 0.0 } else { paces.ahead };
        Duration::from_secs_f64(ahead / self.size.max(1) as f64 + paces.seconds(kind, size))
    }

    /// Decodes `payload`, of this [`Self::size`], for the model `entry`.
    ///
    /// # Errors
    /// [`ServerError::Deadline`] if no worker is free in time, and whatever is wrong with the payload.
    #[tracing::instrument(level = "debug", skip_all, fields(kind = kind.label(), bytes = payload.len()))]
    pub async fn decode(
        &self,
        registry: &Arc<Registry>,
        entry: &Arc<Entry>,
        kind: Kind,
        (payload, size): (Bytes, u64),
        (deadline, tenant): (Instant, &Tenant),
    ) -> Result<Ready, ServerError> {
        let asked = Instant::now();
        let seconds = locked(&self.paces).seconds(kind, size);
        let (registry, of, paces) = (registry.clone(), entry.clone(), self.paces.clone());
        let decode = move |waited: Duration| {
            let start = Instant::now();
            if start >= deadline {
                return Err(ServerError::Deadline("waiting for the decode pool"));
            }
            let (stage, input) = match kind {
                Kind::Bitstream => bitstream(&registry, &of, &payload)?,
                Kind::Image => image(&of, &payload)?,
                Kind::Features(map) => features(&of, map, &payload)?,
                Kind::Pixels { height, width } => pixels(&of, (width, height), payload)?,
                Kind::Normalised => normalised(&of, &payload)?,
            };
            let took = start.elapsed();
            telemetry::decoded(kind, took);
            locked(&paces).learn(kind, size, took);
            Ok(Ready { stage, input, waited, took })
        };
        if brief(kind, seconds) {
            // as on a thread of the pool, a panic must be one request's alone
            return std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| decode(Duration::ZERO)))
                .unwrap_or_else(|_| Err(ServerError::Network("decoding failed".into())));
        }
        locked(&self.paces).ahead += seconds;
        let expected = Expected { paces: self.paces.clone(), seconds };
        let waiting = Waiting { model: entry.name, since: asked, deadline };
        let places = tokio::time::timeout_at(deadline.into(), self.places(tenant.index)).await;
        let places = places.map_err(|_| ServerError::Deadline("waiting for the decode pool"))??;
        // not in vain
        std::mem::forget(waiting);
        let held = (places, expected, Decoding::enter());
        let waited = asked.elapsed();
        let decoded = tokio::task::spawn_blocking(move || {
            let _held = held;
            decode(waited)
        });
        // a decoding cannot be stopped; it keeps its place in the pool, so no more than its worker is lost
        let decoded = tokio::time::timeout_at(deadline.into(), decoded).await;
        let decoded = decoded.map_err(|_| ServerError::Deadline("being decoded"))?;
        decoded.map_err(|e| ServerError::Network(format!("decoding: {e}")))?
    }
}

impl Intake {
    /// A place in the tenant's share, then a worker: never two of one semaphore, or those that hold one would wait for each other.
    async fn places(&self, tenant: u32) -> Result<[OwnedSemaphorePermit; 2], ServerError> {
        let share =
            self.shares.get(&tenant).ok_or_else(|| ServerError::Network(format!("tenant {tenant} has no share of the decode pool")))?;
        let own = share.clone().acquire_owned().await.map_err(|_| ServerError::Draining)?;
        Ok([own, self.workers.clone().acquire_owned().await.map_err(|_| ServerError::Draining)?])
    }
}

/// True for what is decoded where its request is.
fn brief(kind: Kind, seconds: f64) -> bool {
    kind == Kind::Bitstream && seconds > 0.0 && seconds < AT_ONCE
}

fn bitstream(registry: &Registry, entry: &Entry, payload: &[u8]) -> Result<(Stage, Vec<f32>), ServerError> {
    let parsed = Progressive::parse(payload)?;
    let bundle = registry.bundle(&parsed.container.header.bundle)?;
    let stage = entry
        .stage(&bundle.hash)
        .ok_or_else(|| ServerError::UnknownBundle(format!("{} (no decoder for model {})", bundle.manifest.name, entry.name)))?;
    let mut input = Vec::new();
    bundle.decode_parsed_into(&parsed, &mut input)?;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SOON: Duration = Duration::from_secs(2);

    /// Whoever asks, and however few workers there are, a place is had at once, and those of others are left.
    #[tokio::test]
    async fn every_tenant_gets_a_worker() {
        for (workers, tenants) in [(1, vec![0]), (1, vec![1, 2, 3]), (2, vec![1, 2]), (2, vec![1]), (4, vec![1, 2, 3])] {
            let intake = Intake::new(workers, &tenants, 1);
            for &tenant in &tenants {
                let held = tokio::time::timeout(SOON, intake.places(tenant)).await.unwrap().unwrap();
                drop(held);
            }
            let share = if tenants.len() > 1 { workers.div_ceil(2) } else { workers };
            let &flood = tenants.last().unwrap();
            let mut held = Vec::new();
            for _ in 0..share {
                held.push(tokio::time::timeout(SOON, intake.places(flood)).await.unwrap().unwrap());
            }
            let more = tokio::time::timeout(Duration::from_millis(20), intake.places(flood)).await;
            assert!(more.is_err(), "{workers} workers, {tenants:?}: no more than its share");
            if workers > share {
                let other = tokio::time::timeout(SOON, intake.places(tenants[0])).await;
                assert!(other.unwrap().is_ok(), "{workers} workers, {tenants:?}");
            }
        }
        assert!(Intake::new(1, &[1], 1).places(2).await.is_err(), "a stranger");
    }
}
