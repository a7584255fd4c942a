//! Unlearning: Fisher importance and dampening.

pub mod dampen;
pub mod fisher;
