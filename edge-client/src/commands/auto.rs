//! `--policy auto`: every photo goes the way that serves the goal best.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use edge_client::auto::Photo;
use edge_client::local::LocalClassifier;
use edge_client::policy::{Aim, Goal, LocalUse};
use edge_client::{AutoClient, Client, ClientError, InferOptions};

use super::output::{Line, Printer};
use super::stream::{photos, ticks};
use crate::{AimKind, AskArgs, EncodingArgs, LocalKind, PolicyArgs, ServerArgs};

async fn client(server: &ServerArgs, encoding: &EncodingArgs, policy: &PolicyArgs, ask: &AskArgs) -> Result<AutoClient> {
    ensure!(encoding.quality.is_none(), "--policy auto chooses the quality level; leave out --quality");
    ensure!(encoding.target_bytes.is_none(), "--policy auto chooses the quality level; leave out --target-bytes");
    let endpoints: Arc<[_]> = super::endpoints(server)?.into_iter().map(|e| e.with_connect_timeout(ask.deadline)).collect();
    let (encoder, _) = super::encoder(encoding)?;
    let side = encoder.bundle().manifest.input.size;
    let local = match policy.local {
        LocalKind::Off => None,
        _ => match LocalClassifier::open(&policy.local_model, side, encoding.threads.into()) {
            Ok(local) => Some(local),
            Err(e) => {
                eprintln!(
                    "edge-client: no network for this device ({e}); when the link fails there will be no answer. `make setup` makes one, --local off says that none is wanted"
                );
                None
            }
        },
    };
    let goal = Goal {
        deadline: ask.deadline,
        aim: if policy.aim == AimKind::Latency { Aim::Latency } else { Aim::Agreement },
        least_agreement: policy.least_agreement,
        local: if policy.local == LocalKind::Choice { LocalUse::Choice } else { LocalUse::Fallback },
    };
    let options = InferOptions { model: ask.model.clone(), top_k: ask.top_k, ..InferOptions::default() };
    let connector = Arc::new(move || {
        let endpoints = endpoints.clone();
        Box::pin(async move { Client::connect_any(&endpoints).await }) as _
    });
    Ok(AutoClient::new(encoder, local, connector, goal, options, 1.0).await?)
}

async fn one(client: &mut AutoClient, path: &Path) -> Line {
    let name = path.display().to_string();
    let photo = super::read(path).and_then(|file| Ok(Photo { pixels: isthmus_pixels::decode(&file)?, file: Some(file.into()) }));
    let answer = match photo {
        Ok(photo) => client.classify(&photo).await,
        Err(e) => Err(e),
    };
    match answer {
        Ok(answer) => Line::chosen(name, answer),
        Err(e) => Line::failed(name, &e),
    }
}

pub async fn classify(
    files: &[PathBuf],
    server: &ServerArgs,
    encoding: &EncodingArgs,
    whole_image: bool,
    policy: &PolicyArgs,
    ask: &AskArgs,
) -> Result<bool> {
    ensure!(!whole_image, "--policy auto chooses what to send; leave out --whole-image");
    let mut client = client(server, encoding, policy, ask).await?;
    let mut printer = Printer::new(ask.json, files.len() as u64);
    for path in files {
        printer.print(&one(&mut client, path).await)?;
    }
    printer.finish();
    Ok(printer.failures == 0)
}

/// Photos one after the other, at most `fps` a second: a choice needs to know what came of the one before.
pub async fn stream(
    folder: &Path,
    fps: f64,
    repeat: u32,
    server: &ServerArgs,
    encoding: &EncodingArgs,
    policy: &PolicyArgs,
    ask: &AskArgs,
) -> Result<bool> {
    let mut tick = ticks(fps)?;
    let files = photos(folder)?;
    let mut client = client(server, encoding, policy, ask).await?;
    let mut printer = Printer::new(ask.json, files.len() as u64 * u64::from(repeat));
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    for path in (0..repeat).flat_map(|_| files.iter()) {
        let line = tokio::select! {
            line = async { tick.tick().await; one(&mut client, path).await } => line,
            _ = &mut interrupted => {
                let error = ClientError::Usage("interrupted before the answer came".into());
                printer.print(&Line::failed(path.display().to_string(), &error))?;
                printer.finish();
                eprintln!("edge-client: interrupted");
                return Ok(false);
            }
        };
        printer.print(&line)?;
    }
    printer.finish();
    Ok(printer.failures == 0)
}
