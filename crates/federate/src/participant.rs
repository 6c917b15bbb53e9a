//! Taking part in rounds over gRPC.

use std::time::Duration;

use bytes::Bytes;
use isthmus_proto::aggregator_v1::client_service_client::ClientServiceClient;
use isthmus_proto::aggregator_v1::{
    GetModelRequest, GetReportStatusRequest, GetRoundConfigRequest, Model, ReportStatus, UploadChunk, model_chunk, upload_chunk,
};
use isthmus_secagg::report::{KEY_BYTES, hash};
use tonic::Request;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::error::FederateError;
use crate::report::Report;
use crate::round::RoundPlan;

/// Bytes of a part of a body or a model.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Largest model that is fetched.
pub const MAX_MODEL_BYTES: u64 = 256 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A connection to the party that clients talk to.
#[derive(Clone)]
pub struct Participant {
    client: ClientServiceClient<Channel>,
    limit: Duration,
}

/// What [`Participant::round`] found.
pub enum Found {
    /// A round that the client may take part in.
    Round(Box<RoundPlan>),
    /// None; ask again after this time.
    Nothing(Duration),
}

fn refused(what: &'static str) -> impl FnOnce(tonic::Status) -> FederateError {
    move |status| FederateError::Refused { what, status: Box::new(status) }
}

impl Participant {
    /// Connects to `url`; `authority` is a PEM certificate to trust instead of the public ones. Every call takes at most `limit`.
    ///
    /// # Errors
    /// If the address makes no sense or nobody answers.
    pub async fn connect(url: &str, authority: Option<&str>, limit: Duration) -> Result<Self, FederateError> {
        let client = ClientServiceClient::new(channel(url, authority, limit).await?).max_decoding_message_size(4 << 20);
        Ok(Self { client, limit })
    }

    fn within<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.limit);
        request
    }

    /// The round that is open to `client`.
    ///
    /// # Errors
    /// If the coordinator does not answer, or with a senseless configuration.
    pub async fn round(&self, client: &[u8; KEY_BYTES]) -> Result<Found, FederateError> {
        let request = self.within(GetRoundConfigRequest { client: client.to_vec().into() });
        let answer = self.client.clone().get_round_config(request).await.map_err(refused("asking for the round"))?.into_inner();
        if answer.config.is_empty() {
            return Ok(Found::Nothing(Duration::from_millis(answer.retry_ms.clamp(10, 60_000))));
        }
        Ok(Found::Round(Box::new(RoundPlan::decode(&answer.config)?)))
    }

    /// Fetches a model and checks its hash.
    ///
    /// # Errors
    /// If it is too large, another than announced, or does not come.
    pub async fn model(&self, model: &Model) -> Result<Vec<u8>, FederateError> {
        if model.size > MAX_MODEL_BYTES {
            return Err(FederateError::Invalid(format!("a model of {} bytes; at most {MAX_MODEL_BYTES} are fetched", model.size)));
        }
        let mut data = Vec::with_capacity(model.size as usize);
        let request = self.within(GetModelRequest { name: model.name.clone(), version: model.version });
        let mut parts = self.client.clone().get_model(request).await.map_err(refused("asking for the model"))?.into_inner();
        while let Some(part) = parts.message().await.map_err(refused("fetching the model"))? {
            if let Some(model_chunk::Part::Data(part)) = part.part {
                if data.len() + part.len() > model.size as usize {
                    return Err(FederateError::Invalid(format!(
                        "model {:?} is larger than the {} bytes announced",
                        model.name, model.size
                    )));
                }
                data.extend_from_slice(&part);
            }
        }
        if hash(&[&data])[..] != model.sha256[..] {
            return Err(FederateError::Invalid(format!("model {:?} is not the one that the round names (its hash differs)", model.name)));
        }
        Ok(data)
    }

    /// Sends a report once.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn upload(&self, report: &Report) -> Result<ReportStatus, FederateError> {
        let header = UploadChunk { part: Some(upload_chunk::Part::Header(report.header.clone())) };
        let body = Bytes::from(report.body.clone());
        let parts = (0..body.len()).step_by(CHUNK_BYTES).map(move |at| body.slice(at..body.len().min(at + CHUNK_BYTES)));
        let chunks = std::iter::once(header).chain(parts.map(|part| UploadChunk { part: Some(upload_chunk::Part::Body(part)) }));
        let request = self.within(tokio_stream::iter(chunks.collect::<Vec<_>>()));
        Ok(self.client.clone().upload_report(request).await.map_err(refused("sending the report"))?.into_inner())
    }

    /// Sends a report until it is stored, as long as trying again may help and at most for `limit`.
    ///
    /// # Errors
    /// Why it was refused, or the last failure.
    pub async fn upload_until_stored(&self, report: &Report, limit: Duration) -> Result<ReportStatus, FederateError> {
        let until = tokio::time::Instant::now() + limit;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.upload(report).await {
                Err(error) if error.is_transient() && tokio::time::Instant::now() + pause < until => {
                    tokio::time::sleep(pause).await;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
                ended => return ended,
            }
        }
    }

    /// What has become of a report.
    ///
    /// # Errors
    /// If it or its round is not known.
    pub async fn status(&self, round: u64, report: &[u8]) -> Result<ReportStatus, FederateError> {
        let request = self.within(GetReportStatusRequest { round, report: report.to_vec().into() });
        Ok(self.client.clone().get_report_status(request).await.map_err(refused("asking for the report's status"))?.into_inner())
    }
}

/// Connects to `url`; `authority` is a PEM certificate to trust instead of the public ones.
pub(crate) async fn channel(url: &str, authority: Option<&str>, limit: Duration) -> Result<Channel, FederateError> {
    let failed = |why: String| FederateError::Connect { url: url.into(), why };
    let mut endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| failed(e.to_string()))?.connect_timeout(limit);
    if url.starts_with("https://") {
        let tls = match authority {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_webpki_roots(),
        };
        endpoint = endpoint.tls_config(tls).map_err(|e| failed(causes(&e)))?;
    }
    endpoint.connect().await.map_err(|e| failed(causes(&e)))
}

/// An error with its causes.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text
}
