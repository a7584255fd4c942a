//! Protecting data: Bayes error of kernel density posteriors, its gradient, and the ascent along it.
//!
//! For queries x_i and labelled centres z_j, `l_ic = log Σ_{j in class c} exp(-‖x_i - z_j‖² / 2h²)` and the posterior
//! of row i is the softmax over classes of `l_ic + log π_c - log m_ic`, m_ic the number of centres that count. The
//! objective is the mean over queries of a function of the posterior. Two engines evaluate it and its gradient:
//! [`cross`] for queries and centres that differ, [`pairs`] for one set of points that plays both parts, which shares
//! every distance between the two. Neither ever holds an n × n matrix.

pub mod ascent;
pub mod bandwidth;
pub mod cross;
pub mod neighbours;
pub mod noise;
mod objective;
pub mod pairs;
mod points;
pub mod project;
pub mod recourse;
mod spare;
pub mod subsample;
mod tile;
pub mod tree;
pub mod truncated;

pub use objective::{LeaveOneOut, Objective, RowReading, Singleton, Spec};
pub use points::{Points, Sorted, mean};
pub use spare::Spare;
pub use tile::Scalar;

/// Called once per tile; an error ends the evaluation.
pub type Tick<'a> = dyn Fn() -> crate::Result<()> + Sync + 'a;
