//! gRPC client of the offload server.

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use isthmus_codec::BundleHash;
use isthmus_proto::offload_v1::infer_request::Payload as WirePayload;
use isthmus_proto::offload_v1::offload_service_client::OffloadServiceClient;
use isthmus_proto::offload_v1::{DescribeRequest, DescribeResponse, Features, InferRequest, InferResponse};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity, Uri};
use tower::service_fn;

use crate::ClientError;
use crate::balance::{Retries, Transport, balanced, single};
use crate::error::chain;

/// Largest answer accepted (1000 logits and labels are about 10 kB).
const MAX_ANSWER: usize = 4 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(20);
const PEM_CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// Where the server is and how to trust it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    uri: Uri,
    ca: Option<Vec<u8>>,
    identity: Option<Identity>,
    token: Bearer,
    insecure: bool,
    connect_timeout: Duration,
}

impl Endpoint {
    /// Parses `http://HOST:PORT` or `https://HOST:PORT`.
    ///
    /// # Errors
    /// [`ClientError::Usage`] if it is neither.
    pub fn new(url: &str) -> Result<Self, ClientError> {
        let uri: Uri = url.parse().map_err(|e| ClientError::Usage(format!("server address {url:?}: {e}")))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(ClientError::Usage(format!("server address {url:?}: write http://HOST:PORT or https://HOST:PORT")));
        }
        let port = uri.authority().and_then(|a| a.as_str().rsplit_once(':')).map(|(_, port)| port).filter(|p| !p.ends_with(']'));
        if port.is_some_and(|p| p.parse::<u16>().map_or(true, |n| n == 0)) {
            return Err(ClientError::Usage(format!("server address {url:?}: the port must be 1 to 65535")));
        }
        if uri.path_and_query().is_some_and(|p| p.as_str() != "/") {
            return Err(ClientError::Usage(format!("server address {url:?}: there must be nothing after the port")));
        }
        Ok(Self { uri, ca: None, identity: None, token: Bearer::default(), insecure: false, connect_timeout: CONNECT_TIMEOUT })
    }

    /// Trusts the CA certificate(s) in `pem` instead of the public ones.
    #[must_use]
    pub fn with_ca(mut self, pem: Vec<u8>) -> Self {
        self.ca = Some(pem);
        self
    }

    /// Shows this certificate (PEM) to the server, whose key is `key` (PEM).
    #[must_use]
    pub fn with_identity(mut self, certificate: &[u8], key: &[u8]) -> Self {
        self.identity = Some(Identity::from_pem(certificate, key));
        self
    }

    /// Sends this bearer token with every call; never without TLS to another machine.
    ///
    /// # Errors
    /// [`ClientError::Usage`] if it holds what a header cannot.
    pub fn with_token(mut self, token: &str) -> Result<Self, ClientError> {
        let wrong = |_| ClientError::Usage("the token holds something else than printable ASCII".into());
        if token.trim().is_empty() {
            return Err(ClientError::Usage("the token is empty".into()));
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim()).parse().map_err(wrong)?;
        value.set_sensitive(true);
        self.token = Bearer(Some(value));
        Ok(self)
    }

    /// Allows plain HTTP to hosts other than this machine.
    #[must_use]
    pub fn allow_insecure(mut self, allow: bool) -> Self {
        self.insecure = allow;
        self
    }

    /// Gives up connecting after `limit` (5 s unless set).
    #[must_use]
    pub fn with_connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// The server's address.
    pub fn url(&self) -> &Uri {
        &self.uri
    }

    fn is_loopback(&self) -> bool {
        let host = self.uri.host().unwrap_or_default().trim_matches(['[', ']']);
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

/// Adds to calls the bearer token, if there is one, and (feature `otel`) the current span, if spans are collected.
#[derive(Debug, Clone, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        #[cfg(feature = "otel")]
        isthmus_traces::name_to_server(request.metadata_mut());
        Ok(request)
    }
}

/// The generated client over a connection that sends the token.
pub type RawClient = OffloadServiceClient<InterceptedService<Transport, Bearer>>;

