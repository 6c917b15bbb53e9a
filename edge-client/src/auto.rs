//! A client that follows a [`Policy`]: encodes or sends as it says, computes the answer on the device when the link fails, and
//! connects anew by itself.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_pixels::Rgb;
use isthmus_proto::offload_v1::Label;
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, JoinSet};

use crate::local::LocalClassifier;
use crate::policy::{Candidate, Choice, Goal, Outcome, Policy};
use crate::{Client, ClientError, Encoder, InferOptions, Payload, images};

/// Agreement, bytes of image files of a 224 x 224 crop, as measured on the held-out photos with EfficientNet-Lite0
/// (docs/benchmarks/rate); sizes are corrected by what is seen.
const JPEG: [(u8, f64, f64); 5] =
    [(20, 0.597, 3093.0), (30, 0.627, 4038.0), (50, 0.756, 5534.0), (75, 0.790, 8194.0), (90, 0.851, 13456.0)];
const PNG_BYTES: f64 = 76764.0;
/// Before the first answer: seconds of the server for a bitstream and for an image.
const SERVER: (f64, f64) = (0.015, 0.02);
/// How often each option is timed at the start; the fastest counts.
const TRIAL_ROUNDS: usize = 2;

type Connecting = Pin<Box<dyn Future<Output = Result<Client, ClientError>> + Send>>;
/// Makes a new connection.
pub type Connector = Arc<dyn Fn() -> Connecting + Send + Sync>;

/// A photo to classify.
#[derive(Debug, Clone)]
pub struct Photo {
    /// Its pixels.
    pub pixels: Rgb,
    /// Its file, if it may be sent as it is.
    pub file: Option<Bytes>,
}

/// An answer, and how it came about.
#[derive(Debug, Clone)]
pub struct AutoAnswer {
    /// Best first.
    pub labels: Vec<Label>,
    /// How it was computed: what was sent, or [`Choice::Local`].
    pub choice: Choice,
    /// Payload bytes that were sent, those without an answer included.
    pub bytes: usize,
    /// From the call to the answer.
    pub elapsed: Duration,
    /// Of that, this device's computing: the encoder's or the whole network's.
    pub device: Duration,
    /// Of that, the server's, its queue included; zero if the device answered.
    pub server: Duration,
}

/// Classifies photos as its policy says.
pub struct AutoClient {
    encoder: Encoder,
    local: Option<Arc<std::sync::Mutex<LocalClassifier>>>,
    connector: Connector,
    /// The connection, shared with requests under way.
    client: Arc<Mutex<Option<Client>>>,
    policy: Policy,
    goal: Goal,
    options: InferOptions,
    slowdown: f64,
    began: Instant,
    /// Requests whose photo has been answered by the device already.
    background: JoinSet<Outcome>,
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

/// Labels, and who took how many seconds for them.
struct Answered {
    labels: Vec<Label>,
    device: f64,
    server: f64,
}

/// What sending came to: the outcome for the policy, and the labels or the error.
type Sent = (Outcome, Result<Vec<Label>, ClientError>);

impl AutoClient {
    /// A client for `goal`. `options` says what to ask the server for; its deadline is replaced by the goal's. Every option is
    /// timed once here, on this device. `slowdown` above 1 makes this machine compute like a weaker one (for measurements).
    ///
    /// # Errors
    /// If an option cannot be computed.
    pub async fn new(
        mut encoder: Encoder,
        mut local: Option<LocalClassifier>,
        connector: Connector,
        goal: Goal,
        options: InferOptions,
        slowdown: f64,
    ) -> Result<Self, ClientError> {
        let side = encoder.bundle().manifest.input.size;
        let blank = Rgb::new(side, side, isthmus_codec::golden::pixels(side));
        let blank = blank.ok_or_else(|| ClientError::Engine("the bundle's input has no pixels".into()))?;
        let timed = |work: &mut dyn FnMut() -> Result<(), ClientError>| -> Result<f64, ClientError> {
            let mut took = f64::INFINITY;
            for _ in 0..TRIAL_ROUNDS {
                let start = Instant::now();
                work()?;
                took = took.min(seconds(start));
            }
            Ok(took * slowdown)
        };
        let mut candidates = Vec::new();
        let quality = encoder.bundle().manifest.quality.clone();
        for (level, entry) in (1..).zip(&quality) {
            let encode = timed(&mut || encoder.encode_rgb(&blank, level).map(drop))?;
            let choice = Choice::Bottleneck(level);
            candidates.push(Candidate { choice, agreement: entry.agreement, bytes: entry.bytes, encode, server: SERVER.0 });
        }
        for (quality, agreement, bytes) in JPEG {
            let encode = timed(&mut || images::jpeg(&blank, quality).map(drop))?;
            candidates.push(Candidate { choice: Choice::Jpeg(quality), agreement, bytes, encode, server: SERVER.1 });
        }
        let encode = timed(&mut || images::png(&blank).map(drop))?;
        candidates.push(Candidate { choice: Choice::Png, agreement: 1.0, bytes: PNG_BYTES, encode, server: SERVER.1 });
        candidates.push(Candidate { choice: Choice::File, agreement: 1.0, bytes: f64::INFINITY, encode: 0.0, server: SERVER.1 });
        if let Some(local) = &mut local {
            let encode = timed(&mut || local.logits(&blank).map(drop))?;
            candidates.push(Candidate { choice: Choice::Local, agreement: 1.0, bytes: 0.0, encode, server: 0.0 });
        }
        let policy = Policy::new(goal, candidates).ok_or_else(|| ClientError::Usage("the bundle has no quality levels".into()))?;
        Ok(Self {
            encoder,
            local: local.map(|l| Arc::new(std::sync::Mutex::new(l))),
            connector,
            client: Arc::default(),
            policy,
            goal,
            options: InferOptions { deadline: goal.deadline, ..options },
            slowdown: slowdown.max(1.0),
            began: Instant::now(),
            background: JoinSet::new(),
        })
    }

