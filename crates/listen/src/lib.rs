//! A bound on open connections, in all and of one peer: each may hold header tables, windows and half-read messages before
//! anything of it is admitted.

pub mod admin;

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
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
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Descriptors beside those of connections: listeners, files, the admin listener's connections, libtorch.
const OTHER_DESCRIPTORS: u64 = 192;

/// How many connections may be open at once.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// In all.
    pub most: usize,
    /// From one address, or one IPv6 network of 64 bits: who has one has all of its addresses.
    pub each_peer: usize,
}

/// Open connections by peer: no more entries than places.
type Peers = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// Holds a peer's place until it is dropped.
#[derive(Debug)]
struct PeerPlace {
    peers: Peers,
    peer: IpAddr,
}

impl PeerPlace {
    fn take(peers: &Peers, address: IpAddr, most: usize) -> Option<Self> {
        let peer = match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
            v4 => v4,
        };
        let mut open = peers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(peer).or_default();
        (*count < most).then(|| {
            *count += 1;
            Self { peers: peers.clone(), peer }
        })
    }
}

impl Drop for PeerPlace {
    fn drop(&mut self) {
        let mut open = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

/// A connection that counts against the bounds while it lives.
#[derive(Debug)]
pub struct Counted {
    stream: TcpStream,
    /// Until the first byte has to have come, or, where that is bounded, the next answer have begun.
    silent: Option<Pin<Box<Sleep>>>,
    /// How long a connection may be without an answer after its last one, if not for ever.
    idle: Option<Duration>,
    _places: (OwnedSemaphorePermit, PeerPlace),
}

impl Counted {
    /// Notes that some of an answer has gone out.
    fn wrote(&mut self, written: &Poll<io::Result<usize>>) {
        if let (Some(idle), Poll::Ready(Ok(_))) = (self.idle, written) {
            self.silent = Some(Box::pin(sleep(idle)));
        }
    }

    fn new(stream: TcpStream, idle: Option<Duration>, places: (OwnedSemaphorePermit, PeerPlace)) -> Self {
        Self { stream, silent: Some(Box::pin(sleep(FIRST_BYTE))), idle, _places: places }
    }
}

/// Open connections, in all and by peer.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    all: Arc<Semaphore>,
    peers: Peers,
    bounds: Bounds,
}

impl Places {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Self { all: Arc::new(Semaphore::new(bounds.most)), peers: Peers::default(), bounds }
    }

    /// The connection with its places, if there are any.
    pub(crate) fn admit(&self, stream: TcpStream, idle: Option<Duration>) -> Option<Counted> {
        let place = self.all.clone().try_acquire_owned().ok()?;
        // one that has left already has no address
        let address = stream.peer_addr().ok()?;
        let of_peer = PeerPlace::take(&self.peers, address.ip(), self.bounds.each_peer)?;
        Some(Counted::new(stream, idle, (place, of_peer)))
    }
}

/// Waits after a connection could not be taken: most often descriptors are used up, and the next attempt would fail at once.
pub(crate) async fn not_accepted(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    sleep(ACCEPT_AGAIN).await;
}

/// How many of the `wanted` connections there are descriptors for, after the process's soft limit was raised as far as it may be.
pub fn places(wanted: usize) -> usize {
    let needed = wanted as u64 + OTHER_DESCRIPTORS;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return wanted;
    }
    let raised = limit.maximum.map_or(needed, |most| most.min(needed));
    let now = match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limit }) {
        Ok(()) => raised,
        Err(_) => limit.current.unwrap_or(raised),
    };
    let places = now.saturating_sub(OTHER_DESCRIPTORS).max(1).min(wanted as u64) as usize;
    if places < wanted {
        tracing::warn!(
            descriptors = now,
            needed,
            connections = places,
            "fewer connections than max_connections: raise the limit of open files (ulimit -n)"
        );
    }
    places
}

/// The connections of `listener`; those beyond the bounds are closed at once, and `refused` is called.
pub fn bounded(bounds: Bounds, listener: TcpListener, refused: fn()) -> impl Stream<Item = io::Result<Counted>> {
    let places = Places::new(bounds);
    let accepted = TcpIncoming::from(listener).with_nodelay(Some(true)).then(move |accepted| {
        let admitted = accepted.map(|stream| {
            places.admit(stream, None).or_else(|| {
                refused();
                None
            })
        });
        async {
            match admitted {
                Ok(connection) => connection,
                Err(error) => {
                    not_accepted(&error).await;
                    None
                }
            }
        }
    });
    accepted.filter_map(|connection| connection.map(Ok))
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
        let come = buffer.filled().len() > before;
        if come && self.idle.is_none() {
            self.silent = None;
        } else if self.silent.as_mut().is_some_and(|s| s.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "nothing came, or no question was complete, for too long")));
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(&written);
        written
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.wrote(&written);
        written
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
