//! Creating and following rounds over gRPC.

use std::time::Duration;

use bytes::Bytes;
use isthmus_proto::aggregator_v1::round_service_client::RoundServiceClient;
use isthmus_proto::aggregator_v1::{
    AbortRoundRequest, CreateRoundRequest, ListRoundsRequest, Model, ModelChunk, NoteScoreRequest, Round, RoundRequest, State,
    WatchRoundsRequest, model_chunk, result_chunk,
};
use isthmus_secagg::report::hash;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use crate::error::FederateError;
use crate::participant::{CHUNK_BYTES, channel};
use crate::round::RoundPlan;

/// A connection to party 0 as an operator.
#[derive(Clone)]
pub struct Operator {
    client: RoundServiceClient<Channel>,
    token: MetadataValue<Ascii>,
    limit: Duration,
}

/// A round's result.
#[derive(Debug, Clone)]
pub struct RoundResult {
    /// The round as it ended.
    pub round: Round,
    /// Counts of coded coordinates and extra bits.
    pub counts: Vec<u32>,
    /// One bit for each client of the set, in order of report, if the round reveals them.
    pub kept_flags: Vec<u8>,
}

impl RoundResult {
    /// The round's configuration.
    ///
    /// # Errors
    /// If it makes no sense.
    pub fn plan(&self) -> Result<RoundPlan, FederateError> {
        RoundPlan::decode(&self.round.config)
    }

    /// The mean of the clients' updates.
    ///
    /// # Errors
    /// If the counts do not fit the configuration.
    pub fn mean(&self) -> Result<Vec<f64>, FederateError> {
        self.plan()?.mean(&self.counts, self.round.kept)
    }

    /// Counts of the extra bits.
    ///
    /// # Errors
    /// If the configuration makes no sense.
    pub fn extra(&self) -> Result<&[u32], FederateError> {
        let coded = self.plan()?.coded();
        Ok(self.counts.get(coded..).unwrap_or_default())
    }
}

fn refused(what: &'static str) -> impl FnOnce(Status) -> FederateError {
    move |status| FederateError::Refused { what, status: Box::new(status) }
}

impl Operator {
    /// Connects to `url` with a token; `authority` is a PEM certificate to trust instead of the public ones.
    ///
    /// # Errors
    /// If the address or the token makes no sense, or nobody answers.
    pub async fn connect(url: &str, authority: Option<&str>, token: &str, limit: Duration) -> Result<Self, FederateError> {
        let mut token: MetadataValue<Ascii> =
            format!("Bearer {token}").parse().map_err(|_| FederateError::Invalid("the operator's token holds no plain text".into()))?;
        token.set_sensitive(true);
        let client = RoundServiceClient::new(channel(url, authority, limit).await?).max_decoding_message_size(4 << 20);
        Ok(Self { client, token, limit })
    }

