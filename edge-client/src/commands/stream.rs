//! `stream`: the photos of a folder over one bidirectional stream, at a steady rate.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use edge_client::stream::{Receiver, Sender, open};
use edge_client::{Client, ClientError, EncodeTiming, Encoder, InferOptions, Payload};

use isthmus_codec::Quality;
use isthmus_codec::progressive::BASE;
use isthmus_proto::offload_v1::InferResponse;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use super::output::{Line, Printer};
use crate::{AskArgs, EncodingArgs, ServerArgs};

pub struct Pace {
    pub fps: f64,
    pub window: usize,
    pub repeat: u32,
}

impl Pace {
    /// The next photo follows the answer.
    pub const ONE_BY_ONE: Self = Self { fps: FASTEST, window: 1, repeat: 1 };
}

/// Most photos a second.
const FASTEST: f64 = 10_000.0;

struct Sent {
    file: String,
    /// What has been sent of it.
    container: Bytes,
    quality: Quality,
    /// Refinements that may follow.
    rest: VecDeque<Vec<u8>>,
    /// Refinements that have been sent, of a progressive bitstream.
    refinements: Option<usize>,
    /// The answer to what had been sent before the last refinement: better than none.
    answered: Option<InferResponse>,
    /// It was sent whole after the server had forgotten its beginning.
    whole: bool,
    over_target: bool,
    timing: EncodeTiming,
    at: Instant,
}

/// Photos that were sent and not answered, by the id of their answer.
type UnderWay = BTreeMap<u64, Sent>;

/// First pause before a broken stream is opened again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Ids from here on are no answer's.
const UNSENT: u64 = 1 << 63;

/// Opens a stream in place of a broken one, and sends what was not answered again (an inference changes nothing). Tries as long as a photo may take.
async fn reopen(
    client: &mut Client,
    window: usize,
    options: &InferOptions,
    under_way: &mut UnderWay,
) -> Result<(Sender, Receiver), ClientError> {
    let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
    // a server that takes streams and ends them at once must not be asked as fast as it answers
    tokio::time::sleep(pause).await;
    loop {
        match open(client, window, options.clone()).await {
            Ok((mut sender, receiver)) => {
                let mut again = std::mem::take(under_way).into_values();
                let mut broken = None;
                for sent in again.by_ref() {
                    match sender.send(Payload::Bitstream(sent.container.clone())).await {
                        Ok(id) => drop(under_way.insert(id, sent)),
                        Err(error) => {
                            broken = Some((error, sent));
                            break;
                        }
                    }
                }
                let Some((error, first)) = broken else { return Ok((sender, receiver)) };
                // this one ended too: nothing is dropped
                under_way.extend((UNSENT..).zip(std::iter::once(first).chain(again)));
                if began.elapsed() + pause >= options.deadline {
                    return Err(error);
                }
            }
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) if began.elapsed() + pause >= options.deadline => return Err(error),
            Err(error) => tracing::debug!(%error, "the stream could not be opened"),
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

pub fn photos(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("{} cannot be listed", folder.display()))?;
    let known = |p: &Path| {
        let extension = p.extension().map(|e| e.to_string_lossy().to_lowercase());
        matches!(extension.as_deref(), Some("jpg" | "jpeg" | "png" | "webp"))
    };
    let mut files: Vec<PathBuf> = entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| known(p)).collect();
    files.sort();
    ensure!(!files.is_empty(), "{} holds no .jpg, .jpeg, .png or .webp files", folder.display());
    Ok(files)
}

/// One tick per photo.
pub fn ticks(fps: f64) -> Result<tokio::time::Interval> {
    ensure!((0.001..=FASTEST).contains(&fps), "--fps must be between 0.001 and 10000");
    let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / fps));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    Ok(tick)
}

/// Encodes one photo; as a progressive bitstream, of which the beginning is to be sent, if a `certainty` is asked for.
fn encode(encoder: &mut Encoder, path: &Path, quality: Quality, certainty: Option<f32>) -> Result<Sent, ClientError> {
    let read = super::read(path)?;
    let (file, at) = (path.display().to_string(), Instant::now());
    if certainty.is_none() {
        let encoded = encoder.encode(&read, quality)?;
        let (container, quality, over_target, timing) = (encoded.container.into(), encoded.quality, encoded.over_target, encoded.timing);
        let rest = VecDeque::new();
        return Ok(Sent { file, container, quality, rest, refinements: None, answered: None, whole: false, over_target, timing, at });
    }
    let encoded = encoder.encode_progressive(&read)?;
    let mut rest = VecDeque::from(encoded.parts);
    let container = rest.pop_front().unwrap_or_default().into();
    let (quality, refinements, timing) = (BASE.into(), Some(0), encoded.timing);
    Ok(Sent { file, container, quality, rest, refinements, answered: None, whole: false, over_target: false, timing, at })
}

