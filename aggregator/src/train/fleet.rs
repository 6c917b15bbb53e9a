//! Simulated clients: trained here on all cores, reporting over gRPC like any other client.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use isthmus_federate::report::{Identity, make};
use isthmus_federate::train::attack::{self, Attack};
use isthmus_federate::train::client::{vote, with_extra};
use isthmus_federate::train::{Examples, Learner, Model, Sources, Training, learner};
use isthmus_federate::{FederateError, Participant, RoundPlan};
use isthmus_secagg::report::{Credential, SignKey};
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha20Rng;
use tokio::sync::mpsc;

use super::config::TrainConfig;
use crate::error::AggregatorError;
use crate::keys::system_rng;

/// Reports on their way at once.
const UPLOADS: usize = 64;
const YEAR: u64 = 365 * 24 * 3600;

/// The simulated clients.
pub struct Fleet {
    task: String,
    sources: Sources,
    seed: u64,
    parts: Vec<Examples>,
    keys: Vec<SignKey>,
    expires: u64,
    authority: Option<SignKey>,
    attackers: usize,
    attack: Option<Attack>,
}

/// Updates of a round by client; `progress` has seen each.
pub type Updates = HashMap<usize, Vec<f32>>;

impl Fleet {
    /// Deals the data out. Keys follow from the seed: these clients are no secret.
    ///
    /// # Errors
    /// If there are fewer examples than clients.
    pub fn new(config: &TrainConfig, learner: &dyn Learner, authority: Option<SignKey>, now: u64) -> Result<Self, FederateError> {
        let parts = config.fleet.parts.max(config.fleet.simulated).max(1);
        let parts = learner.deal(parts, config.fleet.split, config.seed)?;
        let mut rng = ChaCha20Rng::seed_from_u64(config.seed ^ 0x6B65_7973);
        let attack = config.attack.filter(|a| a.share > 0.0);
        let attackers = attack.map_or(0, |a| (a.share * config.fleet.simulated as f64).round() as usize);
        let mut parts: Vec<Examples> = parts.into_iter().take(config.fleet.simulated).collect();
        if attack.is_some_and(|a| a.kind == Attack::LabelFlip) {
            parts.iter_mut().take(attackers).for_each(|p| p.flipped = true);
        }
        Ok(Self {
            task: config.training.task.clone(),
            sources: config.sources(),
            seed: config.seed,
            keys: parts.iter().map(|_| SignKey::random(&mut rng)).collect(),
            parts,
            expires: now + YEAR,
            authority,
            attackers,
            attack: attack.map(|a| a.kind),
        })
    }

    /// Clients of a round.
    pub fn drawn(&self, round: u64, some: usize) -> Vec<usize> {
        let mut rng = ChaCha20Rng::seed_from_u64(self.seed.wrapping_mul(1_000_003) ^ round);
        sample(&mut rng, self.parts.len(), some.min(self.parts.len())).into_vec()
    }

    /// Trains the clients on all cores.
    ///
    /// # Errors
    /// If training fails.
    pub fn train(
        &self,
        model: &Model,
        training: &Training,
        round: u64,
        clients: &[usize],
        progress: &(dyn Fn() + Sync),
    ) -> Result<Updates, FederateError> {
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(clients.len().max(1));
        let work = || -> Result<Updates, FederateError> {
            // one core each: more would wait for each other
            tch::set_num_threads(1);
            let mut learner = learner(&self.task, &self.sources)?;
            let mut updates = Updates::new();
            while let Some(&client) = clients.get(next.fetch_add(1, Ordering::Relaxed)) {
                let seed = self.seed ^ round << 20 ^ client as u64;
                updates.insert(client, learner.update(model, &self.parts[client], training, seed)?);
                progress();
            }
            Ok(updates)
        };
        let done: Result<Vec<Updates>, FederateError> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let ended = |t: std::thread::ScopedJoinHandle<'_, _>| {
                t.join().unwrap_or_else(|_| Err(FederateError::Invalid("a training thread panicked".into())))
            };
            threads.into_iter().map(ended).collect()
        });
        let mut updates: Updates = done?.into_iter().flatten().collect();
        self.poison(&mut updates, round);
        Ok(updates)
    }

    fn is_attacker(&self, client: usize) -> bool {
        self.attack.is_some() && client < self.attackers
    }

    fn poison(&self, updates: &mut Updates, round: u64) {
        let Some(kind) = self.attack else { return };
        let mut order: Vec<usize> = updates.keys().copied().collect();
        order.sort_unstable();
        let honest: Vec<Vec<f32>> = order.iter().filter(|c| !self.is_attacker(**c)).map(|c| updates[c].clone()).collect();
        let attackers: Vec<usize> = order.into_iter().filter(|c| self.is_attacker(*c)).collect();
        let mut rng = ChaCha20Rng::seed_from_u64(self.seed ^ round);
        if let Some(poison) = attack::update(kind, &honest, attackers.len(), &mut rng) {
            attackers.into_iter().for_each(|c| drop(updates.insert(c, poison.clone())));
        }
    }

    /// Sends all reports, several at once; bytes sent.
    ///
    /// # Errors
    /// The first failure.
    pub async fn report(
        &self,
        plan: &Arc<RoundPlan>,
        updates: &Updates,
        participant: &Participant,
        limit: std::time::Duration,
    ) -> Result<usize, AggregatorError> {
        let authority =
            self.authority.as_ref().ok_or_else(|| AggregatorError::Config("no authority's key for simulated clients".into()))?;
        let quantiser = plan.quantiser()?;
        let against = match self.attack {
            Some(Attack::AdversarialBits) => {
                let honest: Vec<&Vec<f32>> = updates.iter().filter(|(c, _)| !self.is_attacker(**c)).map(|(_, u)| u).collect();
                let mean: Vec<f32> = (0..plan.config().dim as usize)
                    .map(|j| honest.iter().map(|u| u[j]).sum::<f32>() / honest.len().max(1) as f32)
                    .collect();
                Some(attack::bits(&quantiser.forward(&mean)?, plan.coded()))
            }
            _ => None,
        };
        let (results, mut ended) = mpsc::unbounded_channel();
        let places = Arc::new(tokio::sync::Semaphore::new(UPLOADS));
        let mut bytes = 0;
        let mut rng = system_rng()?;
        for (client, update) in updates {
            let key = SignKey::from_bytes(&self.keys[*client].expose());
            let credential = Credential::issue(authority, key.public(), self.expires);
            let bits = match &against {
                Some(against) if self.is_attacker(*client) => with_extra(plan, against, false),
                _ => vote(plan, &quantiser, update, &mut rng)?,
            };
            let report = make(plan, &bits, &Identity { key, credential }, &mut rng)?;
            bytes += report.body.len();
            let place = places.clone().acquire_owned().await.map_err(|e| AggregatorError::Transport(e.to_string()))?;
            let (participant, results) = (participant.clone(), results.clone());
            tokio::spawn(async move {
                let stored = participant.upload_until_stored(&report, limit).await;
                drop(place);
                results.send(stored.map(drop))
            });
        }
        drop(results);
        while let Some(stored) = ended.recv().await {
            stored?;
        }
        Ok(bytes)
    }
}

/// Plain averaging.
pub fn mean(updates: &Updates, dim: usize) -> Vec<f64> {
    let mut order: Vec<&usize> = updates.keys().collect();
    order.sort_unstable();
    let n = order.len().max(1) as f64;
    let mut mean = vec![0.0; dim];
    for client in order {
        mean.iter_mut().zip(&updates[client]).for_each(|(m, u)| *m += f64::from(*u) / n);
    }
    mean
}
