//! Photo to container: preprocess, encoder network, rounding, entropy coding.

use std::path::{Path, PathBuf};
use std::time::Instant;

use isthmus_codec::{Bundle, Trust, folder};
use isthmus_pixels::Rgb;

use crate::ClientError;
use crate::engine::{Engine, RtenEngine};

/// Reads the parts of a bundle folder that a client needs (no decoder weights).
///
/// # Errors
/// [`ClientError::Codec`] names the file that is missing or wrong.
pub fn open_bundle(folder: &Path) -> Result<Bundle, ClientError> {
    let newest = bundle_versions(folder)?.swap_remove(0);
    open_version(&newest, &Trust::all())
}

/// The bundle folders at `folder`, newest version first: itself, or its subfolders.
///
/// # Errors
/// If there is none.
pub fn bundle_versions(folder: &Path) -> Result<Vec<PathBuf>, ClientError> {
    if !folder.is_dir() {
        return Err(ClientError::Usage(format!(
            "{} is no bundle folder; name one with --bundle or ISTHMUS_BUNDLE (the repository has bundles/lite0-patch-stem)",
            folder.display()
        )));
    }
    Ok(folder::versions(folder)?)
}

/// Reads the parts of one version of a bundle that a client needs, if it is trusted.
///
/// # Errors
/// [`ClientError::Codec`] names the file that is missing or wrong.
pub fn open_version(folder: &Path, trust: &Trust) -> Result<Bundle, ClientError> {
    Ok(folder::open(folder, |name| name.ends_with(".onnx"), trust)?)
}

/// Where the encode time went.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct EncodeTiming {
    /// Decoding, cropping, resizing and normalising the photo.
    pub preprocess_us: u64,
    /// The encoder network.
    pub network_us: u64,
    /// Rounding, entropy coding and framing.
    pub entropy_us: u64,
}

impl EncodeTiming {
    /// All three.
    pub fn total_us(&self) -> u64 {
        self.preprocess_us + self.network_us + self.entropy_us
    }
}

/// How long containers may be. Content that no training saw (noise, for example) takes many times the usual bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// Levels below the asked one are tried until a container has at most so many bytes; if none has, the lowest level's is taken.
    pub target: Option<usize>,
    /// The same, but longer ones are never made: an error instead.
    pub most: Option<usize>,
}

/// An encoded photo.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The level that was used: the asked one, or what the budget left.
    pub quality: u8,
    /// The container to send.
    pub container: Vec<u8>,
    /// How long it took.
    pub timing: EncodeTiming,
}

/// Encodes photos with one bundle.
pub struct Encoder {
    bundle: Bundle,
    engine: Box<dyn Engine>,
    budget: Budget,
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Encoder {
    /// Prepares the default engine with `threads` threads.
    ///
    /// # Errors
    /// If the bundle's graph cannot be loaded.
    pub fn new(bundle: Bundle, threads: usize) -> Result<Self, ClientError> {
        let graph = bundle.file(&bundle.manifest.encoder.graph)?;
        let engine = RtenEngine::new(graph, bundle.manifest.input.size, threads)?;
        Ok(Self::with_engine(bundle, Box::new(engine)))
    }

    /// Uses another engine.
    pub fn with_engine(bundle: Bundle, engine: Box<dyn Engine>) -> Self {
        Self { bundle, engine, budget: Budget::default() }
    }

    /// Bounds the length of every container from now on.
    #[must_use]
    pub fn with_budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// The bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The quality level used when none is given: the middle one.
    pub fn default_quality(&self) -> u8 {
        self.bundle.levels() / 2 + 1
    }

    /// Encodes a JPEG, PNG or WebP file at quality level `quality` (from 1), or a lower one if the budget wants it.
    ///
    /// # Errors
    /// If the photo cannot be decoded, the level does not exist, or the encoder fails; [`ClientError::TooLong`] if no level fits.
    pub fn encode(&mut self, file: &[u8], quality: u8) -> Result<Encoded, ClientError> {
        let start = Instant::now();
        let photo = isthmus_pixels::decode(file)?;
        self.encode_from(&photo, quality, start)
    }

    /// Encodes decoded pixels (a camera frame, for example).
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn encode_rgb(&mut self, photo: &Rgb, quality: u8) -> Result<Encoded, ClientError> {
        self.encode_from(photo, quality, Instant::now())
    }

    /// The latent of a photo before gain and rounding (channel-major).
    ///
    /// # Errors
    /// If the engine fails.
    pub fn latent(&mut self, photo: &Rgb) -> Result<Vec<f32>, ClientError> {
        let mut pixels = Vec::new();
        photo.network_input(self.bundle.manifest.input.size)?.normalise_into(&mut pixels);
        self.engine.run(pixels)
    }

    #[tracing::instrument(level = "debug", skip_all, fields(quality), err(level = "debug"))]
    fn encode_from(&mut self, photo: &Rgb, quality: u8, start: Instant) -> Result<Encoded, ClientError> {
        self.bundle.tables.level(quality)?;
        let mut pixels = Vec::new();
        photo.network_input(self.bundle.manifest.input.size)?.normalise_into(&mut pixels);
        let preprocess_us = micros(start);
        let start = Instant::now();
        let latent = self.engine.run(pixels)?;
        let network_us = micros(start);
        let start = Instant::now();
        let (quality, container) = self.code(&latent, quality)?;
        let entropy_us = micros(start);
        Ok(Encoded { quality, container, timing: EncodeTiming { preprocess_us, network_us, entropy_us } })
    }

    /// The container of the highest level up to `asked` that is within the budget.
    fn code(&self, latent: &[f32], asked: u8) -> Result<(u8, Vec<u8>), ClientError> {
        let Budget { target, most } = self.budget;
        let shape = self.bundle.manifest.latent;
        let mut quality = asked;
        loop {
            let symbols = self.bundle.tables.level(quality)?.quantise(latent, shape)?;
            let container = isthmus_codec::container::encode(&symbols, quality, &self.bundle.hash, shape, &self.bundle.tables)?;
            let fits = |limit: Option<usize>| limit.is_none_or(|limit| container.len() <= limit);
            match quality {
                _ if fits(target) && fits(most) => return Ok((quality, container)),
                1 if fits(most) => return Ok((quality, container)),
                1 => return Err(ClientError::TooLong { bytes: container.len(), most: most.unwrap_or_default() }),
                _ => quality -= 1,
            }
        }
    }
}
