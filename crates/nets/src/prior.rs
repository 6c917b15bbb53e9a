//! Fully factorised prior (Ballé et al. 2018): one learned univariate density per latent channel and
//! quality level. Training-only: at run time just the integer tables made from it are used.
//!
//! Density network per channel: widths 1-3-3-3-3-1, `logits <- softplus(M) logits + b`, then for the
//! inner layers `logits += tanh(a) tanh(logits)`; `F(x) = sigmoid(logits(x))`.

use tch::{Kind, Tensor, nn};

const WIDTHS: [i64; 6] = [1, 3, 3, 3, 3, 1];
/// Likelihoods below this are floored; the gradient may still push them up.
const LIKELIHOOD_BOUND: f64 = 1e-9;
/// Mass left outside the tables, both tails together.
const TAIL_MASS: f64 = 1e-9;

/// Densities of `levels` x `channels` latents.
pub struct FactorisedPrior {
    levels: i64,
    channels: i64,
    matrices: Vec<Tensor>,
    biases: Vec<Tensor>,
    factors: Vec<Tensor>,
}

/// What integer tables are made from, for one channel at one level: probability masses of
/// consecutive symbols and of everything outside.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelPmf {
    /// Median of the density; symbols are `round(y - median)`.
    pub median: f32,
    /// Symbol of the first mass.
    pub offset: i32,
    /// Masses of `offset`, `offset + 1`, ...
    pub pmf: Vec<f64>,
    /// Mass outside, coded as escapes.
    pub tail: f64,
}

impl FactorisedPrior {
    /// Creates the variables under `path`. `init_scale` is the half-width of the initial density in
    /// quantisation steps; start narrow, a wide one wastes the first thousand steps.
    pub fn new(path: &nn::Path, levels: i64, channels: i64, init_scale: f64) -> Self {
        let scale = init_scale.powf(1.0 / (WIDTHS.len() - 1) as f64);
        let (mut matrices, mut biases, mut factors) = (vec![], vec![], vec![]);
        for (k, pair) in WIDTHS.windows(2).enumerate() {
            let (input, output) = (pair[0], pair[1]);
            let init = (1.0 / scale / output as f64).exp_m1().ln();
            matrices.push(path.var(&format!("matrix{k}"), &[levels, channels, output, input], nn::Init::Const(init)));
            let uniform = nn::Init::Uniform { lo: -0.5, up: 0.5 };
            biases.push(path.var(&format!("bias{k}"), &[levels, channels, output, 1], uniform));
            if k + 2 < WIDTHS.len() {
                factors.push(path.var(&format!("factor{k}"), &[levels, channels, output, 1], nn::Init::Const(0.0)));
            }
        }
        Self { levels, channels, matrices, biases, factors }
    }

    /// Logits of the cumulative at `x` (rows, 1, points), one density per row.
    fn logits(&self, rows: &Rows, x: &Tensor) -> Tensor {
        let mut logits = x.shallow_clone();
        for k in 0..rows.matrices.len() {
            logits = rows.matrices[k].matmul(&logits) + &rows.biases[k];
            if let Some(factor) = rows.factors.get(k) {
                logits = &logits + factor * logits.tanh();
            }
        }
        logits
    }

    /// Parameters of the densities for each sample's level, flattened to (samples x channels) rows.
    fn rows(&self, level: &Tensor) -> Rows {
        let pick = |t: &Tensor| {
            let s = t.size();
            t.index_select(0, level).view([-1, s[2], s[3]])
        };
        Rows {
            matrices: self.matrices.iter().map(|m| pick(&m.softplus())).collect(),
            biases: self.biases.iter().map(pick).collect(),
            factors: self.factors.iter().map(|a| pick(&a.tanh())).collect(),
        }
    }

    /// Code length in bits of each sample: latents (N, C, H, W) in quantisation steps (noisy in
    /// training, rounded in evaluation), `level` (N) int64. Returns (N).
    pub fn bits(&self, latent: &Tensor, level: &Tensor) -> Tensor {
        let n = latent.size()[0];
        let rows = self.rows(level);
        let x = latent.reshape([n * self.channels, 1, -1]);
        let lower = self.logits(&rows, &(&x - 0.5));
        let upper = self.logits(&rows, &(&x + 0.5));
        // evaluate on the side of zero where the sigmoids do not cancel
        let sign = ((&lower + &upper).le(0.0).to_kind(Kind::Float) * 2.0 - 1.0).detach();
        let p = ((&upper * &sign).sigmoid() - (&lower * &sign).sigmoid()).abs();
        let bounded = lower_bound(&p);
        bounded.log2().neg().view([n, -1]).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
    }

