//! What is printed for one photo: a line for people, or a JSON line for programs.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use edge_client::{AutoAnswer, ClientError, EncodeTiming};
use indicatif::{ProgressBar, ProgressStyle};
use isthmus_codec::Quality;
use isthmus_proto::offload_v1::{InferResponse, Label, Timing};
use serde::Serialize;

/// One line of output.
#[derive(Debug, Default, Serialize)]
pub struct Line {
    pub file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,
    /// Refinements that were sent, with --progressive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refinements: Option<usize>,
    /// What --policy auto chose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<String>,
    /// From photo to answer, with --policy auto.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<f64>,
    /// Payload bytes: the container, or the image file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<usize>,
    /// More than --target-bytes (or the usual bytes' bound) even at the lowest quality.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub over_target: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<LabelLine>,
    #[serde(flatten)]
    pub times: Option<Times>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encode: Option<EncodeTiming>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerTiming>,
}

/// Milliseconds: encoding, everything between the machines, server.
#[derive(Debug, Serialize)]
pub struct Times {
    pub encode_ms: f64,
    pub wire_ms: f64,
    pub server_ms: f64,
}

/// To the microsecond.
fn milliseconds(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

#[derive(Debug, Serialize)]
pub struct LabelLine {
    pub index: u32,
    pub name: String,
    pub score: f32,
}

#[derive(Debug, Serialize)]
pub struct ServerTiming {
    pub decode_us: u64,
    pub queue_us: u64,
    pub network_us: u64,
    pub batch_size: u32,
}

impl Line {
    pub fn failed(file: String, error: &ClientError) -> Self {
        Self { file, error: Some(error.to_string()), ..Self::default() }
    }

    pub fn answered(
        file: String,
        quality: Option<Quality>,
        bytes: usize,
        encode: Option<EncodeTiming>,
        round_trip: Duration,
        answer: InferResponse,
    ) -> Self {
        let timing: Timing = answer.timing.unwrap_or_default();
        let server_ms = timing.total_us as f64 / 1e3;
        Self {
            file,
            quality,
            bytes: Some(bytes),
            labels: lines(answer.labels),
            times: Some(Times {
                encode_ms: milliseconds(encode.map_or(0.0, |e| e.total_us() as f64 / 1e3)),
                wire_ms: milliseconds((round_trip.as_secs_f64() * 1e3 - server_ms).max(0.0)),
                server_ms: milliseconds(server_ms),
            }),
            encode,
            server: Some(ServerTiming {
                decode_us: timing.decode_us,
                queue_us: timing.queue_us,
                network_us: timing.network_us,
                batch_size: timing.batch_size,
            }),
            ..Self::default()
        }
    }

    pub fn chosen(file: String, answer: AutoAnswer) -> Self {
        Self {
            file,
            choice: Some(answer.choice.to_string()),
            bytes: Some(answer.bytes),
            labels: lines(answer.labels),
            latency_ms: Some(milliseconds(answer.elapsed.as_secs_f64() * 1e3)),
            ..Self::default()
        }
    }
}

fn lines(labels: Vec<Label>) -> Vec<LabelLine> {
    labels.into_iter().map(|l| LabelLine { index: l.index, name: l.name, score: l.score }).collect()
}

/// Prints lines, with a progress bar on a terminal.
pub struct Printer {
    json: bool,
    bar: ProgressBar,
    pub failures: usize,
}

impl Printer {
    pub fn new(json: bool, total: u64) -> Self {
        let json = json || !std::io::stdout().is_terminal();
        let bar = if std::io::stderr().is_terminal() && total > 1 { ProgressBar::new(total) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {per_sec}") {
            bar.set_style(style);
        }
        Self { json, bar, failures: 0 }
    }

    pub fn print(&mut self, line: &Line) -> std::io::Result<()> {
        self.failures += usize::from(line.error.is_some());
        let text = if self.json { serde_json::to_string(line)? } else { human(line) };
        self.bar.inc(1);
        self.bar.suspend(|| writeln!(std::io::stdout(), "{text}"))
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn human(line: &Line) -> String {
    if let Some(error) = &line.error {
        return format!("{}: error: {error}", line.file);
    }
    let labels: Vec<String> = line.labels.iter().map(|l| format!("{} {:.0} %", l.name, l.score * 100.0)).collect();
    let bytes = format!("{}{}", line.bytes.unwrap_or_default(), if line.over_target { " B (over the target)" } else { " B" });
    if let (Some(choice), Some(latency)) = (&line.choice, line.latency_ms) {
        return format!("{}: {}  [{choice}, {bytes}; {latency:.1} ms]", line.file, labels.join(", "));
    }
    let times = line
        .times
        .as_ref()
        .map_or_else(String::new, |t| format!("; encode {:.1} ms, wire {:.1} ms, server {:.1} ms", t.encode_ms, t.wire_ms, t.server_ms));
    format!("{}: {}  [{bytes}{times}]", line.file, labels.join(", "))
}
