//! Linear algebra the wings share: orthonormal bases and matrix products.

pub mod gemm;
pub mod orthonormal;

pub use orthonormal::{Orthonormal, orthonormalize};

/// Inner product, term by term in order.
pub fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += by · v`.
pub fn add_scaled(to: &mut [f64], by: f64, v: &[f64]) {
    to.iter_mut().zip(v).for_each(|(t, v)| *t += by * v);
}
