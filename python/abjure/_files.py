"""Writing files that are complete or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from .errors import ArgumentError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes ``content`` to ``path``; what stood there stays until the new file is complete.

    Raises:
        ArgumentError: the path cannot be written; nothing is left behind.
    """
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
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
            found = f"{os.fspath(path)!r} ({err.strerror})"
            raise ArgumentError(f"path: expected a writable file path, got {found}") from err
        raise
