"""Find, watch, remove, add or gate refusal in a language model."""
