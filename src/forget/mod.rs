//! Unlearning: Fisher importance and dampening.
