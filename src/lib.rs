//! abjure: kernels to study and change what a trained model refuses, forgets and can learn.
//!
//! The foundations ([`element`], [`simd`], [`par`], [`view`], [`moments`], [`linalg`], [`random`],
//! [`cancel`], [`error`]) know nothing of the wings ([`forget`], [`refuse`], [`protect`], [`measure`]),
//! and the wings know nothing of each other, except that all may use [`measure`]. [`checkpoint`] stands
//! above them and runs their kernels over files. Python is named only
//! in `python/`, behind the feature of that name.

pub mod cancel;
pub mod checkpoint;
pub mod element;
pub mod error;
pub mod forget;
pub mod linalg;
pub mod measure;
pub mod moments;
pub mod par;
pub mod protect;
pub mod random;
pub mod refuse;
pub mod simd;
pub mod stream;
pub mod view;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};