impl Sent {
    /// Takes the next refinement to what is sent, if there is one and still time for it.
    fn next(&mut self, limit: Duration) -> Option<Bytes> {
        let part = self.rest.pop_front().filter(|_| self.at.elapsed() < limit)?;
        self.container = [&self.container[..], &part].concat().into();
        self.refinements = self.refinements.map(|n| n + 1);
        Some(part.into())
    }

    /// True for a refusal of a refinement that the server has nothing for any more: what was sent is to be sent whole, once.
    fn is_forgotten(&self, error: &ClientError) -> bool {
        let gone = |status: &Status| status.code() == Code::FailedPrecondition;
        !self.whole && self.refinements.is_some_and(|n| n > 0) && matches!(error, ClientError::Server(status) if gone(status))
    }
}

pub async fn run(
    files: &[PathBuf],
    pace: &Pace,
    server: &ServerArgs,
    encoding: &EncodingArgs,
    certainty: Option<f32>,
    ask: &AskArgs,
) -> Result<bool> {
    let mut tick = ticks(pace.fps)?;
    let newest = super::encoder(encoding)?;
    let mut client = Client::connect_any(&super::endpoints(server)?).await?;
    let (mut encoder, quality) = super::served(newest, &mut client, encoding, ask.deadline).await?;
    if certainty.is_some() {
        encoder.bundle().refinements()?;
    }
    let certainty_wanted = certainty.unwrap_or_default();
    let options = InferOptions {
        model: ask.model.clone(),
        top_k: ask.top_k,
        deadline: ask.deadline,
        certainty: certainty_wanted,
        ..InferOptions::default()
    };
    let (sender, mut receiver) = open(&mut client, pace.window, options.clone()).await?;
    let mut sender = Some(sender);
    let mut ending = false;
    let total = files.len() as u64 * u64::from(pace.repeat);
    let mut printer = Printer::new(ask.json, total);
    let mut under_way = UnderWay::new();
    let mut unsent = UNSENT..;
    // photos that the stream's server refused, each by itself, at others
    let (mut refused, mut elsewhere) = (UnderWay::new(), JoinSet::new());
    let (mut ended, mut refusals) = (false, 0);
    let interruption = ClientError::Usage("interrupted before the answer came".into());
    let mut queue = (0..pace.repeat).flat_map(|_| files.iter());
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        tokio::select! {
            _ = tick.tick(), if sender.is_some() && receiver.pending() < pace.window.max(1) => {
                let Some(path) = queue.next() else {
                    // half-close: the answers under way still come; but they may want more
                    if certainty.is_none() || under_way.is_empty() {
                        sender = None;
                    }
                    ending = true;
                    continue;
                };
                let name = path.display().to_string();
                match (encode(&mut encoder, path, quality, certainty), sender.as_mut()) {
                    (Ok(encoded), Some(open)) => {
                        let sent = Sent { at: Instant::now(), ..encoded };
                        match open.send(Payload::Bitstream(sent.container.clone())).await {
                            Ok(id) => {
                                under_way.insert(id, sent);
                            }
                            // the receiving half tells why the stream has ended; there is no answer of this id
                            Err(_) => {
                                under_way.insert(unsent.next().unwrap_or(UNSENT), sent);
                                sender = None;
                            }
                        }
                    }
                    (Err(e), _) => printer.print(&Line::failed(name, &e))?,
                    (Ok(_), None) => {}
                }
            }
            Some(Ok((id, answer))) = elsewhere.join_next() => {
                if let Some(sent) = refused.remove(&id) {
                    end(&mut printer, sent, answer)?;
                }
            }
            // once the stream has ended, only those are awaited
            answer = receiver.next(), if !ended => match answer {
                Ok(Some(answer)) => {
                    let id = answer.id;
                    let Some(mut sent) = under_way.remove(&id) else { continue };
                    match answer.result.map_err(ClientError::from) {
                        Ok(response) if response.wants_more && !sent.rest.is_empty() => match sent.next(options.deadline) {
                            None => end(&mut printer, sent, Ok(response))?,
                            Some(part) => {
                                sent.answered = Some(response);
                                let refined = match sender.as_mut() {
                                    Some(open) => open.refine(id, sent.at, part).await.is_ok(),
                                    None => false,
                                };
                                // if not, the stream has ended: what was to be sent of it is sent again, whole
                                under_way.insert(if refined { id } else { unsent.next().unwrap_or(UNSENT) }, sent);
                                sender = sender.filter(|_| refined);
                            }
                        },
                        Err(error) if sent.is_forgotten(&error) => {
                            sent.whole = true;
                            let payload = Payload::Bitstream(sent.container.clone());
                            let again = match sender.as_mut() {
                                Some(open) => open.send_since(sent.at, payload).await.ok(),
                                None => None,
                            };
                            sender = sender.filter(|_| again.is_some());
                            under_way.insert(again.or_else(|| unsent.next()).unwrap_or(UNSENT), sent);
                        }
                        Err(error) if error.is_transient() && client.has_others() && refused.len() < pace.window => {
                            // ids begin anew with each stream
                            let id = refusals;
                            refusals += 1;
                            let (mut client, payload) = (client.clone(), Payload::Bitstream(sent.container.clone()));
                            let left = InferOptions { deadline: options.deadline.saturating_sub(sent.at.elapsed()), ..options.clone() };
                            elsewhere.spawn(async move { (id, client.infer_again(payload, &left, error).await) });
                            refused.insert(id, sent);
                        }
                        result => end(&mut printer, sent, result)?,
                    }
                    if ending && under_way.is_empty() {
                        sender = None;
                    }
                }
                Ok(None) if under_way.is_empty() && ending => ended = true,
                broken => {
                    let error = broken.err().unwrap_or_else(|| Status::unavailable("the stream has ended").into());
                    give_up_late(&mut printer, &mut under_way, options.deadline)?;
                    let again = tokio::select! {
                        again = reopen(&mut client, pace.window, &options, &mut under_way), if error.is_transient() => again,
                        _ = &mut interrupted => {
                            give_up(&mut printer, refused.into_values().chain(under_way.into_values()), &interruption)?;
                            eprintln!("edge-client: interrupted");
                            return Ok(false);
                        }
                        () = std::future::ready(()), if !error.is_transient() => Err(error),
                    };
                    match again {
                        Ok((open, answers)) => (sender, receiver) = ((!ending || certainty.is_some() && !under_way.is_empty()).then_some(open), answers),
                        Err(error) => {
                            give_up(&mut printer, refused.into_values().chain(under_way.into_values()), &error)?;
                            return Err(error.into());
                        }
                    }
                }
            },
            () = std::future::ready(()), if ended && elsewhere.is_empty() => break,
            _ = &mut interrupted => {
                give_up(&mut printer, refused.into_values().chain(under_way.into_values()), &interruption)?;
                eprintln!("edge-client: interrupted");
                return Ok(false);
            }
        }
    }
    printer.finish();
    if !printer.is_json() {
        writeln!(std::io::stdout(), "{total} photos, {} failed", printer.failures)?;
    }
    Ok(printer.failures == 0)
}

