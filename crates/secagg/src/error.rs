//! Errors of this crate.

/// Why an input was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecAggError {
    /// Something has another size than the round's configuration gives it.
    #[error("{what}: {found} instead of {expected}")]
    Size {
        /// What, with its unit.
        what: &'static str,
        /// By configuration.
        expected: usize,
        /// As found.
        found: usize,
    },
    /// Bits after the last coordinate are not zero.
    #[error("the bits after the last coordinate are not zero")]
    Padding,
    /// A vector holds NaN or an infinity.
    #[error("coordinate {0} is not finite")]
    NotFinite(usize),
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// A call out of turn.
    #[error("the block is not there yet: {0}")]
    Order(&'static str),
    /// A signature, a credential or an envelope is not what it claims to be.
    #[error("{0}")]
    Authentication(&'static str),
    /// A neighbour did not answer.
    #[error("the exchange with the other parties failed: {0}")]
    Link(String),
}

/// Checks a size.
pub(crate) fn expect_size(what: &'static str, expected: usize, found: usize) -> Result<(), SecAggError> {
    if expected == found { Ok(()) } else { Err(SecAggError::Size { what, expected, found }) }
}
