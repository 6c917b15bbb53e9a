//! The whole network on the device: what is left when the link is dead, and a rival on every link.

use std::path::Path;

use isthmus_pixels::Rgb;
use isthmus_proto::offload_v1::Label;

use crate::ClientError;
use crate::engine::{Engine, RtenEngine};

/// A backbone on the edge engine, with the names of its classes.
pub struct LocalClassifier {
    engine: RtenEngine,
    side: u32,
    names: Vec<String>,
}

impl LocalClassifier {
    /// Loads an ONNX graph for square inputs of `side` pixels that ends in logits, and `labels.json` (a list of names in class
    /// order) beside it. `make setup` writes both to data/backbones.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn open(graph: &Path, side: u32, threads: usize) -> Result<Self, ClientError> {
        let read = |path: &Path| std::fs::read(path).map_err(|cause| ClientError::Io { path: path.into(), cause });
        let engine = RtenEngine::new(&read(graph)?, side, threads)?;
        let path = graph.with_file_name("labels.json");
        let names = serde_json::from_slice(&read(&path)?)
            .map_err(|e| ClientError::Usage(format!("{}: a JSON list of class names is needed: {e}", path.display())))?;
        Ok(Self { engine, side, names })
    }

    /// Logits of a photo in class order.
    ///
    /// # Errors
    /// If the engine fails, or gives another number of logits than there are names.
    pub fn logits(&mut self, photo: &Rgb) -> Result<Vec<f32>, ClientError> {
        let mut pixels = Vec::new();
        photo.network_input(self.side)?.normalise_into(&mut pixels);
        let logits = self.engine.run(pixels)?;
        if logits.len() != self.names.len() {
            return Err(ClientError::Engine(format!("{} logits for {} class names", logits.len(), self.names.len())));
        }
        Ok(logits)
    }

    /// The `k` best labels of a photo with their softmax probabilities, best first.
    ///
    /// # Errors
    /// As [`LocalClassifier::logits`].
    pub fn classify(&mut self, photo: &Rgb, k: usize) -> Result<Vec<Label>, ClientError> {
        let logits = self.logits(photo)?;
        Ok(isthmus_proto::best(&logits, k, &self.names))
    }
}
