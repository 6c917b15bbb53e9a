//! Depthwise convolution on one photo's features: vectors of neighbouring outputs at a time, from a padded copy of the channel.
//!
//! rten 0.27 computes single-precision ones a value at a time, in five times the time of the matrix products around them.

use rayon::prelude::*;
use rten::ThreadPool;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdOp};

/// Most outputs of a row that are computed at once.
const BLOCK: usize = 32;

/// Bounds that leave all values as they are.
pub(super) const UNBOUNDED: (f32, f32) = (f32::NEG_INFINITY, f32::INFINITY);

/// A depthwise convolution: each channel has its own kernel.
#[derive(Debug)]
pub(super) struct Depthwise {
    /// Height and width of the kernels.
    pub kernel: [usize; 2],
    /// Down and across.
    pub stride: [usize; 2],
    /// Zeros at top, left, bottom and right.
    pub padding: [usize; 4],
    /// Channels x kernel, row-major.
    pub weights: Vec<f32>,
    /// One for each channel.
    pub bias: Vec<f32>,
    /// Between which the inputs are clamped, and the outputs.
    pub bounds: [(f32, f32); 2],
}

impl Depthwise {
    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.bias.len()
    }

    /// Height and width of the output for those of the input; `None` if the kernel does not fit.
    fn output(&self, [height, width]: [usize; 2]) -> Option<[usize; 2]> {
        let [top, left, bottom, right] = self.padding;
        let side = |side: usize, pads: usize, kernel: usize, stride: usize| Some((side + pads).checked_sub(kernel)? / stride + 1);
        Some([side(height, top + bottom, self.kernel[0], self.stride[0])?, side(width, left + right, self.kernel[1], self.stride[1])?])
    }

    /// Features (C, H, W) of the given height and width to those of the output, and its height and width. `None` if the input has
    /// another number of values than its shape and the channels say, or is smaller than the kernel.
    pub fn run(&self, input: &[f32], [height, width]: [usize; 2], pool: &ThreadPool) -> Option<(Vec<f32>, [usize; 2])> {
        let [rows, columns] = self.output([height, width])?;
        let plane = height * width;
        if plane == 0 || input.len() != self.bias.len() * plane {
            return None;
        }
        let padded = Padded::new(self, [height, width], columns);
        let taps = padded.taps(self.kernel);
        let mut output = vec![0.0; self.bias.len() * rows * columns];
        pool.run(|| {
            let channels = output.par_chunks_mut(rows * columns).zip(input.par_chunks(plane));
            let kernels = self.weights.par_chunks(taps.len()).zip(&self.bias);
            channels.zip(kernels).for_each_init(
                || vec![0.0; padded.len()],
                |copy, ((output, input), (weights, &bias))| {
                    let [before, bounds] = self.bounds;
                    padded.fill(copy, input, before);
                    let stride = self.stride[0] * padded.row();
                    Channel { copy, output, columns, stride, taps: &taps, weights, bias, bounds }.dispatch();
                },
            );
        });
        Some((output, [rows, columns]))
    }
}

/// A channel's outputs from its padded copy.
struct Channel<'a> {
    copy: &'a [f32],
    output: &'a mut [f32],
    columns: usize,
    /// From what the first weight of a row of outputs meets to what that of the next row meets.
    stride: usize,
    taps: &'a [usize],
    weights: &'a [f32],
    bias: f32,
    bounds: (f32, f32),
}

impl SimdOp for Channel<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        // independent sums hide an addition's latency
        if isa.f32().len() * 4 <= BLOCK { self.rows::<I, 4>(isa) } else { self.rows::<I, 2>(isa) }
    }
}

impl Channel<'_> {
    /// With sums of `N` vectors at once.
    #[inline(always)]
    fn rows<I: Isa, const N: usize>(self, isa: I) {
        let ops = isa.f32();
        let (width, bias) = (ops.len() * N, ops.splat(self.bias));
        let (least, most) = (ops.splat(self.bounds.0), ops.splat(self.bounds.1));
        let mut last = [0.0; BLOCK];
        for (row, above) in self.output.chunks_mut(self.columns).zip((0..).step_by(self.stride)) {
            for (out, from) in row.chunks_mut(width).zip((above..).step_by(width)) {
                let mut sums = [bias; N];
                for (tap, weight) in self.taps.iter().zip(self.weights) {
                    let (values, weight) = (ops.load_many::<N>(&self.copy[from + tap..]), ops.splat(*weight));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = ops.mul_add(value, weight, *sum);
                    }
                }
                let whole = out.len() == width;
                let to = if whole { &mut *out } else { &mut last[..width] };
                for (sum, to) in sums.into_iter().zip(to.chunks_mut(ops.len())) {
                    ops.store(ops.min(most, ops.max(least, sum)), to);
                }
                if !whole {
                    out.copy_from_slice(&last[..out.len()]);
                }
            }
        }
    }
}

/// Layout of a channel's copy with zeros around it. With a stride of s across, a row lies there as s rows, of every s-th value each, so that
/// what neighbouring outputs need lies side by side.
struct Padded {
    input: [usize; 2],
    top: usize,
    left: usize,
    height: usize,
    /// Values of each of the rows that a row lies there as.
    part: usize,
    stride: usize,
}

