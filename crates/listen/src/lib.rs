//! A bound on open connections: each may hold header tables, windows and half-read messages before anything of it is
//! admitted.

pub mod admin;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// A connection that says nothing for so long after it was opened is closed: it would hold its place for ever.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// A connection that counts against the bound while it lives.
#[derive(Debug)]
pub struct Counted {
    stream: TcpStream,
    /// Until the first byte has come.
    silent: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

/// The connections of `listener`; those beyond `most` are closed at once, and `refused` is called.
pub fn at_most(most: usize, listener: TcpListener, refused: fn()) -> impl Stream<Item = io::Result<Counted>> {
    let places = Arc::new(Semaphore::new(most));
    TcpIncoming::from(listener).with_nodelay(Some(true)).filter_map(move |accepted| match accepted {
        Ok(stream) => match places.clone().try_acquire_owned() {
            Ok(place) => Some(Ok(Counted { stream, silent: Some(Box::pin(sleep(FIRST_BYTE))), _place: place })),
            Err(_) => {
                refused();
                None
            }
        },
        Err(e) => Some(Err(e)),
    })
}

/// Spreads connections over `n` servers in turn, until `stop`: the servers differ in the age that they let connections reach, so that those
/// that came together do not come back together.
pub fn in_turn<C: Send + 'static>(
    incoming: impl Stream<Item = io::Result<C>> + Send + 'static,
    n: usize,
    stop: CancellationToken,
) -> Vec<ReceiverStream<io::Result<C>>> {
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..n.max(1)).map(|_| mpsc::channel(1)).unzip();
    tokio::spawn(async move {
        let mut incoming = std::pin::pin!(incoming);
        for turn in senders.iter().cycle() {
            let Some(Some(connection)) = stop.run_until_cancelled(incoming.next()).await else { return };
            if turn.send(connection).await.is_err() {
                return;
            }
        }
    });
    receivers.into_iter().map(ReceiverStream::new).collect()
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.silent = None;
        } else if self.silent.as_mut().is_some_and(|s| s.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "nothing came after the connection was opened")));
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
