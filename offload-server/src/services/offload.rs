//! `isthmus.offload.v1.OffloadService`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_codec::BundleHash;
use isthmus_proto::offload_v1::infer_request::Payload;
use isthmus_proto::offload_v1::infer_stream_response::Result as Outcome;
use isthmus_proto::offload_v1::offload_service_server::OffloadService;
use isthmus_proto::offload_v1::{
    Bundle as WireBundle, DescribeRequest, DescribeResponse, InferError, InferRequest, InferResponse, InferStreamResponse,
    Model as WireModel, Timing,
};
use tonic::{Request, Response, Status, Streaming};

use super::progressive::{self, Beginnings};
use super::stream::{self, Answers};
use crate::ServerError;
use crate::answering::Kept;
use crate::features::FeatureMap;
use crate::pipeline::{Ask, Pipeline, Places, grpc_timeout};
use crate::receiving;
use crate::telemetry::{self, Kind};
use crate::tenants::{self, Tenant};

const DEFAULT_TOP_K: u32 = 5;

/// The service; clones share everything.
#[derive(Clone)]
pub struct Offload(pub Arc<Pipeline>);

async fn infer(
    pipeline: &Pipeline,
    request: InferRequest,
    arrived: Instant,
    budget: Duration,
    tenant: &Tenant,
    beginnings: Option<&Beginnings>,
) -> Result<(InferResponse, Option<Places>), ServerError> {
    let refused = |error: ServerError| {
        telemetry::refused(&error, Some(tenant));
        error
    };
    // so much of the bitstream had come before
    let mut before = 0;
    if !(0.0..=1.0).contains(&request.certainty) {
        return Err(refused(ServerError::Invalid(format!("certainty {}: a probability from 0 to 1", request.certainty))));
    }
    let (kind, payload) = match request.payload {
        Some(Payload::Bitstream(b)) => (Kind::Bitstream, b),
        Some(Payload::Refinement(part)) => {
            let beginnings = beginnings.ok_or_else(|| ServerError::Invalid("refinements need InferStream".into()));
            let whole = beginnings.and_then(|b| b.refined(request.id, &part)).map_err(refused)?;
            before = whole.len() - part.len();
            (Kind::Bitstream, whole)
        }
        Some(Payload::Image(b)) => (Kind::Image, b),
        Some(Payload::Features(f)) => (Kind::Features(FeatureMap { block: f.block, encoding: f.encoding }), f.data),
        None => {
            return Err(refused(ServerError::Invalid("the request has no payload: set bitstream, image or features".into())));
        }
    };
    let registry = pipeline.repository.current();
    let begun = beginnings.filter(|_| kind == Kind::Bitstream).map(|b| (b, payload.clone()));
    let answer = pipeline
        .infer(
            Ask { model: &request.model, version: "", kind, payload, arrived, budget, priority: pipeline.priority(0, tenant)?, tenant },
            None,
        )
        .await
        .inspect_err(|error| {
            // who may try again later needs what the refinement refines
            if let Some((beginnings, bitstream)) = begun.as_ref().filter(|_| before > 0 && error.retry_pushback_ms() > 0) {
                beginnings.keep(request.id, &bitstream[..before]);
            }
            let asked = registry.model(&request.model, "");
            asked.into_iter().for_each(|entry| entry.statistics.failed(arrived.elapsed()));
        })?;
    answer.entry.statistics.answered(&answer.times);
    let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    let timing = Timing {
        decode_us: micros(answer.times.decode),
        queue_us: micros(answer.times.queue),
        network_us: micros(answer.times.network),
        batch_size: answer.times.batch_size as u32,
        total_us: micros(answer.times.total),
    };
    let top_k = if request.top_k == 0 { DEFAULT_TOP_K } else { request.top_k };
    let labels = isthmus_proto::best(&answer.logits, top_k as usize, &answer.labels);
    let logits = if request.logits { answer.logits } else { Vec::new() };
    let uncertain = labels.first().is_some_and(|best| best.score < request.certainty);
    let begun = begun.filter(|(_, bitstream)| uncertain && progressive::can_be_refined(&registry, bitstream));
    let wants_more = begun.is_some_and(|(beginnings, bitstream)| beginnings.keep(request.id, &bitstream));
    let response = InferResponse { id: request.id, model: answer.entry.name.into(), labels, logits, timing: Some(timing), wants_more };
    Ok((response, answer.place))
}

#[tonic::async_trait]
impl OffloadService for Offload {
    async fn describe(&self, request: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let registry = self.0.repository.current();
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
            device: m.device(),
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
        let budget = self.0.budget(grpc_timeout(request.metadata()));
        let (tenant, _held) = (tenants::of(&request)?, receiving::of(&request));
        let (response, place) = infer(&self.0, request.into_inner(), arrived, budget, &tenant, None).await?;
        Ok(Kept::beside(response, place))
    }

    type InferStreamStream = Answers<InferStreamResponse>;

    async fn infer_stream(&self, request: Request<Streaming<InferRequest>>) -> Result<Response<Self::InferStreamStream>, Status> {
        let tenant = tenants::of(&request)?;
        let asking = (self.0.clone(), tenant.clone(), Arc::new(Beginnings::default()));
        let answer = move |request: InferRequest| {
            let (pipeline, tenant, beginnings) = asking.clone();
            let arrived = Instant::now();
            async move {
                let id = request.id;
                let asked = (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms.into()));
                let (result, place) = match infer(&pipeline, request, arrived, pipeline.budget(asked), &tenant, Some(&beginnings)).await {
                    Ok((response, place)) => (Outcome::Response(response), place),
                    Err(error) => {
                        let (code, retry_pushback_ms) = (error.code() as i32, error.retry_pushback_ms());
                        (Outcome::Error(InferError { id, code, message: error.to_string(), retry_pushback_ms }), None)
                    }
                };
                (InferStreamResponse { result: Some(result) }, place)
            }
        };
        Ok(Response::new(stream::serve((&self.0, &tenant), request.into_inner(), answer)?))
    }
}
