//! A request's way, whatever protocol it came by: limits and deadline, admission, decoding, batch, answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

use crate::admission::Admitted;
use crate::intake::Intake;
use crate::receiving::Open;
use crate::registry::{Entry, Registry};
use crate::repository::Repository;
use crate::statistics::Times;
use crate::status::Latencies;
use crate::telemetry::{self, InFlight, Kind};
use crate::tenants::{Entered, Tenant, Tenants};
use crate::{Config, ServerError};

const DEADLINE_MARGIN: Duration = Duration::from_millis(5);

/// What every service of the server shares.
pub struct Pipeline {
    /// The models.
    pub repository: Arc<Repository>,
    /// Who may ask.
    pub tenants: Tenants,
    /// Latencies of the last minute.
    pub latencies: Latencies,
    /// Health says no more: balancers look elsewhere. What comes is answered.
    pub leaving: CancellationToken,
    /// Connections and streams take nothing new; what is in flight goes on.
    pub draining: CancellationToken,
    /// Requests of one stream under way.
    pub window: usize,
    /// A stream on which nothing moves for so long ends.
    pub stream_idle: Duration,
    /// A stream that is older than about this ends after what is under way: its connection could not otherwise. Zero: never.
    stream_age: Duration,
    /// Streams so far.
    streams: AtomicU32,
    /// Largest answer in bytes.
    pub max_response_bytes: usize,
    /// Most requests that wait for a network.
    pub max_queue: usize,
    intake: Intake,
    in_flight: Arc<Semaphore>,
    max_in_flight: usize,
    /// Bodies of which something may still come, and streams.
    pub open: Open,
    max_deadline: Duration,
    priority_levels: u8,
}

/// A request, decoded from its protocol.
pub struct Ask<'a> {
    /// Name of the model; empty: the default.
    pub model: &'a str,
    /// Its version; empty: the newest.
    pub version: &'a str,
    /// What the payload is.
    pub kind: Kind,
    /// The payload.
    pub payload: Bytes,
    /// When it came.
    pub arrived: Instant,
    /// Time until the answer is due.
    pub budget: Duration,
    /// 0 is the most urgent.
    pub priority: u8,
    /// Who asks.
    pub tenant: &'a Tenant,
}

/// What requests hold from their arrival until their answers have been taken.
pub struct Places {
    _tenants: Entered,
    _all: OwnedSemaphorePermit,
    _counted: InFlight,
}

/// The answer to a request.
pub struct Answer {
    /// Who gave it.
    pub entry: Arc<Entry>,
    /// Names of the classes.
    pub labels: Arc<Vec<String>>,
    /// In class order.
    pub logits: Vec<f32>,
    /// Where the time went.
    pub times: Times,
    /// The request's place, if it took one for itself: to be held until the answer has been taken.
    pub place: Option<Places>,
}

impl Pipeline {
    /// With the limits of `config`.
    pub fn new(repository: Arc<Repository>, config: &Config, tenants: Tenants) -> Self {
        let indices: Vec<u32> = tenants.all().map(|t| t.index).collect();
        let intake = Intake::new(config.decode_workers(), &indices, config.max_image_pixels);
        Self {
            repository,
            tenants,
            latencies: Latencies::default(),
            leaving: CancellationToken::new(),
            draining: CancellationToken::new(),
            window: config.stream_window,
            stream_idle: config.stream_idle,
            stream_age: config.max_connection_age,
            streams: AtomicU32::new(0),
            max_response_bytes: config.max_response_bytes,
            max_queue: config.max_queue,
            intake,
            in_flight: Arc::new(Semaphore::new(config.max_in_flight)),
            max_in_flight: config.max_in_flight,
            open: Open::default(),
            max_deadline: config.max_deadline,
            priority_levels: config.priority_levels,
        }
    }

    /// How old the next stream may become; none: as old as it likes. A tenth to either side, as for connections, so that those that came together
    /// do not all come back together: multiples of the golden ratio fill that range evenly.
    pub fn next_stream_age(&self) -> Option<Duration> {
        const GOLDEN: f64 = 0.618_033_988_749_895;
        let i = self.streams.fetch_add(1, Ordering::Relaxed);
        (!self.stream_age.is_zero()).then(|| self.stream_age.mul_f64(0.9 + 0.2 * (f64::from(i) * GOLDEN).fract()))
    }

    /// True if no request is between arrival and answer.
    pub fn is_idle(&self) -> bool {
        self.in_flight.available_permits() == self.max_in_flight
    }

    /// Requests between arrival and answer.
    pub fn in_flight(&self) -> usize {
        self.max_in_flight - self.in_flight.available_permits()
    }

