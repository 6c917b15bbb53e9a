//! The model repository: what lies on disk, what of it is loaded, and changes without a lost request.
//!
//! A backbone is `NAME.safetensors` (version 1) or `NAME/N.safetensors` (version N). Loading a model reads its newest versions and all
//! versions of the bundles anew, checks them (hashes, signatures, golden answers), and then puts them in the place of the old ones in
//! one step. What fails leaves everything as it was. Replaced models go when the last request that came in with them has its answer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use isthmus_batcher::Limits;
use isthmus_codec::{Bundle, CodecError, Trust, folder};
use isthmus_nets::BackboneKind;
use isthmus_nets::backbone::CLASSES;
use isthmus_nets::profile::Machine;
use tch::{Device, Kind};
use tokio::sync::watch;

use crate::batcher::{Batcher, Serving};
use crate::model::{Model, Stage};
use crate::placement::{self, Cores};
use crate::registry::{Entry, Registry};
use crate::statistics::Statistics;
use crate::{Config, ServerError, labels, telemetry};

/// Reason of a model that an operator unloaded.
const UNLOADED: &str = "unloaded";

/// Models on disk and in memory.
pub struct Repository {
    config: Config,
    cores: Arc<Cores>,
    machines: Mutex<Vec<(Device, Kind, Machine)>>,
    current: RwLock<Arc<Registry>>,
    /// Held while models are read: one change at a time.
    changing: Mutex<()>,
    /// Why a model is not loaded.
    failures: Mutex<BTreeMap<String, String>>,
    /// Of versions that are or were loaded.
    statistics: Mutex<BTreeMap<(&'static str, u64), Arc<Statistics>>>,
    ready: watch::Sender<bool>,
    /// Nothing is put in any more.
    closed: AtomicBool,
}

/// A version of a model, as the index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Indexed {
    /// Name.
    pub name: String,
    /// Version.
    pub version: u64,
    /// Loaded?
    pub ready: bool,
    /// Why it is not.
    pub reason: String,
}

/// All versions of the bundles at a folder.
fn open_bundles(folder: &Path, trust: &Trust) -> Result<Vec<Bundle>, ServerError> {
    if !folder.is_dir() {
        let why = "is no bundle folder; name one with --bundle or in `bundles` (the repository has bundles/lite0-patch-stem)";
        return Err(ServerError::Config(format!("{} {why}", folder.display())));
    }
    let wrong = |e: CodecError| ServerError::Config(e.to_string());
    let versions = folder::versions(folder).map_err(wrong)?;
    versions.iter().map(|version| folder::open(version, |name| name.starts_with("decoder"), trust).map_err(wrong)).collect()
}

/// All versions of all bundles that `config` names.
///
/// # Errors
/// Names the folder that is wrong.
pub(crate) fn open_all_bundles(config: &Config) -> Result<Vec<Bundle>, ServerError> {
    let keys = config.trusted_bundle_keys.iter().map(String::as_str);
    let trust = Trust::keys(keys).map_err(|e| ServerError::Config(format!("trusted_bundle_keys: {e}")))?;
    let mut bundles = Vec::new();
    for folder in &config.bundles {
        bundles.extend(open_bundles(folder, &trust)?);
    }
    Ok(bundles)
}

/// The file of the newest version of the backbone `name`.
pub(crate) fn backbone_path(config: &Config, name: &str) -> PathBuf {
    let newest = versions(&config.backbones, name).into_iter().next();
    // the error names this file
    newest.map_or_else(|| config.backbones.join(format!("{name}.safetensors")), |(_, path)| path)
}

/// Takes all versions of a model out.
fn take(models: &mut Vec<Arc<Entry>>, name: &str) -> Vec<Arc<Entry>> {
    let (gone, stay) = std::mem::take(models).into_iter().partition(|m| m.name == name);
    *models = stay;
    gone
}

