//! Adam (Kingma & Ba 2015) with its state in the open, so that a checkpoint resumes exactly
//! (libtorch's own optimiser cannot be saved through tch), and an exponential moving average of weights. On request,
//! weights of convolutions are updated by Muon (Jordan et al. 2024) instead: the momentum, as a matrix of output
//! channels by inputs, is brought near to the closest orthogonal one, so that all its directions are learned at one
//! pace; scaled so that learning rates are those of Adam (Liu et al., arXiv 2502.16982).

use tch::{Tensor, nn};

use crate::error::TrainError;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;
/// Momentum of Muon, coefficients and number of its Newton-Schulz iterations, and the root mean square of its updates.
const MOMENTUM: f64 = 0.95;
const NEWTON_SCHULZ: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
const ITERATIONS: usize = 5;
const UPDATE_RMS: f64 = 0.2;

struct Slot {
    name: String,
    variable: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor,
    scale: f64,
    matrix: bool,
}

/// A matrix with the singular vectors of `g` and singular values near one.
fn orthogonal(g: &Tensor) -> Tensor {
    let (a, b, c) = NEWTON_SCHULZ;
    let tall = g.size()[0] > g.size()[1];
    let mut x = if tall { g.tr() } else { g.shallow_clone() };
    x = &x / (x.norm() + 1e-7);
    for _ in 0..ITERATIONS {
        let s = x.matmul(&x.tr());
        let t = &s * b + s.matmul(&s) * c;
        x = &x * a + t.matmul(&x);
    }
    if tall { x.tr() } else { x }
}

/// Optimiser over all trainable variables of a `VarStore`.
pub struct Adam {
    slots: Vec<Slot>,
    steps: i64,
    decay: f64,
}

impl Adam {
    /// `decay` is that of the moving average; variables whose name starts with one of those in `paces` learn
    /// so many times as quickly, and are never updated by Muon.
    pub fn new(vs: &nn::VarStore, decay: f64, paces: &[(&str, f64)], muon: bool) -> Self {
        let pace = |name: &str| paces.iter().find(|(start, _)| name.starts_with(start)).map(|(_, pace)| *pace);
        let mut slots: Vec<Slot> = vs
            .variables()
            .into_iter()
            .filter(|(_, v)| v.requires_grad())
            .map(|(name, variable)| Slot {
                first: variable.zeros_like(),
                second: variable.zeros_like(),
                average: variable.detach().copy(),
                scale: pace(&name).unwrap_or(1.0),
                matrix: muon && variable.dim() == 4 && pace(&name).is_none(),
                variable,
                name,
            })
            .collect();
        slots.sort_by(|a, b| a.name.cmp(&b.name));
        Self { slots, steps: 0, decay }
    }

    /// Clears the gradients.
    pub fn zero_grad(&mut self) {
        for s in &mut self.slots {
            s.variable.zero_grad();
        }
    }

    /// One update with learning rate `lr` after clipping the global gradient norm. Returns the norm
    /// before clipping; a non-finite norm leaves the weights untouched.
    pub fn step(&mut self, lr: f64, max_norm: f64) -> f64 {
        tch::no_grad(|| {
            let squares: Vec<Tensor> =
                self.slots.iter().filter(|s| s.variable.grad().defined()).map(|s| s.variable.grad().square().sum(None)).collect();
            let norm = Tensor::stack(&squares, 0).sum(None).sqrt().double_value(&[]);
            if !norm.is_finite() {
                return norm;
            }
            let clip = (max_norm / norm).min(1.0);
            self.steps += 1;
            let correct1 = 1.0 - BETA1.powi(self.steps as i32);
            let correct2 = 1.0 - BETA2.powi(self.steps as i32);
            // a young average follows the weights closely
            let decay = self.decay.min((1.0 + self.steps as f64) / (10.0 + self.steps as f64));
            for s in &mut self.slots {
                let grad = s.variable.grad();
                if !grad.defined() {
                    continue;
                }
                let grad = grad * clip;
                if s.matrix {
                    let _ = s.first.g_mul_scalar_(MOMENTUM).g_add_(&grad);
                    let ahead = (grad + &s.first * MOMENTUM).view([s.variable.size()[0], -1]);
                    let longest = ahead.size().iter().copied().max().unwrap_or(1) as f64;
                    let update = orthogonal(&ahead).reshape(s.variable.size());
                    let _ = s.variable.g_sub_(&(update * (lr * UPDATE_RMS * longest.sqrt())));
                    let _ = s.average.g_mul_scalar_(decay).g_add_(&(&s.variable * (1.0 - decay)));
                    continue;
                }
                let _ = s.first.g_mul_scalar_(BETA1).g_add_(&(&grad * (1.0 - BETA1)));
                let _ = s.second.g_mul_scalar_(BETA2).g_add_(&(grad.square() * (1.0 - BETA2)));
                let update = (&s.first / correct1) / ((&s.second / correct2).sqrt() + EPSILON);
                let _ = s.variable.g_sub_(&(update * (lr * s.scale)));
                let _ = s.average.g_mul_scalar_(decay).g_add_(&(&s.variable * (1.0 - decay)));
            }
            norm
        })
    }

