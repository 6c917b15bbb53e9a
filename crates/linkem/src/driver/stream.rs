//! Stream level: byte streams that behave as if they ran over the link. Needs no privileges.
//!
//! Bytes are cut into segments, which go through the core one by one; all streams of a [`StreamLink`] share its two
//! directions. A byte stream cannot lose or reorder, so loss and reordering are left out, and a full queue stops the
//! senders instead of dropping: say so in every result ([`EMULATION`]). Real TCP's congestion control is not in play.
//! Connecting costs a round trip.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex, split};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::timer::Timer;
use crate::config::{DirectionConfig, JitterConfig, LinkConfig};
use crate::direction::Direction;
use crate::error::LinkError;
use crate::lateness::Lateness;

/// How results made with this driver are marked.
pub const EMULATION: &str = "stream";
/// Payload of a full TCP segment on Ethernet, with timestamps; the 52 bytes of headers come on top.
const SEGMENT: usize = 1448;
const HEADERS: u32 = 52;
/// Bytes between the application and the link, each way.
const BUFFER: usize = 64 << 10;
/// Queue where the description sets no bound in bytes.
const DEFAULT_QUEUE: u64 = 1 << 20;
/// Bytes of one stream and direction under way, like TCP's receive window: a reader that does not read stops its sender.
const WINDOW: usize = 4 << 20;

/// A segment, where it goes, and its place in the window.
struct Segment {
    bytes: Vec<u8>,
    to: mpsc::UnboundedSender<(Vec<u8>, OwnedSemaphorePermit)>,
    place: OwnedSemaphorePermit,
}

/// One direction, shared by all streams.
struct Lane {
    direction: Mutex<Direction<Segment>>,
    bound: u64,
    start: Instant,
    lateness: Lateness,
    offered: Notify,
    drained: Notify,
}

/// A link that streams run over.
pub struct StreamLink {
    up: Arc<Lane>,
    down: Arc<Lane>,
    round_trip: Duration,
    _dispatchers: JoinSet<()>,
}

/// A stream over a [`StreamLink`]; dropping it closes both directions.
#[derive(Debug)]
pub struct ShapedStream {
    near: DuplexStream,
    _tasks: JoinSet<()>,
}

/// What a link's description asks for and this level leaves out.
pub fn ignored(link: &LinkConfig) -> Vec<String> {
    let any = |asks: fn(&DirectionConfig) -> bool| asks(&link.up) || asks(&link.down);
    let all = [
        ("loss", any(|d| d.loss.is_some())),
        ("reordering", any(|d| d.jitter.as_ref().is_some_and(|j| j.reorder))),
        ("CoDel", any(|d| d.queue.as_ref().is_some_and(|q| q.codel))),
        ("the queue's limit in packets", any(|d| d.queue.as_ref().is_some_and(|q| q.packets.is_some()))),
    ];
    all.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name.to_owned()).collect()
}

/// A direction without what a byte stream cannot show.
fn lossless(config: &DirectionConfig) -> DirectionConfig {
    let jitter = config.jitter.clone().map(|j| JitterConfig { reorder: false, ..j });
    DirectionConfig { loss: None, queue: None, jitter, overhead: config.overhead + HEADERS, ..config.clone() }
}

