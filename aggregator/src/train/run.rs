//! The loop of rounds.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use isthmus_federate::train::{CLIPPED_BIT, Learner, Model, Training};
use isthmus_federate::{Operator, Participant, RoundPlan};
use isthmus_proto::aggregator_v1::{CreateRoundRequest, Filter, Mode, Transform};
use isthmus_secagg::quantise::norm;
use serde::{Deserialize, Serialize};

use super::config::{Kind, Parties, Spread, TrainConfig};
use super::fleet::{Fleet, mean};
use crate::error::AggregatorError;
use crate::keys::open_signer;
use crate::local::Trial;

const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Clients beyond the simulated ones that a round has room for.
const ROOM: u32 = 1000;
/// How fast the norm limit follows the updates.
const NORM_RATE: f64 = 0.3;
const MODEL: &str = "model.safetensors";
const STATE: &str = "state.json";

/// What has been done so far, beside the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Rounds that are done.
    pub done: u64,
    /// What is trained: a run goes on with the same only.
    #[serde(default)]
    pub training: Option<Training>,
    /// Longest update in the next round.
    pub norm: f32,
    /// The parties' number of the last round.
    pub last_round: u64,
    /// A line for each round.
    pub history: Vec<Progress>,
}

/// A round's line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Which, from 1 on.
    pub round: u64,
    /// Share of test examples that the model gets right after it.
    pub accuracy: f64,
    /// Test examples.
    pub examples: usize,
    /// Mean bytes of a test photo, where the task has photos.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<f64>,
    /// Clients whose reports counted.
    pub clients: u32,
    /// After filtering.
    pub kept: u32,
    /// Bytes of a client's report.
    pub report_bytes: usize,
    /// Longest update allowed.
    pub norm: f32,
    /// Share of updates that were longer.
    pub clipped: f64,
    /// Length of the mean update.
    pub step: f64,
    /// Training of the simulated clients, in seconds.
    pub train_s: f64,
    /// From the first report to the result.
    pub round_s: f64,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> AggregatorError + '_ {
    move |cause| AggregatorError::Io { path: path.into(), cause }
}

/// Written whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<(), AggregatorError> {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).map_err(io(&new))?;
    std::fs::rename(&new, path).map_err(io(path))
}

fn resume(out: &Path) -> Result<Option<(Checkpoint, Model)>, AggregatorError> {
    let (state, model) = (out.join(STATE), out.join(MODEL));
    if !state.exists() {
        return Ok(None);
    }
    let text = std::fs::read(&state).map_err(io(&state))?;
    let checkpoint: Checkpoint = serde_json::from_slice(&text).map_err(|e| AggregatorError::Config(format!("{}: {e}", state.display())))?;
    let bytes = std::fs::read(&model).map_err(io(&model))?;
    let decoded = Model::decode(&bytes).map_err(|e| AggregatorError::Config(format!("{}: {e}", model.display())))?;
    Ok(Some((checkpoint, decoded)))
}

/// Connections to party 0.
struct Connected {
    operator: Operator,
    participant: Participant,
}

async fn connect(parties: &Parties, trial: Option<&Trial>) -> Result<(Connected, Option<std::path::PathBuf>), AggregatorError> {
    let (url, certificate, token, authority) = match (parties, trial) {
        (Parties::Remote(r), _) => (r.url.clone(), r.certificate.clone(), r.token.clone(), r.authority.clone()),
        (Parties::Local(_), Some(t)) => (t.url.clone(), Some(t.certificate.clone()), t.token.clone(), Some(t.authority.clone())),
        (Parties::Local(_), None) => return Err(AggregatorError::Config("the local parties were not started".into())),
    };
    let certificate = certificate.map(|p| std::fs::read_to_string(&p).map_err(io(&p))).transpose()?;
    let secret = std::fs::read_to_string(&token).map_err(io(&token))?;
    let operator = Operator::connect(&url, certificate.as_deref(), secret.trim(), CALL_LIMIT).await?;
    let participant = Participant::connect(&url, certificate.as_deref(), CALL_LIMIT).await?;
    Ok((Connected { operator, participant }, authority))
}

