//! Errors of this crate.

use crate::quality::Quality;

/// Why a container, table file or bundle was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The bytes are no well-formed container.
    #[error("malformed container: {0}")]
    Malformed(String),
    /// The container was made for another bundle.
    #[error("the container was made with bundle {found}, this side has {expected}; use the same bundle on both sides")]
    WrongBundle {
        /// Prefix of the hash of the bundle at hand, hexadecimal.
        expected: String,
        /// Prefix in the container.
        found: String,
    },
    /// The latent's shape is not the bundle's.
    #[error("the container holds a latent of {found}, the bundle's is {expected}")]
    WrongShape {
        /// Shape of the bundle's latent.
        expected: String,
        /// Shape in the container.
        found: String,
    },
    /// There is no such quality level.
    #[error("quality {level} does not exist; the bundle has levels 1 to {levels}")]
    UnknownQuality {
        /// Asked for.
        level: Quality,
        /// Levels of the bundle.
        levels: u8,
    },
    /// There is no such refinement.
    #[error("refinement {step} does not exist; the bundle has {steps}")]
    UnknownRefinement {
        /// Asked for.
        step: usize,
        /// Refinements of the bundle.
        steps: usize,
    },
    /// The bundle cannot make progressive bitstreams.
    #[error("bundle {0} has no refinements, which progressive bitstreams need: take one that `trainer refine` made")]
    NoRefinements(String),
    /// The latent cannot be coded.
    #[error("the latent cannot be coded: {0}")]
    BadLatent(String),
    /// A table file is malformed.
    #[error("malformed entropy tables: {0}")]
    BadTables(String),
    /// A bundle is incomplete or inconsistent.
    #[error("bundle: {0}")]
    BadBundle(String),
}

impl CodecError {
    pub(crate) fn malformed(why: impl Into<String>) -> Self {
        Self::Malformed(why.into())
    }

    pub(crate) fn tables(why: impl Into<String>) -> Self {
        Self::BadTables(why.into())
    }

    pub(crate) fn bundle(why: impl Into<String>) -> Self {
        Self::BadBundle(why.into())
    }
}
