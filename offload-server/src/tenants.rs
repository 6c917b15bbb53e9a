//! Who asks: tenants known by a bearer token or a client certificate, their quotas and shares.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use isthmus_codec::bundle::sha256;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Status};

use crate::receiving::PIECE;
use crate::{Config, ServerError, telemetry};

/// Calls beyond `max_in_flight` requests whose message has not been read: a request is refused with reasons, a call is not.
const SPARE_CALLS: usize = 16;
const ANONYMOUS: &str = "anonymous";
const MOST: usize = 1000;

/// A tenant, as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// Name in metrics and logs.
    pub name: String,
    /// SHA-256 (hexadecimal) of the bearer token that it sends.
    #[serde(default)]
    pub token_sha256: Option<String>,
    /// SHA-256 (hexadecimal) of its client certificate in DER form; needs `tls_client_ca`.
    #[serde(default)]
    pub certificate_sha256: Option<String>,
    /// Share of the network's time, relative to the others of the same priority.
    #[serde(default = "one")]
    pub weight: f64,
    /// Most requests between arrival and answer; 0: as many as the server takes.
    #[serde(default)]
    pub max_in_flight: usize,
    /// Most requests a second, as many at once; 0: no bound.
    #[serde(default)]
    pub requests_per_second: u32,
    /// The most urgent `priority` that it may ask for, 1 being the most urgent of all; absent: the middle, which requests have that ask for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_urgent: Option<u8>,
    /// May load and unload models and set log levels, where `model_control` is on.
    #[serde(default)]
    pub operator: bool,
}

fn one() -> f64 {
    1.0
}

/// A tenant at work.
#[derive(Debug)]
pub struct Tenant {
    /// Number in the network's queue.
    pub index: u32,
    /// Name in metrics and logs.
    pub name: String,
    /// Share of the network's time.
    pub weight: f64,
    /// May change models.
    pub operator: bool,
    /// The most urgent priority that it may ask for, from 1.
    pub most_urgent: Option<u8>,
    quota: Option<(usize, Arc<Semaphore>)>,
    rate: Option<(usize, DefaultDirectRateLimiter)>,
    calls: Places,
    requests: Places,
    streams: Places,
    /// Of received bytes, in pieces.
    bytes: Places,
}

/// What all tenants have together.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Requests between arrival and answer.
    pub requests: usize,
    /// Open streams.
    pub streams: usize,
    /// Bytes of messages that are being received, or answered one by one.
    pub bytes: usize,
}

impl Capacity {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self { requests: config.max_in_flight, streams: config.max_streams, bytes: config.max_received_bytes }
    }

    /// Places for calls, requests, streams and pieces of bytes.
    fn all(self) -> [usize; 4] {
        [self.requests + SPARE_CALLS, self.requests, self.streams, self.bytes / PIECE]
    }
}

/// Places that a tenant has for itself, and those that it shares with all others: whoever takes all of the shared ones leaves others theirs.
#[derive(Debug, Clone)]
struct Places {
    own: Arc<Semaphore>,
    shared: Arc<Semaphore>,
    /// Of both together.
    most: usize,
}

impl Places {
    /// Half of `all` is kept for tenants by their weights, the rest is for everybody.
    fn divide(all: usize, weights: &[f64]) -> Vec<Self> {
        let sum: f64 = weights.iter().sum();
        let own: Vec<usize> = weights.iter().map(|w| (0.5 * all as f64 * w / sum) as usize).collect();
        let left = all - own.iter().sum::<usize>();
        let shared = Arc::new(Semaphore::new(left));
        own.into_iter().map(|n| Self { own: Arc::new(Semaphore::new(n)), shared: shared.clone(), most: n + left }).collect()
    }

    fn take(&self) -> Option<OwnedSemaphorePermit> {
        let take = |from: &Arc<Semaphore>| from.clone().try_acquire_owned().ok();
        take(&self.own).or_else(|| take(&self.shared))
    }

