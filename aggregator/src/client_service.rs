//! What party 0 answers clients. Reports are checked before their bodies are read, and bodies are as large as the round's, no more.

use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use isthmus_federate::participant::CHUNK_BYTES;
use isthmus_federate::round::fixed;
use isthmus_proto::aggregator_v1::client_service_server::ClientService;
use isthmus_proto::aggregator_v1::report_status::Stage;
use isthmus_proto::aggregator_v1::{
    GetModelRequest, GetReportStatusRequest, GetRoundConfigRequest, GetRoundConfigResponse, ModelChunk, ReportStatus, UploadChunk,
    model_chunk, upload_chunk,
};
use tokio::sync::Semaphore;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::error::AggregatorError;
use crate::party::{Cell, Party};
use crate::round::Phase;
use crate::store::ReportId;
use crate::telemetry;

/// When a client asks again if no round is open.
const RETRY_MS: u64 = 1000;
/// Waiting for the other parties to store a report before the answer says that they have not yet.
const COMPLETE_LIMIT: Duration = Duration::from_secs(5);
const KIB: usize = 1024;
/// Models that are sent at once: each keeps its bytes until it is through.
const MOST_DOWNLOADS: usize = 64;

/// The service.
#[derive(Clone)]
pub struct Clients {
    party: Arc<Party>,
    /// KiB of bodies that may be received at once.
    room: Arc<Semaphore>,
    /// Models that are being sent.
    downloads: Arc<Semaphore>,
    rates: Arc<DefaultKeyedRateLimiter<[u8; 32]>>,
}

impl Clients {
    /// For party 0.
    pub fn new(party: Arc<Party>) -> Self {
        let room = Arc::new(Semaphore::new(party.config.max_upload_bytes / KIB));
        let per_minute = NonZeroU32::new(party.config.uploads_per_minute).unwrap_or(NonZeroU32::MIN);
        Self {
            party,
            room,
            downloads: Arc::new(Semaphore::new(MOST_DOWNLOADS)),
            rates: Arc::new(RateLimiter::keyed(Quota::per_minute(per_minute))),
        }
    }

    async fn next(&self, parts: &mut Streaming<UploadChunk>) -> Result<Option<upload_chunk::Part>, AggregatorError> {
        let part = tokio::time::timeout(self.party.config.upload_idle, parts.message()).await;
        let part = part.map_err(|_| AggregatorError::Deadline("waiting for the rest of the report"))?;
        Ok(part.map_err(|s| AggregatorError::Invalid(format!("the upload ended: {}", s.message())))?.and_then(|c| c.part))
    }

    async fn upload(&self, mut parts: Streaming<UploadChunk>) -> Result<ReportStatus, AggregatorError> {
        let Some(upload_chunk::Part::Header(header)) = self.next(&mut parts).await? else {
            return Err(AggregatorError::Invalid("an upload begins with its header".into()));
        };
        let cell = self.party.cell(header.round)?;
        let id = self.party.check_header(&cell, &header)?;
        if self.rates.check_key(&id.client).is_err() {
            return Err(AggregatorError::Busy("the client begins too many uploads"));
        }
        if self.rates.len() > 2 * cell.plan.config().max_clients as usize {
            self.rates.retain_recent();
        }
        let expected = cell.plan.body_bytes();
        let permits = u32::try_from(expected.div_ceil(KIB)).map_err(|_| AggregatorError::Invalid("the body is too large".into()))?;
        let _room = self.room.try_acquire_many(permits).map_err(|_| AggregatorError::Busy("too many uploads are under way"))?;
        let mut body = BytesMut::new();
        while let Some(part) = self.next(&mut parts).await? {
            let upload_chunk::Part::Body(part) = part else {
                return Err(AggregatorError::Invalid("an upload has one header".into()));
            };
            if body.len() + part.len() > expected {
                return Err(AggregatorError::Invalid(format!("the body has more than the {expected} bytes of this round's")));
            }
            body.reserve(expected - body.len());
            body.extend_from_slice(&part);
        }
        telemetry::body_bytes(body.len());
        self.party.add_report(&cell, &id, &header, body.freeze()).await?;
        Ok(self.when_complete(&cell, id.report).await)
    }

