//! What party 0 answers operators.

use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use isthmus_federate::RoundPlan;
use isthmus_federate::participant::{CHUNK_BYTES, MAX_MODEL_BYTES};
use isthmus_federate::round::{VERSION, direction_hash, fixed};
use isthmus_proto::aggregator_v1::round_service_server::RoundService;
use isthmus_proto::aggregator_v1::{
    AbortRoundRequest, CreateRoundRequest, Filter, ListRoundsRequest, ListRoundsResponse, Mode, Model, ModelChunk, NoteScoreRequest,
    ResultChunk, Round, RoundConfig, RoundRequest, WatchRoundsRequest, model_chunk, result_chunk,
};
use isthmus_secagg::report::hash;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::compute::attempt;
use crate::error::AggregatorError;
use crate::keys::{from_hex, random_seed};
use crate::party::Party;
use crate::round::Record;

/// Longest time a round may take, in milliseconds.
const LONGEST_MS: u64 = 7 * 24 * 3600 * 1000;

/// The service.
#[derive(Clone)]
pub struct Operators(pub Arc<Party>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Operators {
    /// The token is compared by its hash.
    fn authorise<T>(&self, request: &Request<T>) -> Result<(), AggregatorError> {
        let presented = request.metadata().get("authorization").and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
        let presented = presented.map(|token| hash(&[token.as_bytes()]));
        let known = self.0.config.operators.iter().filter_map(|h| from_hex::<32>("operators", h).ok());
        if known.map(Some).any(|h| h == presented) {
            return Ok(());
        }
        Err(AggregatorError::Unauthenticated(if presented.is_some() {
            "the token is not one of this party's `operators`"
        } else {
            "operators need a token: authorization: Bearer TOKEN"
        }))
    }

    async fn create(&self, request: CreateRoundRequest) -> Result<Round, AggregatorError> {
        let party = &self.0;
        if request.upload_ms == 0 || request.compute_ms == 0 || request.upload_ms.max(request.compute_ms) > LONGEST_MS {
            return Err(AggregatorError::Invalid("upload_ms and compute_ms: more than nothing, at most a week".into()));
        }
        let now = party.now_ms();
        let parties = if request.mode() == Mode::Additive2 { 2 } else { 3 };
        let keys = party.parties.iter().take(parties).map(|p| p.key().map(|k| Bytes::copy_from_slice(&k)));
        let authorities = party.authorities.iter().map(|k| Bytes::copy_from_slice(k)).collect();
        let upload_until_ms = now + request.upload_ms;
        let mut config = RoundConfig {
            version: VERSION,
            task: party.task.to_vec().into(),
            round: party.cells().last().map_or(1, |c| c.plan.round() + 1),
            mode: request.mode,
            dim: request.dim,
            transform: request.transform,
            norm: request.norm,
            rotation: random_seed()?.to_vec().into(),
            extra_bits: request.extra_bits,
            min_clients: request.min_clients,
            max_clients: request.max_clients,
            upload_until_ms,
            compute_until_ms: upload_until_ms + request.compute_ms,
            envelope_keys: keys.collect::<Result<_, _>>()?,
            authorities,
            sampling_below: request.sampling_below,
            training: request.training,
            model: request.model,
            filter: None,
        };
        if let Some(filter) = request.filter {
            let plan = RoundPlan::encode(&config)?;
            let direction = attempt::reference(party, &plan, filter.reference_round).await?;
            config.filter = Some(Filter { direction_hash: direction_hash(&direction).to_vec().into(), ..filter });
        }
        if let Some(model) = &config.model
            && party.store.model(&model.name, model.version).await?.is_none()
        {
            return Err(AggregatorError::NotFound(format!("model {:?} version {} was not published", model.name, model.version)));
        }
        let plan = RoundPlan::encode(&config)?;
        let target = if request.target_clients == 0 { request.max_clients } else { request.target_clients };
        if target < request.min_clients || target > request.max_clients {
            return Err(AggregatorError::Invalid(format!("target_clients {target} is not between min_clients and max_clients")));
        }
        let record = Record::new(plan.round(), target, now);
        Ok(party.add_round(plan, record).await?.round())
    }

    async fn publish(&self, mut parts: Streaming<ModelChunk>) -> Result<Model, AggregatorError> {
        let party = &self.0;
        let next = async |parts: &mut Streaming<ModelChunk>| {
            let part = tokio::time::timeout(party.config.upload_idle, parts.message()).await;
            let part = part.map_err(|_| AggregatorError::Deadline("waiting for the rest of the model"))?;
            Ok::<_, AggregatorError>(part.map_err(|s| AggregatorError::Invalid(s.message().into()))?.and_then(|c| c.part))
        };
        let Some(model_chunk::Part::Model(model)) = next(&mut parts).await? else {
            return Err(AggregatorError::Invalid("the first message names the model".into()));
        };
        if model.size > MAX_MODEL_BYTES || model.name.is_empty() || model.name.len() > 100 {
            return Err(AggregatorError::Invalid(format!("a model has a name of 1 to 100 bytes and at most {MAX_MODEL_BYTES} bytes")));
        }
        let wanted: [u8; 32] = fixed("sha256", &model.sha256)?;
        let mut data = BytesMut::new();
        while let Some(part) = next(&mut parts).await? {
            let model_chunk::Part::Data(part) = part else { return Err(AggregatorError::Invalid("a model is named once".into())) };
            if data.len() + part.len() > model.size as usize {
                return Err(AggregatorError::Invalid(format!("the model is larger than the {} bytes announced", model.size)));
            }
            data.extend_from_slice(&part);
        }
        if hash(&[&data]) != wanted {
            return Err(AggregatorError::Invalid("the model's hash is not the one announced".into()));
        }
        if let Some(earlier) = party.store.model(&model.name, model.version).await?
            && earlier != data
        {
            return Err(AggregatorError::Conflict("another model of this name and version was published"));
        }
        party.store.put_model(model.clone(), data.freeze()).await?;
        Ok(model)
    }

    async fn result(&self, round: u64) -> Result<Vec<ResultChunk>, AggregatorError> {
        let cell = self.0.cell(round)?;
        let outcome = self.0.store.outcome(round).await?.ok_or_else(|| cell.record().wrong("done"))?;
        let mut chunks = vec![ResultChunk { part: Some(result_chunk::Part::Round(cell.round())) }];
        let parts = (0..outcome.counts.len()).step_by(CHUNK_BYTES);
        chunks.extend(parts.map(|at| {
            let part = outcome.counts.slice(at..outcome.counts.len().min(at + CHUNK_BYTES));
            ResultChunk { part: Some(result_chunk::Part::Counts(part)) }
        }));
        if !outcome.flags.is_empty() {
            chunks.push(ResultChunk { part: Some(result_chunk::Part::KeptFlags(outcome.flags)) });
        }
        Ok(chunks)
    }
}

#[tonic::async_trait]
impl RoundService for Operators {
    async fn create_round(&self, request: Request<CreateRoundRequest>) -> Result<Response<Round>, Status> {
        self.authorise(&request)?;
        Ok(Response::new(self.create(request.into_inner()).await?))
    }

    async fn seal_round(&self, request: Request<RoundRequest>) -> Result<Response<Round>, Status> {
        self.authorise(&request)?;
        let cell = self.0.cell(request.into_inner().round)?;
        self.0.change(&cell, |record| record.seal().map(|()| None)).await?;
        Ok(Response::new(cell.round()))
    }

    async fn abort_round(&self, request: Request<AbortRoundRequest>) -> Result<Response<Round>, Status> {
        self.authorise(&request)?;
        let request = request.into_inner();
        let cell = self.0.cell(request.round)?;
        let reason = if request.reason.is_empty() { "by an operator" } else { &request.reason };
        self.0.abort(&cell, reason).await?;
        Ok(Response::new(cell.round()))
    }

    async fn note_score(&self, request: Request<NoteScoreRequest>) -> Result<Response<Round>, Status> {
        self.authorise(&request)?;
        let request = request.into_inner();
        if !(0.0..=1.0).contains(&request.score) {
            return Err(AggregatorError::Invalid(format!("a score is from 0 to 1, not {}", request.score)).into());
        }
        let cell = self.0.cell(request.round)?;
        let noted = self.0.change(&cell, |record| {
            record.score = Some(request.score);
            Ok(None)
        });
        noted.await?;
        Ok(Response::new(cell.round()))
    }

    async fn get_round(&self, request: Request<RoundRequest>) -> Result<Response<Round>, Status> {
        self.authorise(&request)?;
        Ok(Response::new(self.0.cell(request.into_inner().round)?.round()))
    }

    async fn list_rounds(&self, request: Request<ListRoundsRequest>) -> Result<Response<ListRoundsResponse>, Status> {
        self.authorise(&request)?;
        let from = request.into_inner().from;
        let rounds = self.0.cells().iter().filter(|c| c.plan.round() >= from).map(|c| c.round()).collect();
        Ok(Response::new(ListRoundsResponse { rounds }))
    }

    type GetResultStream = Answers<ResultChunk>;

    async fn get_result(&self, request: Request<RoundRequest>) -> Result<Response<Self::GetResultStream>, Status> {
        self.authorise(&request)?;
        let chunks = self.result(request.into_inner().round).await?;
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.into_iter().map(Ok)))))
    }

    type WatchRoundsStream = Answers<Round>;

    async fn watch_rounds(&self, request: Request<WatchRoundsRequest>) -> Result<Response<Self::WatchRoundsStream>, Status> {
        self.authorise(&request)?;
        let party = self.0.clone();
        let mut seen: std::collections::HashMap<u64, Round> = Default::default();
        let changes = tokio_stream::wrappers::WatchStream::new(party.changes.subscribe());
        let rounds = changes.flat_map(move |_| {
            let rounds: Vec<Round> = party.cells().iter().map(|c| c.round()).collect();
            let changed: Vec<Round> = rounds.into_iter().filter(|r| seen.insert(r.round, r.clone()).as_ref() != Some(r)).collect();
            tokio_stream::iter(changed.into_iter().map(Ok))
        });
        Ok(Response::new(Box::pin(rounds)))
    }

    async fn publish_model(&self, request: Request<Streaming<ModelChunk>>) -> Result<Response<Model>, Status> {
        self.authorise(&request)?;
        Ok(Response::new(self.publish(request.into_inner()).await?))
    }
}
