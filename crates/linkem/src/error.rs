//! Errors of link descriptions.

/// What is wrong with a link's description.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{key}: {why}")]
pub struct LinkError {
    /// Which key.
    pub key: String,
    /// What is wrong and what to do.
    pub why: String,
}

impl LinkError {
    /// An error about `key`.
    pub fn new(key: impl Into<String>, why: impl Into<String>) -> Self {
        Self { key: key.into(), why: why.into() }
    }
}