    /// The policy's state.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    fn observe(&mut self, outcome: Outcome) {
        self.policy.observe(self.began.elapsed(), outcome);
    }

    /// Classifies one photo within the goal's deadline.
    ///
    /// # Errors
    /// [`ClientError::Deadline`] if neither server nor device answered in time, or why neither could.
    #[tracing::instrument(level = "debug", skip_all, err(level = "debug"))]
    pub async fn classify(&mut self, photo: &Photo) -> Result<AutoAnswer, ClientError> {
        let start = Instant::now();
        let (top_k, slowdown) = (self.options.top_k as usize, self.slowdown);
        while let Some(done) = self.background.try_join_next() {
            if let Ok(outcome) = done {
                self.observe(outcome);
            }
        }
        let decision = self.policy.decide(self.began.elapsed(), photo.file.as_ref().map(Bytes::len));
        tracing::debug!(choice = %decision.choice, dead = self.policy.link_is_dead(), "decided");
        let answer = |answered: Answered, choice, bytes| {
            let (device, server) = (Duration::from_secs_f64(answered.device), Duration::from_secs_f64(answered.server));
            Ok(AutoAnswer { labels: answered.labels, choice, bytes, elapsed: start.elapsed(), device, server })
        };
        if let (Choice::Local, Some(local)) = (decision.choice, &self.local) {
            let computed = compute(local.clone(), photo, top_k, slowdown).await?;
            return answer(self.computed(computed), Choice::Local, 0);
        }
        let (choice, payload, encode) = self.encode(decision.choice, photo).await?;
        let bytes = payload.len();
        let mut sending = self.send(choice, payload, encode, start);
        let Some(local) = self.local.clone() else {
            return answer(self.sent(sending.await)?, choice, bytes);
        };
        let patience = decision.local_after.unwrap_or(self.goal.deadline).saturating_sub(start.elapsed());
        match tokio::time::timeout(patience, &mut sending).await {
            Ok(sent) => match self.sent(sent) {
                Ok(answered) => answer(answered, choice, bytes),
                Err(_) => {
                    let computed = compute(local, photo, top_k, slowdown).await?;
                    answer(self.computed(computed), Choice::Local, bytes)
                }
            },
            // both at once: whichever is first
            Err(_) => {
                let local = compute(local, photo, top_k, slowdown);
                tokio::pin!(local);
                tokio::select! {
                    computed = &mut local => {
                        self.background.spawn(async move { sending.await.map_or(Outcome::Broken, |(outcome, _)| outcome) });
                        answer(self.computed(computed?), Choice::Local, bytes)
                    }
                    sent = &mut sending => match self.sent(sent) {
                        Ok(answered) => answer(answered, choice, bytes),
                        Err(_) => answer(self.computed(local.await?), Choice::Local, bytes),
                    },
                }
            }
        }
    }

    /// Takes note of an answer that the device computed.
    fn computed(&mut self, (labels, took): (Vec<Label>, f64)) -> Answered {
        self.observe(Outcome::Local(took));
        Answered { labels, device: took, server: 0.0 }
    }

