//! Find, watch, remove, add or gate refusal: directions in activations and weights, biases while decoding.

pub mod decoding;
pub mod directions;
