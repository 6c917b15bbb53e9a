//! Quality as a number: the bundle's levels and what lies between them.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// Parts of the way from one level to the next.
const PARTS: f64 = 256.0;

/// A quality level (from 1), and how far towards the next one: gains between two levels are interpolated geometrically (Cui et al.,
/// "Asymmetric Gained Deep Image Compression With Continuous Rate Adaptation", CVPR 2021).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quality {
    /// The level below.
    pub level: u8,
    /// 256ths of the way to the next.
    pub fraction: u8,
}

impl Quality {
    /// The nearest to `value`, from 1 on.
    pub fn nearest(value: f64) -> Self {
        let parts = (value.clamp(0.0, 255.0) * PARTS).round() as u32;
        Self { level: u8::try_from(parts >> 8).unwrap_or(u8::MAX), fraction: parts as u8 }
    }

    /// As a number.
    pub fn value(self) -> f64 {
        f64::from(self.level) + f64::from(self.fraction) / PARTS
    }

    /// True if it is one of the levels themselves.
    pub fn is_level(self) -> bool {
        self.fraction == 0
    }

    /// The level whose tables code it: the nearest.
    pub fn table_level(self) -> u8 {
        self.level.saturating_add(self.fraction >> 7)
    }
}

impl From<u8> for Quality {
    fn from(level: u8) -> Self {
        Self { level, fraction: 0 }
    }
}

impl FromStr for Quality {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let value: f64 = text.parse().map_err(|_| "a number such as 3 or 3.5 is needed".to_owned())?;
        if !(1.0..=255.0).contains(&value) {
            return Err("levels begin with 1 and there are 255 at most".into());
        }
        Ok(Self::nearest(value))
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_level() { write!(f, "{}", self.level) } else { write!(f, "{:.3}", self.value()) }
    }
}

impl Serialize for Quality {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.is_level() { serializer.serialize_u8(self.level) } else { serializer.serialize_f64(self.value()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_levels_and_parts() {
        let parsed = |text: &str| text.parse::<Quality>();
        assert_eq!(parsed("3"), Ok(Quality { level: 3, fraction: 0 }));
        assert_eq!(parsed("2.5"), Ok(Quality { level: 2, fraction: 128 }));
        assert_eq!(parsed("2.999"), Ok(Quality { level: 3, fraction: 0 }));
        assert_eq!(parsed("255"), Ok(Quality::from(255)));
        for wrong in ["0.9", "256", "-1", "nan", "inf", "three", ""] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Quality::nearest(2.5).to_string(), "2.500");
        assert_eq!(Quality::from(4).to_string(), "4");
        assert_eq!([2.49, 2.5].map(|q| Quality::nearest(q).table_level()), [2, 3]);
        assert!(Quality::nearest(2.5) < Quality::nearest(2.6) && Quality::nearest(2.6) < Quality::from(3));
    }
}
