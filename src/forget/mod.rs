//! Unlearning: Fisher importance and dampening.
pub mod logprobs;
