//! Several servers without a proxy: power of two choices by requests under way (tower), servers that fail set aside for a while,
//! failed requests tried at another within a retry budget.

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep};
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{Service, StdError};
use tonic::transport::{Channel, Error};
use tonic::{Code, Status};
use tower::ServiceExt;
use tower::balance::p2c::Balance;
use tower::buffer::Buffer;
use tower::discover::ServiceList;
use tower::load::Load;
use tower::retry::budget::{Budget, TpsBudget};
use tower::util::BoxCloneSyncService;

use crate::ClientError;

/// What calls go through: one connection, or a balanced set of them.
pub type Transport = BoxCloneSyncService<Request<Body>, Response<Body>, TransportError>;

/// What a connection failed with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TransportError(#[source] StdError);

/// A server that failed once is set aside for so long, twice as long after each further failure in a row, up to the limit.
const ASIDE: Duration = Duration::from_millis(500);
const LONGEST_ASIDE: Duration = Duration::from_secs(30);
/// A request that is given up after so long without an answer counts as a failure of its server; one that is given up sooner says nothing.
const SILENT: Duration = Duration::from_millis(250);
/// A server that is set aside is looked at again so often.
const RECHECK: Duration = Duration::from_millis(50);
/// Calls waiting for a connection to be ready.
const WAITING: usize = 1024;
/// Of the requests of the last seconds, so many may be tried again (and a few a second in any case).
const RETRIED: f32 = 0.2;
const RETRIES_A_SECOND: u32 = 10;
const BUDGET_SPAN: Duration = Duration::from_secs(10);
/// Tries of one request, the first included.
const MOST_TRIES: u32 = 4;
/// By so much more than it was asked for a client waits at most.
const HERD: f64 = 0.5;
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// When requests may be tried again.
#[derive(Clone)]
pub struct Retries(Arc<TpsBudget>);

impl std::fmt::Debug for Retries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Retries")
    }
}

impl Retries {
    pub(crate) fn new() -> Self {
        Self(Arc::new(TpsBudget::new(BUDGET_SPAN, RETRIES_A_SECOND, RETRIED)))
    }

    /// Counts a request that is sent for the first time.
    pub(crate) fn first(&self) {
        self.0.deposit();
    }

    /// How long to wait before try `next` (2 is the second) of a request that `error` ended with `left` of its time left; `None`: not at all.
    /// An inference changes nothing, so it may be repeated whatever became of it.
    pub(crate) fn after(&self, error: &ClientError, next: u32, left: Duration) -> Option<Duration> {
        // full jitter, so that those that failed together do not come back together; not before the server wants it, and not all just then
        let jitter = FIRST_PAUSE.mul_f64(f64::from(2u32.pow(next.min(10))) * rand::random::<f64>());
        let pause = jitter.max(pushback(error)?.mul_f64(1.0 + HERD * rand::random::<f64>()));
        (error.is_transient() && next <= MOST_TRIES && pause < left && self.0.withdraw()).then_some(pause)
    }
}

/// How long the server asks to be left alone; what is no such number, as -1, asks for no more tries (gRPC's proposal A6).
fn pushback(error: &ClientError) -> Option<Duration> {
    let ClientError::Server(status) = error else { return Some(Duration::ZERO) };
    let Some(asked) = status.metadata().get("grpc-retry-pushback-ms") else { return Some(Duration::ZERO) };
    asked.to_str().ok()?.parse().ok().map(Duration::from_millis)
}

/// This connection alone.
pub(crate) fn single(channel: Channel) -> Transport {
    Transport::new(channel.map_err(|e| TransportError(e.into())))
}

/// Power of two choices over these connections; those with `false` could not be made yet.
pub(crate) fn balanced(members: Vec<(Channel, bool)>) -> Transport {
    let states: Arc<[State]> = members.iter().map(|_| State::default()).collect();
    let member = |(place, (channel, up)): (usize, (Channel, bool))| {
        if !up {
            states[place].failed(Instant::now());
        }
        Member { channel, fleet: states.clone(), place, recheck: None }
    };
    let members: Vec<Member> = members.into_iter().enumerate().map(member).collect();
    let balance: Balance<_, Request<Body>> = Balance::new(ServiceList::new::<Request<Body>>(members));
    Transport::new(Buffer::new(balance, WAITING).map_err(TransportError))
}

/// One server's connection.
struct Member {
    channel: Channel,
    /// Of all members.
    fleet: Arc<[State]>,
    place: usize,
    /// While it is set aside.
    recheck: Option<Pin<Box<Sleep>>>,
}

#[derive(Default)]
struct State {
    under_way: AtomicU32,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    failures: u32,
    aside_until: Option<Instant>,
}