    /// All of `n`, or none.
    fn take_many(&self, n: usize) -> Option<Vec<OwnedSemaphorePermit>> {
        (0..n).map(|_| self.take()).collect()
    }
}

/// What requests that came together hold of their tenant's.
pub struct Entered {
    _quota: Option<OwnedSemaphorePermit>,
    _places: Vec<OwnedSemaphorePermit>,
}

impl Tenant {
    /// As configured.
    fn new(index: usize, config: &TenantConfig, [calls, requests, streams, bytes]: [Places; 4]) -> Self {
        let rate = NonZeroU32::new(config.requests_per_second);
        let most = config.max_in_flight;
        Self {
            index: index as u32,
            name: config.name.clone(),
            weight: config.weight,
            operator: config.operator,
            most_urgent: config.most_urgent,
            quota: (most > 0).then(|| (most, Arc::new(Semaphore::new(most)))),
            rate: rate.map(|n| (n.get() as usize, RateLimiter::direct(Quota::per_second(n)))),
            calls,
            requests,
            streams,
            bytes,
        }
    }

    /// A tenant with places for itself alone.
    #[cfg(test)]
    pub(crate) fn alone(index: usize, config: &TenantConfig) -> Self {
        let places = || Places { own: Arc::new(Semaphore::new(64)), shared: Arc::new(Semaphore::new(0)), most: 64 };
        Self::new(index, config, std::array::from_fn(|_| places()))
    }

    /// Most requests that may come together, by quota, rate, and the places that it may take.
    pub fn at_once(&self) -> usize {
        let (quota, rate) = (self.quota.as_ref().map(|q| q.0), self.rate.as_ref().map(|r| r.0));
        quota.into_iter().chain(rate).fold(self.requests.most, usize::min)
    }

    /// A place for a stream.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if there is none.
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, ServerError> {
        self.streams.take().ok_or(ServerError::busy("too many streams are open"))
    }

    /// Room for one more piece of what is received.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if there is none.
    pub fn receive(&self) -> Result<OwnedSemaphorePermit, ServerError> {
        self.bytes.take().ok_or(ServerError::busy("too many bytes are being received"))
    }

    /// Places for `n` requests that come together, within the tenant's quotas: all of them or none, and nothing is used up by those that are refused.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if they are used up; with a rate, it says when all `n` would be let in. [`ServerError::Invalid`] if so many never are.
    pub fn enter(&self, n: usize) -> Result<Entered, ServerError> {
        let count = NonZeroU32::new(u32::try_from(n).unwrap_or(u32::MAX)).unwrap_or(NonZeroU32::MIN);
        let quota = self.quota.clone().map(|(_, q)| q.try_acquire_many_owned(count.get())).transpose();
        let quota = quota.map_err(|_| ServerError::busy("this tenant has as many requests in flight as it may"))?;
        let places = self.requests.take_many(n).ok_or(ServerError::busy("too many requests in flight"))?;
        if let Some((most, rate)) = &self.rate {
            let never = |_| ServerError::Invalid(format!("{n} requests at once; this tenant may send {most} a second"));
            if let Err(early) = rate.check_n(count).map_err(never)? {
                let retry = early.wait_time_from(DefaultClock::default().now());
                return Err(ServerError::Busy { why: "this tenant sends more requests a second than it may", retry });
            }
        }
        Ok(Entered { _quota: quota, _places: places })
    }
}

/// All tenants.
#[derive(Clone)]
pub struct Tenants {
    tokens: Arc<HashMap<String, Arc<Tenant>>>,
    certificates: Arc<HashMap<String, Arc<Tenant>>>,
    anonymous: Option<Arc<Tenant>>,
}

