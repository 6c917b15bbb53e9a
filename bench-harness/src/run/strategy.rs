//! The strategies: what the device makes of a photo before it sends it.

use edge_client::{Encoder, Payload};
use isthmus_pixels::Rgb;
use serde::{Deserialize, Serialize};

use crate::codecs::Codec;
use crate::error::HarnessError;

/// Strategies to compare, each at its settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StrategyConfig {
    /// Quality levels of the bundle; empty: all.
    pub bottleneck: Vec<u8>,
    /// WebP qualities.
    pub webp: Vec<u8>,
    /// JPEG qualities.
    pub jpeg: Vec<u8>,
    /// Lossless PNG.
    pub png: bool,
}

/// One strategy at one setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// The bundle at a quality level.
    Bottleneck(u8),
    /// An image file for the server's whole network.
    Image(Codec),
}

impl StrategyConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the wrong one.
    pub fn check(&self) -> Result<(), String> {
        if self.webp.iter().chain(&self.jpeg).any(|&q| q > 100) || self.jpeg.contains(&0) {
            return Err("strategies: qualities are at most 100, those of JPEG at least 1".into());
        }
        Ok(())
    }

    /// Every strategy at every setting; `levels` are the bundle's.
    ///
    /// # Errors
    /// If a quality level does not exist.
    pub fn all(&self, levels: u8) -> Result<Vec<Strategy>, HarnessError> {
        if let Some(q) = self.bottleneck.iter().find(|&&q| q == 0 || q > levels) {
            return Err(HarnessError::data("strategies.bottleneck", format!("quality {q}; the bundle has levels 1 to {levels}")));
        }
        let own = if self.bottleneck.is_empty() { (1..=levels).collect() } else { self.bottleneck.clone() };
        let mut all: Vec<Strategy> = own.into_iter().map(Strategy::Bottleneck).collect();
        all.extend(self.webp.iter().map(|&q| Strategy::Image(Codec::Webp(q))));
        all.extend(self.jpeg.iter().map(|&q| Strategy::Image(Codec::Jpeg(q))));
        all.extend(self.png.then_some(Strategy::Image(Codec::Png)));
        Ok(all)
    }
}

impl Strategy {
    /// Name and setting.
    pub fn name(self) -> String {
        match self {
            Self::Bottleneck(q) => format!("Isthmus q{q}"),
            Self::Image(codec) => codec.name(),
        }
    }

    /// What to send for a photo, which is cropped and resized already for all of them.
    ///
    /// # Errors
    /// If encoding fails.
    pub fn encode(self, encoder: &mut Encoder, photo: &Rgb) -> Result<Payload, HarnessError> {
        Ok(match self {
            Self::Bottleneck(q) => Payload::Bitstream(encoder.encode_rgb(photo, q)?.container.into()),
            Self::Image(codec) => Payload::Image(codec.encode(photo)?.into()),
        })
    }
}