    fn within<T>(&self, message: T) -> Request<T> {
        let mut request = self.signed(message);
        request.set_timeout(self.limit);
        request
    }

    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.token.clone());
        request
    }

    /// Creates a round.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn create(&mut self, round: CreateRoundRequest) -> Result<Round, FederateError> {
        let request = self.within(round);
        Ok(self.client.create_round(request).await.map_err(refused("creating a round"))?.into_inner())
    }

    /// Closes a round to clients.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn seal(&mut self, round: u64) -> Result<Round, FederateError> {
        let request = self.within(RoundRequest { round });
        Ok(self.client.seal_round(request).await.map_err(refused("sealing a round"))?.into_inner())
    }

    /// Ends a round without a result.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn abort(&mut self, round: u64, reason: &str) -> Result<Round, FederateError> {
        let request = self.within(AbortRoundRequest { round, reason: reason.into() });
        Ok(self.client.abort_round(request).await.map_err(refused("aborting a round"))?.into_inner())
    }

    /// A round.
    ///
    /// # Errors
    /// If it is not known.
    pub async fn round(&mut self, round: u64) -> Result<Round, FederateError> {
        let request = self.within(RoundRequest { round });
        Ok(self.client.get_round(request).await.map_err(refused("asking for a round"))?.into_inner())
    }

    /// Rounds from `from` on.
    ///
    /// # Errors
    /// If the party does not answer.
    pub async fn list(&mut self, from: u64) -> Result<Vec<Round>, FederateError> {
        let request = self.within(ListRoundsRequest { from });
        Ok(self.client.list_rounds(request).await.map_err(refused("listing rounds"))?.into_inner().rounds)
    }

    /// All rounds, and every change from now on.
    ///
    /// # Errors
    /// If the party does not answer.
    pub async fn watch(&mut self) -> Result<Streaming<Round>, FederateError> {
        let request = self.signed(WatchRoundsRequest {});
        Ok(self.client.watch_rounds(request).await.map_err(refused("following rounds"))?.into_inner())
    }

    /// Waits for the end of a round, at most for `limit`; `progress` sees every change of it.
    ///
    /// # Errors
    /// If it is aborted, does not end in time, or the connection is lost.
    pub async fn wait(&mut self, round: u64, limit: Duration, mut progress: impl FnMut(&Round)) -> Result<Round, FederateError> {
        let wait = async {
            let mut rounds = self.watch().await?;
            while let Some(seen) = rounds.message().await.map_err(refused("following rounds"))? {
                if seen.round != round {
                    continue;
                }
                progress(&seen);
                match seen.state() {
                    State::Done => return Ok(seen),
                    State::Aborted => return Err(FederateError::Invalid(format!("round {round} was aborted: {}", seen.reason))),
                    _ => {}
                }
            }
            Err(FederateError::Invalid("the connection ended".into()))
        };
        tokio::time::timeout(limit, wait).await.unwrap_or(Err(FederateError::Late { what: "the round", limit }))
    }

    /// Notes how well the model did after a round.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn note_score(&mut self, round: u64, score: f64) -> Result<Round, FederateError> {
        let request = self.within(NoteScoreRequest { round, score });
        Ok(self.client.note_score(request).await.map_err(refused("noting a score"))?.into_inner())
    }

    /// The result of a round that is done.
    ///
    /// # Errors
    /// If it has none, or the connection is lost.
    pub async fn result(&mut self, round: u64) -> Result<RoundResult, FederateError> {
        const WHAT: &str = "fetching the result";
        let request = self.within(RoundRequest { round });
        let mut parts = self.client.get_result(request).await.map_err(refused(WHAT))?.into_inner();
        let mut result = RoundResult { round: Round::default(), counts: Vec::new(), kept_flags: Vec::new() };
        while let Some(part) = parts.message().await.map_err(refused(WHAT))? {
            match part.part {
                Some(result_chunk::Part::Round(round)) => result.round = round,
                Some(result_chunk::Part::Counts(counts)) => {
                    result.counts.extend(counts.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)))
                }
                Some(result_chunk::Part::KeptFlags(flags)) => result.kept_flags.extend_from_slice(&flags),
                None => {}
            }
        }
        Ok(result)
    }

    /// Publishes a model for clients.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn publish(&mut self, name: &str, version: u64, data: Bytes) -> Result<Model, FederateError> {
        let model = Model { name: name.into(), version, sha256: hash(&[&data]).to_vec().into(), size: data.len() as u64 };
        let first = ModelChunk { part: Some(model_chunk::Part::Model(model)) };
        let parts = (0..data.len()).step_by(CHUNK_BYTES).map(move |at| data.slice(at..data.len().min(at + CHUNK_BYTES)));
        let rest = parts.map(|part| ModelChunk { part: Some(model_chunk::Part::Data(part)) });
        let request = self.within(tokio_stream::iter(std::iter::once(first).chain(rest).collect::<Vec<_>>()));
        Ok(self.client.publish_model(request).await.map_err(refused("publishing a model"))?.into_inner())
    }
}
