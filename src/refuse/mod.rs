//! Find, watch, remove, add or gate refusal: directions in activations and weights, routed experts, biases while decoding.

pub mod decoding;
pub mod directions;
pub mod experts;
