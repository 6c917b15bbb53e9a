//! The network of a channel's contexts: learned in floating point from random positions, then rounded to integers.
//!
//! Its two outputs are the natural parameters of a family of distributions over symbols, `log p(s) = base(s) + u a(s) + v b(s)`, whose functions of
//! the symbol are learned with it. Once it is learned, thresholds and histograms take their place.

use isthmus_codec::estimator::UNITS;
use isthmus_codec::{Input, Network};
use rand::Rng;
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::{Place, Seen};
use crate::error::TrainError;

/// Positions of a step.
const BATCH: usize = 2048;
/// Positions that are drawn together, one after the other in a row: most of what they read is in the cache by then.
const TOGETHER: usize = 8;
/// Steps at most, and how often a position is drawn on average if there are few.
const STEPS: usize = 1200;
const TIMES: usize = 4;
/// Learning rate of the first step; it falls to nothing along a cosine.
const LEARNING_RATE: f64 = 2e-2;
/// Positions that tell the inputs' spreads, and the range of the units.
const RANGED: usize = 16_384;
/// Symbols farther out count like this one, at most; which one is told by the share of symbols that lie beyond.
const FARTHEST: i32 = 20;
const BEYOND: f64 = 5e-4;
/// So many times the largest sum of a unit that was seen is the end of its range.
const HEADROOM: f64 = 4.0;
/// Added to the spread of inputs, most of which are zero.
const LEAST_SPREAD: f64 = 0.05;

/// Inputs (rows, 2 x places: signed values, then magnitudes) of random positions, and the symbols there.
fn draw(seen: &Seen, channel: u16, places: &[Place], rows: usize, rng: &mut impl Rng) -> (Tensor, Vec<i32>) {
    let mut inputs = vec![0f32; rows * 2 * places.len()];
    let (mut symbols, mut row) = (Vec::with_capacity(rows), 0);
    for (i, values) in inputs.chunks_exact_mut(2 * places.len()).enumerate() {
        if i % TOGETHER == 0 {
            row = rng.random_range(0..seen.rows());
        }
        let (signed, magnitude) = values.split_at_mut(places.len());
        for ((signed, magnitude), says) in signed.iter_mut().zip(magnitude).zip(seen.read(places, row)) {
            (*signed, *magnitude) = (says.signed.into(), says.magnitude.into());
        }
        symbols.push(seen.symbol(channel, row));
        row = (row + 1) % seen.rows();
    }
    (Tensor::from_slice(&inputs).view([rows as i64, -1]), symbols)
}

