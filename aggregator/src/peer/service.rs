//! What a party answers the others. Who calls is known by its certificate; most calls are party 0's alone.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use isthmus_federate::RoundPlan;
use isthmus_federate::participant::CHUNK_BYTES;
use isthmus_proto::aggregator_v1::peer_service_server::PeerService;
use isthmus_proto::aggregator_v1::{
    AbortRoundRequest, CommitSetRequest, ForwardAnswer, ForwardedReport, GetOpeningRequest, LevelMessage, LevelsReceived, OpenRoundRequest,
    OpeningChunk, PeerRequest, PeerRound, ReportHeader, ReportSet, StartComputeRequest, level_message,
};
use isthmus_secagg::Seed;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::ids;
use crate::compute::attempt;
use crate::error::AggregatorError;
use crate::party::{Cell, Party};
use crate::round::{Phase, Record};
use crate::telemetry;

/// Reports that are checked and stored at once.
const AT_ONCE: usize = 64;
/// A neighbour may begin an attempt before this party knows of it.
const EARLY: Duration = Duration::from_secs(10);

/// The service.
#[derive(Clone)]
pub struct Peers(pub Arc<Party>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Peers {
    /// Which party calls.
    fn caller<T>(&self, request: &Request<T>) -> Result<u8, AggregatorError> {
        let known = || {
            let certificates = request.peer_certs()?;
            let presented = certificates.first()?.as_ref().to_vec();
            self.0.parties.iter().find(|p| p.certificate_der().is_ok_and(|d| d == presented)).map(|p| p.party)
        };
        known().ok_or(AggregatorError::Unauthenticated("the caller's certificate is no other party's"))
    }

    fn check_coordinator<T>(&self, request: &Request<T>) -> Result<(), AggregatorError> {
        if self.caller(request)? == 0 { Ok(()) } else { Err(AggregatorError::Unauthenticated("only party 0 may ask for this")) }
    }

    fn cell(&self, round: u64, config_hash: &[u8]) -> Result<Arc<Cell>, AggregatorError> {
        let cell = self.0.cell(round)?;
        if cell.plan.hash()[..] != *config_hash {
            return Err(AggregatorError::State(format!("round {round} has another configuration here")));
        }
        Ok(cell)
    }

    async fn store_forwarded(&self, round: u64, header: &ReportHeader, body: Bytes) -> Result<(), AggregatorError> {
        let cell = self.0.cell(round)?;
        let id = self.0.check_header(&cell, header)?;
        self.0.add_report(&cell, &id, header, body).await.map(drop)
    }

    async fn forwarded(self, round: u64, header: ReportHeader, body: Bytes) -> ForwardAnswer {
        let (code, message) = match self.store_forwarded(round, &header, body).await {
            Ok(()) => (0, String::new()),
            Err(error) => {
                telemetry::report_refused(&error);
                (error.code() as i32, error.to_string())
            }
        };
        ForwardAnswer { report: header.report, code, message }
    }

    /// Reports put together from their parts; a body never grows beyond its round's size.
    fn assembled(
        party: Arc<Party>,
        parts: Streaming<ForwardedReport>,
    ) -> impl Stream<Item = Result<(u64, ReportHeader, Bytes), Status>> + Send {
        futures_util::stream::unfold((party, parts, BytesMut::new()), |(party, mut parts, mut body)| async move {
            loop {
                let part = match parts.message().await {
                    Ok(Some(part)) => part,
                    Ok(None) => return None,
                    Err(status) => return Some((Err(status), (party, parts, body))),
                };
                let most = party.cell(part.round).map_or(0, |cell| cell.plan.body_bytes());
                if body.len() + part.body.len() > most {
                    return Some((Err(Status::invalid_argument("a body is larger than its round's")), (party, parts, body)));
                }
                body.extend_from_slice(&part.body);
                if let Some(header) = part.header {
                    let whole = body.split().freeze();
                    return Some((Ok((part.round, header, whole)), (party, parts, body)));
                }
            }
        })
    }
}

#[tonic::async_trait]
impl PeerService for Peers {
    async fn open_round(&self, request: Request<OpenRoundRequest>) -> Result<Response<PeerRound>, Status> {
        self.check_coordinator(&request)?;
        let plan = RoundPlan::decode(&request.into_inner().config).map_err(AggregatorError::from)?;
        // announced again after a lost answer or a restart of party 0
        let cell = match self.0.cell(plan.round()) {
            Ok(cell) if cell.plan.hash() == plan.hash() => cell,
            Ok(cell) => return Err(cell.record().wrong("of this configuration").into()),
            Err(_) => {
                let mut record = Record::new(plan.round(), 0, self.0.now_ms());
                record.phase = Phase::Open;
                self.0.add_round(plan, record).await?
            }
        };
        Ok(Response::new(cell.peer_round()))
    }

    type ForwardReportsStream = Answers<ForwardAnswer>;

    async fn forward_reports(&self, request: Request<Streaming<ForwardedReport>>) -> Result<Response<Self::ForwardReportsStream>, Status> {
        self.check_coordinator(&request)?;
        let service = self.clone();
        let answers = Self::assembled(self.0.clone(), request.into_inner()).map(move |report| {
            let service = service.clone();
            async move {
                let (round, header, body) = report?;
                Ok(service.forwarded(round, header, body).await)
            }
        });
        Ok(Response::new(Box::pin(answers.buffered(AT_ONCE))))
    }

    async fn list_reports(&self, request: Request<PeerRequest>) -> Result<Response<ReportSet>, Status> {
        self.check_coordinator(&request)?;
        let request = request.into_inner();
        let cell = self.cell(request.round, &request.config_hash)?;
        let reports = self.0.store.reports(cell.plan.round()).await?;
        Ok(Response::new(ReportSet { reports: reports.concat().into() }))
    }

    async fn propose_set(&self, request: Request<PeerRequest>) -> Result<Response<ReportSet>, Status> {
        self.check_coordinator(&request)?;
        let request = request.into_inner();
        let cell = self.cell(request.round, &request.config_hash)?;
        self.0.change(&cell, |record| record.seal().map(|()| None)).await?;
        let reports = self.0.store.reports(cell.plan.round()).await?;
        Ok(Response::new(ReportSet { reports: reports.concat().into() }))
    }

    async fn commit_set(&self, request: Request<CommitSetRequest>) -> Result<Response<PeerRound>, Status> {
        self.check_coordinator(&request)?;
        let request = request.into_inner();
        let cell = self.cell(request.round, &request.config_hash)?;
        let set = request.set.ok_or_else(|| AggregatorError::Invalid("the set is missing".into()))?;
        attempt::commit(&self.0, &cell, ids(&set)?).await?;
        Ok(Response::new(cell.peer_round()))
    }

    async fn start_compute(&self, request: Request<StartComputeRequest>) -> Result<Response<PeerRound>, Status> {
        self.check_coordinator(&request)?;
        let request = request.into_inner();
        let cell = self.cell(request.round, &request.config_hash)?;
        if cell.record().set_hash.is_none_or(|h| h[..] != request.set_hash[..]) {
            return Err(cell.record().wrong("computing that set").into());
        }
        attempt::start(&self.0, &cell, request.epoch).await?;
        Ok(Response::new(cell.peer_round()))
    }

    async fn exchange_levels(&self, request: Request<Streaming<LevelMessage>>) -> Result<Response<LevelsReceived>, Status> {
        let caller = self.caller(&request)?;
        if caller != (self.0.me() + 1) % 3 {
            return Err(AggregatorError::Unauthenticated("messages of a computation come from the next party").into());
        }
        let mut parts = request.into_inner();
        let first = parts.message().await?.and_then(|m| m.part);
        let Some(level_message::Part::Hello(hello)) = first else {
            return Err(Status::invalid_argument("a computation begins with a hello"));
        };
        let cell = self.0.cell(hello.round)?;
        let seed: [u8; 32] = hello.zero_seed[..].try_into().map_err(|_| Status::invalid_argument("zero_seed has 32 bytes"))?;
        let mut attempts = cell.attempt.subscribe();
        let wanted = attempts.wait_for(|a| a.as_ref().is_some_and(|a| a.epoch >= hello.epoch));
        let attempt = match tokio::time::timeout(EARLY, wanted).await {
            Ok(Ok(attempt)) => attempt.clone(),
            _ => None,
        };
        let Some(attempt) = attempt.filter(|a| a.epoch == hello.epoch) else {
            return Err(AggregatorError::State(format!("epoch {} of round {} is not being computed here", hello.epoch, hello.round)).into());
        };
        if cell.record().set_hash.is_none_or(|h| h[..] != hello.set_hash[..]) {
            attempt.inbox.close("the next party computes another set");
            return Err(AggregatorError::State("another set was committed here".into()).into());
        }
        attempt.inbox.hello(Seed::from_bytes(seed))?;
        let received: Result<(), Status> = async {
            while let Some(message) = parts.message().await? {
                let Some(level_message::Part::Level(level)) = message.part else {
                    return Err(Status::invalid_argument("a level is wanted"));
                };
                telemetry::peer_bytes("received", level.words.len());
                let (words, rest) = level.words.as_chunks::<8>();
                if !rest.is_empty() {
                    return Err(Status::invalid_argument("a level holds words of 8 bytes"));
                }
                attempt.inbox.put(level.block, level.level, words.iter().map(|w| u64::from_le_bytes(*w)).collect())?;
            }
            Ok(())
        }
        .await;
        if let Err(status) = &received {
            attempt.inbox.close(&format!("the next party's messages ended: {}", status.message()));
        }
        received.map(|()| Response::new(LevelsReceived {}))
    }

    type GetOpeningStream = Answers<OpeningChunk>;

    async fn get_opening(&self, request: Request<GetOpeningRequest>) -> Result<Response<Self::GetOpeningStream>, Status> {
        let caller = self.caller(&request)?;
        let request = request.into_inner();
        let cell = self.0.cell(request.round)?;
        let words = attempt::hand_out(&self.0, &cell, request.epoch, &request.set_hash, request.share, caller).await?;
        let chunks =
            (0..words.len()).step_by(CHUNK_BYTES).map(|at| Ok(OpeningChunk { words: words.slice(at..words.len().min(at + CHUNK_BYTES)) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.collect::<Vec<_>>()))))
    }

    async fn abort_round(&self, request: Request<AbortRoundRequest>) -> Result<Response<PeerRound>, Status> {
        self.check_coordinator(&request)?;
        let request = request.into_inner();
        let cell = self.0.cell(request.round)?;
        self.0.abort(&cell, &request.reason).await?;
        Ok(Response::new(cell.peer_round()))
    }

    async fn get_round(&self, request: Request<PeerRequest>) -> Result<Response<PeerRound>, Status> {
        self.caller(&request)?;
        let request = request.into_inner();
        Ok(Response::new(self.cell(request.round, &request.config_hash)?.peer_round()))
    }
}
