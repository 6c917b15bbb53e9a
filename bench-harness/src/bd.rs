//! Bjøntegaard's delta rate: how many more (or fewer) bytes one method takes than another at equal quality, on average over the range
//! where their curves overlap.
//!
//! After Bjøntegaard, "Calculation of average PSNR differences between RD-curves" (VCEG-M33, 2001), with the interpolation of Akima ("A new
//! method of interpolation and smooth curve fitting based on local procedures", J. ACM 17(4), 1970), which does not swing between points.

use crate::stats::envelope;

/// A cubic between two points: Hermite's, from values and slopes at its ends.
struct Curve {
    x: Vec<f64>,
    y: Vec<f64>,
    slopes: Vec<f64>,
}

impl Curve {
    /// Akima's curve through points whose `x` rise.
    fn through(points: &[(f64, f64)]) -> Self {
        let (x, y): (Vec<f64>, Vec<f64>) = points.iter().copied().unzip();
        // slopes between points, with two more at each end, extrapolated
        let mut between = vec![0.0; 2];
        between.extend(points.windows(2).map(|w| (w[1].1 - w[0].1) / (w[1].0 - w[0].0)));
        let n = between.len();
        let inner = between.get(3).copied().unwrap_or(between[2]);
        between[1] = 2.0 * between[2] - inner;
        between[0] = 2.0 * between[1] - between[2];
        let before = if n > 3 { between[n - 2] } else { between[n - 1] };
        between.push(2.0 * between[n - 1] - before);
        between.push(2.0 * between[n] - between[n - 1]);
        let change: Vec<f64> = between.windows(2).map(|w| (w[1] - w[0]).abs()).collect();
        let most = change.iter().copied().fold(0.0, f64::max);
        let slopes = (0..x.len()).map(|i| {
            let (left, right) = (change[i + 2], change[i]);
            let (a, b) = (between[i + 1], between[i + 2]);
            if left + right <= 1e-9 * most || most == 0.0 { 0.5 * (a + b) } else { (left * a + right * b) / (left + right) }
        });
        Self { slopes: slopes.collect(), x, y }
    }

    fn at(&self, x: f64) -> f64 {
        let i = self.x.partition_point(|&v| v <= x).clamp(1, self.x.len() - 1) - 1;
        let width = self.x[i + 1] - self.x[i];
        let t = (x - self.x[i]) / width;
        let (s, t2) = (1.0 - t, t * t);
        self.y[i] * (1.0 + 2.0 * t) * s * s
            + self.slopes[i] * width * t * s * s
            + self.y[i + 1] * t2 * (3.0 - 2.0 * t)
            + self.slopes[i + 1] * width * t2 * (t - 1.0)
    }

    /// Integral from `low` to `high`, both within the points.
    fn integral(&self, low: f64, high: f64) -> f64 {
        let inside = self.x.iter().copied().filter(|&x| low < x && x < high);
        let edges: Vec<f64> = std::iter::once(low).chain(inside).chain(std::iter::once(high)).collect();
        // Simpson's rule is exact for cubics
        edges.windows(2).map(|w| (w[1] - w[0]) / 6.0 * (self.at(w[0]) + 4.0 * self.at(0.5 * (w[0] + w[1])) + self.at(w[1]))).sum()
    }
}

/// Points (bytes, quality) as a curve of ln bytes over quality.
fn curve(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let sound: Vec<(f64, f64)> = points.iter().copied().filter(|(bytes, quality)| *bytes > 0.0 && quality.is_finite()).collect();
    envelope(&sound).into_iter().map(|(bytes, quality)| (quality, bytes.ln())).collect()
}

/// What was compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Delta {
    /// Mean difference of bytes, relative to the anchor's: -0.6 is 60 % fewer.
    pub rate: f64,
    /// Range of qualities that both curves cover.
    pub range: (f64, f64),
}

/// Bytes of `test` relative to those of `anchor` at equal quality; both are points (bytes, quality), where more quality is better. `None` if fewer
/// than four points of a curve remain after those that others beat, or the curves share no range.
pub fn delta_rate(anchor: &[(f64, f64)], test: &[(f64, f64)]) -> Option<Delta> {
    const LEAST: usize = 4;
    let (anchor, test) = (curve(anchor), curve(test));
    if anchor.len() < LEAST || test.len() < LEAST {
        return None;
    }
    let low = anchor[0].0.max(test[0].0);
    let high = anchor[anchor.len() - 1].0.min(test[test.len() - 1].0);
    if high <= low {
        return None;
    }
    let mean = |points: &[(f64, f64)]| Curve::through(points).integral(low, high) / (high - low);
    Some(Delta { rate: (mean(&test) - mean(&anchor)).exp_m1(), range: (low, high) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ANCHOR: [(f64, f64); 4] = [(9487.76, 40.037), (4593.60, 38.615), (2486.44, 36.845), (1358.24, 34.851)];
    const TEST: [(f64, f64); 4] = [(9787.80, 40.121), (4469.00, 38.651), (2451.52, 36.970), (1356.24, 34.987)];

    #[test]
    fn agrees_with_the_python_package_bjontegaard() {
        // bd_rate(..., method="akima") of bjontegaard 1.3.0 on its own example
        assert!((100.0 * delta_rate(&ANCHOR, &TEST).unwrap().rate + 4.425_245).abs() < 0.01);
        let (a, b) = (
            [(500.0, 0.4), (900.0, 0.6), (1600.0, 0.72), (2500.0, 0.8), (4000.0, 0.85), (6000.0, 0.88)],
            [(700.0, 0.35), (1300.0, 0.61), (2600.0, 0.7), (4100.0, 0.82), (7000.0, 0.86), (9900.0, 0.9)],
        );
        let delta = delta_rate(&a, &b).unwrap();
        assert!((100.0 * delta.rate - 46.334_979).abs() < 0.1, "{delta:?}");
        assert_eq!(delta.range, (0.4, 0.88));
    }

    #[test]
    fn a_constant_factor_is_found_and_beaten_points_do_not_count() {
        let third: Vec<(f64, f64)> = ANCHOR.iter().map(|(b, q)| (b / 3.0, *q)).collect();
        assert!((delta_rate(&ANCHOR, &third).unwrap().rate + 2.0 / 3.0).abs() < 1e-12);
        let mut with_bad = third.clone();
        with_bad.push((9000.0, 35.0));
        assert_eq!(delta_rate(&ANCHOR, &with_bad), delta_rate(&ANCHOR, &third));
        assert!(delta_rate(&ANCHOR, &third[..3]).is_none(), "too few points");
        let better: Vec<(f64, f64)> = ANCHOR.iter().map(|(b, q)| (*b, q + 10.0)).collect();
        assert!(delta_rate(&ANCHOR, &better).is_none(), "no common range");
    }
}
