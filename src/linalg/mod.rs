//! Linear algebra the wings share: orthonormal bases and matrix products.

pub mod gemm;
pub mod orthonormal;

pub use orthonormal::{Orthonormal, orthonormalize};
