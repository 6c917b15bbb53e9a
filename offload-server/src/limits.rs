//! Message sizes by method, both ways: a generated service has one limit for all of its methods, which would let a health question of 8 MB in.

use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

/// Largest message, and largest answer, of methods that carry no payload.
pub const CONTROL_BYTES: usize = 64 << 10;
const CONTROL_ANSWER: usize = 256 << 10;

/// Methods that carry one payload for one answer, and streams of them.
const UNARY: [&str; 2] = ["Infer", "ModelInfer"];
const STREAMS: [&str; 2] = ["InferStream", "ModelStreamInfer"];

/// The same service with different limits: each call goes to the one for its method.
#[derive(Clone)]
pub struct PerMethod<S> {
    unary: S,
    stream: S,
    control: S,
}

impl<S> PerMethod<S> {
    /// `make` gives the service with a limit on messages and on answers; `unary` and `stream` are those of methods that carry payloads, whose answers
    /// may have `answers` bytes.
    pub fn new(unary: usize, stream: usize, answers: usize, make: impl Fn(usize, usize) -> S) -> Self {
        Self { unary: make(unary, answers), stream: make(stream, answers), control: make(CONTROL_BYTES, CONTROL_ANSWER) }
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