/// What to send.
#[derive(Debug, Clone)]
pub enum Payload {
    /// A container made by [`crate::Encoder`].
    Bitstream(Bytes),
    /// A JPEG, PNG, WebP or AVIF file.
    Image(Bytes),
    /// Values of a layer of the server's model.
    Features(Features),
    /// The next refinement of a progressive bitstream; see [`crate::stream::Sender::refine`].
    Refinement(Bytes),
}

impl Payload {
    /// Bytes of the payload itself.
    pub fn len(&self) -> usize {
        match self {
            Self::Bitstream(b) | Self::Image(b) | Self::Refinement(b) => b.len(),
            Self::Features(f) => f.data.len(),
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What to ask for.
#[derive(Debug, Clone)]
pub struct InferOptions {
    /// Model name; empty for the server's default.
    pub model: String,
    /// Labels wanted.
    pub top_k: u32,
    /// Also all logits.
    pub logits: bool,
    /// Give up after this long.
    pub deadline: Duration,
    /// Probability of the best class from which on a stream's answer to a progressive bitstream is the last; 0: always.
    pub certainty: f32,
}

impl Default for InferOptions {
    fn default() -> Self {
        Self { model: String::new(), top_k: 5, logits: false, deadline: Duration::from_secs(10), certainty: 0.0 }
    }
}

impl InferOptions {
    /// The request for `payload`.
    pub fn request(&self, id: u64, payload: Payload) -> InferRequest {
        let payload = match payload {
            Payload::Bitstream(b) => WirePayload::Bitstream(b),
            Payload::Image(b) => WirePayload::Image(b),
            Payload::Features(f) => WirePayload::Features(f),
            Payload::Refinement(b) => WirePayload::Refinement(b),
        };
        let timeout_ms = u32::try_from(self.deadline.as_millis()).unwrap_or(u32::MAX);
        let (model, top_k, logits, certainty) = (self.model.clone(), self.top_k, self.logits, self.certainty);
        InferRequest { id, model, payload: Some(payload), top_k, logits, timeout_ms, certainty }
    }
}

/// Connections to one server or several; cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: RawClient,
    /// Only where there is another server to try.
    retries: Option<Retries>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("retries", &self.retries).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`ClientError::Usage`] for plain HTTP to another machine (unless allowed),
    /// [`ClientError::Connect`] if the server cannot be reached.
    #[tracing::instrument(level = "debug", skip_all, fields(server = %endpoint.uri), err(level = "debug"))]
    pub async fn connect(endpoint: &Endpoint) -> Result<Self, ClientError> {
        let channel = channel(endpoint, builder(endpoint)?.connect()).await?;
        Ok(Self::over(single(channel), endpoint))
    }

    /// Connects to several servers of which any may answer, and balances requests over them (power of two choices): what one cannot answer
    /// is tried at another, within a budget, and servers that fail are set aside for a while. Those that cannot be reached now are tried later.
    /// All of them are sent the same token.
    ///
    /// # Errors
    /// As [`Client::connect`]; of unreachable servers only if none can be reached.
    pub async fn connect_any(endpoints: &[Endpoint]) -> Result<Self, ClientError> {
        if let [only] = endpoints {
            return Self::connect(only).await;
        }
        let Some(first) = endpoints.first() else { return Err(ClientError::Usage("no server is named".into())) };
        if endpoints.iter().any(|e| e.token.0 != first.token.0) {
            return Err(ClientError::Usage("servers that stand for each other take the same token".into()));
        }
        let builders = endpoints.iter().map(builder).collect::<Result<Vec<_>, _>>()?;
        let connecting = endpoints.iter().zip(&builders).map(|(endpoint, builder)| channel(endpoint, builder.connect()));
        let (mut members, mut failures) = (Vec::with_capacity(endpoints.len()), Vec::new());
        for (builder, connected) in builders.iter().zip(futures_util::future::join_all(connecting).await) {
            match connected {
                Ok(channel) => members.push((channel, true)),
                Err(error) => {
                    tracing::debug!(%error, "set aside");
                    failures.push(error);
                    members.push((builder.connect_lazy(), false));
                }
            }
        }
        match failures.pop() {
            Some(last) if failures.len() + 1 == endpoints.len() => Err(last),
            _ => Ok(Self { retries: Some(Retries::new()), ..Self::over(balanced(members), first) }),
        }
    }

    /// Connects through `connector` instead of plain TCP: an emulated link, a proxy, a socket made elsewhere.
    ///
    /// # Errors
    /// As [`Client::connect`], with the connector's errors as [`ClientError::Connect`].
    pub async fn connect_through<F, S>(endpoint: &Endpoint, connector: impl Fn(Uri) -> F + Send + 'static) -> Result<Self, ClientError>
    where
        F: Future<Output = std::io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let connector = service_fn(move |uri| {
            let connecting = connector(uri);
            async move { Ok::<_, std::io::Error>(TokioIo::new(connecting.await?)) }
        });
        let channel = channel(endpoint, builder(endpoint)?.connect_with_connector(connector)).await?;
        Ok(Self::over(single(channel), endpoint))
    }

    fn over(transport: Transport, endpoint: &Endpoint) -> Self {
        let inner = OffloadServiceClient::with_interceptor(transport, endpoint.token.clone()).max_decoding_message_size(MAX_ANSWER);
        Self { inner, retries: None }
    }

    /// What the server has loaded; refused with FAILED_PRECONDITION if it lacks the given bundle.
    ///
    /// # Errors
    /// [`ClientError::Server`] or [`ClientError::Deadline`].
    #[tracing::instrument(level = "debug", skip_all, err(level = "debug"))]
    pub async fn describe(&mut self, bundle: Option<&BundleHash>, deadline: Duration) -> Result<DescribeResponse, ClientError> {
        let bundle_hash = bundle.map(|h| Bytes::copy_from_slice(&h.0)).unwrap_or_default();
        let asked = DescribeRequest { bundle_hash };
        self.repeated(deadline, asked, |mut inner, request| async move { inner.describe(request).await }).await
    }

    /// One photo, one answer.
    ///
    /// # Errors
    /// [`ClientError::Server`] or [`ClientError::Deadline`].
    #[tracing::instrument(level = "debug", skip_all, fields(bytes = payload.len()), err(level = "debug"))]
    pub async fn infer(&mut self, payload: Payload, options: &InferOptions) -> Result<InferResponse, ClientError> {
        let asked = options.request(0, payload);
        self.repeated(options.deadline, asked, |mut inner, request| async move { inner.infer(request).await }).await
    }

    /// Asks once more, within the retry budget and not before the server wants it, for what a server of the set has `refused`.
    ///
    /// # Errors
    /// What was refused, if it may not be tried again; else as [`Client::infer`].
    pub async fn infer_again(
        &mut self,
        payload: Payload,
        options: &InferOptions,
        refused: ClientError,
    ) -> Result<InferResponse, ClientError> {
        let pause = self.retries.as_ref().and_then(|r| r.after(&refused, 2, options.deadline));
        let Some(pause) = pause else { return Err(refused) };
        tokio::time::sleep(pause).await;
        let left = options.deadline.saturating_sub(pause);
        let mut request = tonic::Request::new(options.request(0, payload));
        request.set_timeout(left);
        within(left, self.inner.infer(request)).await
    }

    /// The budget of repeated requests, if there is another server to ask.
    pub(crate) fn retries(&self) -> Option<Retries> {
        self.retries.clone()
    }

    /// A call within `deadline`, at another server too if there is one and the first cannot answer.
    async fn repeated<M, T, F>(
        &self,
        deadline: Duration,
        message: M,
        call: impl Fn(RawClient, tonic::Request<M>) -> F,
    ) -> Result<T, ClientError>
    where
        M: Clone,
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let start = Instant::now();
        if let Some(retries) = &self.retries {
            retries.first();
        }
        for next in 2.. {
            let left = deadline.saturating_sub(start.elapsed());
            let mut request = tonic::Request::new(message.clone());
            request.set_timeout(left);
            let failed = match within(left, call(self.inner.clone(), request)).await {
                Ok(answer) => return Ok(answer),
                Err(ClientError::Deadline(_)) => break,
                Err(error) => error,
            };
            let left = deadline.saturating_sub(start.elapsed());
            let Some(pause) = self.retries.as_ref().and_then(|r| r.after(&failed, next, left)) else { return Err(failed) };
            tracing::debug!(error = %failed, "trying another server");
            tokio::time::sleep(pause).await;
        }
        Err(ClientError::Deadline(deadline))
    }

