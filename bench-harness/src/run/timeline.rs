//! Photos at a steady pace over a link that varies: each strategy has the link from its beginning, alone.

use std::time::{Duration, Instant};

use edge_client::AutoClient;
use linkem::catalogue::NamedLink;

use crate::error::HarnessError;
use crate::run::config::TimelineConfig;
use crate::run::progress;
use crate::run::results::{TimelineResults, TimelineRow, TimelineSample};
use crate::run::session::{Bench, Sample, Session, choose};
use crate::run::strategy::Strategy;

/// Plays the link once per strategy.
///
/// # Errors
/// If link or server do not start.
pub async fn measure(
    bench: &mut Bench<'_>,
    (name, named): &(String, NamedLink),
    t: &TimelineConfig,
    levels: u8,
) -> Result<TimelineResults, HarnessError> {
    let strategies = t.strategies.all(levels)?;
    let total = (t.length.as_secs_f64() * strategies.len() as f64).round() as usize;
    let bar = progress(format!("{name}: time lines (s)"), total);
    let mut rows = Vec::new();
    for strategy in strategies {
        rows.push(play(bench, named, t, strategy).await?);
        bar.inc(t.length.as_secs());
    }
    bar.finish_and_clear();
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    Ok(TimelineResults {
        name: name.clone(),
        about: named.about.clone(),
        link: Some(named.link.clone()),
        deadline_ms: ms(t.deadline),
        period_ms: ms(t.period),
        rows,
    })
}

async fn play(bench: &mut Bench<'_>, named: &NamedLink, t: &TimelineConfig, strategy: Strategy) -> Result<TimelineRow, HarnessError> {
    let config = &bench.prepared.config;
    // the same seed for all: the same losses and jitter at the same packets
    let site = bench.site(&named.link, config.seed)?;
    let began = Instant::now();
    let mut session = Session::new(&site, config.device_slowdown, t.deadline);
    let mut auto: Option<AutoClient> = match strategy {
        Strategy::Auto(a) => Some(bench.auto(&site, a, t.deadline).await?),
        _ => None,
    };
    let (mut samples, mut right, mut bytes) = (Vec::new(), 0.0, 0.0);
    let mut tick = tokio::time::interval(t.period);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let photos: Vec<(&crate::photos::Photo, u32)> = bench.photos.iter().zip(bench.reference.iter().copied()).collect();
    for (photo, wanted) in photos.into_iter().cycle() {
        tick.tick().await;
        let at = began.elapsed();
        if at >= t.length {
            break;
        }
        let sample = match &mut auto {
            Some(client) => choose(client, photo, wanted).await,
            None => session.one(&mut bench.device, strategy, photo, wanted).await,
        };
        let in_time = sample.ok().filter(|s: &Sample| s.latency <= t.deadline.as_secs_f64() * 1e3);
        right += f64::from(u8::from(in_time.as_ref().is_some_and(|s| s.agrees)));
        bytes += in_time.as_ref().map_or(0.0, |s| s.bytes as f64);
        samples.push(TimelineSample {
            at_s: at.as_secs_f64(),
            latency_ms: in_time.as_ref().map(|s| (s.latency * 1e3).round() / 1e3),
            choice: in_time.and_then(|s| s.choice).map_or_else(|| strategy.name(), |c| c.0),
        });
    }
    let n = samples.len().max(1) as f64;
    let answered: Vec<f64> = samples.iter().filter_map(|s| s.latency_ms).collect();
    let late = (samples.len() - answered.len()) as f64 * t.deadline.as_secs_f64() * 1e3;
    Ok(TimelineRow {
        strategy: strategy.name(),
        emulator: site.emulation.report(&named.link, &config.congestion_control),
        n: samples.len(),
        in_time: answered.len() as f64 / n,
        in_time_and_agreeing: right / n,
        mean_latency_ms: (answered.iter().sum::<f64>() + late) / n,
        bytes: bytes / answered.len().max(1) as f64,
        samples,
    })
}
