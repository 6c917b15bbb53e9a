//! Who asks: tenants known by a bearer token or a client certificate, their quotas and shares.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use isthmus_codec::bundle::sha256;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Status};

use crate::ServerError;

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
    places: Option<Arc<Semaphore>>,
    rate: Option<DefaultDirectRateLimiter>,
}

impl Tenant {
    /// As configured.
    pub(crate) fn new(index: usize, config: &TenantConfig) -> Self {
        let rate = NonZeroU32::new(config.requests_per_second).map(|n| RateLimiter::direct(Quota::per_second(n)));
        let places = (config.max_in_flight > 0).then(|| Arc::new(Semaphore::new(config.max_in_flight)));
        Self { index: index as u32, name: config.name.clone(), weight: config.weight, operator: config.operator, places, rate }
    }

    /// A place for a request, within the tenant's quotas.
    ///
    /// # Errors
    /// [`ServerError::Busy`] if they are used up.
    pub fn enter(&self) -> Result<Option<OwnedSemaphorePermit>, ServerError> {
        let place = self.places.clone().map(Semaphore::try_acquire_owned).transpose();
        let place = place.map_err(|_| ServerError::Busy("this tenant has as many requests in flight as it may"))?;
        if self.rate.as_ref().is_some_and(|r| r.check().is_err()) {
            return Err(ServerError::Busy("this tenant sends more requests a second than it may"));
        }
        Ok(place)
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
        return Ok(text.to_ascii_lowercase());
    }
    Err(ServerError::Config(format!("{what}: 64 hexadecimal digits are wanted")))
}

impl Tenants {
    /// Those of the configuration; without any, everybody is one tenant.
    ///
    /// # Errors
    /// [`ServerError::Config`] says which entry is wrong.
    pub fn new(configs: &[TenantConfig]) -> Result<Self, ServerError> {
        let (mut tokens, mut certificates) = (HashMap::new(), HashMap::new());
        let wrong = |name: &str, why: &str| Err(ServerError::Config(format!("tenant {name:?}: {why}")));
        if configs.len() > MOST {
            return Err(ServerError::Config(format!("at most {MOST} tenants")));
        }
        for (i, config) in configs.iter().enumerate() {
            let name = &config.name;
            let plain = !name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            if !plain || name == ANONYMOUS || configs[..i].iter().any(|c| c.name == *name) {
                return wrong(name, "a name of its own, of letters, digits, - _ and . is wanted");
            }
            if !(config.weight.is_finite() && (1e-3..=1e3).contains(&config.weight)) {
                return wrong(name, "weight is from 0.001 to 1000");
            }
            let tenant = Arc::new(Tenant::new(i + 1, config));
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
            operator: true,
        };
        let anonymous = configs.is_empty().then(|| Arc::new(Tenant::new(0, &everybody)));
        Ok(Self { tokens: Arc::new(tokens), certificates: Arc::new(certificates), anonymous })
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
        let tenant = token.and_then(|(_, token)| self.tokens.get(&sha256(token.trim().as_bytes())));
        tenant.cloned().ok_or(ServerError::Unauthenticated)
    }

    /// Puts the tenant beside the request, or refuses it.
    ///
    /// # Errors
    /// UNAUTHENTICATED.
    #[allow(clippy::result_large_err, reason = "tonic's interceptors return Status")]
    pub fn intercept(&self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let tenant = self.identify(&request)?;
        request.extensions_mut().insert(tenant);
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

    use super::*;

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
        let tenants = Tenants::new(&[tenant("cameras", "one"), tenant("robots", "two")]).unwrap();
        assert_eq!(tenants.identify(&ask("Bearer two")).unwrap().name, "robots");
        assert_eq!(tenants.identify(&ask("bearer  one")).unwrap().name, "cameras");
        for wrong in ["Bearer three", "Basic one", "one", "Bearer"] {
            assert!(matches!(tenants.identify(&ask(wrong)), Err(ServerError::Unauthenticated)), "{wrong}");
        }
        assert!(tenants.identify(&Request::new(())).is_err());
        assert_eq!(Tenants::new(&[]).unwrap().identify(&Request::new(())).unwrap().name, ANONYMOUS);
    }

    #[test]
    fn senseless_tenants_are_named() {
        let error = |configs: &[TenantConfig]| Tenants::new(configs).err().unwrap().to_string();
        assert!(error(&[tenant("a", "x"), tenant("a", "y")]).contains("name of its own"));
        assert!(error(&[tenant("a", "x"), tenant("b", "x")]).contains("same token"));
        assert!(error(&[tenant("a b", "x")]).contains("letters"));
        assert!(error(&[TenantConfig { token_sha256: None, ..tenant("a", "x") }]).contains("needed"));
        assert!(error(&[TenantConfig { token_sha256: Some("12".into()), ..tenant("a", "x") }]).contains("64 hexadecimal"));
        assert!(error(&[TenantConfig { weight: 0.0, ..tenant("a", "x") }]).contains("weight"));
    }

    #[test]
    fn quotas_bound_a_tenant() {
        let tenants = Tenants::new(&[TenantConfig { max_in_flight: 1, ..tenant("a", "x") }]).unwrap();
        let a = tenants.identify(&ask("Bearer x")).unwrap();
        let place = a.enter().unwrap();
        assert!(matches!(a.enter(), Err(ServerError::Busy(_))));
        drop(place);
        assert!(a.enter().is_ok());
        let slow = Tenant::new(1, &TenantConfig { requests_per_second: 2, ..tenant("b", "y") });
        let taken = (0..10).filter(|_| slow.enter().is_ok()).count();
        assert!((2..=3).contains(&taken), "{taken}");
    }
}