    /// True if what one server cannot answer may be tried at another.
    pub fn has_others(&self) -> bool {
        self.retries.is_some()
    }

    /// The generated client, for streams.
    pub fn raw(&mut self) -> &mut RawClient {
        &mut self.inner
    }
}

/// Waits for a connection, as long as `endpoint` allows.
async fn channel(
    endpoint: &Endpoint,
    connecting: impl Future<Output = Result<Channel, tonic::transport::Error>>,
) -> Result<Channel, ClientError> {
    let unreachable = |why: String| ClientError::Connect { url: endpoint.uri.to_string(), why };
    tokio::time::timeout(endpoint.connect_timeout, connecting)
        .await
        .map_err(|_| unreachable(format!("no connection within {:?}", endpoint.connect_timeout)))?
        .map_err(|e| unreachable(explained(&chain(&e))))
}

/// How to reach `endpoint`, not connected yet.
fn builder(endpoint: &Endpoint) -> Result<tonic::transport::Endpoint, ClientError> {
    let channel = Channel::builder(endpoint.uri.clone())
        .connect_timeout(endpoint.connect_timeout)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .tcp_nodelay(true);
    let url = &endpoint.uri;
    if url.scheme_str() != Some("https") {
        if !endpoint.is_loopback() && !endpoint.insecure {
            let why = format!("{url} is not this machine and has no TLS; use https://, or --insecure on a network you trust");
            return Err(ClientError::Usage(why));
        }
        if !endpoint.is_loopback() && endpoint.token.0.is_some() {
            return Err(ClientError::Usage(format!("the token is not sent to {url} without TLS; use https://")));
        }
        return Ok(channel);
    }
    let tls = match &endpoint.ca {
        Some(pem) if !pem.windows(PEM_CERTIFICATE.len()).any(|w| w == PEM_CERTIFICATE) => {
            return Err(ClientError::Usage("the CA file holds no PEM certificate (-----BEGIN CERTIFICATE-----)".into()));
        }
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_webpki_roots(),
    };
    let tls = match &endpoint.identity {
        Some(identity) => tls.identity(identity.clone()),
        None => tls,
    };
    channel.tls_config(tls).map_err(|e| ClientError::Connect { url: url.to_string(), why: chain(&e) })
}

/// Waits at most `deadline`, whoever notices first that it passed: this timer, tonic's, or the server.
async fn within<T>(deadline: Duration, call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T, ClientError> {
    let start = Instant::now();
    match tokio::time::timeout(deadline, call).await {
        Err(_) => Err(ClientError::Deadline(deadline)),
        Ok(Err(status)) if status.code() == tonic::Code::Cancelled && start.elapsed() >= deadline => Err(ClientError::Deadline(deadline)),
        Ok(answer) => Ok(answer?.into_inner()),
    }
}

/// Adds what to do to the transport's own words.
fn explained(why: &str) -> String {
    let hint = if why.contains("InvalidContentType") {
        "the server does not speak TLS there; use http://"
    } else if why.contains("UnknownIssuer") {
        "its certificate is not signed by a CA that is trusted here; name the right one with --ca"
    } else if why.contains("NotValidForName") {
        "its certificate is for another host name"
    } else if why.contains("Connection refused") {
        "nothing listens there; is the server running, and is the port right?"
    } else if why.contains("dns error") {
        "the host name is unknown"
    } else {
        return why.to_owned();
    };
    format!("{hint} ({why})")
}
