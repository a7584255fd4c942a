"""Contrasts kept apart by the labels of their prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .._interop import integers
from .._labelled import Labelled
from ..errors import ArgumentError, ShapeError
from .contrast import Contrast
from .directions import _width

__all__ = ["LabelledContrast"]


class LabelledContrast(Labelled[Contrast]):
    """A :class:`Contrast` for each owner (or set of labels) of the prompts, merged when asked for.

    ``without(label)`` is the contrast of a run that never saw the label's prompts, to the bit: parts are merged in the
    order of their labels. Its cost is a merge of the other parts, d numbers each (d × d with ``covariance=True``).

    Args:
        covariance, options: as in :class:`Contrast`; a reservoir is refused, since samples of one seed do not merge.

    Raises:
        ArgumentError: an option of :class:`Contrast` that does not exist or is out of range, or a reservoir.
    """

    _kind = "contrast"

    def __init__(self, covariance: bool = False, **options: Any) -> None:
        if options.get("reservoir") is not None:
            raise ArgumentError("reservoir: expected None, since the samples of several owners do not merge")
        self._options: dict[str, Any] = {"covariance": covariance, **options}
        try:
            Contrast(**self._options)
        except TypeError as err:
            raise ArgumentError(f"options: expected those of Contrast ({err})") from None
        super().__init__(lambda: Contrast(**self._options))

    def update(self, x: Any, label: Any, owner: Any) -> LabelledContrast:
        """Adds activations.

        Args:
            x, label: as :meth:`Contrast.update`: rows ``(..., d)`` and their class, 0 or 1.
            owner: the labels of all rows (one, or a set), or a list with one (or a set) for each row.

        Raises:
            As :meth:`Contrast.update`; ShapeError: not one owner per row. With owners by row, those before the one that
            does not fit have been added then.
        """
        if isinstance(owner, (str, frozenset, set, tuple)):
            with self._adding(owner) as part:
                part.update(x, label)
            return self
        width = _width(x)
        rows = x.reshape(-1, width) if hasattr(x, "reshape") else np.asarray(x).reshape(-1, width)
        owners = [frozenset([o]) if isinstance(o, str) else frozenset(o) for o in owner]
        if len(owners) != len(rows):
            raise ShapeError(f"owner: expected {len(rows)} owners, one per row, got {len(owners)}")
        classes = integers(label, "label").reshape(np.shape(label))
        flat = np.full(len(rows), classes) if classes.ndim == 0 else classes.reshape(-1)
        if len(flat) != len(rows):
            raise ShapeError(f"label: expected {len(rows)} labels, one per row, got {len(flat)}")
        for key in dict.fromkeys(owners):
            at = [i for i, o in enumerate(owners) if o == key]
            with self._adding(key) as part:
                part.update(rows[at], flat[at])
        return self

    def _load(self, path: Path) -> Contrast:
        return Contrast.load(path)

    def _save(self, part: Contrast, path: Path) -> None:
        part.save(path)

    def _facts(self, folder: Path) -> dict[str, Any]:
        return {"options": self._options}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LabelledContrast:
        """Reads what :meth:`save` wrote; parts are read when they are needed.

        Raises:
            ArgumentError: the directory cannot be read or is of another kind.
        """
        found, parts = cls._read(path)
        options = found.get("options")
        if not isinstance(options, dict):
            raise ArgumentError("path: expected the options of the contrasts in labels.json")
        new = cls(**options)
        new._parts = dict(parts)
        return new