    fn level_rows(&self, level: i64) -> Rows {
        self.rows(&Tensor::from_slice(&[level]).to_device(self.matrices[0].device()))
    }

    /// Latent values, one for each of the rows, at which the logits of the cumulative equal `target`, by bisection.
    fn quantile(&self, rows: &Rows, target: f64) -> Tensor {
        let options = (Kind::Float, self.matrices[0].device());
        let count = rows.matrices.first().map_or(0, |m| m.size()[0]);
        let mut low = Tensor::full([count, 1, 1], -1e5, options);
        let mut high = Tensor::full([count, 1, 1], 1e5, options);
        for _ in 0..60 {
            let middle = (&low + &high) * 0.5;
            let below = self.logits(rows, &middle).lt(target);
            low = middle.where_self(&below, &low);
            high = high.where_self(&below, &middle);
        }
        ((low + high) * 0.5).view([-1])
    }

    /// Medians of all levels (levels, C).
    pub fn medians(&self) -> Tensor {
        let all = Tensor::arange(self.levels, (Kind::Int64, self.matrices[0].device()));
        tch::no_grad(|| self.quantile(&self.rows(&all), 0.0).view([self.levels, self.channels]))
    }

    /// Masses of the symbols of every channel at one level, in f64.
    /// A channel's table reaches at most `max_half_width` symbols to either side of its median.
    ///
    /// # Errors
    /// If libtorch cannot hand out the values.
    pub fn pmfs(&self, level: i64, max_half_width: i32) -> Result<Vec<ChannelPmf>, crate::NetError> {
        tch::no_grad(|| {
            let rows = self.level_rows(level);
            let reach = (2.0 / TAIL_MASS - 1.0).ln();
            let values = |t: Tensor| Vec::<f32>::try_from(t.view(-1));
            let low = values(self.quantile(&rows, -reach))?;
            let median = values(self.quantile(&rows, 0.0))?;
            let high = values(self.quantile(&rows, reach))?;
            let mut out = Vec::new();
            for c in 0..self.channels as usize {
                let width = |w: f32| (w.ceil().max(0.0) as i32).min(max_half_width);
                let (minima, maxima) = (width(median[c] - low[c]), width(high[c] - median[c]));
                let edges: Vec<f64> =
                    (0..=minima + maxima + 1).map(|j| f64::from(median[c]) - f64::from(minima) + f64::from(j) - 0.5).collect();
                let cumulative = self.cumulative(&rows, c as i64, &edges)?;
                let pmf: Vec<f64> = cumulative.windows(2).map(|w| (w[1].0 - w[0].0).max(w[0].1 - w[1].1).max(0.0)).collect();
                let tail = cumulative[0].0 + cumulative[cumulative.len() - 1].1;
                out.push(ChannelPmf { median: median[c], offset: -minima, pmf, tail });
            }
            Ok(out)
        })
    }

    /// (F(x), 1 - F(x)) of channel `c` at `points`, in f64.
    fn cumulative(&self, rows: &Rows, c: i64, points: &[f64]) -> Result<Vec<(f64, f64)>, crate::NetError> {
        let one = |t: &Tensor| t.narrow(0, c, 1).to_kind(Kind::Double);
        let row = Rows {
            matrices: rows.matrices.iter().map(one).collect(),
            biases: rows.biases.iter().map(one).collect(),
            factors: rows.factors.iter().map(one).collect(),
        };
        let x = Tensor::from_slice(points).to_device(row.matrices[0].device()).view([1, 1, -1]);
        let logits = Vec::<f64>::try_from(self.logits(&row, &x).view(-1))?;
        Ok(logits.into_iter().map(|l| (1.0 / (1.0 + (-l).exp()), 1.0 / (1.0 + l.exp()))).collect())
    }

    /// Number of quality levels.
    pub fn levels(&self) -> i64 {
        self.levels
    }
}

struct Rows {
    matrices: Vec<Tensor>,
    biases: Vec<Tensor>,
    factors: Vec<Tensor>,
}

/// `max(p, bound)` whose gradient passes where p >= bound, or where it would raise p
/// (a smaller p always costs more bits here, so below the bound the gradient always raises it).
fn lower_bound(p: &Tensor) -> Tensor {
    let clamped = p.clamp_min(LIKELIHOOD_BOUND);
    // straight through: value of the clamp, gradient of p
    p + (clamped - p).detach()
}
