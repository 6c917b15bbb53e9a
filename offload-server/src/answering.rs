//! Answers until the transport has taken them. A client that reads slowly, or not at all, keeps its answer in memory: meanwhile that is a request
//! in flight, which counts against the tenant's quota and holds up a drain, and it is dropped when nothing of it is taken for too long.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body as _, Frame};
use tokio::task::AbortHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

use crate::ServerError;
use crate::pipeline::Places;
use crate::receiving::Opened;

/// The transport asks for more when a client has room for some; what it has is out of reach until the stream or its connection ends. So it gets no more
/// than this at once: a frame.
const SLICE: usize = 16 << 10;

/// What a response holds until it has been taken, as an extension of it.
#[derive(Clone)]
pub struct Kept(#[allow(dead_code, reason = "held, not read")] Arc<Places>);

impl Kept {
    /// Puts `places` beside `message`.
    pub fn beside<T>(message: T, places: Option<Places>) -> tonic::Response<T> {
        let mut response = tonic::Response::new(message);
        if let Some(places) = places {
            response.extensions_mut().insert(Self(Arc::new(places)));
        }
        response
    }
}

/// `response`, dropped if nothing of it is taken for somewhat longer than `limit`; `open` counts until it has all been.
pub fn until_taken(mut response: http::Response<Body>, limit: Duration, open: Opened) -> http::Response<Body> {
    if response.body().is_end_stream() {
        return response;
    }
    let kept = response.extensions_mut().remove::<Kept>();
    response.map(|body| {
        let answer = Answer { body, rest: Bytes::new(), kept, _open: open };
        let shared = Arc::new(Mutex::new(State { answer: Some(answer), unasked: Some(Instant::now()) }));
        // a little later than a stream's own limits, which tell why
        let watch = tokio::spawn(drop_untaken(Arc::downgrade(&shared), limit + limit / 4)).abort_handle();
        Body::new(Taken { shared, watch })
    })
}

struct Answer {
    body: Body,
    /// Of the last piece of data.
    rest: Bytes,
    kept: Option<Kept>,
    _open: Opened,
}

struct State {
    /// None if it was dropped, or is done.
    answer: Option<Answer>,
    /// When the transport got something; none if it has asked for more since.
    unasked: Option<Instant>,
}

fn locked(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops an answer that the transport does not ask for.
async fn drop_untaken(shared: Weak<Mutex<State>>, limit: Duration) {
    loop {
        let left = {
            let Some(shared) = shared.upgrade() else { return };
            let mut state = locked(&shared);
            let left = state.unasked.map_or(limit, |since| limit.saturating_sub(since.elapsed()));
            if left.is_zero() {
                let untaken = state.answer.take();
                drop(state);
                drop(untaken);
                tracing::debug!("an answer was dropped: nobody took it");
                return;
            }
            left
        };
        tokio::time::sleep(left).await;
    }
}

struct Taken {
    shared: Arc<Mutex<State>>,
    watch: AbortHandle,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl http_body::Body for Taken {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut state = locked(&self.shared);
        state.unasked = None;
        let Some(answer) = state.answer.as_mut() else {
            let mut trailers = http::HeaderMap::new();
            Status::from(ServerError::Deadline("waiting to be read by the client")).add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        };
        if answer.rest.is_empty() {
            match ready!(Pin::new(&mut answer.body).poll_frame(context)).transpose()?.map(Frame::into_data) {
                Some(Ok(data)) => answer.rest = data,
                // trailers, or the end: the client knows that it has everything, and may ask again
                ended => {
                    answer.kept = None;
                    return Poll::Ready(ended.and_then(Result::err).map(Ok));
                }
            }
        }
        let slice = answer.rest.split_to(answer.rest.len().min(SLICE));
        state.unasked = Some(Instant::now());
        Poll::Ready(Some(Ok(Frame::data(slice))))
    }

    fn is_end_stream(&self) -> bool {
        locked(&self.shared).answer.as_ref().is_some_and(|answer| answer.rest.is_empty() && answer.body.is_end_stream())
    }
}