    /// Most of them.
    pub fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }

    /// True if no request is under way, none is coming, and no stream is open.
    pub fn is_quiet(&self) -> bool {
        self.is_idle() && self.open.is_none()
    }

    /// The smaller of what the client asks for and the server's limit, less a little: the answer that the
    /// deadline passed must leave before the transport cuts the call (which it reports as CANCELLED).
    pub fn budget(&self, asked: Option<Duration>) -> Duration {
        let budget = asked.map_or(self.max_deadline, |a| a.min(self.max_deadline));
        budget.saturating_sub((budget / 10).min(DEADLINE_MARGIN))
    }

    /// From a request's number, 1 being the most urgent; 0 or none is the middle. A tenant has no more urgent one than it may ask for.
    ///
    /// # Errors
    /// [`ServerError::Invalid`] above the levels there are.
    pub fn priority(&self, asked: u64, tenant: &Tenant) -> Result<u8, ServerError> {
        let levels = self.priority_levels;
        let middle = levels / 2;
        let above = || ServerError::Invalid(format!("priority {asked}: 1, the most urgent, to {levels}, or 0 for the middle"));
        let wanted = if asked == 0 { middle } else { u8::try_from(asked - 1).ok().filter(|p| *p < levels).ok_or_else(above)? };
        Ok(wanted.max(tenant.most_urgent.map_or(middle, |most| most.saturating_sub(1)).min(levels - 1)))
    }

    /// Places for `n` requests of a tenant that come together: for all or for none.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if there are none, within its quotas or at all.
    pub fn enter(&self, tenant: &Tenant, n: usize) -> Result<Places, ServerError> {
        // as many as the tenants have together: it counts
        let places = self.in_flight.clone().try_acquire_many_owned(u32::try_from(n).unwrap_or(u32::MAX));
        let places = places.map_err(|_| ServerError::busy("too many requests in flight"))?;
        Ok(Places { _tenants: tenant.enter(n)?, _all: places, _counted: InFlight::enter(n) })
    }

    /// Whether `n` photos like this one that come together could all be answered in time: if not, none needs to be begun.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if not, [`ServerError::UnknownModel`].
    pub fn would_admit(&self, ask: &Ask<'_>, n: usize) -> Result<(), ServerError> {
        let registry = self.repository.current();
        let entry = registry.model(ask.model, ask.version)?;
        entry.batcher.would_admit(entry.likely_stage(ask.kind), n, ask.arrived + ask.budget, ask.priority, ask.tenant)
    }

    /// One photo, with metrics. It takes a place for itself unless it comes with others that have theirs ([`Self::enter`]); the request's caller
    /// notes it in the model's statistics.
    ///
    /// # Errors
    /// Why there is no answer.
    #[tracing::instrument(level = "debug", skip_all, fields(model = %ask.model, kind, queue_ms, network_ms, batch_size))]
    pub async fn infer(&self, ask: Ask<'_>, entered: Option<&Places>) -> Result<Answer, ServerError> {
        let (kind, bytes, arrived) = (ask.kind, ask.payload.len(), ask.arrived);
        let tenant = ask.tenant;
        let result = self.admit(ask, entered).await;
        let span = tracing::Span::current();
        span.record("kind", kind.label());
        if let Ok(Answer { times, .. }) = &result {
            span.record("queue_ms", 1e3 * times.queue.as_secs_f64()).record("network_ms", 1e3 * times.network.as_secs_f64());
            span.record("batch_size", times.batch_size);
        }
        telemetry::tenant(&tenant.name, result.as_ref().err());
        telemetry::answered(kind, bytes, arrived.elapsed(), result.as_ref().err());
        if let Err(error) = &result {
            tracing::debug!(%error, kind = kind.label(), bytes, "request failed");
        }
        result
    }

    async fn admit(&self, ask: Ask<'_>, entered: Option<&Places>) -> Result<Answer, ServerError> {
        let place = entered.is_none().then(|| self.enter(ask.tenant, 1)).transpose()?;
        let registry = self.repository.current();
        let entry = registry.model(ask.model, ask.version)?.clone();
        let deadline = ask.arrived + ask.budget;
        let size = self.intake.size(ask.kind, &ask.payload).inspect_err(|error| {
            telemetry::model(entry.name, Some(error));
        })?;
        let decoding = self.intake.expected(ask.kind, size);
        let admitted = entry.batcher.admit(entry.likely_stage(ask.kind), (deadline, decoding), ask.priority, ask.tenant);
        let admitted = admitted.inspect_err(|error| telemetry::model(entry.name, Some(error)))?;
        let answer = self.compute((ask, size), &registry, &entry, admitted, deadline).await;
        telemetry::model(entry.name, answer.as_ref().err());
        if let Ok(answer) = &answer {
            self.latencies.record(answer.times.total, Instant::now());
        }
        answer.map(|answer| Answer { place, ..answer })
    }

    async fn compute(
        &self,
        (ask, size): (Ask<'_>, u64),
        registry: &Arc<Registry>,
        entry: &Arc<Entry>,
        admitted: Admitted<'_>,
        deadline: Instant,
    ) -> Result<Answer, ServerError> {
        let ready = self.intake.decode(registry, entry, ask.kind, (ask.payload, size), (deadline, ask.tenant)).await?;
        if Instant::now() >= deadline {
            return Err(ServerError::Deadline("being decoded"));
        }
        let pending = entry.batcher.submit(ready.stage, ready.input, deadline, ask.priority, ask.tenant)?;
        drop(admitted);
        let computed = pending.answer(deadline).await?;
        let queue = ready.waited + computed.waited;
        telemetry::queued(entry.name, queue);
        let times =
            Times { decode: ready.took, queue, network: computed.network, batch_size: computed.batch_size, total: ask.arrived.elapsed() };
        Ok(Answer { entry: entry.clone(), labels: registry.labels.clone(), logits: computed.logits, times, place: None })
    }
}

/// The client's time limit from the `grpc-timeout` header (digits and a unit H, M, S, m, u or n).
pub fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        let parse = |text: &str| {
            let mut m = MetadataMap::new();
            m.insert("grpc-timeout", text.parse().unwrap());
            grpc_timeout(&m)
        };
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("3S"), Some(Duration::from_secs(3)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "12", "-3S", "123456789S", "1x"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