/// A request under way at a member.
struct UnderWay {
    fleet: Arc<[State]>,
    place: usize,
    began: Instant,
    ended: bool,
}

impl Member {
    fn state(&self) -> &State {
        &self.fleet[self.place]
    }

    /// Set aside, and somebody else is not: where all are, trying is better than waiting.
    fn is_avoided(&self, now: Instant) -> bool {
        self.state().is_aside(now) && self.fleet.iter().any(|s| !s.is_aside(now))
    }
}

impl State {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, now: Instant) {
        let mut health = self.health();
        let aside = ASIDE.saturating_mul(1 << health.failures.min(16)).min(LONGEST_ASIDE);
        health.failures = health.failures.saturating_add(1);
        health.aside_until = Some(now + aside);
    }

    fn is_aside(&self, now: Instant) -> bool {
        self.health().aside_until.is_some_and(|until| now < until)
    }

    fn answered(&self) {
        *self.health() = Health::default();
    }
}

impl UnderWay {
    fn begin(member: &Member) -> Self {
        member.state().under_way.fetch_add(1, Ordering::Relaxed);
        Self { fleet: member.fleet.clone(), place: member.place, began: Instant::now(), ended: false }
    }

    fn state(&self) -> &State {
        &self.fleet[self.place]
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.state().under_way.fetch_sub(1, Ordering::Relaxed);
        // given up without a word from the server: it may hang
        if !self.ended && self.began.elapsed() >= SILENT {
            self.state().failed(Instant::now());
        }
    }
}

impl Load for Member {
    /// Set aside or not, then requests under way: a dead server fails fast, and would look idle.
    type Metric = (bool, u32);

    fn load(&self) -> Self::Metric {
        (self.state().is_aside(Instant::now()), self.state().under_way.load(Ordering::Relaxed))
    }
}

impl Service<Request<Body>> for Member {
    type Response = Response<Body>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while self.is_avoided(Instant::now()) {
            let recheck = self.recheck.get_or_insert_with(|| Box::pin(sleep(RECHECK)));
            std::task::ready!(recheck.as_mut().poll(context));
            self.recheck = None;
        }
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut under_way = UnderWay::begin(self);
        let calling = self.channel.call(request);
        Box::pin(async move {
            let answer = calling.await;
            under_way.ended = true;
            let state = under_way.state();
            match &answer {
                Err(_) => state.failed(Instant::now()),
                Ok(response) => match Status::from_header_map(response.headers()).map(|s| s.code()) {
                    Some(Code::Unavailable) => state.failed(Instant::now()),
                    // it is there and says something, be it that it is busy
                    _ => state.answered(),
                },
            }
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn who_fails_is_set_aside_for_longer_each_time() {
        let (state, mut now) = (State::default(), Instant::now());
        assert!(!state.is_aside(now));
        for expected in [500, 1000, 2000] {
            state.failed(now);
            assert!(state.is_aside(now + (expected - 1) * MS), "{expected}");
            now += expected * MS;
            assert!(!state.is_aside(now), "{expected}");
        }
        state.failed(now);
        state.answered();
        assert!(!state.is_aside(now));
        for _ in 0..100 {
            state.failed(now);
        }
        assert!(!state.is_aside(now + LONGEST_ASIDE));
    }

    #[test]
    fn retries_stay_within_their_budget() {
        let retries = Retries::new();
        let (away, second) = (ClientError::from(Status::unavailable("")), Duration::from_secs(1));
        assert!(retries.after(&Status::invalid_argument("").into(), 2, second).is_none());
        assert!(retries.after(&ClientError::Deadline(second), 2, second).is_none());
        assert!(retries.after(&away, MOST_TRIES + 1, second).is_none());
        assert!(retries.after(&away, 2, Duration::ZERO).is_none());
        let mut busy = Status::resource_exhausted("");
        busy.metadata_mut().insert("grpc-retry-pushback-ms", "300".parse().unwrap());
        let busy = ClientError::from(busy);
        assert!(retries.after(&busy, 2, second).is_some_and(|pause| pause >= 300 * MS));
        assert!(retries.after(&busy, 2, 200 * MS).is_none(), "no time for what the server asks");
        let mut never = Status::resource_exhausted("");
        never.metadata_mut().insert("grpc-retry-pushback-ms", "-1".parse().unwrap());
        assert!(retries.after(&never.into(), 2, second).is_none());
        for _ in 0..1000 {
            retries.first();
        }
        let granted = (0..1000).filter(|_| retries.after(&away, 2, second).is_some()).count();
        let reserve = (RETRIES_A_SECOND * BUDGET_SPAN.as_secs() as u32) as usize;
        assert!((180..=210 + reserve).contains(&granted), "{granted} of 1000");
    }
}
