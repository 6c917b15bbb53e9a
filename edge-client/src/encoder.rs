//! Photo to container: preprocess, encoder network, rounding, entropy coding.

use std::path::{Path, PathBuf};
use std::time::Instant;

use isthmus_codec::{Bundle, Quality, Trust, folder};
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

/// How long containers may be. Content that no training saw (patterns of saturated colours, for example) takes several times the usual bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    /// The highest quality up to the asked one is taken whose container has at most so many bytes; if none has, the lowest level.
    pub target: Option<usize>,
    /// The same, but longer ones are never made: an error instead.
    pub most: Option<usize>,
    /// As `target`, in mean bytes of the asked quality's containers (of the highest level's, for progressive bitstreams).
    pub times_usual: Option<f64>,
}

/// An encoded photo.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The quality that was used: the asked one, or what the budget left.
    pub quality: Quality,
    /// The container to send.
    pub container: Vec<u8>,
    /// It is of the lowest level and has more bytes than the budget's target all the same.
    pub over_target: bool,
    /// How long it took.
    pub timing: EncodeTiming,
}

/// A photo as a progressive bitstream.
#[derive(Debug, Clone)]
pub struct Progressive {
    /// The container of level 1, then its refinements.
    pub parts: Vec<Vec<u8>>,
    /// How long it took.
    pub timing: EncodeTiming,
}

/// Encodes photos with one bundle.
pub struct Encoder {
    bundle: Bundle,
    engine: Box<dyn Engine>,
    budget: Budget,
}

/// How near a quality is brought to what a budget allows, in 256ths of the way from one level to the next.
const FINEST: u16 = 4;

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

    /// Encodes a JPEG, PNG or WebP file at this quality (from 1), or a lower one if the budget wants it.
    ///
    /// # Errors
    /// If the photo cannot be decoded, the quality does not exist, or the encoder fails; [`ClientError::TooLong`] if no level fits.
    pub fn encode(&mut self, file: &[u8], quality: impl Into<Quality>) -> Result<Encoded, ClientError> {
        let start = Instant::now();
        let photo = isthmus_pixels::decode(file)?;
        self.encode_from(&photo, quality.into(), start)
    }

    /// Encodes decoded pixels (a camera frame, for example).
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn encode_rgb(&mut self, photo: &Rgb, quality: impl Into<Quality>) -> Result<Encoded, ClientError> {
        self.encode_from(photo, quality.into(), Instant::now())
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

    /// Encodes a JPEG, PNG or WebP file as a progressive bitstream: as many refinements as the budget allows.
    ///
    /// # Errors
    /// As [`Encoder::encode`]; a bundle without refinements is an error.
    pub fn encode_progressive(&mut self, file: &[u8]) -> Result<Progressive, ClientError> {
        let start = Instant::now();
        let (latent, timing) = self.timed_latent(&isthmus_pixels::decode(file)?, start)?;
        let start = Instant::now();
        let mut parts = self.bundle.encode_progressive(&latent)?;
        let (limit, most) = (self.limit(self.bundle.levels().into()), self.budget.most);
        if let (Some(first), Some(most)) = (parts.first().map(Vec::len), most)
            && first > most
        {
            return Err(ClientError::TooLong { bytes: first, most });
        }
        let mut bytes = 0;
        let fit = parts.iter().take_while(|part| {
            bytes += part.len();
            bytes <= limit
        });
        parts.truncate(fit.count().max(1));
        Ok(Progressive { parts, timing: EncodeTiming { entropy_us: micros(start), ..timing } })
    }

    #[tracing::instrument(level = "debug", skip_all, fields(%quality), err(level = "debug"))]
    fn encode_from(&mut self, photo: &Rgb, quality: Quality, start: Instant) -> Result<Encoded, ClientError> {
        self.bundle.tables.level(quality)?;
        let (latent, timing) = self.timed_latent(photo, start)?;
        let start = Instant::now();
        let asked = quality;
        let (quality, container) = self.code(&latent, asked)?;
        let over_target = container.len() > self.limit(asked);
        Ok(Encoded { quality, container, over_target, timing: EncodeTiming { entropy_us: micros(start), ..timing } })
    }

    /// The latent, and how long it took since `start`.
    fn timed_latent(&mut self, photo: &Rgb, start: Instant) -> Result<(Vec<f32>, EncodeTiming), ClientError> {
        let mut pixels = Vec::new();
        photo.network_input(self.bundle.manifest.input.size)?.normalise_into(&mut pixels);
        let preprocess_us = micros(start);
        let start = Instant::now();
        let latent = self.engine.run(pixels)?;
        Ok((latent, EncodeTiming { preprocess_us, network_us: micros(start), entropy_us: 0 }))
    }

    /// Most bytes of a container of this quality.
    fn limit(&self, asked: Quality) -> usize {
        let Budget { target, most, times_usual } = self.budget;
        let above = asked.level + u8::from(!asked.is_level());
        let usual = self.bundle.manifest.quality.get(usize::from(above).saturating_sub(1)).map(|q| q.bytes);
        let times = times_usual.zip(usual).map(|(times, bytes)| (times * bytes) as usize);
        [target, most, times].into_iter().flatten().min().unwrap_or(usize::MAX)
    }

    /// The container of the highest quality up to `asked` that is within the budget.
    fn code(&self, latent: &[f32], asked: Quality) -> Result<(Quality, Vec<u8>), ClientError> {
        let (limit, most) = (self.limit(asked), self.budget.most);
        let coded = |quality: Quality| Ok::<_, ClientError>((quality, self.bundle.encode(latent, quality)?));
        let whole = coded(asked)?;
        if whole.1.len() <= limit {
            return Ok(whole);
        }
        let mut best = coded(1.into())?;
        match most {
            Some(most) if best.1.len() > most => return Err(ClientError::TooLong { bytes: best.1.len(), most }),
            _ if best.1.len() > limit => return Ok(best),
            _ => {}
        }
        // a level, then a part of the way to the next
        let (mut level, mut above) = (1, asked.level + u8::from(!asked.is_level()));
        while above - level > 1 {
            let middle = level + (above - level) / 2;
            let tried = coded(middle.into())?;
            if tried.1.len() <= limit {
                (level, best) = (middle, tried);
            } else {
                above = middle;
            }
        }
        let (mut fits, mut exceeds) = (0u16, if level == asked.level { asked.fraction.into() } else { 256 });
        while exceeds - fits > FINEST {
            let middle = fits + (exceeds - fits) / 2;
            let tried = coded(Quality { level, fraction: middle as u8 })?;
            if tried.1.len() <= limit {
                (fits, best) = (middle, tried);
            } else {
                exceeds = middle;
            }
        }
        Ok(best)
    }
}
