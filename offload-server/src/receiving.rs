//! Bytes of messages that are being received or answered, bounded by tenant: a call is admitted before its message has come, and a message
//! that never ends must not keep out, or take down, those of others.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use crate::answering::until_taken;
use crate::telemetry;
use crate::tenants::Tenant;

/// Bytes are counted in pieces of so many.
pub const PIECE: usize = 64 << 10;

/// What a call holds of its tenant's bytes; given back when the last handle is dropped.
#[derive(Debug, Default)]
pub struct Held(Mutex<Vec<OwnedSemaphorePermit>>);

impl Held {
    fn pieces(&self) -> MutexGuard<'_, Vec<OwnedSemaphorePermit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `request` holds: to be kept until it is answered.
pub fn of<T>(request: &tonic::Request<T>) -> Option<Arc<Held>> {
    request.extensions().get().cloned()
}

/// Counts bodies of which something may still come, and open streams.
#[derive(Debug, Clone, Default)]
pub struct Open(Arc<AtomicUsize>);

/// Counts until it is dropped.
#[derive(Debug)]
pub struct Opened(Arc<AtomicUsize>);

impl Open {
    /// One more.
    pub fn enter(&self) -> Opened {
        self.0.fetch_add(1, Ordering::AcqRel);
        Opened(self.0.clone())
    }

    /// True if there is none.
    pub fn is_none(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A service whose requests' bytes count as their tenant's, and whose answers are dropped if nobody takes them.
#[derive(Clone)]
pub struct Receiving<S> {
    service: S,
    /// A message that has come is no longer counted: it is a request in flight.
    streams: bool,
    open: Open,
    idle: Duration,
}

impl<S> Receiving<S> {
    /// `streams`: of many messages; `open` counts bodies both ways; answers may rest for as long as `idle`.
    pub fn new(service: S, streams: bool, open: Open, idle: Duration) -> Self {
        Self { service, streams, open, idle }
    }
}

impl<S: NamedService> NamedService for Receiving<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Receiving<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let Some(tenant) = request.extensions().get::<Arc<Tenant>>().cloned() else { return Box::pin(self.service.call(request)) };
        let held = Arc::new(Held::default());
        request.extensions_mut().insert(held.clone());
        let (streams, open, idle) = (self.streams, self.open.enter(), self.idle);
        let answering = self.open.enter();
        let counted = |body| Body::new(Counted { body, tenant, held, message: Message::default(), streams, come: 0, _open: open });
        let answered = self.service.call(request.map(counted));
        Box::pin(async move { Ok(until_taken(answered.await?, idle, answering)) })
    }
}

/// How much of the message that comes now has come.
#[derive(Debug, Default)]
struct Message {
    /// Of the five bytes before a message: flag and length.
    header: [u8; 5],
    have: usize,
    left: usize,
    come: usize,
}

impl Message {
    /// Goes on by `data`; bytes of a message that is not whole yet.
    fn advance(&mut self, mut data: &[u8]) -> usize {
        while !data.is_empty() {
            let n = if self.have < self.header.len() {
                let n = data.len().min(self.header.len() - self.have);
                self.header[self.have..self.have + n].copy_from_slice(&data[..n]);
                self.have += n;
                if self.have == self.header.len() {
                    let [_, length @ ..] = self.header;
                    self.left = u32::from_be_bytes(length) as usize;
                }
                n
            } else {
                let n = data.len().min(self.left);
                self.left -= n;
                n
            };
            self.come += n;
            data = &data[n..];
            if self.have == self.header.len() && self.left == 0 {
                (self.have, self.come) = (0, 0);
            }
        }
        self.come
    }
}

/// A body that counts what it gave.
struct Counted {
    body: Body,
    tenant: Arc<Tenant>,
    held: Arc<Held>,
    message: Message,
    streams: bool,
    come: usize,
    _open: Opened,
}

impl Counted {
    fn count(&mut self, data: &[u8]) -> Result<(), Status> {
        // a single message counts once it is whole, too
        self.come = if self.streams { self.message.advance(data) } else { self.come + data.len() };
        let mut held = self.held.pieces();
        held.truncate(self.come.div_ceil(PIECE));
        while held.len() < self.come.div_ceil(PIECE) {
            let piece = self.tenant.receive().inspect_err(|error| telemetry::refused(error, Some(&self.tenant)))?;
            held.push(piece);
        }
        Ok(())
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|f| f.as_ref().ok()).and_then(Frame::data_ref) {
            self.count(data)?;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_followed_whatever_their_pieces() {
        let whole: Vec<u8> = [[&[0, 0, 0, 0, 3][..], b"abc"].concat(), vec![0; 5], [&[1, 0, 0, 1, 0][..], &[7; 256]].concat()].concat();
        for size in 1..40 {
            let mut message = Message::default();
            let come: Vec<usize> = whole.chunks(size).map(|piece| message.advance(piece)).collect();
            assert_eq!(come.last(), Some(&0), "pieces of {size}");
            assert!(come.iter().all(|n| *n <= 261), "{come:?}");
        }
        let mut message = Message::default();
        assert_eq!(message.advance(&whole[..6]), 6);
        assert_eq!(message.advance(&whole[6..9]), 1);
    }
}
