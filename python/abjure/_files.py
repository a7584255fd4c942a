"""Writing files that are complete or not there, and reading them back."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ArgumentError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes ``content`` to ``path``; what stood there stays until the new file is complete.

    Raises:
        ArgumentError: the path cannot be written; nothing is left behind.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A file to write inside the block, which takes the place of ``path`` where the block ends without an error.

    Raises:
        ArgumentError: the path cannot be written; nothing is left behind.
    """
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as err:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(err, OSError):
            found = f"{os.fspath(path)!r} ({err.strerror or err})"
            raise ArgumentError(f"path: expected a writable file path, got {found}") from err
        raise


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], kind: str) -> Iterator[Any]:
    """An open safetensors file, NumPy's side; what cannot be read inside is not a saved ``kind``.

    Raises:
        ArgumentError: there is no such file, or an entry is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ArgumentError(f"path: expected a readable file, got {os.fspath(path)!r}")
    try:
        with safe_open(os.fspath(path), "numpy") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as err:
        raise ArgumentError(f"path: {os.fspath(path)!r} is not a saved {kind}") from err
