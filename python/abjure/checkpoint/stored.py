"""The files of a checkpoint, checked, and what abjure keeps beside them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native
from ..errors import ArgumentError, CheckpointError
from .layout import TensorInfo

FORMAT = "abjure.checkpoint.1"
PROVENANCE = "abjure.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
#: Folders of version control and download caches: no part of a checkpoint.
_SKIPPED = (".git", ".cache")
_JOURNAL, _PARTIAL = ".abjure-journal", ".abjure-partial"
#: Ending of a shard while it is changed in place, so that nothing loads it.
EDITING = ".abjure-editing"
_LARGEST_JSON = 100_000_000


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
    header: str
    size: int
    tensors: dict[str, Place]
    metadata: dict[str, str]

    @property
    def name(self) -> str:
        return self.path.name

    def patch(self, number: int) -> str:
        """Name of the file that undoes edit ``number``."""
        return patch_name(self.name, number)

    def identity(self) -> list[Any]:
        """What differs once somebody changed the file."""
        found = self.path.stat()
        return [self.name, found.st_size, found.st_mtime_ns, self.header]

    def read(self, name: str) -> Any:
        """A small tensor as float64."""
        place = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(place.begin)
            content = file.read(place.end - place.begin)
        if place.dtype == "BF16":
            wide = np.frombuffer(content, "<u2").astype(np.uint32) << 16
            found = wide.view(np.float32)
        elif place.dtype in ("F64", "F32", "F16"):
            found = np.frombuffer(content, "<f" + str(int(place.dtype[1:]) // 8))
        else:
            raise CheckpointError(f"{self.path}: {name}: expected a float tensor, got {place.dtype}")
        return found.astype(np.float64).reshape(place.shape)


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk: a directory, or one file."""

    path: Path
    directory: Path
    alone: bool
    index: str | None
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to shape and dtype."""
        return {n: TensorInfo(p.shape, p.dtype) for s in self.shards for n, p in s.tensors.items()}

    def shard_of(self, tensor: str) -> Shard:
        return next(s for s in self.shards if tensor in s.tensors)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(s.size for s in self.shards)

    @property
    def provenance_path(self) -> Path:
        return provenance_path(self.path, self.alone)

    def provenance(self) -> dict[str, Any] | None:
        """What abjure wrote about this checkpoint.

        Raises:
            CheckpointError: it cannot be read.
        """
        if not self.provenance_path.is_file():
            return None
        found = read_json(self.provenance_path)
        if found.get("format") != FORMAT or not isinstance(found.get("history"), list):
            raise CheckpointError(f"{self.provenance_path}: is no provenance of format {FORMAT!r}")
        return found

    def carried(self) -> tuple[list[str], list[str]]:
        """Relative names of the other files that belong to a copy, and notes on what does not or is not edited."""
        if self.alone:
            patches = self.directory.glob(f"{self.path.name}.undo-*")
            return sorted(p.name for p in patches), []
        own = {s.name for s in self.shards} | {self.index, PROVENANCE}
        files, notes = [], []
        for path in _walk(self.directory):
            name = path.relative_to(self.directory).as_posix()
            if name in own or name.endswith(EDITING):
                continue
            if path.suffix in _PICKLES:
                notes.append(f"{name}: left behind (a pickle, which would still hold the old weights)")
            elif path.is_symlink() and not _leads_to_blobs_or_stays(path, self.directory):
                notes.append(f"{name}: left behind (a symbolic link that leads out of the checkpoint)")
            elif not path.is_file():
                notes.append(f"{name}: left behind (no regular file)")
            else:
                if path.suffix == ".safetensors":
                    notes.append(f"{name}: carried along as it is (not part of the checkpoint)")
                files.append(name)
        return files, notes


def is_patch(name: str) -> bool:
    """Whether a file name is one that :func:`patch_name` gives."""
    shard, _, number = name.rpartition(".undo-")
    return shard.endswith(".safetensors") and number.isdigit()


def patch_name(shard: str, number: int) -> str:
    return f"{shard}.undo-{number}"


def provenance_path(path: Path, alone: bool) -> Path:
    return path.with_name(f"{path.name}.{PROVENANCE}") if alone else path / PROVENANCE


def beside(path: Path, alone: bool, kind: str) -> Path:
    """The journal of a checkpoint, or where a copy grows."""
    if kind == _JOURNAL and not alone:
        return path / kind
    return path.parent / f".{path.name}{kind}"


def journal_of(path: Path, alone: bool) -> Path:
    return beside(path, alone, _JOURNAL)


def partial_of(path: Path) -> Path:
    return beside(path, True, _PARTIAL)


def _walk(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name in _SKIPPED or path.name == _JOURNAL:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _leads_to_blobs_or_stays(path: Path, directory: Path) -> bool:
    """Hugging Face caches consist of links to a folder of blobs."""
    target, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return target.is_relative_to(home) or target.parent == blobs


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: expected at most {_LARGEST_JSON} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: expected a JSON object ({err})") from err
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def kind_of(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """The checkpoint that a path means, and whether it is a file of its own.

    Raises:
        CheckpointError: there is nothing.
    """
    found = Path(path)
    if found.name.endswith(".safetensors.index.json"):
        return found.parent, False
    if not found.exists() and not found.with_name(found.name + EDITING).exists():
        raise CheckpointError(f"{found}: no such file or directory")
    return found, not found.is_dir()


def opened(path: str | os.PathLike[str]) -> Stored:
    """Opens a checkpoint; every header and the index are checked.

    Raises:
        CheckpointError: it is damaged, inconsistent or of another kind, or an edit in place was interrupted.
    """
    root, alone = kind_of(path)
    if (journal := journal_of(root, alone)).exists():
        raise CheckpointError(
            f"{root}: an edit in place was interrupted; `abjure undo` brings it back ({journal.name})"
        )
    directory, index, shards = _native.checkpoint_open(os.fspath(path))
    config_path = Path(directory) / "config.json"
    return Stored(
        root,
        Path(directory),
        alone,
        index,
        tuple(_shard(Path(directory) / s[0], s) for s in shards),
        read_json(config_path) if config_path.is_file() else {},
    )


def _shard(path: Path, found: Any) -> Shard:
    _, header, size, tensors, metadata = found
    places = {name: Place(dtype, tuple(shape), begin, end) for name, dtype, shape, begin, end in tensors}
    return Shard(path, header, size, places, dict(metadata))


def expect_writable_in_place(stored: Stored) -> None:
    """Raises unless every shard is a file of this checkpoint alone."""
    for shard in stored.shards:
        found = shard.path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_nlink > 1:
            raise CheckpointError(f"{shard.path}: is linked from elsewhere, which an edit in place would change too")


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """What the system complains about becomes a CheckpointError."""
    try:
        yield
    except OSError as err:
        name = err.filename if err.filename is not None else path
        raise CheckpointError(f"{os.fspath(name)}: {err.strerror or err}") from err


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file that is complete, and on the storage device, before it has its name."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def sync_directory(path: Path) -> None:
    """Makes renames in a directory last."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_memory(memory: int | str) -> int:
    """Bytes from a number, or from text such as ``"256M"`` or ``"1.5G"`` (powers of 1024).

    Raises:
        ArgumentError: it is neither, or less than a megabyte.
    """
    found = memory
    if isinstance(memory, str):
        text = memory.strip().upper().removesuffix("IB").removesuffix("B")
        units = {"K": 10, "M": 20, "G": 30, "T": 40}
        shift = units.get(text[-1:], 0)
        try:
            found = int(float(text[:-1] if shift else text) * (1 << shift))
        except (ValueError, OverflowError):
            raise ArgumentError(f"memory: expected bytes, such as '256M', got {memory!r}") from None
    if isinstance(found, bool) or not isinstance(found, int) or not 1 << 20 <= found < 1 << 60:
        raise ArgumentError(f"memory: expected 1M or more, got {memory!r}")
    return found
