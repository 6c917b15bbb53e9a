//! `isthmus.offload.v1.OffloadService`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use isthmus_codec::BundleHash;
use isthmus_proto::offload_v1::infer_request::Payload;
use isthmus_proto::offload_v1::infer_stream_response::Result as Outcome;
use isthmus_proto::offload_v1::offload_service_server::OffloadService;
use isthmus_proto::offload_v1::{
    Bundle as WireBundle, DescribeRequest, DescribeResponse, InferError, InferRequest, InferResponse, InferStreamResponse,
    Model as WireModel, Timing,
};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::batcher::Computed;
use crate::features::FeatureMap;
use crate::intake::Intake;
use crate::registry::{Entry, Registry};
use crate::telemetry::{self, InFlight, Kind};
use crate::{Config, ServerError};

const DEFAULT_TOP_K: u32 = 5;
const DEADLINE_MARGIN: Duration = Duration::from_millis(5);

/// The service; clones share everything.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    registry: Arc<Registry>,
    intake: Intake,
    in_flight: Arc<Semaphore>,
    max_in_flight: usize,
    streams: Arc<Semaphore>,
    draining: CancellationToken,
    window: usize,
    max_deadline: Duration,
    stream_idle: Duration,
}

impl Service {
    /// `draining` stops new work; what is in flight goes on.
    pub fn new(registry: Registry, config: &Config, draining: CancellationToken) -> Self {
        let shared = Shared {
            registry: Arc::new(registry),
            intake: Intake::new(config.decode_workers()),
            in_flight: Arc::new(Semaphore::new(config.max_in_flight)),
            max_in_flight: config.max_in_flight,
            streams: Arc::new(Semaphore::new(config.max_streams)),
            draining,
            window: config.stream_window,
            max_deadline: config.max_deadline,
            stream_idle: config.stream_idle,
        };
        Self { shared: Arc::new(shared) }
    }

    /// True if no request is between arrival and answer.
    pub fn is_idle(&self) -> bool {
        self.shared.in_flight.available_permits() == self.shared.max_in_flight
    }
}

impl Shared {
    /// One request, with metrics.
    #[tracing::instrument(level = "debug", skip_all, fields(id = request.id, model = %request.model))]
    async fn infer(&self, request: InferRequest, arrived: Instant, budget: Duration) -> Result<InferResponse, ServerError> {
        let (kind, payload) = match request.payload {
            Some(Payload::Bitstream(b)) => (Kind::Bitstream, b),
            Some(Payload::Image(b)) => (Kind::Image, b),
            Some(Payload::Features(f)) => (Kind::Features(FeatureMap { block: f.block, encoding: f.encoding }), f.data),
            None => {
                let error = ServerError::Invalid("the request has no payload: set bitstream, image or features".into());
                telemetry::answered(Kind::Bitstream, 0, arrived.elapsed(), Some(&error));
                return Err(error);
            }
        };
        let bytes = payload.len();
        let ask = Ask { id: request.id, model: request.model, top_k: request.top_k, logits: request.logits };
        let result = self.compute(ask, kind, payload, arrived, arrived + budget).await;
        telemetry::answered(kind, bytes, arrived.elapsed(), result.as_ref().err());
        if let Err(error) = &result {
            tracing::debug!(%error, kind = kind.label(), bytes, "request failed");
        }
        result
    }

    async fn compute(
        &self,
        ask: Ask,
        kind: Kind,
        payload: Bytes,
        arrived: Instant,
        deadline: Instant,
    ) -> Result<InferResponse, ServerError> {
        if self.draining.is_cancelled() {
            return Err(ServerError::Draining);
        }
        let _place = self.in_flight.try_acquire().map_err(|_| ServerError::Busy("too many requests in flight"))?;
        let _counted = InFlight::enter();
        let entry = self.registry.model(&ask.model)?;
        let admitted = entry.admission.enter(deadline.saturating_duration_since(Instant::now()))?;
        let answer = self.answer(ask, entry, kind, payload, arrived, deadline).await;
        match answer {
            Err(ServerError::Busy(_) | ServerError::Draining) => {}
            Err(ServerError::Deadline(_)) => admitted.leave(false),
            _ => admitted.leave(true),
        }
        answer
    }

    async fn answer(
        &self,
        ask: Ask,
        entry: &Entry,
        kind: Kind,
        payload: Bytes,
        arrived: Instant,
        deadline: Instant,
    ) -> Result<InferResponse, ServerError> {
        let ready = self.intake.decode(&self.registry, &ask.model, kind, payload, deadline).await?;
        if Instant::now() >= deadline {
            return Err(ServerError::Deadline("being decoded"));
        }
        let answer = entry.batcher.submit(ready.stage, ready.input, deadline)?;
        let answer = tokio::time::timeout_at(deadline.into(), answer).await;
        let answer = answer.map_err(|_| ServerError::Deadline("waiting for the network"))?;
        let computed: Computed = answer.map_err(|_| ServerError::Draining)??;
        let queue = ready.waited + computed.waited;
        telemetry::queued(queue);
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let timing = Timing {
            decode_us: micros(ready.took),
            queue_us: micros(queue),
            network_us: micros(computed.network),
            batch_size: computed.batch_size as u32,
            total_us: micros(arrived.elapsed()),
        };
        let top_k = if ask.top_k == 0 { DEFAULT_TOP_K } else { ask.top_k };
        let labels = isthmus_proto::best(&computed.logits, top_k as usize, &self.registry.labels);
        let logits = if ask.logits { computed.logits } else { Vec::new() };
        Ok(InferResponse { id: ask.id, model: entry.name.into(), labels, logits, timing: Some(timing) })
    }

