//! Measuring: whether a change of refusals, memory or training data worked, with error bars.

pub mod cross;
pub mod decimal;
pub mod hsic;
pub mod matching;
pub mod overlap;
pub mod resample;
pub mod text;
