"""Arrays to protect that need not fit in memory: memory maps of files, and chunks that are put into one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import _interop
from ..errors import ArgumentError, DTypeError, ShapeError
from .bayes import Array

_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}


def is_bytes(x: Any) -> bool:
    """Whether ``x`` holds uint8 values, which are read as multiples of 1/255."""
    return str(getattr(x, "dtype", "")) in ("uint8", "torch.uint8")


def unit(x: Any) -> Any:
    """Bytes as f32 multiples of 1/255."""
    if _interop.is_torch(x):
        import torch

        return x.to(torch.float32) / 255
    return np.asarray(x).astype(np.float32) / np.float32(255)


def to_bytes(x: Any) -> Any:
    """f32 multiples of 1/255 as bytes."""
    if _interop.is_torch(x):
        import torch

        return (x * 255).round().to(torch.uint8)
    return np.rint(x * np.float32(255)).astype(np.uint8)


def is_path(x: object) -> bool:
    return isinstance(x, (str, os.PathLike))


def is_within(x: Any, directory: Path) -> bool:
    """Whether ``x`` is the memory map of a file in ``directory``."""
    name = getattr(x, "filename", None)
    return name is not None and Path(name).parent == directory


def load_array(x: Any, arg: str, key: str | None = None) -> Any:
    """``x`` itself, or the read-only memory map of the file that it names.

    Args:
        x: an array, or the path of a ``.npy`` or ``.safetensors`` file.
        arg: name in errors.
        key: the tensor of a safetensors file that holds several.

    Raises:
        ArgumentError: no such file, one of another kind, damaged or truncated, or without that tensor.
        DTypeError: values of a type that is not taken.
    """
    if not is_path(x):
        return x
    path = Path(x)
    if not path.is_file():
        raise ArgumentError(f"{arg}: expected a readable file, got {os.fspath(path)!r}")
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as err:
            raise ArgumentError(f"{arg}: {os.fspath(path)!r} is no complete .npy file ({err})") from err
    if path.suffix == ".safetensors":
        return _tensor_map(path, arg, key)
    raise ArgumentError(f"{arg}: expected a .npy or .safetensors file, got {os.fspath(path)!r}")


def _tensor_map(path: Path, arg: str, key: str | None) -> Array:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        names = sorted(name for name in header if name != "__metadata__")
        if key is None and len(names) != 1:
            raise ArgumentError(f"{arg}: {os.fspath(path)!r} holds {names}; name one with key=")
        found = header[names[0] if key is None else key]
        dtype, shape = found["dtype"], tuple(int(n) for n in found["shape"])
        begin, end = (int(o) + 8 + length for o in found["data_offsets"])
    except ArgumentError:
        raise
    except KeyError as err:
        raise ArgumentError(f"{arg}: {os.fspath(path)!r} has no {err}") from err
    except (ValueError, TypeError, AttributeError, OSError) as err:
        raise ArgumentError(f"{arg}: {os.fspath(path)!r} is no safetensors file ({err})") from err
    if dtype not in _SAFETENSORS:
        raise DTypeError(f"{arg}: expected dtype {', '.join(_SAFETENSORS)}, got {dtype}")
    kind = _dtype(_SAFETENSORS[dtype], arg)
    if end - begin != math.prod(shape) * kind.itemsize or end > size:
        raise ArgumentError(f"{arg}: {os.fspath(path)!r} is truncated or its header is wrong")
    if math.prod(shape) == 0:
        return np.empty(shape, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r", offset=begin, shape=shape)


def _dtype(name: str, arg: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as err:
        raise DTypeError(f"{arg}: bfloat16 files need the package ml_dtypes") from err
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def spool(chunks: Iterable[Any], path: str | os.PathLike[str]) -> tuple[Array, Array | None]:
    """The rows of ``chunks``, put one after the other into the file ``path``, as its memory map; and their labels.

    Args:
        chunks: arrays ``(b, ...)`` of one dtype and shape of a row, or pairs of one and its ``(b,)`` labels.
        path: a file to write, without a header.

    Raises:
        ShapeError, DTypeError: a chunk that differs from the first; no chunks.
        ArgumentError: the file cannot be written.
    """
    labels: list[Array] = []
    first: Array | None = None
    rows = 0
    try:
        with open(path, "wb") as file:
            for at, chunk in enumerate(chunks):
                pair = isinstance(chunk, tuple) and len(chunk) == 2
                values = _interop.source(chunk[0] if pair else chunk, f"chunk {at}")
                if _interop.is_torch(values):
                    values = values.numpy()
                values = values if isinstance(values, np.ndarray) else np.from_dlpack(values)
                if values.ndim < 2 or len(values) == 0:
                    raise ShapeError(f"x: expected chunks of rows, got shape {values.shape} for chunk {at}")
                first = values[:0] if first is None else first
                if values.shape[1:] != first.shape[1:] or (at > 0 and pair != bool(labels)):
                    raise ShapeError(
                        f"x: expected chunks like the first, rows of shape {first.shape[1:]}, "
                        f"got {values.shape} for chunk {at}"
                    )
                if values.dtype != first.dtype:
                    raise DTypeError(f"x: expected chunks of dtype {first.dtype}, got {values.dtype} for chunk {at}")
                if pair:
                    found = _interop.integers(chunk[1], f"labels of chunk {at}")
                    if found.shape != (len(values),):
                        raise ShapeError(f"y: expected {len(values)} labels for chunk {at}, got shape {found.shape}")
                    labels.append(found)
                np.ascontiguousarray(values).tofile(file)
                rows += len(values)
    except OSError as err:
        raise ArgumentError(f"out: {os.fspath(path)!r} cannot be written ({err.strerror or err})") from err
    if first is None:
        raise ShapeError("x: expected at least one chunk, got none")
    array = np.memmap(path, dtype=first.dtype, mode="r", shape=(rows, *first.shape[1:]))
    return array, np.concatenate(labels) if labels else None
