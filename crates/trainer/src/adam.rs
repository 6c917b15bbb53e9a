//! Adam (Kingma & Ba 2015) with its state in the open, so that a checkpoint resumes exactly
//! (libtorch's own optimiser cannot be saved through tch), and an exponential moving average of weights. On request,
//! weights of convolutions are updated by Muon (Jordan et al. 2024) instead: the momentum, as a matrix of output
//! channels by inputs, is brought near to the closest orthogonal one, so that all its directions are learned at one
//! pace; scaled so that learning rates are those of Adam (Liu et al., arXiv 2502.16982).

use std::collections::BTreeMap;

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

/// Matrices with the singular vectors of those in `g` (count, rows, columns) and singular values near one.
fn orthogonal(g: &Tensor) -> Tensor {
    let (a, b, c) = NEWTON_SCHULZ;
    let tall = g.size()[1] > g.size()[2];
    let mut x = if tall { g.transpose(1, 2) } else { g.shallow_clone() };
    x = &x / (x.square().sum_dim_intlist([1i64, 2].as_slice(), true, None).sqrt() + 1e-7);
    for _ in 0..ITERATIONS {
        let s = x.matmul(&x.transpose(1, 2));
        let t = &s * b + s.matmul(&s) * c;
        x = &x * a + t.matmul(&x);
    }
    if tall { x.transpose(1, 2) } else { x }
}

/// Rows and columns.
type Shape = (i64, i64);

/// A variable and where it lies in the values of its group.
struct Slot {
    name: String,
    variable: Tensor,
    start: i64,
    pace: f64,
}

impl Slot {
    fn len(&self) -> i64 {
        self.variable.numel() as i64
    }

    fn of(&self, values: &Tensor) -> Tensor {
        values.narrow(0, self.start, self.len()).view(self.variable.size().as_slice())
    }
}

/// Variables that are updated at once: their values lie one behind the other, and the variables are views of them. On a GPU a step would
/// otherwise spend most of its time on starting kernels.
struct Group {
    slots: Vec<Slot>,
    values: Tensor,
    average: Tensor,
    first: Tensor,
    /// Adam's; Muon has none.
    second: Option<Tensor>,
    /// Of each value, for Adam.
    pace: Tensor,
    /// Of each matrix, for Muon.
    matrix: Option<Shape>,
}

impl Group {
    fn new(mut slots: Vec<Slot>, matrix: Option<Shape>) -> Self {
        let mut start = 0;
        for slot in &mut slots {
            slot.start = start;
            start += slot.len();
        }
        let values = Tensor::cat(&slots.iter().map(|s| s.variable.detach().reshape([-1])).collect::<Vec<_>>(), 0);
        let pace =
            Tensor::cat(&slots.iter().map(|s| values.new_full([s.len()], s.pace, (values.kind(), values.device()))).collect::<Vec<_>>(), 0);
        let second = matrix.is_none().then(|| values.zeros_like());
        let mut group = Self { slots, average: values.copy(), first: values.zeros_like(), second, pace, matrix, values };
        group.adopt();
        group
    }

    /// Makes the variables views of the values again, should another optimiser have taken them since.
    fn adopt(&mut self) {
        for slot in &mut self.slots {
            let mut own = slot.of(&self.values);
            own.copy_(&slot.variable.detach());
            slot.variable.set_data(&own);
        }
    }

    /// Zero for variables that this loss does not reach.
    fn gradient(&self) -> Tensor {
        let of = |s: &Slot| {
            let grad = s.variable.grad();
            if grad.defined() { grad.reshape([-1]) } else { self.values.new_zeros([s.len()], (self.values.kind(), self.values.device())) }
        };
        Tensor::cat(&self.slots.iter().map(of).collect::<Vec<_>>(), 0)
    }

    fn update(&mut self, grad: &Tensor, lr: f64, steps: i32) {
        let update = match (&mut self.second, self.matrix) {
            (Some(second), _) => {
                let _ = self.first.g_mul_scalar_(BETA1).g_add_(&(grad * (1.0 - BETA1)));
                let _ = second.g_mul_scalar_(BETA2).g_add_(&(grad.square() * (1.0 - BETA2)));
                let (correct1, correct2) = (1.0 - BETA1.powi(steps), 1.0 - BETA2.powi(steps));
                (&self.first / correct1) / ((&*second / correct2).sqrt() + EPSILON) * (&self.pace * lr)
            }
            (None, matrix) => {
                let (rows, columns) = matrix.unwrap_or((1, 1));
                let _ = self.first.g_mul_scalar_(MOMENTUM).g_add_(grad);
                let ahead = (grad + &self.first * MOMENTUM).view([-1, rows, columns]);
                orthogonal(&ahead).reshape([-1]) * (lr * UPDATE_RMS * (rows.max(columns) as f64).sqrt())
            }
        };
        let _ = self.values.g_sub_(&update);
    }
}

/// Optimiser over all trainable variables of a `VarStore`. It takes their storage: of two over the same variables, that which was made or
/// restarted last updates them.
pub struct Adam {
    groups: Vec<Group>,
    steps: i64,
    decay: f64,
}