/// Learns which distribution the symbols of `channel` have, given those at `places`.
///
/// # Errors
/// If libtorch fails.
pub(super) fn fit(seen: &Seen, channel: u16, places: &[Place], rng: &mut impl Rng) -> Result<Network, TrainError> {
    let (sample, symbols) = draw(seen, channel, places, RANGED, rng);
    let spread = (sample.std_dim([0i64].as_slice(), false, false) + LEAST_SPREAD).reciprocal();
    let mut far: Vec<i32> = symbols.iter().map(|s| s.abs()).collect();
    far.sort_unstable();
    let farthest = (far[((1.0 - BEYOND) * far.len() as f64) as usize] + 1).min(FARTHEST);
    let classes = i64::from(2 * farthest + 1);
    let class = |symbols: &[i32]| {
        let classes: Vec<i64> = symbols.iter().map(|&s| i64::from(s.clamp(-farthest, farthest) + farthest)).collect();
        Tensor::from_slice(&classes)
    };
    let vs = nn::VarStore::new(Device::Cpu);
    let (root, inputs, units) = (vs.root(), 2 * places.len() as i64, UNITS as i64);
    let zeros = |name: &str, shape: &[i64]| root.var(name, shape, nn::Init::Const(0.0));
    let (weights, bias) = (zeros("weights", &[inputs, units]), zeros("bias", &[units]));
    let outputs = zeros("outputs", &[units, 2]);
    let (functions, base) = (zeros("functions", &[2, classes]), zeros("base", &[classes]));
    let mut random = |count: i64, spread: f64| {
        let values: Vec<f32> = (0..count).map(|_| (spread * (rng.random::<f64>() * 12.0 - 6.0) / 12f64.sqrt()) as f32).collect();
        Tensor::from_slice(&values)
    };
    let steps = STEPS.min((TIMES * seen.rows()).div_ceil(BATCH));
    let (first, second) = (random(inputs * units, (inputs as f64).powf(-0.5)), random(units * 2, 0.05));
    let values: Vec<f32> = (-farthest..=farthest).map(|s| s as f32).collect();
    let values = Tensor::from_slice(&values);
    tch::no_grad(|| {
        weights.shallow_clone().copy_(&first.view([inputs, units]));
        outputs.shallow_clone().copy_(&second.view([units, 2]));
        functions.shallow_clone().copy_(&Tensor::stack(&[values.abs(), values.shallow_clone()], 0));
        let counts = class(&symbols).bincount::<Tensor>(None, classes).to_kind(Kind::Float);
        base.shallow_clone().copy_(&(counts / RANGED as f64 + 1e-5).log());
    });
    let units_of = |x: &Tensor| ((x * &spread).matmul(&weights) + &bias).relu();
    let mut adam = nn::adam(0.9, 0.99, 0.0).build(&vs, LEARNING_RATE)?;
    tch::with_grad(|| {
        for step in 0..steps {
            let (x, symbols) = draw(seen, channel, places, BATCH, rng);
            let logits = units_of(&x).matmul(&outputs).matmul(&functions) + &base;
            adam.set_lr(LEARNING_RATE * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos()));
            adam.backward_step(&logits.cross_entropy_for_logits(&class(&symbols)));
        }
    });
    tch::no_grad(|| {
        let sums = (&sample * &spread).matmul(&weights) + &bias;
        let largest = Vec::<f64>::try_from(sums.abs().amax([0i64].as_slice(), false))?;
        let weights = Vec::<f64>::try_from((&weights * spread.view([-1, 1])).contiguous().view(-1))?;
        let outputs = Vec::<f64>::try_from(outputs.tr().contiguous().view(-1))?;
        Ok(rounded(places, &weights, &Vec::<f64>::try_from(&bias)?, &largest, &outputs))
    })
}

/// The network in integers: units use a part of their range up to the `largest` sums that were seen, outputs all of it.
fn rounded(places: &[Place], weights: &[f64], bias: &[f64], largest: &[f64], outputs: &[f64]) -> Network {
    let range = f64::from(i16::MAX);
    let scales: [f64; UNITS] = std::array::from_fn(|unit| {
        let column = weights.iter().skip(unit).step_by(UNITS).map(|w| w.abs()).fold(0.0, f64::max);
        range / (HEADROOM * largest[unit]).max(column).max(f64::MIN_POSITIVE)
    });
    let row = |row: usize| std::array::from_fn(|unit| (weights[row * UNITS + unit] * scales[unit]).round() as i16);
    let inputs = places.iter().enumerate();
    let inputs =
        inputs.map(|(i, &(channel, dy, dx))| Input { channel, dy, dx, signed: row(i), magnitude: row(places.len() + i) }).collect();
    let outputs = [0, 1].map(|output| {
        let said: [f64; UNITS] = std::array::from_fn(|unit| outputs[output * UNITS + unit] / scales[unit]);
        // with all units at the end of their range the sum still stays below 2^31
        let most = said.iter().map(|w| w.abs()).sum::<f64>().max(f64::MIN_POSITIVE);
        said.map(|w| (w / most * range).round() as i16)
    });
    Network { inputs, bias: std::array::from_fn(|unit| (bias[unit] * scales[unit]).round() as i16), outputs }
}
