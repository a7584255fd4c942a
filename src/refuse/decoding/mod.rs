//! Token-wise logit bias, gates and phrase automata while decoding.
