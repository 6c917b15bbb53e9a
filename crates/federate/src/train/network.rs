//! Between models and libtorch's variables.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tch::{Tensor, nn};

use super::{Model, torch};
use crate::error::FederateError;

/// Copies a model into a network's variables; they must be the same tensors. `what` names the network in errors.
///
/// # Errors
/// If a tensor is missing, unknown or of another shape.
pub fn load(variables: &nn::VarStore, model: &Model, what: &str) -> Result<(), FederateError> {
    let mut variables = variables.variables();
    let known = variables.len();
    let mut taken = 0;
    for (name, shape, values) in model.tensors() {
        let shape: Vec<i64> = shape.iter().map(|s| *s as i64).collect();
        let variable = variables.get_mut(name).filter(|v| v.size() == shape);
        let variable = variable.ok_or_else(|| FederateError::Invalid(format!("tensor {name} {shape:?} is not one of {what}'s network")))?;
        let values = Tensor::f_from_slice(values).and_then(|t| t.f_view(shape.as_slice())).map_err(torch)?;
        tch::no_grad(|| variable.f_copy_(&values)).map_err(torch)?;
        taken += 1;
    }
    if taken == known {
        Ok(())
    } else {
        Err(FederateError::Invalid(format!("the model has {taken} of the {known} tensors of {what}'s network")))
    }
}

/// A network's variables as a model.
///
/// # Errors
/// If libtorch fails.
pub fn store(variables: &nn::VarStore) -> Result<Model, FederateError> {
    let tensors = variables.variables().into_iter().map(|(name, tensor)| {
        let shape = tensor.size().iter().map(|s| *s as usize).collect();
        let values = Vec::<f32>::try_from(tensor.f_detach().and_then(|t| t.f_view(-1)).map_err(torch)?).map_err(torch)?;
        Ok((name, shape, values))
    });
    Model::new(tensors.collect::<Result<Vec<_>, FederateError>>()?)
}

/// A model of the same tensors with fresh values: uniform with variance 1 / inputs, biases zero. From our own generator, because
/// libtorch's is shared by the whole process.
///
/// # Errors
/// None for a model that was made by [`store`].
pub fn fresh(model: &Model, seed: u64) -> Result<Model, FederateError> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let tensors = model.tensors().map(|(name, shape, values)| {
        let inputs: usize = shape.iter().skip(1).product();
        let bound = if shape.len() > 1 { (3.0 / inputs as f64).sqrt() } else { 0.0 };
        let values = values.iter().map(|_| (rng.random_range(-1.0..1.0) * bound) as f32).collect();
        (name.to_owned(), shape.to_vec(), values)
    });
    Model::new(tensors.collect())
}

/// What changed from one model to another of the same tensors.
pub fn difference(new: &Model, old: &Model) -> Vec<f32> {
    new.values.iter().zip(&old.values).map(|(new, old)| new - old).collect()
}
