"""Accumulators kept apart by the labels of their data, so that one owner's part can be taken out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from ._files import write_atomically
from ._policy import label_set
from .errors import ArgumentError

Key = frozenset[str]
T = TypeVar("T")


def key_order(key: Key) -> tuple[str, ...]:
    """Sets of labels in an order that does not depend on which others there are."""
    return tuple(sorted(key))


class Labelled(Generic[T]):
    """One accumulator for each set of labels that data came with.

    What is asked for is made by merging parts in the order of their labels, never in that of their arrival: so the
    result without a label is, bit for bit, that of a run which never saw the label's data. Nothing mixes two parts
    before it is asked for.
    """

    #: Written into saved directories.
    _kind = ""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        #: Parts, or the files they are in.
        self._parts: dict[Key, T | Path] = {}

    @property
    def labels(self) -> list[str]:
        """All labels seen, sorted."""
        return sorted(frozenset().union(*self._parts)) if self._parts else []

    @property
    def keys(self) -> list[Key]:
        """The sets of labels that data came with, sorted."""
        return sorted(self._parts, key=key_order)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, label: object) -> bool:
        return any(label in key for key in self._parts)

    def _load(self, path: Path) -> T:
        raise NotImplementedError

    def _save(self, part: T, path: Path) -> None:
        raise NotImplementedError

    def _part(self, key: Key) -> T:
        found = self._parts[key]
        if isinstance(found, Path):
            found = self._parts[key] = self._load(found)
        return found

    def _changed(self, key: Key) -> None:
        """Called before the part of ``key`` changes or goes."""

    @contextmanager
    def _adding(self, labels: Any) -> Iterator[T]:
        """The part for data with these labels; a new one is kept only where the block ends without an error."""
        key = label_set(labels)
        known = key in self._parts
        part = self._part(key) if known else self._make()
        yield part
        self._changed(key)
        self._parts[key] = part

    def _with(self, labels: Any) -> list[Key]:
        """Keys that hold one of the labels, all of which must be known."""
        wanted = label_set(labels)
        if unknown := sorted(wanted - set(self.labels)):
            raise ArgumentError(
                f"label: expected labels seen, {', '.join(self.labels) or 'none yet'}, got {unknown[0]!r}"
            )
        return [key for key in self.keys if key & wanted]

    def _merged(self, keys: Iterable[Key]) -> T:
        total: Any = self._make()
        for key in sorted(keys, key=key_order):
            total.merge(self._part(key))
        return total  # type: ignore[no-any-return]

    def total(self) -> T:
        """Everything, merged; empty where nothing was seen."""
        return self._merged(self._parts)

    def forget_set(self, label: Any) -> T:
        """What was seen with the label, or one of several: the forget set for dampening. A copy.

        Raises:
            ArgumentError: a label that was never seen.
        """
        return self._merged(self._with(label))

    def without(self, label: Any) -> T:
        """What a run has that never saw data of the label, or of several, bit for bit; nothing here changes.

        Data that carries another label beside it is left out too. Empty where nothing else was seen.

        Raises:
            ArgumentError: a label that was never seen.
        """
        gone = set(self._with(label))
        return self._merged(key for key in self._parts if key not in gone)

    def remove(self, label: Any) -> None:
        """Drops what was seen with the label, for good; afterwards this object is that of a run which never saw it.

        Raises:
            ArgumentError: a label that was never seen.
        """
        for key in self._with(label):
            self._changed(key)
            del self._parts[key]

    def merge(self, other: Labelled[T]) -> Labelled[T]:
        """Adds what another one has seen, part by part; returns this object.

        Raises:
            As the accumulators' ``merge``; parts before the one that does not fit have been added then.
        """
        for key in other.keys:
            with self._adding(key) as part:
                part.merge(other._part(key))  # type: ignore[attr-defined]
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a directory: a file for each part and ``labels.json``, which is written last.

        Raises:
            ArgumentError: the directory holds one already, or cannot be written.
        """
        folder = Path(path)
        if (folder / "labels.json").exists():
            raise ArgumentError(f"path: expected a new directory, got {os.fspath(path)!r}, which holds labelled parts")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ArgumentError(
                f"path: expected a directory to write, got {os.fspath(path)!r} ({err.strerror})"
            ) from err
        listed = []
        for i, key in enumerate(self.keys):
            name = f"part-{i:05d}.safetensors"
            self._save(self._part(key), folder / name)
            listed.append({"labels": list(key_order(key)), "file": name})
        content = {"format": f"abjure.labelled.{self._kind}.1", "parts": listed, **self._facts(folder)}
        write_atomically(folder / "labels.json", (json.dumps(content, indent=1) + "\n").encode())

    def _facts(self, folder: Path) -> dict[str, Any]:
        """More to write, and to note."""
        return {}

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[Key, Path]]:
        folder = Path(path)
        try:
            found = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
            parts = {frozenset(map(str, p["labels"])): folder / Path(p["file"]).name for p in found["parts"]}
            wrong = found["format"] != f"abjure.labelled.{cls._kind}.1"
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ArgumentError(
                f"path: expected a directory with labels.json, got {os.fspath(path)!r} ({err})"
            ) from err
        if wrong:
            raise ArgumentError(f"path: expected labelled parts of kind {cls._kind!r}, got format {found['format']!r}")
        if lacking := [p.name for p in parts.values() if not p.is_file()]:
            raise ArgumentError(f"path: expected the files of labels.json, got no {lacking[0]!r}")
        return found, parts

    def __repr__(self) -> str:
        shown = ", ".join(self.labels[:5]) + (", …" if len(self.labels) > 5 else "")
        return f"{type(self).__name__}({len(self._parts)} parts, labels: {shown or 'none'})"
