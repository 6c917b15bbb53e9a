//! Named weights: safetensors in, safetensors out, and the one-time import of `.pth` files.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use crate::{NetError, pth};

/// Tensors by name, on one device.
pub struct Weights {
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    /// Reads a safetensors file's bytes; half precision becomes single.
    ///
    /// # Errors
    /// [`NetError::Format`] if the bytes are not safetensors or hold another type than f32 and f16.
    pub fn from_safetensors(bytes: &[u8], what: &str, device: Device) -> Result<Self, NetError> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| NetError::format(what, e.to_string()))?;
        let mut tensors = HashMap::new();
        for (name, view) in file.tensors() {
            let kind = match view.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::F16 => Kind::Half,
                other => return Err(NetError::format(what, format!("tensor {name} is {other:?}, expected F32 or F16"))),
            };
            let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
            let t = Tensor::f_from_data_size(view.data(), &shape, kind)?;
            tensors.insert(name, t.to_kind(Kind::Float).to_device(device));
        }
        Ok(Self { tensors })
    }

    /// Reads a backbone from `path`: safetensors, or torch's legacy `.pth`.
    ///
    /// # Errors
    /// [`NetError::Io`] if unreadable, [`NetError::Format`] if malformed.
    pub fn open(path: &Path, device: Device) -> Result<Self, NetError> {
        let bytes = std::fs::read(path).map_err(|cause| NetError::Io { path: path.into(), cause })?;
        let what = path.display().to_string();
        if path.extension().is_some_and(|e| e == "pth") {
            let mut tensors = HashMap::new();
            for (name, raw) in pth::read(&bytes)? {
                let shape: Vec<i64> = raw.shape.iter().map(|&d| d as i64).collect();
                tensors.insert(name, Tensor::from_slice(&raw.data).reshape(&shape).to_device(device));
            }
            return Ok(Self { tensors });
        }
        Self::from_safetensors(&bytes, &what, device)
    }

    /// Whether there is a tensor `name`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`, checked against `shape` (-1 matches any extent).
    ///
    /// # Errors
    /// [`NetError::Shape`] if it is missing or has another shape.
    pub fn get(&self, name: &str, shape: &[i64]) -> Result<Tensor, NetError> {
        let found = self.tensors.get(name);
        let size = found.map(Tensor::size).unwrap_or_default();
        let fits = size.len() == shape.len() && size.iter().zip(shape).all(|(a, b)| *b == -1 || a == b);
        match found {
            Some(t) if fits => Ok(t.shallow_clone()),
            _ => Err(NetError::Shape { name: name.into(), expected: shape.into(), found: size }),
        }
    }

    /// The tensor `name`, whatever its shape.
    pub fn get_any(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Copies the tensors into the variables of `vs` by name.
    ///
    /// # Errors
    /// [`NetError::Shape`] if one is missing or has another shape.
    pub fn copy_to(&self, vs: &tch::nn::VarStore) -> Result<(), NetError> {
        for (name, mut variable) in vs.variables() {
            let saved = self.get(&name, &variable.size())?;
            tch::no_grad(|| variable.copy_(&saved));
        }
        Ok(())
    }

    /// Total number of elements.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(Tensor::numel).sum()
    }

    /// Names of the tensors, unordered.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// f32.
    Single,
    /// f16, in half the bytes.
    Half,
}

/// Serialises named tensors as safetensors (sorted by name, so equal tensors give equal bytes).
///
/// # Errors
/// [`NetError::Format`] if serialisation fails.
pub fn to_safetensors<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>, storage: Storage) -> Result<Vec<u8>, NetError> {
    let dtype = match storage {
        Storage::Single => Dtype::F32,
        Storage::Half => Dtype::F16,
    };
    let mut owned: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, t) in tensors {
        let flat = t.to_device(Device::Cpu).contiguous().view(-1);
        let bytes = match storage {
            Storage::Single => Vec::<f32>::try_from(&flat.to_kind(Kind::Float))?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Storage::Half => {
                let bits = Vec::<i16>::try_from(&flat.to_kind(Kind::Half).f_view_dtype(Kind::Int16)?)?;
                bits.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        };
        owned.push((name.to_owned(), t.size().iter().map(|&d| d as usize).collect(), bytes));
    }
    owned.sort();
    let mut views = Vec::new();
    for (name, shape, bytes) in &owned {
        let view = TensorView::new(dtype, shape.clone(), bytes).map_err(|e| NetError::format(name.clone(), e.to_string()))?;
        views.push((name.as_str(), view));
    }
    safetensors::serialize(views, None).map_err(|e| NetError::format("safetensors", e.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn halves_come_back_as_near_as_their_type_allows() {
        let t = Tensor::from_slice(&[0.0f32, 1.0, -0.333_333, 1e-6, 6e4]).view([1, 5]);
        for (storage, share) in [(Storage::Single, 0.0), (Storage::Half, 1.0 / 2048.0)] {
            let bytes = to_safetensors([("t", &t)], storage).unwrap();
            let back = Weights::from_safetensors(&bytes, "test", Device::Cpu).unwrap().get("t", &[1, 5]).unwrap();
            assert_eq!(back.kind(), Kind::Float);
            let off = ((&back - &t).abs() - t.abs() * share).max().double_value(&[]);
            assert!(off <= 6e-8, "{storage:?}: {off}");
        }
    }
}
