"""The exceptions that abjure raises, all before anything has been written."""

from __future__ import annotations


class AbjureError(Exception):
    """Base class of every error that abjure raises on purpose."""


class ShapeError(AbjureError, ValueError):
    """A dimension, rank or length does not fit."""


class DTypeError(AbjureError, TypeError):
    """An element type, or a type of object, that the function does not take."""


class LayoutError(AbjureError, ValueError):
    """Memory that cannot be used as asked: read-only, overlapping, misaligned or strided beyond rows."""


class DeviceError(AbjureError, ValueError):
    """An array on a device that the function does not compute on."""


class ArgumentError(AbjureError, ValueError):
    """A number or option outside its domain."""


class NonFiniteError(AbjureError, ValueError):
    """A NaN or infinity where it would poison the result."""


class DegenerateError(AbjureError, ValueError):
    """Input from which the quantity asked for cannot be estimated."""


class CheckpointError(AbjureError, ValueError):
    """A checkpoint that is damaged, inconsistent or of the wrong kind, or a file of it that cannot be used."""
