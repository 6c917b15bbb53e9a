//! Calls to another party.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use isthmus_federate::RoundPlan;
use isthmus_proto::aggregator_v1::peer_service_client::PeerServiceClient;
use isthmus_proto::aggregator_v1::{
    AbortRoundRequest, CommitSetRequest, ForwardAnswer, ForwardedReport, GetOpeningRequest, LevelMessage, OpenRoundRequest, PeerRequest,
    PeerRound, ReportSet, StartComputeRequest,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status, Streaming};

use super::ids;
use crate::error::AggregatorError;
use crate::keys::{PublicParty, SecretParty, tls_name};
use crate::store::ReportId;

/// Largest message between parties: a level of a block, with room for its frame.
pub const MAX_MESSAGE: usize = 4 << 20;
const KEEPALIVE: Duration = Duration::from_secs(10);
const STREAM_WINDOW: u32 = 8 << 20;

/// A connection to another party: made when first needed, made anew when lost.
pub struct PeerLink {
    party: u8,
    client: PeerServiceClient<Channel>,
    limit: Duration,
    last: Mutex<LastCall>,
}

/// How the last calls to a party ended.
#[derive(Debug, Clone, Default)]
pub struct LastCall {
    /// When it last answered.
    pub answered: Option<SystemTime>,
    /// Why it has not answered since.
    pub failure: Option<String>,
}

