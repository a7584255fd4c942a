//! Unlearning: Fisher importance, dampening, and the log-probabilities that unlearning losses are made of.

pub mod dampen;
pub mod fisher;
pub mod logprobs;
pub mod permitted;
pub mod ratio;
