//! Where in a photo the tail needs the features: weights of the distortion by channel and position, from the frozen teacher alone.
//!
//! * Fisher weights: the squared gradient of the log-probability of a class drawn from the teacher's own answer, for each feature. Its mean over
//!   draws is the diagonal of the Fisher information (Amari, "Natural gradient works efficiently in learning", Neural Computation 10(2),
//!   1998): how much the answer's distribution moves when that feature does.
//! * Saliency: gradient class activation maps of several layers, mixed, as FrankenSplit weights its distortion (arXiv 2302.10681 and its
//!   code: XGradCAM, distortion `(d + d s) / 2`); here for the teacher's first choice instead of a label, on the crop that is trained on, and
//!   without smoothing by principal components.

use isthmus_nets::{Backbone, Layer};
use tch::{Kind, Tensor};

use crate::recipe::Recipe;

/// No feature of a photo counts more than so many times the mean.
const MOST: f64 = 30.0;
/// Draws of a class for one photo's Fisher weights.
const DRAWS: usize = 2;
const TINY: f64 = 1e-12;

/// Divides each sample by its own mean.
fn by_mean(t: &Tensor) -> Tensor {
    t / (t.mean_dim([1i64, 2, 3].as_slice(), true, Kind::Float) + TINY)
}

/// Moves each sample to between 0 and 1; what is the same everywhere becomes 0.
fn to_unit(t: &Tensor) -> Tensor {
    let over = [1i64, 2, 3];
    let (least, most) = (t.amin(over.as_slice(), true), t.amax(over.as_slice(), true));
    (t - &least) / (most - &least + TINY)
}

fn resized(t: &Tensor, like: &Tensor) -> Tensor {
    let size = like.size();
    t.upsample_bilinear2d([size[2], size[3]].as_slice(), false, None, None)
}

/// The last block at each resolution behind block `from`.
fn ends(teacher: &Backbone, from: usize) -> impl Iterator<Item = Layer> {
    let kind = teacher.kind();
    let side = move |block: usize| kind.layer_shape(Layer::Block(block)).map(|s| s[1]);
    (from + 1..kind.block_count()).filter(move |&b| side(b) != side(b + 1)).map(Layer::Block)
}

/// Weights (N, C or 1, H, W) that the squared errors at the measured layer are multiplied by, beside those of channels, with mean 1 or
/// below; none if the recipe asks for none. `target`: the teacher's values there (N, C, H, W), `std` their deviation by channel.
pub fn weights(teacher: &Backbone, recipe: &Recipe, target: &Tensor, std: &Tensor) -> Option<Tensor> {
    if recipe.fisher_positions <= 0.0 && recipe.saliency <= 0.0 {
        return None;
    }
    let mut at = (recipe.measure(), target.detach().set_requires_grad(true));
    let mut values = vec![at.1.shallow_clone()];
    for layer in ends(teacher, recipe.measure_block) {
        at = (layer, teacher.between(&at.1, at.0, layer));
        values.push(at.1.shallow_clone());
    }
    let logits = teacher.tail(&at.1, at.0);
    let fisher = (recipe.fisher_positions > 0.0)
        .then(|| of_positions(&logits, &values[0], std) * recipe.fisher_positions + (1.0 - recipe.fisher_positions));
    let saliency = (recipe.saliency > 0.0).then(|| activation_map(&logits, &values) * recipe.saliency + (1.0 - recipe.saliency));
    match (fisher, saliency) {
        (Some(a), Some(b)) => Some(a * b),
        (a, b) => a.or(b),
    }
}

/// Fisher weights (N, C, H, W) of the features in units of their deviation; mean 1 in each photo.
fn of_positions(logits: &Tensor, features: &Tensor, std: &Tensor) -> Tensor {
    let log_p = logits.log_softmax(-1, Kind::Float);
    let classes = log_p.detach().exp().multinomial(DRAWS as i64, true);
    let mut sum = features.zeros_like();
    for draw in 0..DRAWS as i64 {
        let chosen = log_p.gather(1, &classes.narrow(1, draw, 1), false).sum(Kind::Float);
        let gradient = &Tensor::run_backward(&[chosen], &[features], true, false)[0];
        sum += gradient.square();
    }
    // few draws are noisy: a feature's neighbours need what it needs
    let needed = (sum * std.square().view([1, -1, 1, 1])).avg_pool2d([3, 3], [1, 1], [1, 1], false, false, None::<i64>);
    by_mean(&by_mean(&needed).clamp_max(MOST)).detach()
}

/// Class activation map (N, 1, H, W) between 0 and 1, at the size of the first of `values`.
fn activation_map(logits: &Tensor, values: &[Tensor]) -> Tensor {
    let best = logits.amax([1i64].as_slice(), false).sum(Kind::Float);
    let gradients = Tensor::run_backward(&[best], values, true, false);
    let maps = values.iter().zip(&gradients).map(|(values, gradient)| {
        let values = values.detach();
        let over = [2i64, 3];
        let weight = (gradient * &values).sum_dim_intlist(over.as_slice(), true, Kind::Float)
            / (values.sum_dim_intlist(over.as_slice(), true, Kind::Float) + 1e-7);
        let map = (weight * &values).sum_dim_intlist([1i64].as_slice(), true, Kind::Float).relu();
        resized(&to_unit(&map), &gradients[0])
    });
    let maps: Vec<Tensor> = maps.collect();
    to_unit(&Tensor::stack(&maps, 0).mean_dim([0i64].as_slice(), false, Kind::Float)).detach()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_scaled_by_themselves() {
        let t = Tensor::from_slice(&[1f32, 3.0, 10.0, 10.0]).view([2, 1, 1, 2]);
        assert_eq!(Vec::<f32>::try_from(by_mean(&t).view(-1)).unwrap(), [0.5, 1.5, 1.0, 1.0]);
        assert_eq!(Vec::<f32>::try_from(to_unit(&t).view(-1)).unwrap(), [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_feature_that_the_answer_follows_weighs_most() {
        let features = Tensor::rand([1, 2, 6, 6], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
        // the first class follows one position of the second channel
        let seen = features.narrow(1, 1, 1).narrow(2, 4, 1).narrow(3, 1, 1).view([1, 1]);
        let logits = Tensor::cat(&[&seen * 3.0, seen.zeros_like(), seen.zeros_like()], 1);
        let weights = of_positions(&logits, &features, &Tensor::ones([2], (Kind::Float, tch::Device::Cpu)));
        assert!((weights.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-4);
        assert!(weights.double_value(&[0, 1, 4, 1]) > 3.0 && weights.double_value(&[0, 0, 4, 1]) < 1e-3);
        let map = activation_map(&logits, &[features]);
        assert_eq!(map.size(), [1, 1, 6, 6]);
        assert!(map.double_value(&[0, 0, 4, 1]) > 0.0);
    }
}