impl PeerLink {
    /// To `public`, as the party with these keys. Calls take at most `limit`.
    ///
    /// # Errors
    /// If the description's address or certificate makes no sense.
    pub fn new(public: &PublicParty, keys: &SecretParty, limit: Duration) -> Result<Self, AggregatorError> {
        let bad = |e: tonic::transport::Error| AggregatorError::Config(format!("party {}: {}: {e}", public.party, public.url));
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&public.certificate))
            .identity(Identity::from_pem(&keys.certificate, keys.tls_key.as_str()))
            .domain_name(tls_name(public.party));
        if !public.url.starts_with("https://") {
            return Err(AggregatorError::Config(format!("party {}: {} must begin with https://", public.party, public.url)));
        }
        let endpoint = Endpoint::from_shared(public.url.clone())
            .map_err(bad)?
            .connect_timeout(limit)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .tcp_nodelay(true)
            .initial_stream_window_size(Some(STREAM_WINDOW))
            .initial_connection_window_size(Some(2 * STREAM_WINDOW))
            .tls_config(tls)
            .map_err(bad)?;
        let client =
            PeerServiceClient::new(endpoint.connect_lazy()).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        Ok(Self { party: public.party, client, limit, last: Mutex::default() })
    }

    /// Notes how a call ended.
    fn heard<T>(&self, ended: Result<T, Status>) -> Result<T, AggregatorError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // a refusal is an answer as well
        let silent = |s: &&Status| matches!(s.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown);
        match ended.as_ref().err().filter(silent) {
            Some(status) => last.failure = Some(status.message().to_owned()),
            None => *last = LastCall { answered: Some(SystemTime::now()), failure: None },
        }
        ended.map_err(|status| AggregatorError::Peer { party: self.party, status: Box::new(status) })
    }

    /// How the last calls ended.
    pub fn last_call(&self) -> LastCall {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn within<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.limit);
        request
    }

    fn about(&self, plan: &RoundPlan) -> Request<PeerRequest> {
        self.within(PeerRequest { round: plan.round(), config_hash: plan.hash().to_vec().into() })
    }

    /// Announces a round.
    ///
    /// # Errors
    /// If the party cannot be reached or refuses.
    pub async fn open_round(&self, plan: &RoundPlan) -> Result<PeerRound, AggregatorError> {
        let request = self.within(OpenRoundRequest { config: plan.bytes().to_vec().into() });
        Ok(self.heard(self.client.clone().open_round(request).await)?.into_inner())
    }

    /// Begins passing reports on.
    ///
    /// # Errors
    /// If the party cannot be reached.
    pub async fn forward_reports(&self, reports: ReceiverStream<ForwardedReport>) -> Result<Streaming<ForwardAnswer>, AggregatorError> {
        let mut client = self.client.clone();
        let call = client.forward_reports(Request::new(reports));
        let answers = tokio::time::timeout(self.limit, call).await.map_err(|_| AggregatorError::Deadline("another party's answer"))?;
        Ok(self.heard(answers)?.into_inner())
    }

    /// Which reports the party has.
    ///
    /// # Errors
    /// If the party cannot be reached or answers with something senseless.
    pub async fn list_reports(&self, plan: &RoundPlan) -> Result<Vec<ReportId>, AggregatorError> {
        ids(self.heard(self.client.clone().list_reports(self.about(plan)).await)?.get_ref())
    }

    /// Ends uploads at the party; which reports it has.
    ///
    /// # Errors
    /// If the party cannot be reached or refuses.
    pub async fn propose_set(&self, plan: &RoundPlan) -> Result<Vec<ReportId>, AggregatorError> {
        ids(self.heard(self.client.clone().propose_set(self.about(plan)).await)?.get_ref())
    }

    /// Fixes the set at the party.
    ///
    /// # Errors
    /// If the party cannot be reached or refuses.
    pub async fn commit_set(&self, plan: &RoundPlan, set: &[ReportId]) -> Result<PeerRound, AggregatorError> {
        let set = Some(ReportSet { reports: set.concat().into() });
        let request = CommitSetRequest { round: plan.round(), config_hash: plan.hash().to_vec().into(), set };
        Ok(self.heard(self.client.clone().commit_set(self.within(request)).await)?.into_inner())
    }

    /// Starts an attempt at the party.
    ///
    /// # Errors
    /// If the party cannot be reached or refuses.
    pub async fn start_compute(&self, plan: &RoundPlan, set_hash: &[u8; 32], epoch: u64) -> Result<PeerRound, AggregatorError> {
        let (config_hash, set_hash) = (plan.hash().to_vec().into(), set_hash.to_vec().into());
        let request = StartComputeRequest { round: plan.round(), config_hash, set_hash, epoch };
        Ok(self.heard(self.client.clone().start_compute(self.within(request)).await)?.into_inner())
    }

    /// Sends messages of a computation until there are no more. Ends when the stream does.
    ///
    /// # Errors
    /// If the party cannot be reached or refuses.
    pub async fn exchange_levels(&self, messages: ReceiverStream<LevelMessage>) -> Result<(), AggregatorError> {
        self.heard(self.client.clone().exchange_levels(Request::new(messages)).await).map(drop)
    }

    /// A share of the result.
    ///
    /// # Errors
    /// If the party cannot be reached, has none, or sends one of another size.
    pub async fn opening(&self, round: u64, epoch: u64, set_hash: &[u8; 32], share: u8, bytes: usize) -> Result<Bytes, AggregatorError> {
        let request = GetOpeningRequest { round, epoch, set_hash: set_hash.to_vec().into(), share: share.into() };
        let mut chunks = self.heard(self.client.clone().get_opening(self.within(request)).await)?.into_inner();
        let mut words = BytesMut::with_capacity(bytes);
        while let Some(chunk) = self.heard(chunks.message().await)? {
            if words.len() + chunk.words.len() > bytes {
                return Err(AggregatorError::Invalid(format!("party {} sent more than the {bytes} bytes of its share", self.party)));
            }
            words.extend_from_slice(&chunk.words);
        }
        if words.len() != bytes {
            return Err(AggregatorError::Invalid(format!(
                "party {} sent {} bytes of its share instead of {bytes}",
                self.party,
                words.len()
            )));
        }
        Ok(words.freeze())
    }

    /// Tells the party that a round ended.
    ///
    /// # Errors
    /// If the party cannot be reached or refuses.
    pub async fn abort(&self, round: u64, reason: &str) -> Result<PeerRound, AggregatorError> {
        let request = self.within(AbortRoundRequest { round, reason: reason.into() });
        Ok(self.heard(self.client.clone().abort_round(request).await)?.into_inner())
    }

    /// The round's state at the party.
    ///
    /// # Errors
    /// If the party cannot be reached or does not know it.
    pub async fn round(&self, plan: &RoundPlan) -> Result<PeerRound, AggregatorError> {
        Ok(self.heard(self.client.clone().get_round(self.about(plan)).await)?.into_inner())
    }
}

/// True if asking again later may help.
pub fn is_transient(error: &AggregatorError) -> bool {
    let transient = [Code::Unavailable, Code::DeadlineExceeded, Code::ResourceExhausted, Code::Cancelled, Code::Unknown, Code::Internal];
    match error {
        AggregatorError::Peer { status, .. } => transient.contains(&status.code()),
        // a database may come back
        AggregatorError::Deadline(_) | AggregatorError::Store(_) => true,
        _ => false,
    }
}