impl Adam {
    /// `decay` is that of the moving average; variables whose name starts with one of those in `paces` learn
    /// so many times as quickly, and are never updated by Muon.
    pub fn new(vs: &nn::VarStore, decay: f64, paces: &[(&str, f64)], muon: bool) -> Self {
        let pace = |name: &str| paces.iter().find(|(start, _)| name.starts_with(start)).map(|(_, pace)| *pace);
        let mut groups: BTreeMap<Option<Shape>, Vec<Slot>> = BTreeMap::new();
        let variables: BTreeMap<String, Tensor> = vs.variables().into_iter().filter(|(_, v)| v.requires_grad()).collect();
        for (name, variable) in variables {
            let pace = pace(&name);
            let size = variable.size();
            let matrix = (muon && size.len() == 4 && pace.is_none()).then(|| (size[0], size[1..].iter().product()));
            groups.entry(matrix).or_default().push(Slot { name, variable, start: 0, pace: pace.unwrap_or(1.0) });
        }
        let groups = tch::no_grad(|| groups.into_iter().map(|(matrix, slots)| Group::new(slots, matrix)).collect());
        Self { groups, steps: 0, decay }
    }

    fn slots(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.groups.iter_mut().flat_map(|g| &mut g.slots)
    }

    /// Clears the gradients.
    pub fn zero_grad(&mut self) {
        self.slots().for_each(|s| s.variable.zero_grad());
    }

    /// One update with learning rate `lr` after clipping the global gradient norm. Returns the norm
    /// before clipping; a non-finite norm leaves the weights untouched.
    pub fn step(&mut self, lr: f64, max_norm: f64) -> f64 {
        tch::no_grad(|| {
            let gradients: Vec<Tensor> = self.groups.iter().map(Group::gradient).collect();
            let squares: Vec<Tensor> = gradients.iter().map(|g| g.square().sum(None)).collect();
            let norm = Tensor::stack(&squares, 0).sum(None).sqrt().double_value(&[]);
            if !norm.is_finite() {
                return norm;
            }
            let clip = (max_norm / norm).min(1.0);
            self.steps += 1;
            // a young average follows the weights closely
            let decay = self.decay.min((1.0 + self.steps as f64) / (10.0 + self.steps as f64));
            for (group, grad) in self.groups.iter_mut().zip(gradients) {
                group.update(&(grad * clip), lr, self.steps as i32);
                // what does not change stays as it is, to the last bit
                let _ = group.average.lerp_(&group.values, 1.0 - decay);
            }
            norm
        })
    }

    /// Swaps weights and their moving averages; calling it twice restores the weights.
    pub fn swap_average(&mut self) {
        tch::no_grad(|| {
            for g in &mut self.groups {
                let kept = g.values.copy();
                g.values.copy_(&g.average);
                g.average.copy_(&kept);
            }
        });
    }

    /// Starts anew from the current weights: moments and moving average.
    pub fn restart(&mut self) {
        self.steps = 0;
        tch::no_grad(|| {
            for g in &mut self.groups {
                g.adopt();
                g.average.copy_(&g.values);
                let _ = g.first.zero_();
                if let Some(second) = &mut g.second {
                    let _ = second.zero_();
                }
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
        for (g, s) in self.groups.iter().flat_map(|g| g.slots.iter().map(move |s| (g, s))) {
            out.push((format!("first/{}", s.name), s.of(&g.first)));
            out.push((format!("average/{}", s.name), s.of(&g.average)));
            if let Some(second) = &g.second {
                out.push((format!("second/{}", s.name), s.of(second)));
            }
        }
        out
    }

    /// Restores what [`Adam::state`] gave.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&mut self, state: &isthmus_nets::weights::Weights, prefix: &str) -> Result<(), TrainError> {
        self.steps = state.get(&format!("{prefix}steps"), &[1])?.double_value(&[0]) as i64;
        for g in &self.groups {
            let parts = [("first", Some(&g.first)), ("second", g.second.as_ref()), ("average", Some(&g.average))];
            for (part, values) in parts.iter().filter_map(|(part, values)| Some((part, (*values)?))) {
                for s in &g.slots {
                    let saved = state.get(&format!("{prefix}{part}/{}", s.name), &s.variable.size())?;
                    tch::no_grad(|| s.of(values).copy_(&saved));
                }
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
            let g = Tensor::randn([2, rows, columns], (Kind::Float, Device::Cpu));
            let (_, strengths, _) = orthogonal(&g).svd(true, true);
            let strengths = Vec::<f32>::try_from(strengths.reshape([-1])).unwrap();
            assert!(strengths.iter().all(|s| (0.5..1.4).contains(s)), "{strengths:?}");
            let same = (orthogonal(&g) * &g).sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float);
            assert!(same.min().double_value(&[]) > 0.0);
            let alone = orthogonal(&g.narrow(0, 1, 1));
            assert!((alone - orthogonal(&g).narrow(0, 1, 1)).abs().max().double_value(&[]) < 1e-4);
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
