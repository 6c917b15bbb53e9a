//! `stream`: the photos of a folder over one bidirectional stream, at a steady rate.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edge_client::stream::{Answer, open};
use edge_client::{Client, ClientError, EncodeTiming, InferOptions, Payload};

use super::output::{Line, Printer};
use crate::{AskArgs, EncodingArgs, ServerArgs};

pub struct Pace {
    pub fps: f64,
    pub window: usize,
    pub repeat: u32,
}

struct Sent {
    file: String,
    bytes: usize,
    timing: EncodeTiming,
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
    ensure!((0.001..=10_000.0).contains(&fps), "--fps must be between 0.001 and 10000");
    let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / fps));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    Ok(tick)
}

pub async fn run(folder: &Path, pace: &Pace, server: &ServerArgs, encoding: &EncodingArgs, ask: &AskArgs) -> Result<bool> {
    let mut tick = ticks(pace.fps)?;
    let files = photos(folder)?;
    let newest = super::encoder(encoding)?;
    let mut client = Client::connect(&super::endpoint(server)?).await?;
    let (mut encoder, quality) = super::served(newest, &mut client, encoding, ask.deadline).await?;
    let options = InferOptions { model: ask.model.clone(), top_k: ask.top_k, logits: false, deadline: ask.deadline };
    let (sender, mut receiver) = open(&mut client, pace.window, options).await?;
    let mut sender = Some(sender);
    let total = files.len() as u64 * u64::from(pace.repeat);
    let mut printer = Printer::new(ask.json, total);
    let mut under_way: HashMap<u64, Sent> = HashMap::new();
    let mut queue = (0..pace.repeat).flat_map(|_| files.iter());
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        tokio::select! {
            _ = tick.tick(), if sender.is_some() && receiver.pending() < pace.window.max(1) => {
                let Some(path) = queue.next() else {
                    sender = None; // half-close: the answers under way still come
                    continue;
                };
                let name = path.display().to_string();
                let encoded = super::read(path).and_then(|file| encoder.encode(&file, quality));
                match (encoded, sender.as_mut()) {
                    (Ok(encoded), Some(open)) => {
                        let bytes = encoded.container.len();
                        match open.send(Payload::Bitstream(encoded.container.into())).await {
                            Ok(id) => {
                                under_way.insert(id, Sent { file: name, bytes, timing: encoded.timing });
                            }
                            // the receiving half tells why the stream has ended
                            Err(e) => {
                                printer.print(&Line::failed(name, &e))?;
                                sender = None;
                            }
                        }
                    }
                    (Err(e), _) => printer.print(&Line::failed(name, &e))?,
                    (Ok(_), None) => {}
                }
            }
            answer = receiver.next() => match answer {
                Ok(Some(answer)) => print(&mut printer, &mut under_way, answer, quality)?,
                Ok(None) => break,
                Err(error) => {
                    give_up(&mut printer, under_way, &error)?;
                    return Err(error.into());
                }
            },
            _ = &mut interrupted => {
                give_up(&mut printer, under_way, &ClientError::Usage("interrupted before the answer came".into()))?;
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

/// Every photo that was sent gets its line, answered or not.
fn give_up(printer: &mut Printer, under_way: HashMap<u64, Sent>, error: &ClientError) -> Result<()> {
    let mut left: Vec<(u64, Sent)> = under_way.into_iter().collect();
    left.sort_by_key(|(id, _)| *id);
    for (_, sent) in left {
        printer.print(&Line::failed(sent.file, error))?;
    }
    printer.finish();
    Ok(())
}

fn print(printer: &mut Printer, under_way: &mut HashMap<u64, Sent>, answer: Answer, quality: u8) -> Result<()> {
    let Some(sent) = under_way.remove(&answer.id) else { return Ok(()) };
    let line = match answer.result {
        Ok(response) => Line::answered(sent.file, Some(quality), sent.bytes, Some(sent.timing), answer.elapsed, response),
        Err(status) => Line::failed(sent.file, &ClientError::from(status)),
    };
    Ok(printer.print(&line)?)
}