/// Versions of the backbone `name` in `folder`, newest first.
fn versions(folder: &Path, name: &str) -> Vec<(u64, PathBuf)> {
    let single = folder.join(format!("{name}.safetensors"));
    let mut found: Vec<(u64, PathBuf)> = single.is_file().then_some((1, single)).into_iter().collect();
    for path in std::fs::read_dir(folder.join(name)).into_iter().flatten().filter_map(Result::ok).map(|e| e.path()) {
        let number = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".safetensors"));
        // written as requests write it: neither 03 nor +3
        if let Some(version) = number.and_then(|n| n.parse().ok().filter(|v: &u64| *v > 0 && v.to_string() == n)) {
            found.retain(|(v, _)| *v != version);
            found.push((version, path));
        }
    }
    found.sort();
    found.into_iter().rev().collect()
}

impl Repository {
    /// Loads everything that `config` names.
    ///
    /// # Errors
    /// Names the file or key that is wrong.
    pub fn open(config: &Config) -> Result<Self, ServerError> {
        tch::set_num_threads(config.network_threads() as i32);
        let labels = Arc::new(labels::open(&config.backbones.join("labels.json"), CLASSES as usize)?);
        let default = config.models.first().map_or("", String::as_str).into();
        let empty = Arc::new(Registry { default, models: Vec::new(), bundles: Vec::new(), labels });
        let repository = Self {
            config: config.clone(),
            cores: Cores::new(config.network_threads()),
            machines: Mutex::default(),
            current: RwLock::new(empty),
            changing: Mutex::default(),
            failures: Mutex::default(),
            statistics: Mutex::default(),
            ready: watch::Sender::new(false),
            closed: AtomicBool::new(false),
        };
        if config.bundles.is_empty() {
            tracing::warn!("bundles is empty: only whole images will be answered");
        }
        let bundles = repository.bundles()?;
        for name in &config.models {
            let entries = repository.entries(name, &bundles)?;
            if let Some(entry) = entries.first() {
                telemetry::load(entry.name, true);
            }
            repository.put(name, &bundles, entries);
        }
        Ok(repository)
    }

