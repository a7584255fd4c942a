"""Safetensors headers and indices, read and checked before anything else looks at the files."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LONGEST = 100_000_000
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in its file: dtype as safetensors spells it, shape, first byte, one past the last."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose header was checked."""

    path: Path
    tensors: dict[str, Place]


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk: a directory, or one file."""

    path: Path
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]


def opened(path: str | os.PathLike[str]) -> Stored:
    """Opens a checkpoint; every header and the index are checked.

    Raises:
        ArgumentError: it is damaged, inconsistent or of another kind; pickles are refused.
    """
    given = Path(path)
    try:
        return _opened(given)
    except OSError as err:
        raise ArgumentError(f"path: {os.fspath(err.filename or given)!r}: {err.strerror or err}") from err


def _opened(given: Path) -> Stored:
    directory = given if given.is_dir() else given.parent
    names = sorted(p.name for p in directory.iterdir())
    indices = [n for n in names if n.endswith(_INDEX)]
    files = [n for n in names if n.endswith(".safetensors")]
    if not given.is_dir():
        indices = [given.name] if given.name.endswith(_INDEX) else []
        files = [given.name]
    if len(indices) > 1 or (not indices and len(files) > 1):
        raise _error(given, f"expected one file or one index, got {len(files)} files and {len(indices)} indices")
    if not indices:
        if not files:
            pickle = next((n for n in names if n.endswith(_PICKLES)), None)
            what = f", only pickles ({pickle}), which are refused and never loaded" if pickle else ""
            raise _error(given, f"holds no safetensors file{what}")
        shards: tuple[Shard, ...] = (_shard(directory, files[0], {}),)
    else:
        places = _index(directory / indices[0])
        wanted: dict[str, dict[str, str]] = {}
        for tensor, file in places.items():
            wanted.setdefault(file, {})[tensor] = file
        shards = tuple(_shard(directory, file, tensors) for file, tensors in wanted.items())
    config = directory / "config.json"
    return Stored(given, shards, _json(config) if config.is_file() else {})


def _error(path: Path, what: str) -> ArgumentError:
    return ArgumentError(f"path: {os.fspath(path)!r}: {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def _json(path: Path, content: bytes | None = None) -> dict[str, Any]:
    if content is None:
        if path.stat().st_size > _LONGEST:
            raise _error(path, f"expected at most {_LONGEST} bytes")
        content = path.read_bytes()
    try:
        found = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as err:
        raise _error(path, f"expected JSON ({err})") from None
    if not isinstance(found, dict):
        raise _error(path, f"expected a JSON object, got {type(found).__name__}")
    return found


def _index(path: Path) -> dict[str, str]:
    places = _json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise _error(path, "expected a weight_map of tensors to files")
    for tensor, file in places.items():
        plain = isinstance(file, str) and not file.startswith(".") and not set(file) & set("/\\\0:")
        if not plain or not file.endswith(".safetensors"):
            raise _error(path, f"{tensor}: expected a plain file name ending in .safetensors, got {file!r}")
    return places


def _shard(directory: Path, name: str, expected: Mapping[str, str]) -> Shard:
    path = directory / name
    if path.is_symlink():
        home, target = directory.resolve(), path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if target.parent not in (home, blobs):
            raise _error(path, "is a symbolic link that leads out of the checkpoint")
    shard = Shard(path, _header(path))
    if expected and shard.tensors.keys() != expected.keys():
        odd = min(shard.tensors.keys() ^ expected.keys())
        raise _error(path, f"{odd}: index and file differ in whether it is there")
    return shard


def _header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start[:1] == b"\x80" or start[:2] == b"PK":
            raise _error(path, "is a pickle, which is refused and never loaded")
        if len(start) < 8:
            raise _error(path, f"expected a safetensors file, got {len(start)} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LONGEST):
            raise _error(path, f"its header says {length} bytes, more than there are")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise _error(path, f"{name}: expected dtype, shape and two offsets") from None
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or dtype not in _BITS:
            raise _error(path, f"{name}: dtype {dtype!r}, shape {shape!r} or offsets are none")
        if begin > end or (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise _error(path, f"{name}: {end - begin} bytes for {dtype} {tuple(shape)}")
        if 8 + length + end > size:
            raise _error(path, f"{name}: ends beyond the end of the file (truncated?)")
        found[name] = Place(dtype, tuple(shape), 8 + length + begin, 8 + length + end)
    spans = sorted((p.begin, p.end, name) for name, p in found.items())
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin != end:
            raise _error(path, f"{name} and {other} overlap or leave a gap")
    if max((p.end for p in found.values()), default=8 + length) != size:
        raise _error(path, "its tensors do not fill the file")
    return found
