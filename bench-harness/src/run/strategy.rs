//! The strategies: what the device makes of a photo.

use std::collections::BTreeMap;
use std::path::PathBuf;

use edge_client::engine::{Engine, RtenEngine};
use edge_client::local::LocalClassifier;
use edge_client::policy::{Aim, LocalUse};
use edge_client::{Encoder, Payload};
use isthmus_pixels::Rgb;
use isthmus_proto::offload_v1::Features;
use isthmus_proto::offload_v1::features::Encoding;
use serde::{Deserialize, Serialize};

use crate::codecs::Codec;
use crate::error::HarnessError;
use crate::stats::argmax;

/// zstd's level for raw features.
const ZSTD_LEVEL: i32 = 3;

/// Strategies to compare, each at its settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StrategyConfig {
    /// Quality levels of the bundle; empty: all.
    pub bottleneck: Vec<u8>,
    /// Qualities of each image codec, by its key; none for lossless ones.
    pub images: BTreeMap<String, Vec<u8>>,
    /// Values of the bundle's split point as they are.
    pub features: Vec<FeatureEncoding>,
    /// The whole network on the device.
    pub local: bool,
    /// The client's own choice, for these goals.
    pub auto: Vec<AutoConfig>,
}

/// How raw features are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeatureEncoding {
    /// Single precision.
    F32,
    /// A byte a value, then zstd.
    U8Zstd,
}

/// A goal of `--policy auto`; its deadline is the run's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoConfig {
    /// What comes after the deadline.
    pub aim: Aim,
    /// Options of less agreement are left out.
    #[serde(default)]
    pub least_agreement: f64,
    /// When the network may run on the device.
    #[serde(default)]
    pub local: LocalUse,
}

/// One strategy at one setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Strategy {
    /// The bundle at a quality level.
    Bottleneck(u8),
    /// An image file for the server's whole network.
    Image(Codec),
    /// The first blocks on the device, their output as it is.
    Features(FeatureEncoding),
    /// Everything on the device.
    Local,
    /// Whatever the client chooses.
    Auto(AutoConfig),
}

impl StrategyConfig {
    /// Every strategy at every setting; `levels` are the bundle's.
    ///
    /// # Errors
    /// If a quality level or codec does not exist.
    pub fn all(&self, levels: u8) -> Result<Vec<Strategy>, HarnessError> {
        if let Some(q) = self.bottleneck.iter().find(|&&q| q == 0 || q > levels) {
            return Err(HarnessError::data("strategies.bottleneck", format!("quality {q}; the bundle has levels 1 to {levels}")));
        }
        if self.auto.iter().any(|a| !(0.0..=1.0).contains(&a.least_agreement)) {
            return Err(HarnessError::data("strategies.auto.least_agreement", "use 0 to 1"));
        }
        let own = if self.bottleneck.is_empty() { (1..=levels).collect() } else { self.bottleneck.clone() };
        let mut all: Vec<Strategy> = own.into_iter().map(Strategy::Bottleneck).collect();
        for (key, qualities) in &self.images {
            if qualities.is_empty() {
                all.push(Strategy::Image(Codec::new(key, None)?));
            }
            for &q in qualities {
                all.push(Strategy::Image(Codec::new(key, Some(q))?));
            }
        }
        all.extend(self.features.iter().map(|&f| Strategy::Features(f)));
        all.extend(self.local.then_some(Strategy::Local));
        all.extend(self.auto.iter().map(|&a| Strategy::Auto(a)));
        Ok(all)
    }
}

impl Strategy {
    /// Name and setting.
    pub fn name(self) -> String {
        match self {
            Self::Bottleneck(q) => format!("{} q{q}", crate::compare::OURS),
            Self::Image(codec) => codec.name(),
            Self::Features(FeatureEncoding::F32) => "features f32".into(),
            Self::Features(FeatureEncoding::U8Zstd) => "features u8+zstd".into(),
            Self::Local => "local".into(),
            Self::Auto(a) => {
                let aim = if a.aim == Aim::Latency { "latency" } else { "agreement" };
                let floor = if a.least_agreement > 0.0 { format!(", at least {:.0} %", a.least_agreement * 100.0) } else { String::new() };
                format!("auto ({aim}{floor})")
            }
        }
    }

    /// Name without the setting.
    pub fn family(self) -> &'static str {
        match self {
            Self::Bottleneck(_) => crate::compare::OURS,
            Self::Image(codec) => codec.family(),
            Self::Features(_) => "features",
            Self::Local => "local",
            Self::Auto(_) => "auto",
        }
    }
}