impl Padded {
    fn new(conv: &Depthwise, input: [usize; 2], columns: usize) -> Self {
        let [top, left, bottom, right] = conv.padding;
        let stride = conv.stride[1];
        // the last block of outputs may reach past the last of them
        let read = columns.next_multiple_of(BLOCK) + (conv.kernel[1] - 1) / stride;
        let part = (input[1] + left + right).div_ceil(stride).max(read);
        Self { input, top, left, height: input[0] + top + bottom, part, stride }
    }

    fn row(&self) -> usize {
        self.part * self.stride
    }

    fn len(&self) -> usize {
        self.height * self.row()
    }

    /// Where the values for each of a kernel's weights begin, seen from the first output of a row.
    fn taps(&self, [height, width]: [usize; 2]) -> Vec<usize> {
        let across = |x: usize| x % self.stride * self.part + x / self.stride;
        (0..height).flat_map(|y| (0..width).map(move |x| y * self.row() + across(x))).collect()
    }

    /// Copies a channel between the zeros, which stay, and clamps it.
    fn fill(&self, copy: &mut [f32], channel: &[f32], (least, most): (f32, f32)) {
        let put = |(to, from): (&mut f32, &f32)| *to = from.clamp(least, most);
        for (to, from) in copy.chunks_mut(self.row()).skip(self.top).zip(channel.chunks(self.input[1])) {
            for (phase, part) in to.chunks_mut(self.part).enumerate() {
                // the first column of the input that is of this phase, and where it goes
                let first = (phase + self.stride - self.left % self.stride) % self.stride;
                let part = &mut part[(first + self.left) / self.stride..];
                let from = from.get(first..).unwrap_or_default();
                match self.stride {
                    1 => part.iter_mut().zip(from).for_each(put),
                    2 => {
                        // by constant steps, for the compiler to vectorise
                        let (pairs, rest) = from.as_chunks::<2>();
                        let (whole, last) = part.split_at_mut(pairs.len());
                        whole.iter_mut().zip(pairs.iter().map(|[first, _]| first)).for_each(put);
                        last.iter_mut().zip(rest).for_each(put);
                    }
                    stride => part.iter_mut().zip(from.iter().step_by(stride)).for_each(put),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// By the definition.
    fn plain(conv: &Depthwise, input: &[f32], [height, width]: [usize; 2], [rows, columns]: [usize; 2]) -> Vec<f32> {
        let ([kh, kw], [top, left, ..]) = (conv.kernel, conv.padding);
        let mut output = Vec::new();
        for (c, bias) in conv.bias.iter().enumerate() {
            for (y, x) in (0..rows).flat_map(|y| (0..columns).map(move |x| (y, x))) {
                let mut sum = *bias;
                for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
                    let at = [(y * conv.stride[0] + ky).checked_sub(top), (x * conv.stride[1] + kx).checked_sub(left)];
                    if let [Some(iy), Some(ix)] = at
                        && iy < height
                        && ix < width
                    {
                        let value = input[(c * height + iy) * width + ix].clamp(conv.bounds[0].0, conv.bounds[0].1);
                        sum += conv.weights[(c * kh + ky) * kw + kx] * value;
                    }
                }
                output.push(sum.clamp(conv.bounds[1].0, conv.bounds[1].1));
            }
        }
        output
    }

    #[test]
    fn it_computes_what_the_definition_says() {
        let pool = ThreadPool::with_num_threads(2);
        let value = |i: usize| ((i * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
        let mut compared = 0;
        for kernel in [[1, 1], [3, 3], [5, 5], [3, 5], [2, 4]] {
            for stride in [[1, 1], [2, 2], [1, 2], [3, 3]] {
                for padding in [[0; 4], [1, 1, 1, 1], [0, 0, 1, 1], [1, 2, 2, 1], [0, 1, 0, 3]] {
                    for size in [[1, 1], [5, 7], [16, 16], [28, 28], [9, 33]] {
                        let channels = 3;
                        let weights = (0..channels * kernel[0] * kernel[1]).map(value).collect();
                        let bounds = if compared % 2 == 0 { [(-0.5, 0.7), (0.0, 1.5)] } else { [UNBOUNDED; 2] };
                        let bias = vec![0.1, -0.2, 0.3];
                        let conv = Depthwise { kernel, stride, padding, weights, bias, bounds };
                        let input: Vec<f32> = (0..channels * size[0] * size[1]).map(|i| value(i + 5)).collect();
                        let fits = size[0] + padding[0] + padding[2] >= kernel[0] && size[1] + padding[1] + padding[3] >= kernel[1];
                        let Some((found, shape)) = conv.run(&input, size, &pool) else {
                            assert!(!fits, "{conv:?} {size:?}");
                            continue;
                        };
                        let wanted = plain(&conv, &input, size, shape);
                        assert!(fits && found.len() == wanted.len(), "{conv:?} {size:?}");
                        let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                        assert!(worst < 1e-5, "{conv:?} {size:?}: {worst}");
                        compared += 1;
                    }
                }
            }
        }
        assert!(compared > 400, "{compared}");
    }

    #[test]
    fn an_input_of_another_size_is_refused() {
        let conv =
            Depthwise { kernel: [3, 3], stride: [1, 1], padding: [1; 4], weights: vec![1.0; 9], bias: vec![0.0], bounds: [UNBOUNDED; 2] };
        let pool = ThreadPool::with_num_threads(1);
        assert!(conv.run(&[1.0; 15], [4, 4], &pool).is_none());
        assert!(conv.run(&[], [0, 4], &pool).is_none());
        assert!(conv.run(&[1.0; 16], [4, 4], &pool).is_some());
    }
}