/// Photos keep their time limit when a broken stream is opened again.
fn give_up_late(printer: &mut Printer, under_way: &mut UnderWay, limit: Duration) -> Result<()> {
    for (_, sent) in under_way.extract_if(.., |_, sent| sent.at.elapsed() >= limit) {
        failed(printer, sent, &ClientError::Deadline(limit))?;
    }
    Ok(())
}

/// Every photo that was sent gets its line, answered or not.
fn give_up(printer: &mut Printer, photos: impl Iterator<Item = Sent>, error: &ClientError) -> Result<()> {
    for sent in photos {
        failed(printer, sent, error)?;
    }
    printer.finish();
    Ok(())
}

/// A photo's line.
fn end(printer: &mut Printer, sent: Sent, answer: Result<InferResponse, ClientError>) -> Result<()> {
    match answer {
        Ok(response) => answered(printer, sent, response),
        Err(error) => failed(printer, sent, &error),
    }
}

fn answered(printer: &mut Printer, sent: Sent, response: InferResponse) -> Result<()> {
    let (bytes, refinements, over_target) = (sent.container.len(), sent.refinements, sent.over_target);
    let line = Line::answered(sent.file, Some(sent.quality), bytes, Some(sent.timing), sent.at.elapsed(), response);
    Ok(printer.print(&Line { refinements, over_target, ..line })?)
}

/// The line of a photo that was not answered, or whose refinement was not.
fn failed(printer: &mut Printer, mut sent: Sent, error: &ClientError) -> Result<()> {
    match sent.answered.take() {
        Some(response) => answered(printer, sent, response),
        None => Ok(printer.print(&Line::failed(sent.file, error))?),
    }
}
