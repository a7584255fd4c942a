//! Linear algebra the wings share.

pub mod orthonormal;

pub use orthonormal::{Orthonormal, orthonormalize};