    /// The smaller of what the client asks for and the server's limit, less a little: the answer that the
    /// deadline passed must leave before the transport cuts the call (which it reports as CANCELLED).
    fn budget(&self, asked: Option<Duration>) -> Duration {
        let budget = asked.map_or(self.max_deadline, |a| a.min(self.max_deadline));
        budget.saturating_sub((budget / 10).min(DEADLINE_MARGIN))
    }
}

struct Ask {
    id: u64,
    model: String,
    top_k: u32,
    logits: bool,
}

/// The client's time limit from the `grpc-timeout` header (digits and a unit H, M, S, m, u or n).
fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
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

#[tonic::async_trait]
impl OffloadService for Service {
    async fn describe(&self, request: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let registry = &self.shared.registry;
        let wanted = request.into_inner().bundle_hash;
        if !wanted.is_empty() {
            let hash: [u8; 32] = wanted.as_ref().try_into().map_err(|_| ServerError::Invalid("bundle_hash: 32 bytes are needed".into()))?;
            if !registry.bundles.iter().any(|b| b.hash == BundleHash(hash)) {
                return Err(ServerError::UnknownBundle(isthmus_codec::bundle::hex(&hash)).into());
            }
        }
        let models = registry.models.iter().map(|m| WireModel {
            name: m.name.into(),
            input_size: m.input_size,
            classes: registry.labels.len() as u32,
            device: m.device.clone(),
            bundles: registry
                .bundles
                .iter()
                .filter(|b| m.stage(&b.hash).is_some())
                .map(|b| WireBundle {
                    name: b.manifest.name.clone(),
                    version: b.manifest.version.clone(),
                    hash: Bytes::copy_from_slice(&b.hash.0),
                    quality_levels: b.levels().into(),
                })
                .collect(),
        });
        Ok(Response::new(DescribeResponse { version: env!("CARGO_PKG_VERSION").into(), models: models.collect() }))
    }

    async fn infer(&self, request: Request<InferRequest>) -> Result<Response<InferResponse>, Status> {
        let arrived = Instant::now();
        let budget = self.shared.budget(grpc_timeout(request.metadata()));
        Ok(Response::new(self.shared.infer(request.into_inner(), arrived, budget).await?))
    }

    type InferStreamStream = Answers;

    async fn infer_stream(&self, request: Request<Streaming<InferRequest>>) -> Result<Response<Self::InferStreamStream>, Status> {
        let place = self.shared.streams.clone().try_acquire_owned();
        let place = place.map_err(|_| ServerError::Busy("too many streams are open"))?;
        let (answers, outgoing) = mpsc::channel(self.shared.window);
        let shared = self.shared.clone();
        // a place of its own for the status that ends the stream: the channel may be full
        let (last, ending) = oneshot::channel();
        tokio::spawn(async move {
            if let Some(status) = pump(shared, request.into_inner(), answers).await {
                let _ = last.send(Err(status));
            }
            drop(place);
        });
        let ending = futures_util::stream::once(ending).filter_map(|last| std::future::ready(last.ok()));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing).chain(ending))))
    }
}

/// The answers of a stream, and the status that ends it.
type Answers = Pin<Box<dyn Stream<Item = Result<InferStreamResponse, Status>> + Send>>;

/// Reads requests while the window has room and answers each as it is ready. The stream ends with the client's
/// half-close; with DEADLINE_EXCEEDED if nothing moves for too long, UNAVAILABLE when the server drains, or the
/// transport's status for an unreadable message, after what is under way has been answered; with DEADLINE_EXCEEDED
/// if the client does not read its answers. Dropping the set of tasks cancels what is under way.
async fn pump(
    shared: Arc<Shared>,
    mut requests: Streaming<InferRequest>,
    answers: mpsc::Sender<Result<InferStreamResponse, Status>>,
) -> Option<Status> {
    let mut tasks: JoinSet<Result<(), ()>> = JoinSet::new();
    let mut ending: Option<Result<(), Status>> = None;
    while ending.is_none() || !tasks.is_empty() {
        let open = ending.is_none();
        let room = open && tasks.len() < shared.window;
        tokio::select! {
            () = answers.closed() => return None,
            () = shared.draining.cancelled(), if open => ending = Some(Err(ServerError::Draining.into())),
            done = tasks.join_next(), if !tasks.is_empty() => {
                if !matches!(done, Some(Ok(Ok(())))) {
                    return Some(ServerError::Deadline("waiting to be read by the client").into());
                }
            }
            message = tokio::time::timeout(shared.stream_idle, requests.message()), if room => match message {
                Ok(Ok(Some(request))) => {
                    let (shared, answers) = (shared.clone(), answers.clone());
                    tasks.spawn(answer(shared, request, answers));
                }
                Ok(Ok(None)) => ending = Some(Ok(())),
                Ok(Err(status)) => ending = Some(Err(status)),
                Err(_) if tasks.is_empty() => ending = Some(Err(ServerError::Deadline("awaited: the stream was idle").into())),
                Err(_) => {}
            },
        }
    }
    ending.and_then(Result::err)
}

async fn answer(shared: Arc<Shared>, request: InferRequest, answers: mpsc::Sender<Result<InferStreamResponse, Status>>) -> Result<(), ()> {
    let id = request.id;
    let asked = (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms.into()));
    let budget = shared.budget(asked);
    let result = match shared.infer(request, Instant::now(), budget).await {
        Ok(response) => Outcome::Response(response),
        Err(error) => Outcome::Error(InferError { id, code: error.code() as i32, message: error.to_string() }),
    };
    let message = InferStreamResponse { result: Some(result) };
    let sent = tokio::time::timeout(shared.stream_idle, answers.send(Ok(message))).await;
    sent.map_err(|_| ())?.map_err(|_| ())
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
