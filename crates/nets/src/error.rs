//! Errors of this crate.

use std::path::PathBuf;

/// What can go wrong when networks are loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A file could not be read or written.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause (not a `source`: its text is in this error's already).
        cause: std::io::Error,
    },
    /// A weight file is not what its format demands.
    #[error("{what}: {why}")]
    Format {
        /// Which file or part.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A tensor that the network needs is missing or has another shape.
    #[error("tensor {name}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Shape the network needs; empty if any.
        expected: Vec<i64>,
        /// Shape found; empty if the tensor is missing.
        found: Vec<i64>,
    },
    /// libtorch reported an error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

impl NetError {
    /// A [`NetError::Format`].
    pub fn format(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Format { what: what.into(), why: why.into() }
    }
}
