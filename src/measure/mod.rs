//! Measuring: whether a change of refusals, memory or training data worked.

pub mod matching;
pub mod text;