/// A SHA-256 as [`sha256`] writes it.
fn fingerprint(what: &str, text: &str) -> Result<String, ServerError> {
    if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        let hash = text.to_ascii_lowercase();
        if hash == sha256(b"") {
            return Err(ServerError::Config(format!(
                "{what}: this is the hash of nothing: the file that it was made of was empty or missing"
            )));
        }
        return Ok(hash);
    }
    Err(ServerError::Config(format!("{what}: 64 hexadecimal digits are wanted")))
}

impl Tenants {
    /// Those of the configuration, who share `capacity`, and somewhat more places for calls; without any, everybody is one tenant.
    ///
    /// # Errors
    /// [`ServerError::Config`] says which entry is wrong.
    pub fn new(configs: &[TenantConfig], capacity: Capacity) -> Result<Self, ServerError> {
        let (mut tokens, mut certificates) = (HashMap::new(), HashMap::new());
        let wrong = |name: &str, why: &str| Err(ServerError::Config(format!("tenant {name:?}: {why}")));
        if configs.len() > MOST {
            return Err(ServerError::Config(format!("at most {MOST} tenants")));
        }
        let weights: Vec<f64> = configs.iter().map(|c| c.weight.clamp(1e-3, 1e3)).collect();
        let shares = capacity.all().map(|all| Places::divide(all, &weights));
        for (i, config) in configs.iter().enumerate() {
            let places = shares.each_ref().map(|of| of[i].clone());
            let name = &config.name;
            let plain = !name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            if !plain || name == ANONYMOUS || configs[..i].iter().any(|c| c.name == *name) {
                return wrong(name, "a name of its own, of letters, digits, - _ and . is wanted");
            }
            if !(config.weight.is_finite() && (1e-3..=1e3).contains(&config.weight)) {
                return wrong(name, "weight is from 0.001 to 1000");
            }
            if config.most_urgent == Some(0) {
                return wrong(name, "most_urgent is from 1");
            }
            let tenant = Arc::new(Tenant::new(i + 1, config, places));
            let mut known = false;
            for (map, key, text) in
                [(&mut tokens, "token_sha256", &config.token_sha256), (&mut certificates, "certificate_sha256", &config.certificate_sha256)]
            {
                let Some(text) = text else { continue };
                known = true;
                if map.insert(fingerprint(&format!("tenant {name:?}: {key}"), text)?, tenant.clone()).is_some() {
                    return wrong(name, "another tenant has the same token or certificate");
                }
            }
            if !known {
                return wrong(name, "token_sha256 or certificate_sha256 is needed");
            }
        }
        let everybody = TenantConfig {
            name: ANONYMOUS.into(),
            token_sha256: None,
            certificate_sha256: None,
            weight: 1.0,
            max_in_flight: 0,
            requests_per_second: 0,
            most_urgent: Some(1),
            operator: true,
        };
        let shared = |n: usize| Places { own: Arc::new(Semaphore::new(0)), shared: Arc::new(Semaphore::new(n)), most: n };
        let everybody = || Arc::new(Tenant::new(0, &everybody, capacity.all().map(shared)));
        let anonymous = configs.is_empty().then(everybody);
        Ok(Self { tokens: Arc::new(tokens), certificates: Arc::new(certificates), anonymous })
    }

    /// Tenants whose share of something is less than one place: nothing is kept for them.
    pub fn without_places(&self) -> usize {
        let none = |places: &Places| places.own.available_permits() == 0;
        self.all().filter(|t| [&t.calls, &t.requests, &t.streams, &t.bytes].into_iter().any(none)).count()
    }