/// What came of a photo on the device.
pub enum Prepared {
    /// To be sent.
    Send(Payload),
    /// The answer: index of the best class.
    Answer(u32),
}

/// The device's networks, as far as the strategies need them.
pub struct Device {
    encoder: Encoder,
    local: Option<LocalClassifier>,
    head: Option<Head>,
}

struct Head {
    engine: RtenEngine,
    block: usize,
    side: u32,
}

impl Device {
    /// Loads what `strategies` need; `backbones` has the graphs that `make setup` writes.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn open(encoder: Encoder, backbones: &std::path::Path, strategies: &[Strategy]) -> Result<Self, HarnessError> {
        let manifest = &encoder.bundle().manifest;
        let side = manifest.input.size;
        let local = strategies.iter().any(|s| matches!(s, Strategy::Local)).then(|| Self::local(backbones, &encoder)).transpose()?;
        let wanted = strategies.iter().any(|s| matches!(s, Strategy::Features(_)));
        let block = manifest.decoders.first().and_then(|d| d.split_block);
        let head = match (wanted, block) {
            (false, _) => None,
            (true, None) => {
                return Err(HarnessError::data("strategies.features", "the bundle rebuilds the pixels: it has no features to send"));
            }
            (true, Some(block)) => {
                let path = Self::graph(backbones, &encoder, &format!("-to-block{block}"));
                let graph = std::fs::read(&path).map_err(|cause| HarnessError::Io { path, cause })?;
                Some(Head { engine: RtenEngine::new(&graph, side, 1)?, block, side })
            }
        };
        Ok(Self { encoder, local, head })
    }

    fn graph(backbones: &std::path::Path, encoder: &Encoder, suffix: &str) -> PathBuf {
        let name = encoder.bundle().manifest.decoders.first().map_or("", |d| d.backbone.as_str());
        backbones.join(format!("{name}{suffix}.onnx"))
    }

    /// The bundle's backbone for the device.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn local(backbones: &std::path::Path, encoder: &Encoder) -> Result<LocalClassifier, HarnessError> {
        Ok(LocalClassifier::open(&Self::graph(backbones, encoder, ""), encoder.bundle().manifest.input.size, 1)?)
    }

    /// What a strategy other than [`Strategy::Auto`] makes of a photo, which is cropped and resized already.
    ///
    /// # Errors
    /// If encoding fails.
    pub fn prepare(&mut self, strategy: Strategy, photo: &Rgb) -> Result<Prepared, HarnessError> {
        let lacking = |what: &str| HarnessError::data(what, "was not loaded");
        Ok(match strategy {
            Strategy::Bottleneck(q) => Prepared::Send(Payload::Bitstream(self.encoder.encode_rgb(photo, q)?.container.into())),
            Strategy::Image(codec) => Prepared::Send(Payload::Image(codec.encode(photo)?.into())),
            Strategy::Features(encoding) => {
                Prepared::Send(Payload::Features(self.head.as_mut().ok_or_else(|| lacking("head"))?.run(encoding, photo)?))
            }
            Strategy::Local => {
                let logits = self.local.as_mut().ok_or_else(|| lacking("local"))?.logits(photo)?;
                Prepared::Answer(argmax(&logits) as u32)
            }
            Strategy::Auto(_) => return Err(lacking("auto")),
        })
    }
}

impl Head {
    fn run(&mut self, encoding: FeatureEncoding, photo: &Rgb) -> Result<Features, HarnessError> {
        let mut pixels = Vec::new();
        photo.network_input(self.side).map_err(edge_client::ClientError::from)?.normalise_into(&mut pixels);
        let values = self.engine.run(pixels)?;
        let little_endian = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let (encoding, data) = match encoding {
            FeatureEncoding::F32 => (Encoding::F32, little_endian(&values)),
            FeatureEncoding::U8Zstd => {
                let (low, high) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
                let step = ((high - low) / 255.0).max(f32::MIN_POSITIVE);
                let bytes: Vec<u8> = values.iter().map(|v| ((v - low) / step).round() as u8).collect();
                let mut data = little_endian(&[low, high]);
                data.extend(zstd::bulk::compress(&bytes, ZSTD_LEVEL).map_err(|e| HarnessError::data("zstd", e.to_string()))?);
                (Encoding::U8Zstd, data)
            }
        };
        Ok(Features { block: self.block as u32, encoding: encoding as i32, data: data.into() })
    }
}
