"""Publish data that a model cannot learn from."""