    /// Swaps weights and their moving averages; calling it twice restores the weights.
    pub fn swap_average(&mut self) {
        tch::no_grad(|| {
            for s in &mut self.slots {
                let kept = s.variable.copy();
                s.variable.copy_(&s.average);
                s.average.copy_(&kept);
            }
        });
    }

    /// Starts anew from the current weights: moments and moving average.
    pub fn restart(&mut self) {
        self.steps = 0;
        tch::no_grad(|| {
            for s in &mut self.slots {
                s.average.copy_(&s.variable);
                let _ = (s.first.zero_(), s.second.zero_());
            }
        });
    }

    /// Updates done so far.
    pub fn steps(&self) -> i64 {
        self.steps
    }

    /// State by name: moments and averages.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut out = vec![("steps".to_owned(), Tensor::from_slice(&[self.steps as f32]))];
        for s in &self.slots {
            out.push((format!("first/{}", s.name), s.first.shallow_clone()));
            out.push((format!("second/{}", s.name), s.second.shallow_clone()));
            out.push((format!("average/{}", s.name), s.average.shallow_clone()));
        }
        out
    }

    /// Restores what [`Adam::state`] gave.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&mut self, state: &isthmus_nets::weights::Weights, prefix: &str) -> Result<(), TrainError> {
        self.steps = state.get(&format!("{prefix}steps"), &[1])?.double_value(&[0]) as i64;
        for s in &mut self.slots {
            let shape = s.variable.size();
            for (part, target) in [("first", &mut s.first), ("second", &mut s.second), ("average", &mut s.average)] {
                let saved = state.get(&format!("{prefix}{part}/{}", s.name), &shape)?;
                tch::no_grad(|| target.copy_(&saved));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn orthogonal_matrices_keep_directions_and_level_their_strengths() {
        for (rows, columns) in [(8, 20), (20, 8)] {
            let g = Tensor::randn([rows, columns], (Kind::Float, Device::Cpu));
            let (_, strengths, _) = orthogonal(&g).svd(true, true);
            let strengths = Vec::<f32>::try_from(strengths).unwrap();
            assert!(strengths.iter().all(|s| (0.5..1.4).contains(s)), "{strengths:?}");
            assert!((orthogonal(&g) * g).sum(Kind::Float).double_value(&[]) > 0.0);
        }
    }

    #[test]
    fn both_rules_descend() {
        for muon in [false, true] {
            let vs = nn::VarStore::new(Device::Cpu);
            let w = vs.root().var("w", &[4, 3, 3, 3], nn::Init::Const(1.0));
            let mut adam = Adam::new(&vs, 0.9, &[], muon);
            let loss = || w.square().sum(Kind::Float);
            let before = loss().double_value(&[]);
            for _ in 0..200 {
                adam.zero_grad();
                loss().backward();
                adam.step(0.05, 1e9);
            }
            assert!(loss().double_value(&[]) < before * 0.5, "muon {muon}");
        }
    }
}
