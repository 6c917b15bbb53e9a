//! `classify`: one request per photo.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use edge_client::{Client, ClientError, Encoder, InferOptions, Payload};
use isthmus_codec::Quality;

use super::output::{Line, Printer};
use crate::{AskArgs, EncodingArgs, ServerArgs};

pub async fn run(files: &[PathBuf], server: &ServerArgs, encoding: &EncodingArgs, whole_image: bool, ask: &AskArgs) -> Result<bool> {
    let endpoints = super::endpoints(server)?;
    let mut printer = Printer::new(ask.json, files.len() as u64);
    if missing(files, &mut printer)? {
        return Ok(false);
    }
    let mut encoder = if whole_image { None } else { Some(super::encoder(encoding)?) };
    let mut client = Client::connect_any(&endpoints).await?;
    if let Some(newest) = encoder.take() {
        encoder = Some(super::served(newest, &mut client, encoding, ask.deadline).await?);
    }
    let options = InferOptions { model: ask.model.clone(), top_k: ask.top_k, deadline: ask.deadline, ..InferOptions::default() };
    for path in files {
        let name = path.display().to_string();
        let line = match one(path, encoder.as_mut(), &mut client, &options).await {
            Ok(line) => line,
            Err(e) => Line::failed(name, &e),
        };
        printer.print(&line)?;
    }
    printer.finish();
    Ok(printer.failures == 0)
}

/// If none of the photos is there, says so of each: no server is needed for that.
fn missing(files: &[PathBuf], printer: &mut Printer) -> Result<bool> {
    let causes = files.iter().map(|path| std::fs::metadata(path).err()).collect::<Option<Vec<_>>>();
    let Some(causes) = causes else { return Ok(false) };
    for (path, cause) in files.iter().zip(causes) {
        printer.print(&Line::failed(path.display().to_string(), &ClientError::Io { path: path.clone(), cause }))?;
    }
    printer.finish();
    Ok(true)
}

async fn one(
    path: &Path,
    encoder: Option<&mut (Encoder, Quality)>,
    client: &mut Client,
    options: &InferOptions,
) -> Result<Line, ClientError> {
    let file = super::read(path)?;
    let (payload, quality, over_target, timing) = match encoder {
        Some((encoder, quality)) => {
            let encoded = encoder.encode(&file, *quality)?;
            (Payload::Bitstream(encoded.container.into()), Some(encoded.quality), encoded.over_target, Some(encoded.timing))
        }
        None => (Payload::Image(file.into()), None, false, None),
    };
    let bytes = payload.len();
    let start = Instant::now();
    let answer = client.infer(payload, options).await?;
    let line = Line::answered(path.display().to_string(), quality, bytes, timing, start.elapsed(), answer);
    Ok(Line { over_target, ..line })
}
