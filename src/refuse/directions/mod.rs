//! Directions: project, ablate, steer; activations and weights.

pub mod edit;
pub mod probe;
pub mod weights;

pub use edit::Edit;
pub use weights::{ByTile, Factors, NormPreserving, check_finite, orthogonalize_columns};
