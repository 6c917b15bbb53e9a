//! Evaluation during training: rounded latents, code lengths from the densities, agreement with the teacher.

use isthmus_nets::Layer;
use isthmus_pixels::Rgb;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::{Run, kl};
use crate::error::TrainError;

const BATCH: usize = 16;

/// Evaluation of one quality level.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LevelScore {
    /// Quality level, from 1.
    pub level: usize,
    /// Mean bytes per photo, ideal code length.
    pub bytes: f64,
    /// Share of photos whose top-1 equals the teacher's.
    pub agreement: f64,
    /// Mean KL (nats) to the teacher.
    pub kl: f64,
    /// Feature error per element, normalised.
    pub error: f64,
}

/// A point of the learning curve.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Crops seen.
    pub crops: u64,
    /// Photos evaluated.
    pub photos: usize,
    /// One entry per level.
    pub levels: Vec<LevelScore>,
}

/// Stacks square photos into normalised (N, 3, S, S).
pub fn stack(photos: &[Rgb], device: tch::Device) -> Tensor {
    let mut pixels = Vec::new();
    for p in photos {
        p.normalise_into(&mut pixels);
    }
    let side = photos.first().map_or(1, |p| i64::from(p.width()));
    Tensor::from_slice(&pixels).view([-1, 3, side, side]).to_device(device)
}

/// Scores the current weights on square photos of the network's input size.
///
/// # Errors
/// If libtorch fails.
pub fn score(run: &Run, photos: &[Rgb]) -> Result<CurvePoint, TrainError> {
    let _frozen = tch::no_grad_guard();
    let levels = run.recipe.lambdas.len();
    let (split, measure) = (run.recipe.split(), run.recipe.measure());
    let (medians, student) = (run.medians(), run.student());
    let mut sums = vec![[0f64; 4]; levels];
    for chunk in photos.chunks(BATCH) {
        let pixels = stack(chunk, run.net.vs.device());
        let target = run.teacher.between(&run.seen_by_teacher(&pixels), Layer::Input, measure);
        let wanted = run.teacher.tail(&target, measure).log_softmax(-1, Kind::Float);
        for (l, sum) in sums.iter_mut().enumerate() {
            let level = run.net.level_tensor(l as i64, chunk.len() as i64);
            let passed = run.net.round_pass(&pixels, &level, &medians, Kind::Float);
            let features = student.between(&run.net.decoder.denormalise(&passed.rebuilt), split, measure);
            let got = student.tail(&features, measure).log_softmax(-1, Kind::Float);
            let same = got.argmax(-1, false).eq_tensor(&wanted.argmax(-1, false));
            let error = run.error(&target, &features);
            sum[0] += passed.bits.sum(Kind::Double).double_value(&[]) / 8.0;
            sum[1] += same.sum(Kind::Double).double_value(&[]);
            sum[2] += kl(&wanted, &got).sum(Kind::Double).double_value(&[]);
            sum[3] += error * chunk.len() as f64;
        }
    }
    let n = photos.len().max(1) as f64;
    let bytes = |l: usize| run.frozen_bytes().and_then(|b| b.get(l).copied()).unwrap_or(sums[l][0] / n);
    let levels = sums
        .iter()
        .enumerate()
        .map(|(l, s)| LevelScore { level: l + 1, bytes: bytes(l), agreement: s[1] / n, kl: s[2] / n, error: s[3] / n })
        .collect();
    Ok(CurvePoint { crops: run.crops(), photos: photos.len(), levels })
}
