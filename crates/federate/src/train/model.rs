//! A model as a vector: tensors by name, in order of name.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::FederateError;

/// Names and shapes of tensors, and all their values one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    tensors: Vec<(String, Vec<usize>)>,
    /// The values.
    pub values: Vec<f32>,
}

impl Model {
    /// From tensors, which are put in order of name.
    ///
    /// # Errors
    /// If a tensor's values are not as many as its shape says.
    pub fn new(mut tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> Result<Self, FederateError> {
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let mut model = Self { tensors: Vec::new(), values: Vec::new() };
        for (name, shape, values) in tensors {
            if shape.iter().product::<usize>() != values.len() {
                return Err(FederateError::Invalid(format!("tensor {name}: {} values in shape {shape:?}", values.len())));
            }
            model.tensors.push((name, shape));
            model.values.extend(values);
        }
        Ok(model)
    }

    /// Coordinates of an update.
    pub fn dim(&self) -> usize {
        self.values.len()
    }

    /// Tensors with their values, in order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], &[f32])> {
        let mut at = 0;
        self.tensors.iter().map(move |(name, shape)| {
            let from = at;
            at += shape.iter().product::<usize>();
            (name.as_str(), shape.as_slice(), &self.values[from..at])
        })
    }

    /// Adds `update` times `factor`.
    ///
    /// # Errors
    /// If it has another length.
    pub fn add(&mut self, update: &[f64], factor: f64) -> Result<(), FederateError> {
        if update.len() != self.values.len() {
            return Err(FederateError::Invalid(format!("an update of {} values for a model of {}", update.len(), self.values.len())));
        }
        self.values.iter_mut().zip(update).for_each(|(v, u)| *v = (f64::from(*v) + factor * u) as f32);
        Ok(())
    }

    /// As a safetensors file.
    ///
    /// # Errors
    /// None for a model that was made by [`Self::new`].
    pub fn encode(&self) -> Result<Vec<u8>, FederateError> {
        let invalid = |e: safetensors::SafeTensorError| FederateError::Invalid(format!("model: {e}"));
        let bytes: Vec<(&str, &[usize], Vec<u8>)> =
            self.tensors().map(|(name, shape, values)| (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
        let views =
            bytes.iter().map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(invalid)?)));
        safetensors::serialize(views.collect::<Result<Vec<_>, FederateError>>()?, None).map_err(invalid)
    }

    /// From a safetensors file with tensors in single precision.
    ///
    /// # Errors
    /// If it is something else, or a value is not finite.
    pub fn decode(bytes: &[u8]) -> Result<Self, FederateError> {
        let invalid = |why: String| FederateError::Invalid(format!("model: {why}"));
        let file = SafeTensors::deserialize(bytes).map_err(|e| invalid(e.to_string()))?;
        let mut tensors = Vec::new();
        for (name, view) in file.tensors() {
            if view.dtype() != Dtype::F32 {
                return Err(invalid(format!("tensor {name} is not in single precision")));
            }
            let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            if values.iter().any(|v| !v.is_finite()) {
                return Err(invalid(format!("tensor {name} holds a value that is not finite")));
            }
            tensors.push((name, view.shape().to_vec(), values));
        }
        Self::new(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_give_the_same_model_and_nonsense_is_refused() {
        let tensors = vec![("b".into(), vec![2], vec![1.0, 2.0]), ("a".into(), vec![1, 3], vec![3.0, 4.0, 5.0])];
        let mut model = Model::new(tensors).unwrap();
        assert_eq!(model.values, [3.0, 4.0, 5.0, 1.0, 2.0]);
        let bytes = model.encode().unwrap();
        assert_eq!(Model::decode(&bytes).unwrap(), model);
        assert!(Model::decode(&bytes[..bytes.len() - 1]).is_err() && Model::decode(b"x").is_err());
        model.add(&[1.0; 5], 0.5).unwrap();
        assert_eq!(model.values[0], 3.5);
        assert!(model.add(&[1.0; 4], 1.0).is_err());
        assert!(Model::new(vec![("a".into(), vec![2], vec![1.0])]).is_err());
        model.values[0] = f32::NAN;
        assert!(Model::decode(&model.encode().unwrap()).is_err());
    }
}
