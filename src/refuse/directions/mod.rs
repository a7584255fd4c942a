//! Directions: estimate, project, ablate, steer; activations and weights.