    /// The report's status, once all parties have it or soon after.
    async fn when_complete(&self, cell: &Cell, id: ReportId) -> ReportStatus {
        let complete = async {
            loop {
                let forwarded = cell.forwarded.notified();
                if cell.is_complete(&id) || cell.forwarding().refused.contains(&id) {
                    return;
                }
                forwarded.await;
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(COMPLETE_LIMIT, complete) => {}
            () = cell.until(|r| r.phase > Phase::Sealing) => {}
        }
        let stage = if cell.is_complete(&id) { Stage::Complete } else { Stage::Received };
        ReportStatus { stage: stage.into(), round_state: cell.record().phase.wire().into() }
    }

    async fn status(&self, request: GetReportStatusRequest) -> Result<ReportStatus, AggregatorError> {
        let cell = self.party.cell(request.round)?;
        let id: ReportId = fixed("report", &request.report)?;
        let phase = cell.record().phase;
        let sealed = matches!(phase, Phase::Computing | Phase::Revealing | Phase::Done);
        let stage = if sealed {
            let set = self.party.store.set(request.round).await?;
            if set.binary_search(&id).is_ok() { Stage::Counted } else { Stage::LeftOut }
        } else if phase == Phase::Aborted {
            Stage::LeftOut
        } else if self.party.store.header(request.round, id).await?.is_none() {
            return Err(AggregatorError::NotFound(format!("report {} of round {} is not known here", hex::encode(id), request.round)));
        } else if cell.is_complete(&id) {
            Stage::Complete
        } else {
            Stage::Received
        };
        Ok(ReportStatus { stage: stage.into(), round_state: phase.wire().into() })
    }
}

#[tonic::async_trait]
impl ClientService for Clients {
    async fn get_round_config(&self, request: Request<GetRoundConfigRequest>) -> Result<Response<GetRoundConfigResponse>, Status> {
        let client = fixed("client", &request.into_inner().client).map_err(AggregatorError::from)?;
        let now = self.party.now_ms();
        let open = |c: &Arc<Cell>| c.record().phase == Phase::Open && c.plan.config().upload_until_ms > now && c.plan.admits(&client);
        let found = self.party.cells().into_iter().rev().find(open);
        let config = found.map(|c| Bytes::copy_from_slice(c.plan.bytes())).unwrap_or_default();
        Ok(Response::new(GetRoundConfigResponse { config, retry_ms: RETRY_MS }))
    }

    type GetModelStream = Pin<Box<dyn Stream<Item = Result<ModelChunk, Status>> + Send>>;

    async fn get_model(&self, request: Request<GetModelRequest>) -> Result<Response<Self::GetModelStream>, Status> {
        let request = request.into_inner();
        let place = self.downloads.clone().try_acquire_owned().map_err(|_| AggregatorError::Busy("too many models are being fetched"))?;
        let data = self.party.store.model(&request.name, request.version).await?;
        let data = data
            .ok_or_else(|| AggregatorError::NotFound(format!("model {:?} version {} is not known here", request.name, request.version)))?;
        let parts = (0..data.len()).step_by(CHUNK_BYTES).map(move |at| {
            let _held = &place;
            let part = data.slice(at..data.len().min(at + CHUNK_BYTES));
            Ok(ModelChunk { part: Some(model_chunk::Part::Data(part)) })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn upload_report(&self, request: Request<Streaming<UploadChunk>>) -> Result<Response<ReportStatus>, Status> {
        let stored = self.upload(request.into_inner()).await;
        if let Err(error) = &stored {
            telemetry::report_refused(error);
        }
        Ok(Response::new(stored?))
    }

    async fn get_report_status(&self, request: Request<GetReportStatusRequest>) -> Result<Response<ReportStatus>, Status> {
        Ok(Response::new(self.status(request.into_inner()).await?))
    }
}