/// Runs the rounds that are missing; `scorer` has the task's data; `trial` are the local parties, if the configuration names them.
/// `tell` sees each round's line, `step` each trained client, or report where no client is simulated.
///
/// # Errors
/// What stopped it; what is done is in the checkpoint.
pub async fn run(
    config: &TrainConfig,
    mut scorer: Box<dyn Learner>,
    trial: Option<&Trial>,
    mut tell: impl FnMut(&Progress, &str),
    step: impl Fn(u64, usize, usize) + Sync,
) -> Result<Checkpoint, AggregatorError> {
    std::fs::create_dir_all(&config.out).map_err(io(&config.out))?;
    let (mut checkpoint, mut model) = match resume(&config.out)? {
        Some((checkpoint, model)) => {
            if checkpoint.training.as_ref().is_some_and(|t| *t != config.training) {
                let why = "holds a run with another [training]; use that one, or another `out`";
                return Err(AggregatorError::Config(format!("{} {why}", config.out.display())));
            }
            (checkpoint, model)
        }
        None => {
            let training = Some(config.training.clone());
            let start = Checkpoint { done: 0, training, norm: config.aggregation.norm, last_round: 0, history: Vec::new() };
            (start, scorer.initial(config.seed)?)
        }
    };
    let (mut connected, authority) = match config.aggregation.kind {
        Kind::Secure => {
            let (connected, authority) = connect(&config.parties, trial).await?;
            (Some(connected), authority.map(|p| open_signer(&p)).transpose()?)
        }
        Kind::Float32 => (None, None),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let fleet = Fleet::new(config, &*scorer, authority, now)?;
    while checkpoint.done < config.rounds {
        let round = checkpoint.done + 1;
        let clients = fleet.drawn(round, config.per_round());
        let mut line = match &mut connected {
            Some(connected) => secure_round(config, connected, &fleet, &mut checkpoint, &mut model, &clients, &step).await?,
            None => {
                let began = Instant::now();
                let (count, of) = (std::sync::atomic::AtomicUsize::new(0), clients.len());
                let seen = || step(round, count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, of);
                let updates = fleet.train(&model, &config.training, round, &clients, &seen)?;
                let update = mean(&updates, model.dim());
                let train_s = began.elapsed().as_secs_f64();
                apply(config, &mut model, &update)?;
                Progress {
                    clients: clients.len() as u32,
                    kept: clients.len() as u32,
                    report_bytes: 4 * model.dim(),
                    train_s,
                    ..blank(round, &checkpoint, &update)
                }
            }
        };
        let score = scorer.score(&model)?;
        (line.accuracy, line.examples, line.bytes) = (score.accuracy(), score.of, score.bytes);
        checkpoint.done = round;
        checkpoint.history.push(line.clone());
        // the model first: a state without its model would be worse than a round done twice
        write(&config.out.join(MODEL), &model.encode()?)?;
        let text = serde_json::to_vec_pretty(&checkpoint).map_err(|e| AggregatorError::Store(e.to_string()))?;
        write(&config.out.join(STATE), &text)?;
        if let Some(connected) = &mut connected {
            connected.operator.note_score(checkpoint.last_round, line.accuracy).await?;
        }
        tell(&line, &config.training.task);
    }
    Ok(checkpoint)
}

fn blank(round: u64, checkpoint: &Checkpoint, update: &[f64]) -> Progress {
    let short: Vec<f32> = update.iter().map(|v| *v as f32).collect();
    Progress {
        round,
        accuracy: 0.0,
        examples: 0,
        bytes: None,
        clients: 0,
        kept: 0,
        report_bytes: 0,
        norm: checkpoint.norm,
        clipped: 0.0,
        step: norm(&short),
        train_s: 0.0,
        round_s: 0.0,
    }
}

fn apply(config: &TrainConfig, model: &mut Model, update: &[f64]) -> Result<(), AggregatorError> {
    Ok(model.add(update, config.aggregation.server_rate)?)
}

fn request(config: &TrainConfig, checkpoint: &Checkpoint, model: &Model, clients: usize) -> Result<CreateRoundRequest, AggregatorError> {
    let sum = &config.aggregation;
    let filter = (sum.drop > 0 && checkpoint.last_round > 0).then(|| Filter {
        reference_round: checkpoint.last_round,
        drop: sum.drop,
        ..Filter::default()
    });
    let transform = match sum.transform {
        Spread::Hadamard => Transform::Hadamard,
        Spread::Kashin => Transform::Kashin,
    };
    Ok(CreateRoundRequest {
        mode: Mode::Boolean3.into(),
        dim: u32::try_from(model.dim()).map_err(|_| AggregatorError::Invalid("the model is too large".into()))?,
        transform: transform.into(),
        norm: checkpoint.norm,
        extra_bits: CLIPPED_BIT as u32 + 1,
        min_clients: sum.min_clients,
        max_clients: clients as u32 + ROOM,
        upload_ms: sum.upload.as_millis() as u64,
        compute_ms: sum.compute.as_millis() as u64,
        training: config.training.encode()?,
        filter,
        ..CreateRoundRequest::default()
    })
}

async fn secure_round(
    config: &TrainConfig,
    connected: &mut Connected,
    fleet: &Fleet,
    checkpoint: &mut Checkpoint,
    model: &mut Model,
    clients: &[usize],
    step: &(impl Fn(u64, usize, usize) + Sync),
) -> Result<Progress, AggregatorError> {
    let round = checkpoint.done + 1;
    let data = model.encode()?;
    let published = connected.operator.publish(&config.training.task, version(checkpoint, &data), data.into()).await?;
    let mut wanted = request(config, checkpoint, model, clients.len())?;
    wanted.model = Some(published);
    let created = connected.operator.create(wanted).await?;
    let plan = Arc::new(RoundPlan::decode(&created.config)?);
    let began = Instant::now();
    let (count, of) = (std::sync::atomic::AtomicUsize::new(0), clients.len());
    let updates = tokio::task::block_in_place(|| {
        let seen = || step(round, count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, of);
        fleet.train(model, &config.training, round, clients, &seen)
    })?;
    let train_s = began.elapsed().as_secs_f64();
    let began = Instant::now();
    if !clients.is_empty() {
        fleet.report(&plan, &updates, &connected.participant, config.aggregation.upload).await?;
        tokio::time::sleep(config.fleet.linger).await;
        connected.operator.seal(created.round).await?;
    }
    let limit = config.aggregation.upload + config.aggregation.compute;
    connected
        .operator
        .wait(created.round, limit, |seen| {
            if clients.is_empty() {
                step(round, seen.reports as usize, 0)
            }
        })
        .await?;
    let result = connected.operator.result(created.round).await?;
    let update = result.mean()?;
    let kept = result.round.kept;
    let clipped = result.extra()?.get(CLIPPED_BIT).map_or(0.0, |c| f64::from(*c) / f64::from(kept.max(1)));
    let line = Progress {
        clients: result.round.clients,
        kept,
        report_bytes: plan.body_bytes(),
        clipped,
        train_s,
        round_s: began.elapsed().as_secs_f64() - config.fleet.linger.as_secs_f64(),
        ..blank(round, checkpoint, &update)
    };
    apply(config, model, &update)?;
    checkpoint.last_round = created.round;
    if config.aggregation.norm_quantile > 0.0 {
        // geometric steps towards the limit below which the wanted share of updates lies
        let wanted = 1.0 - config.aggregation.norm_quantile;
        checkpoint.norm = (f64::from(checkpoint.norm) * (NORM_RATE * (clipped - wanted)).exp()) as f32;
    }
    Ok(line)
}

/// A number that names this model: a loop that is started again publishes other models under other numbers.
fn version(checkpoint: &Checkpoint, data: &[u8]) -> u64 {
    let hash = isthmus_secagg::report::hash(&[data]);
    checkpoint.done << 32 | u64::from(u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]))
}
