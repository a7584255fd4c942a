"""Unlearn a subset or a class of the training data."""