    /// All of them, in the order of the configuration.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        let mut known: Vec<&Arc<Tenant>> = self.tokens.values().chain(self.certificates.values()).chain(&self.anonymous).collect();
        known.sort_by_key(|t| t.index);
        known.dedup_by_key(|t| t.index);
        known.into_iter()
    }

    /// Who sends a request: by its certificate, else by its token.
    ///
    /// # Errors
    /// [`ServerError::Unauthenticated`] if tenants are configured and this is none.
    fn identify<T>(&self, request: &Request<T>) -> Result<Arc<Tenant>, ServerError> {
        if let Some(everybody) = &self.anonymous {
            return Ok(everybody.clone());
        }
        let leaf = request.peer_certs().and_then(|certs| certs.first().map(|c| sha256(c.as_ref())));
        if let Some(tenant) = leaf.and_then(|l| self.certificates.get(&l)) {
            return Ok(tenant.clone());
        }
        let sent = request.metadata().get("authorization").and_then(|v| v.to_str().ok());
        let token = sent.and_then(|text| text.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        // looked up by its hash, so that the time of the comparison tells nothing of the token
        let token = token.map(|(_, token)| token.trim()).filter(|token| !token.is_empty());
        let tenant = token.and_then(|token| self.tokens.get(&sha256(token.as_bytes())));
        tenant.cloned().ok_or(ServerError::Unauthenticated)
    }

    /// Puts the tenant beside the request, with a place that it holds until its message has been read: half-sent messages are bounded too.
    ///
    /// # Errors
    /// UNAUTHENTICATED, RESOURCE_EXHAUSTED.
    #[allow(clippy::result_large_err, reason = "tonic's interceptors return Status")]
    pub fn intercept(&self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let tenant = self.identify(&request).inspect_err(|e| telemetry::refused(e, None))?;
        let place = tenant.calls.take().ok_or(ServerError::busy("too many calls"));
        let place = place.inspect_err(|e| telemetry::refused(e, Some(&tenant)))?;
        request.extensions_mut().insert(tenant);
        request.extensions_mut().insert(Arc::new(place));
        Ok(request)
    }
}