    /// Takes note of what came of sending.
    fn sent(&mut self, sent: Result<Sent, tokio::task::JoinError>) -> Result<Answered, ClientError> {
        let (outcome, labels) = sent.map_err(|e| ClientError::Engine(format!("request: {e}")))?;
        let (device, server) = match &outcome {
            Outcome::Answered { encode, server, queue, .. } => (*encode, server + queue),
            _ => (0.0, 0.0),
        };
        self.observe(outcome);
        Ok(Answered { labels: labels?, device, server })
    }

    /// The payload of `choice` (or of the lower level that the encoder's budget left), and the seconds that it took.
    async fn encode(&mut self, mut choice: Choice, photo: &Photo) -> Result<(Choice, Payload, f64), ClientError> {
        let start = Instant::now();
        let side = self.encoder.bundle().manifest.input.size;
        let payload = match choice {
            Choice::Bottleneck(level) => {
                let encoded = self.encoder.encode_rgb(&photo.pixels, level)?;
                choice = Choice::Bottleneck(encoded.quality.level);
                Payload::Bitstream(encoded.container.into())
            }
            Choice::Jpeg(quality) => Payload::Image(images::jpeg(&photo.pixels.network_input(side)?, quality)?.into()),
            Choice::File if photo.file.is_some() => Payload::Image(photo.file.clone().unwrap_or_default()),
            Choice::Png | Choice::File | Choice::Local => Payload::Image(images::png(&photo.pixels.network_input(side)?)?.into()),
        };
        slow_down(start.elapsed(), self.slowdown).await;
        Ok((choice, payload, seconds(start)))
    }

    /// Sends in a task of its own; it ends with the deadline. A connection that answers late or not is given up.
    fn send(&self, choice: Choice, payload: Payload, encode: f64, start: Instant) -> JoinHandle<Sent> {
        let (slot, connector, mut options) = (self.client.clone(), self.connector.clone(), self.options.clone());
        tokio::spawn(async move {
            let bytes = payload.len();
            let limit = options.deadline.saturating_sub(start.elapsed());
            let asked = Instant::now();
            let work = async {
                let mut client = connected(&slot, &connector).await?;
                options.deadline = options.deadline.saturating_sub(start.elapsed());
                let sent = Instant::now();
                Ok((client.infer(payload, &options).await?, seconds(sent)))
            };
            let result = tokio::time::timeout(limit, work).await.unwrap_or(Err(ClientError::Deadline(limit)));
            match result {
                Ok((response, took)) => {
                    let timing = response.timing.unwrap_or_default();
                    let (total, queue) = (timing.total_us as f64 / 1e6, timing.queue_us as f64 / 1e6);
                    let (wire, server) = ((took - total).max(0.0), (total - queue).max(0.0));
                    (Outcome::Answered { choice, bytes, encode, wire, server, queue }, Ok(response.labels))
                }
                Err(error) => {
                    *slot.lock().await = None;
                    let late = matches!(error, ClientError::Deadline(_));
                    (if late { Outcome::Late { bytes, waited: seconds(asked) } } else { Outcome::Broken }, Err(error))
                }
            }
        })
    }
}

/// The open connection, or a new one.
async fn connected(slot: &Mutex<Option<Client>>, connector: &Connector) -> Result<Client, ClientError> {
    let mut open = slot.lock().await;
    if let Some(client) = &*open {
        return Ok(client.clone());
    }
    let client = connector().await?;
    *open = Some(client.clone());
    Ok(client)
}

/// Waits as long as a device that is `slowdown` times slower would go on computing.
async fn slow_down(took: Duration, slowdown: f64) {
    if slowdown > 1.0 {
        tokio::time::sleep(took.mul_f64(slowdown - 1.0)).await;
    }
}

/// The device's own answer and the seconds that it took, on a thread that may block: the link is served meanwhile.
async fn compute(
    local: Arc<std::sync::Mutex<LocalClassifier>>,
    photo: &Photo,
    top_k: usize,
    slowdown: f64,
) -> Result<(Vec<Label>, f64), ClientError> {
    let start = Instant::now();
    let pixels = photo.pixels.clone();
    let work = tokio::task::spawn_blocking(move || local.lock().unwrap_or_else(PoisonError::into_inner).classify(&pixels, top_k));
    let labels = work.await.map_err(|e| ClientError::Engine(format!("on the device: {e}")))??;
    slow_down(start.elapsed(), slowdown).await;
    Ok((labels, seconds(start)))
}
