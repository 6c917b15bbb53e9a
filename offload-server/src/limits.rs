//! Message sizes by method, both ways, and times: a generated service has one limit for all of its methods, which would let a question of 8 MB
//! for the models' names in, and a server has one time for all, in which no model loads.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tower::BoxError;

use crate::ServerError;

/// Largest message, and largest answer, of methods that carry no payload.
pub const CONTROL_BYTES: usize = 64 << 10;
const CONTROL_ANSWER: usize = 256 << 10;
/// Loading a model takes seconds, on a busy machine many.
const CONTROL_TIME: Duration = Duration::from_secs(600);
/// Largest question to health and reflection, which nobody has to be known for: names.
pub const OPEN_BYTES: usize = 4 << 10;
/// Until their answers begin.
pub const OPEN_TIME: Duration = Duration::from_secs(10);

/// Methods that carry one payload for one answer, and streams of them.
const UNARY: [&str; 2] = ["Infer", "ModelInfer"];
const STREAMS: [&str; 2] = ["InferStream", "ModelStreamInfer"];

/// A service whose responses begin in time: uploads that stall end too. Streams have their own limits.
#[derive(Clone)]
pub struct Within<S> {
    service: S,
    limit: Duration,
}

impl<S> Within<S> {
    /// DEADLINE_EXCEEDED after `limit`.
    pub fn new(service: S, limit: Duration) -> Self {
        Self { service, limit }
    }
}

impl<S: NamedService> NamedService for Within<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<Body>> for Within<S>
where
    S: Service<http::Request<Body>, Response = http::Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let answered = tokio::time::timeout(self.limit, self.service.call(request));
        Box::pin(async {
            match answered.await {
                Ok(response) => Ok(response?.map(Body::new)),
                Err(_) => Ok(Status::from(ServerError::Deadline("being received or answered")).into_http()),
            }
        })
    }
}

/// What calls are limited to.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// Largest message of methods that carry one payload for one answer, and of streams of them.
    pub unary: usize,
    /// See `unary`.
    pub stream: usize,
    /// Largest answer of both.
    pub answers: usize,
    /// Until the answer to a payload begins.
    pub time: Duration,
}

/// The same service with different limits: each call goes to the one for its method.
#[derive(Clone)]
pub struct PerMethod<S> {
    unary: S,
    stream: S,
    control: S,
}

impl<S> PerMethod<Within<S>> {
    /// `make` gives the service with a limit on messages and on answers, for streams of them or not.
    pub fn new(limits: &CallLimits, make: impl Fn(usize, usize, bool) -> S) -> Self {
        Self {
            unary: Within::new(make(limits.unary, limits.answers, false), limits.time),
            stream: Within::new(make(limits.stream, limits.answers, true), limits.time),
            control: Within::new(make(CONTROL_BYTES, CONTROL_ANSWER, false), CONTROL_TIME),
        }
    }
}

impl<S: NamedService> NamedService for PerMethod<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for PerMethod<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        for service in [&mut self.unary, &mut self.stream, &mut self.control] {
            std::task::ready!(service.poll_ready(context))?;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let service = match () {
            () if UNARY.contains(&method) => &mut self.unary,
            () if STREAMS.contains(&method) => &mut self.stream,
            () => &mut self.control,
        };
        service.call(request)
    }
}
