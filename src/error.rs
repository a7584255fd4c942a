//! The one error type of the crate. `python/errors.rs` maps each variant to one Python exception.

/// What can go wrong in a kernel. Every message names the argument, what was expected and what was found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A dimension, rank or length does not fit.
    #[error("{arg}: expected {expected}, got {found}")]
    Shape {
        arg: &'static str,
        expected: String,
        found: String,
    },
    /// An element type that the kernel does not take.
    #[error("{arg}: expected dtype {expected}, got {found}")]
    DType {
        arg: &'static str,
        expected: String,
        found: String,
    },
    /// Memory that cannot be used as asked: read-only, overlapping, misaligned, on another device.
    #[error("{arg}: {reason}")]
    Layout { arg: &'static str, reason: String },
    /// A number outside its domain (a negative alpha, an epsilon of zero).
    #[error("{arg}: expected {expected}, got {found}")]
    Value {
        arg: &'static str,
        expected: String,
        found: String,
    },
    /// A NaN or infinity where it would poison the result.
    #[error("{arg}: non-finite value {found} at flat index {index}")]
    NonFinite {
        arg: &'static str,
        index: usize,
        found: f64,
    },
    /// Input from which the quantity asked for cannot be estimated.
    #[error("{arg}: {reason}")]
    Degenerate { arg: &'static str, reason: String },
    /// A checkpoint that is damaged, inconsistent or of the wrong kind, or a file of it that cannot be read or written.
    #[error("{path}: {reason}")]
    Checkpoint { path: String, reason: String },
    /// The caller cancelled a long computation.
    #[error("interrupted")]
    Interrupted,
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn shape(arg: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Shape {
            arg,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    pub fn value(arg: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Value {
            arg,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    pub fn layout(arg: &'static str, reason: impl ToString) -> Self {
        Self::Layout {
            arg,
            reason: reason.to_string(),
        }
    }

    pub fn checkpoint(path: impl AsRef<std::path::Path>, reason: impl ToString) -> Self {
        Self::Checkpoint {
            path: path.as_ref().display().to_string(),
            reason: reason.to_string(),
        }
    }

    pub fn degenerate(arg: &'static str, reason: impl ToString) -> Self {
        Self::Degenerate {
            arg,
            reason: reason.to_string(),
        }
    }
}
