"""Exact retrieval that returns only what a user may see, and cannot tell what the others are."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _native
from .._files import replacing
from .._interop import is_torch, source
from .._policy import Policy, label_codes
from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError

__all__ = ["Found", "PermittedIndex"]

_FORMAT = "abjure.permitted_index.1"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
#: safetensors' own limit.
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class Found:
    """What a search returned, best first; ties in the order of records.

    Attributes:
        rows: ``(queries, k)`` int64, places of the records in the index; fewer columns where fewer are permitted.
        scores: ``(queries, k)`` float64.
        ids: the records' names, where the index has names; else the rows.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    ids: list[list[Any]]

    def _repr_html_(self) -> str:
        head = "<tr><th>query</th><th>rank</th><th>record</th><th>score</th></tr>"
        body = "".join(
            f"<tr><td>{q}</td><td>{r + 1}</td><td>{html.escape(str(name))}</td><td>{score:.4f}</td></tr>"
            for q, (names, scores) in enumerate(zip(self.ids, self.scores, strict=True))
            for r, (name, score) in enumerate(zip(names, scores, strict=True))
        )
        return f"<table>{head}{body}</table>"


class PermittedIndex:
    """Exact top-k retrieval over embeddings, filtered by a :class:`Policy` inside the scan.

    The scan reads the permitted records and no others. So every result of a user is the same to the bit whatever the
    forbidden records hold, NaN included; adding or removing forbidden records changes nothing but the numbers of
    rows. Its work depends on the permitted records alone. What a stop watch could still tell is where permitted records
    lie in memory: the processor may fetch, without using it, up to 4 KB that follows a permitted record.

    Scores are products in the arithmetic of the embeddings (float32 for half types), each from its own record and query
    in a fixed order: off by at most ``24 u Σ|xᵢ qᵢ|`` (:func:`abjure.refuse.project` has the same bound), and the same
    bits for every number of threads and instruction set.

    Args:
        embeddings: ``(n, d)`` array or CPU tensor of any of the four dtypes; kept, not copied.
        labels: for each record a label or several.
        policy: who may see what.
        ids: names of the records, strings or whole numbers.
        metric: ``"dot"``, or ``"cosine"``, which keeps the inverse length of each record (0 for a record of zeros).

    Raises:
        ShapeError, DTypeError: arrays that do not fit. ArgumentError: an unknown label (its record is named) or metric.
        NonFiniteError: an embedding is NaN or infinite.
    """

    def __init__(
        self,
        embeddings: Any,
        labels: Iterable[Any],
        policy: Policy,
        *,
        ids: Sequence[Any] | None = None,
        metric: Literal["dot", "cosine"] = "dot",
    ) -> None:
        if not isinstance(policy, Policy):
            raise DTypeError(f"policy: expected a Policy, got {type(policy).__name__}")
        if metric not in ("dot", "cosine"):
            raise ArgumentError(f"metric: expected 'dot' or 'cosine', got {metric!r}")
        rows = source(embeddings, "embeddings")
        shape = tuple(getattr(rows, "shape", ()))
        if len(shape) != 2 or 0 in shape:
            raise ShapeError(f"embeddings: expected shape (n, d) with n and d above 0, got {shape}")
        codes, sets = label_codes(labels, policy)
        if len(codes) != shape[0]:
            raise ShapeError(f"labels: expected {shape[0]} records' labels, got {len(codes)}")
        inverse = _native.inverse_lengths(rows)  # also finds what is not finite
        self._take(rows, codes, sets, policy, metric, inverse if metric == "cosine" else None, _names(ids, shape[0]))

    def _take(
        self, rows: Any, codes: Any, sets: list[frozenset[str]], policy: Policy, metric: str, inverse: Any, ids: Any
    ) -> None:
        self._rows, self._codes, self._sets, self._policy = rows, codes, sets, policy
        self._metric, self._inverse, self._ids = metric, inverse, ids
        self._seen: dict[frozenset[int], npt.NDArray[np.uint32]] = {}

    @property
    def policy(self) -> Policy:
        """Who may see what."""
        return self._policy

    @property
    def metric(self) -> str:
        """``"dot"`` or ``"cosine"``."""
        return self._metric

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def width(self) -> int:
        """Values of an embedding."""
        return int(self._rows.shape[1])

    def permitted(self, user: str) -> npt.NDArray[np.uint32]:
        """Rows that a user may see, ascending; kept for the next search.

        Raises:
            ArgumentError: an unknown user.
        """
        self._policy.rights(user)
        allowed = frozenset(i for i, labels in enumerate(self._sets) if self._policy.may_see(user, labels))
        if allowed not in self._seen:
            mask = np.zeros(len(self._sets), dtype=bool)
            mask[list(allowed)] = True
            self._seen[allowed] = np.flatnonzero(mask[self._codes]).astype(np.uint32)
        return self._seen[allowed]

    def search(self, queries: Any, user: str, k: int = 10) -> Found:
        """The ``k`` permitted records with the highest scores for each query.

        Args:
            queries: ``(d,)`` or ``(m, d)``, finite; rounded to the arithmetic of the embeddings.
            user: one of the policy's. A user without rights finds nothing: ``(m, 0)``.
            k: at least 1.

        Raises:
            ArgumentError: an unknown user, or ``k`` below 1. ShapeError, DTypeError: queries that do not fit.
            NonFiniteError: a query is not finite, or the score of a permitted record overflows.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ArgumentError(f"k: expected 1 or more, got {k!r}")
        try:
            asked = np.asarray(queries.detach().double() if is_torch(queries) else queries, dtype=np.float64)
        except (TypeError, ValueError):
            raise DTypeError(f"queries: expected numbers, got {type(queries).__name__}") from None
        single = asked[None] if asked.ndim == 1 else asked
        if single.ndim != 2 or single.shape[1] != self.width:
            raise ShapeError(f"queries: expected shape (m, {self.width}), got {asked.shape}")
        if not np.isfinite(single).all():
            raise NonFiniteError("queries: expected finite values, got NaN or infinity")
        m = len(single)
        if self._metric == "cosine":
            length = np.linalg.norm(single, axis=1, keepdims=True)
            single = single / np.where(length > 0, length, 1.0)
        rows = self.permitted(user)
        if not m or not len(rows):
            return Found(np.zeros((m, 0), dtype=np.int64), np.zeros((m, 0)), [[] for _ in range(m)])
        flat = np.ascontiguousarray(single).reshape(-1)
        places, scores = _native.permitted_top_k(self._rows, flat, rows, int(k), self._inverse)
        places, scores = places.reshape(m, -1), scores.reshape(m, -1)
        names = places.tolist()
        if self._ids is not None:
            names = [[self._ids[i] for i in row] for row in names]
        return Found(places, scores, names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file: embeddings, labels, policy, names. It appears complete or not at all.

        Raises:
            ArgumentError: the path cannot be written.
        """
        metadata = {
            "format": _FORMAT,
            "index": json.dumps(
                {
                    "labels": [sorted(s) for s in self._sets],
                    "policy": self._policy.to_dict(),
                    "metric": self._metric,
                    "ids": self._ids,
                }
            ),
        }
        arrays: dict[str, Any] = {"embeddings": self._rows, "codes": self._codes}
        arrays |= {} if self._inverse is None else {"inverse": self._inverse}
        with replacing(path) as temporary:
            if is_torch(self._rows):
                import torch
                from safetensors.torch import save_file as save_tensors

                tensors = {n: a if is_torch(a) else torch.from_numpy(np.array(a)) for n, a in arrays.items()}
                save_tensors({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata)
            else:
                from safetensors.numpy import save_file

                save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermittedIndex:
        """Opens what :meth:`save` wrote by memory map: embeddings are read from the file where a search needs them.

        Forbidden records are not read, not even to see whether they are finite.

        Raises:
            ArgumentError: the file cannot be read, is damaged, or is no index.
        """
        header, start = _header(path)
        try:
            metadata = header["__metadata__"]
            if metadata.get("format") != _FORMAT:
                raise ArgumentError(f"path: expected a file of format {_FORMAT!r}, got {metadata.get('format')!r}")
            facts = json.loads(metadata["index"])
            sets = [frozenset(map(str, s)) for s in facts["labels"]]
            policy = Policy.from_dict(facts["policy"])
            rows = _mapped(path, header["embeddings"], start)
            codes = np.array(_mapped(path, header["codes"], start, np.int32))
            inverse = _mapped(path, header["inverse"], start) if "inverse" in header else None
            metric = facts["metric"]
            ids = _names(facts["ids"], len(rows))
        except (KeyError, TypeError, ValueError, OSError) as err:
            if isinstance(err, ArgumentError):
                raise
            raise ArgumentError(f"path: {os.fspath(path)!r} is not a saved PermittedIndex ({err})") from err
        for labels in sets:
            policy.check(labels)
        fits = rows.ndim == 2 and codes.shape == (len(rows),) and (inverse is None or inverse.shape == codes.shape)
        inside = not len(codes) or (codes.min() >= 0 and codes.max() < len(sets))
        if not (fits and inside and metric in ("dot", "cosine") and (metric == "cosine") == (inverse is not None)):
            raise ArgumentError(
                f"path: {os.fspath(path)!r} is not a saved PermittedIndex (its parts do not fit together)"
            )
        new = cls.__new__(cls)
        new._take(rows, codes, sets, policy, metric, None if inverse is None else np.asarray(inverse), ids)
        return new

    def __repr__(self) -> str:
        kinds = len(self._sets)
        return f"PermittedIndex({len(self):,} records of width {self.width}, {kinds} kinds of labels, {self._metric})"


def _names(ids: Any, n: int) -> list[Any] | None:
    if ids is None:
        return None
    found = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    if len(found) != n:
        raise ShapeError(f"ids: expected {n} names, one per record, got {len(found)}")
    bad = next((i for i, v in enumerate(found) if isinstance(v, bool) or not isinstance(v, (str, int))), None)
    if bad is not None:
        raise DTypeError(f"ids: expected strings or whole numbers, got {type(found[bad]).__name__} at index {bad}")
    return found


def _header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and where its data begin."""
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MOST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as err:
        raise ArgumentError(f"path: expected a readable PermittedIndex, got {os.fspath(path)!r} ({err})") from err
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ArgumentError(f"path: {os.fspath(path)!r} is not a saved PermittedIndex")
    return header, 8 + length


def _mapped(path: str | os.PathLike[str], entry: Any, start: int, dtype: Any = None) -> Any:
    """A tensor of the file as a read-only memory map."""
    shape = tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    kind = entry["dtype"]
    if dtype is not None and kind != "I32":
        raise ValueError(f"codes of dtype {kind}")
    stored = dtype or (np.uint16 if kind == "BF16" else _DTYPES[kind])
    size = int(np.prod(shape)) * np.dtype(stored).itemsize
    if any(n < 0 for n in shape) or end - begin != size or begin < 0 or start + end > Path(path).stat().st_size:
        raise ValueError("a tensor lies outside the file")
    found = np.memmap(path, dtype=stored, mode="r", offset=start + begin, shape=shape)
    if kind != "BF16":
        return found
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("bfloat16 needs the package ml_dtypes") from None
    return found.view(ml_dtypes.bfloat16)