    /// What is loaded now.
    pub fn current(&self) -> Arc<Registry> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads the model called `name`, or loads it anew. It takes seconds; libtorch wants a thread that ends afterwards.
    ///
    /// # Errors
    /// What is wrong; the old version stays.
    pub fn load(&self, name: &str) -> Result<(), ServerError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = self.bundles().and_then(|bundles| Ok((self.entries(name, &bundles)?, bundles)));
        if let Some(kind) = BackboneKind::from_name(name) {
            telemetry::load(kind.name(), loaded.is_ok());
        }
        match loaded {
            Ok((entries, bundles)) => {
                self.failures().remove(name);
                self.put(name, &bundles, entries);
                Ok(())
            }
            Err(error) => {
                tracing::warn!(model = name, %error, "loading failed");
                if BackboneKind::from_name(name).is_some() {
                    self.failures().insert(name.to_owned(), error.to_string());
                }
                Err(error)
            }
        }
    }

    /// Puts a model in place of what has its name. Bundles that only other models know stay.
    fn put(&self, name: &str, bundles: &[Arc<Bundle>], entries: Vec<Arc<Entry>>) {
        let mut next = Registry::clone(&self.current());
        let gone = take(&mut next.models, name);
        next.bundles.retain(|old| bundles.iter().all(|b| b.hash != old.hash) && next.models.iter().any(|m| m.stage(&old.hash).is_some()));
        next.bundles.splice(0..0, bundles.iter().cloned());
        next.models.extend(entries);
        // the default stays the configuration's, whatever was away for a while
        next.models.sort_by_key(|m| self.config.models.iter().position(|name| name == m.name).unwrap_or(usize::MAX));
        self.set(next);
        drop(gone);
    }

    /// Unloads the model called `name`: no new requests; those that are in have their answers.
    ///
    /// # Errors
    /// If it is not loaded.
    pub fn unload(&self, name: &str) -> Result<(), ServerError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if name.is_empty() {
            return Err(ServerError::Invalid("which model is to be unloaded? Its name is empty".into()));
        }
        let mut next = Registry::clone(&self.current());
        next.model(name, "")?;
        let gone = take(&mut next.models, name);
        self.failures().insert(name.to_owned(), UNLOADED.into());
        self.set(next);
        drop(gone);
        tracing::info!(model = name, "model unloaded");
        Ok(())
    }

    /// Takes all models out, whatever is being loaded: that is dropped when it is there. Their threads finish what they are at; what is returned is alive
    /// until they have.
    pub fn close(&self) -> Vec<Weak<()>> {
        let gone = self.current();
        self.set(Registry { models: Vec::new(), ..Registry::clone(&gone) });
        self.closed.store(true, Ordering::SeqCst);
        // what was put in between
        let late = self.replace(Registry { models: Vec::new(), ..Registry::clone(&gone) });
        gone.models.iter().chain(&late.models).map(|model| model.batcher.at_work()).collect()
    }

    /// All versions of all models, loaded or on disk.
    pub fn index(&self) -> Vec<Indexed> {
        let current = self.current();
        let failures = self.failures();
        let mut index = Vec::new();
        for kind in BackboneKind::ALL {
            let name = kind.name();
            // what is loaded serves on, even if its file has gone
            let loaded = current.models.iter().filter(|m| m.name == name).map(|m| m.version);
            let mut all: Vec<u64> = versions(&self.config.backbones, name).into_iter().map(|(version, _)| version).chain(loaded).collect();
            all.sort_unstable();
            all.dedup();
            for version in all.into_iter().rev() {
                let ready = current.models.iter().any(|m| m.name == name && m.version == version);
                let reason = if ready { String::new() } else { failures.get(name).cloned().unwrap_or_else(|| "not loaded".into()) };
                index.push(Indexed { name: name.into(), version, ready, reason });
            }
        }
        index
    }

    /// True if every model that the configuration names is loaded, or was unloaded on purpose, and at least one is.
    pub fn is_ready(&self) -> bool {
        let current = self.current();
        let failures = self.failures();
        if current.models.is_empty() {
            return false;
        }
        self.config
            .models
            .iter()
            .all(|name| current.models.iter().any(|m| m.name == name) || failures.get(name).is_some_and(|r| r == UNLOADED))
    }

    fn failures(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, next: Registry) -> Arc<Registry> {
        std::mem::replace(&mut *self.current.write().unwrap_or_else(PoisonError::into_inner), Arc::new(next))
    }

    fn set(&self, next: Registry) {
        let next = Arc::new(next);
        let old = {
            let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
            if self.closed.load(Ordering::SeqCst) {
                return;
            }
            std::mem::replace(&mut *current, next.clone())
        };
        old.models.iter().for_each(|m| telemetry::loaded(m.name, m.version, false));
        next.models.iter().for_each(|m| telemetry::loaded(m.name, m.version, true));
        self.ready.send_replace(self.is_ready());
    }

    /// [`Self::is_ready`], and when it changes.
    pub fn readiness(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// All bundles; those that are loaded already as they are.
    fn bundles(&self) -> Result<Vec<Arc<Bundle>>, ServerError> {
        let current = self.current();
        let keep = |bundle: Bundle| {
            let loaded = current.bundles.iter().find(|b| b.hash == bundle.hash);
            loaded.cloned().unwrap_or_else(|| Arc::new(bundle))
        };
        Ok(open_all_bundles(&self.config)?.into_iter().map(keep).collect())
    }

    /// The newest versions of a model.
    fn entries(&self, name: &str, bundles: &[Arc<Bundle>]) -> Result<Vec<Arc<Entry>>, ServerError> {
        if BackboneKind::from_name(name).is_none() {
            let known = BackboneKind::ALL.map(BackboneKind::name).join(", ");
            return Err(ServerError::Invalid(format!("model {:?} is unknown; known: {known}", name.chars().take(64).collect::<String>())));
        }
        let mut found = versions(&self.config.backbones, name);
        if found.is_empty() {
            // the error names the file
            found.push((1, self.config.backbones.join(format!("{name}.safetensors"))));
        }
        let sole = found.len() == 1;
        let newest = found.into_iter().take(self.config.model_versions);
        let entries: Vec<_> = newest.map(|(version, path)| self.entry(name, version, &path, bundles, sole)).collect::<Result<_, _>>()?;
        // bitstreams that were answered must be, and a backbone that no bundle vouches for may be anything: where bundles have to be signed
        // their manifests sign the backbones too
        let signed = !self.config.trusted_bundle_keys.is_empty();
        let wanted = bundles.iter().flat_map(|b| &b.manifest.decoders).any(|d| d.backbone == name);
        let checked = if signed { &entries[..] } else { &entries[..entries.len().min(wanted.into())] };
        if let Some(entry) = checked.iter().find(|e| e.stages.is_empty()) {
            let of = if signed { "signed bundle" } else { "bundle" };
            let why = format!("no {of} was made for version {} of {name}: its SHA-256 is in no manifest", entry.version);
            return Err(ServerError::Config(why));
        }
        Ok(entries)
    }

    fn entry(&self, name: &str, version: u64, path: &Path, bundles: &[Arc<Bundle>], sole: bool) -> Result<Arc<Entry>, ServerError> {
        let instances = placement::instances(&self.config, name)?;
        let mut models = Vec::with_capacity(instances.len());
        for instance in &instances {
            models.push(Model::load(name, path, bundles, *instance, sole)?);
        }
        let (Some(model), Some(first)) = (models.first(), instances.first()) else {
            return Err(ServerError::Config(format!("placements: no instance of {name}")));
        };
        let stages: Vec<_> = model.bundles().copied().filter_map(|h| model.stage(&h).map(|s| (h, s))).collect();
        let machine = self.machine(first.device, first.precision.kind());
        // what is served meanwhile and this are not to take the cores from each other
        tch::set_num_threads(first.threads as i32);
        let alone = model.time_alone(|| (first.device == Device::Cpu).then(|| self.cores.take(first.threads)))?;
        let costs: Vec<_> = model.stages().into_iter().map(|s| (s, machine.time(&model.layers(s), 1))).collect();
        let whole = machine.time(&model.layers(Stage::Pixels), 1);
        let factor = alone.as_secs_f64() / whole.as_secs_f64().max(1e-9);
        let (name, kind, input_size) = (model.name(), model.kind(), model.input_size());
        tracing::info!(model = name, version, device = first.device_name(), instances = instances.len(), bundles = stages.len(), ?alone, roofline = ?whole, "model loaded");
        // a version that is loaded anew goes on counting
        let statistics = self.statistics.lock().unwrap_or_else(PoisonError::into_inner).entry((name, version)).or_default().clone();
        let config = &self.config;
        let limits = Limits {
            max_batch: config.max_batch,
            max_delay: config.queue_delay,
            preferred: config.preferred_batch_sizes.clone(),
            max_entries: config.max_queue,
            max_cost: Some(config.max_queue_cost),
            workers: instances.len(),
        };
        let serving = Serving { limits, costs, factor };
        let runners = models.into_iter().zip(instances.iter().copied()).collect();
        let batcher = Batcher::start(runners, name, &serving, &self.cores, &statistics)?;
        Ok(Arc::new(Entry { name, version, kind, input_size, instances, batcher, statistics, stages }))
    }

    /// What a device can do in this precision, measured once.
    fn machine(&self, device: Device, kind: Kind) -> Machine {
        let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., machine)) = machines.iter().find(|(d, k, _)| (*d, *k) == (device, kind)) {
            return *machine;
        }
        let machine = Machine::measure(device, kind);
        machines.push((device, kind, machine));
        machine
    }
}