/// The tenant that [`Tenants::intercept`] found.
///
/// # Errors
/// [`ServerError::Unauthenticated`] if the service runs without it.
pub fn of<T>(request: &Request<T>) -> Result<Arc<Tenant>, ServerError> {
    request.extensions().get::<Arc<Tenant>>().cloned().ok_or(ServerError::Unauthenticated)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    const EIGHT: Capacity = Capacity { requests: 8, streams: 8, bytes: 8 * PIECE };

    fn tenant(name: &str, token: &str) -> TenantConfig {
        let text = format!("name = {name:?}\ntoken_sha256 = {:?}", sha256(token.as_bytes()));
        toml::from_str(&text).unwrap()
    }

    fn ask(authorization: &str) -> Request<()> {
        let mut request = Request::new(());
        request.metadata_mut().insert("authorization", authorization.parse().unwrap());
        request
    }

    #[test]
    fn threat_timing_tokens_are_compared_by_their_hash() {
        let tenants = Tenants::new(&[tenant("cameras", "one"), tenant("robots", "two")], EIGHT).unwrap();
        assert_eq!(tenants.identify(&ask("Bearer two")).unwrap().name, "robots");
        assert_eq!(tenants.identify(&ask("bearer  one")).unwrap().name, "cameras");
        for wrong in ["Bearer three", "Basic one", "one", "Bearer", "Bearer ", "bearer  "] {
            assert!(matches!(tenants.identify(&ask(wrong)), Err(ServerError::Unauthenticated)), "{wrong}");
        }
        assert!(tenants.identify(&Request::new(())).is_err());
        assert_eq!(Tenants::new(&[], EIGHT).unwrap().identify(&Request::new(())).unwrap().name, ANONYMOUS);
    }

    #[test]
    fn senseless_tenants_are_named() {
        let error = |configs: &[TenantConfig]| Tenants::new(configs, EIGHT).err().unwrap().to_string();
        assert!(error(&[tenant("a", "x"), tenant("a", "y")]).contains("name of its own"));
        assert!(error(&[tenant("a", "x"), tenant("b", "x")]).contains("same token"));
        assert!(error(&[tenant("a b", "x")]).contains("letters"));
        assert!(error(&[TenantConfig { token_sha256: None, ..tenant("a", "x") }]).contains("needed"));
        assert!(error(&[TenantConfig { token_sha256: Some("12".into()), ..tenant("a", "x") }]).contains("64 hexadecimal"));
        assert!(error(&[tenant("a", "")]).contains("hash of nothing"));
        assert!(error(&[TenantConfig { weight: 0.0, ..tenant("a", "x") }]).contains("weight"));
    }

    #[test]
    fn quotas_bound_a_tenant() {
        let tenants = Tenants::new(&[TenantConfig { max_in_flight: 1, ..tenant("a", "x") }], EIGHT).unwrap();
        let a = tenants.identify(&ask("Bearer x")).unwrap();
        let place = a.enter(1).unwrap();
        assert!(matches!(a.enter(1), Err(ServerError::Busy { .. })));
        drop(place);
        assert!(a.enter(1).is_ok());
        let slow = Tenant::alone(1, &TenantConfig { requests_per_second: 2, ..tenant("b", "y") });
        let taken = (0..10).filter(|_| slow.enter(1).is_ok()).count();
        assert!((2..=3).contains(&taken), "{taken}");
        // those that come together use up the rate together or not at all, and are told when they may come
        let many = Tenant::alone(1, &TenantConfig { requests_per_second: 8, max_in_flight: 8, ..tenant("c", "z") });
        drop(many.enter(5).unwrap());
        let again = |n: usize| match many.enter(n) {
            Err(ServerError::Busy { retry, .. }) => retry,
            other => panic!("{:?}", other.err()),
        };
        assert!(again(8) > Duration::from_millis(500) && again(8) < Duration::from_millis(700), "five are to come back");
        assert!(many.enter(3).is_ok(), "three were left");
        assert!(matches!(many.enter(9), Err(ServerError::Busy { .. })), "more than may be in flight");
        let never = Tenant::alone(1, &TenantConfig { requests_per_second: 2, ..tenant("d", "z") }).enter(3);
        assert!(matches!(never, Err(ServerError::Invalid(why)) if why.contains("2 a second")));
    }

    #[test]
    fn a_flood_leaves_others_their_places() {
        let tenants =
            Tenants::new(&[tenant("flood", "x"), TenantConfig { weight: 3.0, ..tenant("quiet", "y") }], Capacity { requests: 16, ..EIGHT })
                .unwrap();
        let [flood, quiet] = ["Bearer x", "Bearer y"].map(|t| tenants.identify(&ask(t)).unwrap());
        // half of 16 is kept: 2 and 6; 8 are for everybody
        let taken: Vec<_> = std::iter::from_fn(|| flood.enter(1).ok()).collect();
        assert_eq!(taken.len(), 2 + 8);
        let others: Vec<_> = std::iter::from_fn(|| quiet.enter(1).ok()).collect();
        assert_eq!(others.len(), 6);
        drop(taken);
        assert_eq!(std::iter::from_fn(|| quiet.enter(1).ok()).collect::<Vec<_>>().len(), 8);
        // and calls whose messages have not come
        let held: Vec<_> = std::iter::from_fn(|| tenants.intercept(ask("Bearer x")).ok()).collect();
        assert_eq!(held.len(), 16 + SPARE_CALLS - 12);
        assert_eq!(tenants.intercept(ask("Bearer x")).unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert!(tenants.intercept(ask("Bearer y")).is_ok());
        drop(held);
        assert!(tenants.intercept(ask("Bearer x")).is_ok());
        // streams, and bytes that are being received: one and three of eight are kept, four are for everybody
        let streams: Vec<_> = std::iter::from_fn(|| flood.stream().ok()).collect();
        let bytes: Vec<_> = std::iter::from_fn(|| flood.receive().ok()).collect();
        assert_eq!((streams.len(), bytes.len()), (1 + 4, 1 + 4));
        assert!(quiet.stream().is_ok() && quiet.receive().is_ok());
    }
}
