//! How often each strategy gives the answer to the lossless photo, and its bytes; without a link.

use std::time::Duration;

use edge_client::{Client, Endpoint, InferOptions};

use crate::codecs::Codec;
use crate::error::HarnessError;
use crate::run::emulation::ServerProcess;
use crate::run::progress;
use crate::run::results::AgreementRow;
use crate::run::session::Bench;
use crate::run::strategy::{FeatureEncoding, Prepared, Strategy};
use crate::stats::bootstrap;

const DEADLINE: Duration = Duration::from_secs(60);

/// Sends every photo with every strategy to a server on loopback; fills the bench's reference answers first.
///
/// # Errors
/// If the server does not start or a request fails.
pub async fn measure(bench: &mut Bench<'_>, strategies: &[Strategy]) -> Result<Vec<AgreementRow>, HarnessError> {
    let config = &bench.prepared.config;
    let process = ServerProcess::start(bench.server, &config.bundle, &config.backbones, None)?;
    let mut client = Client::connect(&Endpoint::new(&format!("http://{}", process.address))?).await?;
    let options = InferOptions { top_k: 1, deadline: DEADLINE, ..InferOptions::default() };
    let fixed: Vec<Strategy> = strategies.iter().copied().filter(|s| !matches!(s, Strategy::Auto(_))).collect();
    let bar = progress("agreement (no link)".into(), (fixed.len() + 1) * bench.photos.len());
    let lossless = Strategy::Image(Codec::png());
    let mut reference = Vec::new();
    let mut rows = Vec::new();
    // the lossless photo first: the others are compared with it
    for (i, strategy) in std::iter::once(lossless).chain(fixed).enumerate() {
        let (mut bytes, mut agrees) = (0, Vec::new());
        for (p, photo) in bench.photos.iter().enumerate() {
            let best = match bench.device.prepare(strategy, &photo.pixels)? {
                Prepared::Answer(best) => best,
                Prepared::Send(payload) => {
                    bytes += payload.len();
                    let answer = client.infer(payload, &options).await?;
                    answer.labels.first().ok_or_else(|| HarnessError::Backend("the server sent no labels".into()))?.index
                }
            };
            bar.inc(1);
            if i == 0 {
                reference.push(best);
            }
            agrees.push((photo.group.as_str(), f64::from(u8::from(best == reference[p]))));
        }
        if i > 0 {
            rows.push(AgreementRow {
                strategy: strategy.name(),
                family: strategy.family().into(),
                lossless: match strategy {
                    Strategy::Image(codec) => codec.is_lossless(),
                    Strategy::Features(encoding) => encoding == FeatureEncoding::F32,
                    Strategy::Local => true,
                    Strategy::Bottleneck(_) | Strategy::Auto(_) => false,
                },
                n: agrees.len(),
                bytes: bytes as f64 / agrees.len().max(1) as f64,
                agreement: bootstrap(&agrees),
            });
        }
    }
    bar.finish_and_clear();
    bench.reference = reference;
    Ok(rows)
}
