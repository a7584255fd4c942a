"""Thin glue to the libraries people already use; the only place that chooses a device path."""