impl Lane {
    fn new(config: &DirectionConfig, folder: &Path, seed: u64, start: Instant, lateness: Lateness) -> Result<Self, LinkError> {
        let direction = Mutex::new(Direction::new(&lossless(config), folder, seed)?);
        let bound = config.queue.as_ref().and_then(|q| q.bytes).unwrap_or(DEFAULT_QUEUE);
        Ok(Self { direction, bound, start, lateness, offered: Notify::new(), drained: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Direction<Segment>> {
        self.direction.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Hands segments over when they are due.
    async fn dispatch(&self, timer: Timer) -> io::Result<()> {
        loop {
            let deadline = self.lock().next_deadline();
            tokio::select! {
                waited = timer.until(self.start + deadline.unwrap_or_default()), if deadline.is_some() => waited?,
                () = self.offered.notified() => {}
            }
            let arrived = self.lock().poll(self.now());
            for (due, segment) in arrived {
                self.lateness.record(due, self.now());
                // the stream may be gone; its segments still took their time on the link
                let _ = segment.to.send((segment.bytes, segment.place));
            }
            self.drained.notify_waiters();
        }
    }

    /// Takes bytes from `from` as fast as the queue lets it.
    async fn take(&self, mut from: impl AsyncRead + Unpin, to: mpsc::UnboundedSender<(Vec<u8>, OwnedSemaphorePermit)>) -> io::Result<()> {
        let window = Arc::new(Semaphore::new(WINDOW));
        let mut buffer = vec![0; SEGMENT];
        loop {
            let n = from.read(&mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            let place = window.clone().acquire_many_owned(n as u32).await.map_err(io::Error::other)?;
            let mut segment = Some(Segment { bytes: buffer[..n].to_vec(), to: to.clone(), place });
            loop {
                let drained = self.drained.notified();
                tokio::pin!(drained);
                drained.as_mut().enable();
                if let Some(segment) = self.offer(&mut segment, n as u32) {
                    drop(segment);
                    return Err(io::Error::other("the link dropped a segment of a stream"));
                }
                if segment.is_none() {
                    break;
                }
                drained.await;
            }
        }
    }

    /// Offers the segment if there is room; gives it back if the core refused it.
    fn offer(&self, segment: &mut Option<Segment>, bytes: u32) -> Option<Segment> {
        let mut direction = self.lock();
        if direction.queued_bytes() >= self.bound {
            return None;
        }
        let refused = segment.take().and_then(|s| direction.offer(self.now(), s, bytes).err());
        self.offered.notify_one();
        refused.map(|(_, segment)| segment)
    }
}

/// Writes what has arrived; ends when no more can come.
async fn give(mut arrived: mpsc::UnboundedReceiver<(Vec<u8>, OwnedSemaphorePermit)>, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    while let Some((bytes, _place)) = arrived.recv().await {
        to.write_all(&bytes).await?;
        if arrived.is_empty() {
            to.flush().await?;
        }
    }
    to.shutdown().await
}

impl StreamLink {
    /// A link that starts now: steps, traces and outages count from here. `folder` is where trace files are. Must be
    /// made inside a tokio runtime.
    ///
    /// # Errors
    /// Names the key that is wrong, or says that no timer could be made.
    pub fn start(config: &LinkConfig, folder: &Path, seed: u64) -> Result<Self, LinkError> {
        config.check(folder)?;
        let (start, lateness) = (Instant::now(), Lateness::new()?);
        let up = Arc::new(Lane::new(&config.up, folder, seed, start, lateness.clone())?);
        let down = Arc::new(Lane::new(&config.down, folder, !seed, start, lateness)?);
        let mut dispatchers = JoinSet::new();
        for lane in [up.clone(), down.clone()] {
            let timer = Timer::new().map_err(|e| LinkError::new("timer", e.to_string()))?;
            dispatchers.spawn(async move {
                let _ = lane.dispatch(timer).await;
            });
        }
        Ok(Self { up, down, round_trip: config.up.delay + config.down.delay, _dispatchers: dispatchers })
    }

    /// How late the emulator was, both directions together.
    pub fn lateness(&self) -> &Lateness {
        &self.up.lateness
    }

    /// Connects by `connecting` and puts the link around the stream. Takes a round trip of the link more.
    ///
    /// # Errors
    /// Those of `connecting`.
    pub async fn connect<S>(&self, connecting: impl Future<Output = io::Result<S>>) -> io::Result<ShapedStream>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let when = Instant::now() + self.round_trip;
        let far = connecting.await?;
        Timer::new()?.until(when).await?;
        Ok(self.wrap(far))
    }

    /// Puts the link around `far`.
    pub fn wrap<S>(&self, far: S) -> ShapedStream
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (near, inside) = duplex(BUFFER);
        let ((from_near, to_near), (from_far, to_far)) = (split(inside), split(far));
        let ((up, sent), (down, returned)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let mut tasks = JoinSet::new();
        let (lane_up, lane_down) = (self.up.clone(), self.down.clone());
        // an error ends its direction by dropping its half of the stream
        tasks.spawn(async move { drop(lane_up.take(from_near, up).await) });
        tasks.spawn(async move { drop(lane_down.take(from_far, down).await) });
        tasks.spawn(async move { drop(give(sent, to_far).await) });
        tasks.spawn(async move { drop(give(returned, to_near).await) });
        ShapedStream { near, _tasks: tasks }
    }
}

impl AsyncRead for ShapedStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.near).poll_read(context, buffer)
    }
}

impl AsyncWrite for ShapedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.near).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.near).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.near).poll_shutdown(context)
    }
}
