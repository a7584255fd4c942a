"""What can be said of published data, computed on them as stored, and kept beside them."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _interop
from .._files import write_atomically
from ..errors import ArgumentError, DegenerateError, ShapeError
from .bayes import ESTIMATION_PERPLEXITY, READINGS, Array, BayesError, bayes_error, rows
from .bounds import METHODS, Bound, SmoothedError, bayes_error_bounds, matrix64, smoothed_error
from .sources import is_bytes, load_array, unit

SENTENCE = "The budget is exact; the readings are estimates; nothing here bounds the accuracy on clean data."
FORMAT = "abjure protect certificate 1"
SUFFIX = ".certificate.json"
#: Pairs of classes times cubed features above which the Bhattacharyya bound would take longer than all else.
GAUSSIAN_WORK = 1e11
#: Rows of a pass over the stored arrays.
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Verification:
    """What of a certificate was found again in the arrays at hand."""

    #: The published array is the one certified.
    published: bool
    #: The clean array is; None if none was given.
    clean: bool | None
    #: Largest change of a row between the arrays given, None without the clean one.
    largest_change: float | None
    #: Whether that change is within the budget, None without the clean one.
    budget: bool | None

    def __bool__(self) -> bool:
        return self.published and self.clean is not False and self.budget is not False


@dataclass(frozen=True)
class Certificate:
    """What can be said of published data: the exact budget, readings and bounds before and after, and of which arrays.

    Readings carry intervals from random halves of the rows (:func:`bayes_error`, ``subsamples``).
    """

    norm: str
    epsilon: float
    #: Largest change of one row (L∞ or L2) between the arrays as stored, in f64 (of 1 = ``levels`` for integers).
    largest_change: float
    #: Published data among themselves, at the bandwidth that calibrates the clean data.
    published_before: BayesError
    published_after: BayesError
    #: The same, at the bandwidth that calibrates the published data.
    published_refitted: BayesError
    #: Clean points under the rule learnt from clean and from published points, at the bandwidth of the ascent.
    clean_before: BayesError
    clean_after: BayesError
    #: Rows that the readings are computed on.
    rows: int
    sentence: str = SENTENCE
    #: Stored values are multiples of one over this; None for floating-point values.
    levels: int | None = None
    #: Largest change of one value in whole levels, and how many the budget allows (L∞ with ``levels`` only).
    largest_levels: int | None = None
    allowed_levels: int | None = None
    #: Rows that may differ from the clean ones, of how many.
    protected_rows: int | None = None
    total_rows: int | None = None
    #: ``"input"``, or ``"features"`` where readings and bounds are of a feature map's values.
    space: str = "input"
    #: Bayes error of the rows smoothed at the bandwidth that calibrates the clean data.
    smoothed_before: SmoothedError | None = None
    smoothed_after: SmoothedError | None = None
    #: Nearest-neighbour, Bhattacharyya and Henze–Penrose bounds.
    bounds_before: tuple[Bound, ...] = ()
    bounds_after: tuple[Bound, ...] = ()
    #: SHA-256 of dtype, shape and values in C order; see :func:`fingerprint`.
    clean_sha256: str = ""
    published_sha256: str = ""
    #: What made the data.
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the stored change is within the budget: in whole levels where values are, else in f64."""
        if self.largest_levels is not None and self.allowed_levels is not None:
            return self.largest_levels <= self.allowed_levels
        return self.largest_change <= self.epsilon

    def _lines(self) -> list[tuple[str, str, str]]:
        lines = [("largest change of a row (" + self.norm + ")", f"{self.largest_change:.6g}", f"≤ {self.epsilon:.6g}")]
        if self.largest_levels is not None:
            lines.append(
                (f"the same in levels of 1/{self.levels}", str(self.largest_levels), f"≤ {self.allowed_levels}")
            )
        if self.protected_rows is not None and self.protected_rows != self.total_rows:
            lines.append(("rows that may have changed", str(self.protected_rows), f"of {self.total_rows}"))

        def shown(found: BayesError, reading: str) -> str:
            value = f"{getattr(found, reading):.4f}"
            if reading not in found.standard_errors:
                return value
            low, high = found.interval_of(reading)
            return f"{value} ({low:.4f} to {high:.4f})"

        for name, before, after in (
            ("published", self.published_before, self.published_after),
            ("published, bandwidth fitted again", self.published_before, self.published_refitted),
            ("clean under the published rule", self.clean_before, self.clean_after),
        ):
            for reading in ("plugin", "gini", "soft", "own_label_error"):
                lines.append((f"{name}: {reading}", shown(before, reading), shown(after, reading)))
        if self.smoothed_before is not None and self.smoothed_after is not None:
            cells = [f"{s.error:.4f} ({s.interval[0]:.4f} to {s.interval[1]:.4f})" for s in self._smoothed()]
            name = f"smoothed by N(0, {self.smoothed_after.bandwidth:.4g}²): Bayes error"
            lines.append((name, cells[0], cells[1]))
        for old, new in zip(self.bounds_before, self.bounds_after, strict=True):
            cells = [f"{b.lower:.4f} to {b.upper:.4f}" for b in (old, new)]
            lines.append((f"{new.name} (n = {new.rows}, d = {new.features}; {new.holds})", cells[0], cells[1]))
        return lines

    def _smoothed(self) -> list[SmoothedError]:
        return [s for s in (self.smoothed_before, self.smoothed_after) if s is not None]

    def _heading(self) -> str:
        level = self.published_after.level
        of = "the data" if self.space == "input" else "their features"
        return f"readings of {of}, {self.rows} rows, {level:.0%} intervals"

    def __str__(self) -> str:
        body = "\n".join(f"{name}: {a} -> {b}" for name, a, b in self._lines())
        return f"{self._heading()}\n{body}\n{self.sentence}"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{html.escape(n)}</th><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>"
            for n, a, b in self._lines()
        )
        head = f"<tr><th>{html.escape(self._heading())}</th><th>before</th><th>after</th></tr>"
        return f"<table><caption>{html.escape(self.sentence)}</caption>{head}{cells}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the readings of single rows are left out, non-finite numbers become text."""
        readings = {name: _reading_to_dict(getattr(self, name)) for name in _READINGS}
        smoothed = {n: getattr(self, n) and asdict(getattr(self, n)) for n in ("smoothed_before", "smoothed_after")}
        bounds = {n: [asdict(b) for b in getattr(self, n)] for n in ("bounds_before", "bounds_after")}
        plain = {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in {*readings, *smoothed, *bounds}}
        found = _plain({"format": FORMAT, "holds": self.holds, **plain, **readings, **smoothed, **bounds})
        assert isinstance(found, dict)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the certificate as JSON, completely or not at all; beside the data, by convention as
        ``<data file>.certificate.json``.

        Raises:
            ArgumentError: ``path`` cannot be written.
        """
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(path, (content + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Reads what :meth:`save` wrote; readings of single rows are not kept, so ``values`` are empty.

        Raises:
            ArgumentError: no readable file, or not a certificate.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
            raise ArgumentError(f"path: expected a saved certificate, got {os.fspath(path)!r} ({err})") from err
        try:
            if found.pop("format") != FORMAT:
                raise KeyError("format")
            held = found.pop("holds")
            for name in _READINGS:
                found[name] = _reading_from_dict(found[name])
            for name in ("smoothed_before", "smoothed_after"):
                found[name] = None if found[name] is None else SmoothedError(**_numbers(found[name], SmoothedError))
            for name in ("bounds_before", "bounds_after"):
                found[name] = tuple(Bound(**_numbers(b, Bound)) for b in found[name])
            certificate = cls(**found)
            if held is not certificate.holds:
                raise ValueError("its own numbers contradict it")
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ArgumentError(f"path: {os.fspath(path)!r} is not a saved certificate ({err})") from err
        return certificate

    def verify(self, published: Any, clean: Any = None) -> Verification:
        """Whether arrays are those the certificate was made for, and their change within its budget.

        Args:
            published: the published array, or the path of a ``.npy`` or one-tensor ``.safetensors`` file.
            clean: likewise the clean one; without it the budget is not looked at.

        Raises:
            ArgumentError: a file that cannot be read.
            ShapeError: the arrays differ in shape.
        """
        published = load_array(published, "published")
        same = fingerprint(published) == self.published_sha256
        if clean is None:
            return Verification(same, None, None, None)
        clean = load_array(clean, "clean")
        change, levels = largest_change(clean, published, self.norm, self.levels)
        if levels is not None and self.allowed_levels is not None:
            within = levels <= self.allowed_levels
        else:
            within = change <= self.epsilon
        return Verification(same, fingerprint(clean) == self.clean_sha256, change, within)


_READINGS = ("published_before", "published_after", "published_refitted", "clean_before", "clean_after")
_SCALARS = ("value", "objective", *READINGS, "leave_one_out", "rows", "level")


def _reading_to_dict(found: BayesError) -> dict[str, Any]:
    return {
        **{name: getattr(found, name) for name in _SCALARS},
        "bandwidth": list(found.bandwidth),
        "classes": np.asarray(found.classes).tolist(),
        "standard_errors": dict(found.standard_errors),
    }


def _reading_from_dict(found: dict[str, Any]) -> BayesError:
    numbers: dict[str, Any] = {name: float(found[name]) for name in ("value", *READINGS, "level")}
    return BayesError(
        **numbers,
        objective=str(found["objective"]),
        leave_one_out=str(found["leave_one_out"]),
        rows=int(found["rows"]),
        bandwidth=tuple(float(h) for h in found["bandwidth"]),
        classes=np.asarray(found["classes"]),
        values=np.empty(0),
        standard_errors={k: float(v) for k, v in found["standard_errors"].items()},
    )


def _numbers(found: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The fields of ``kind``, floats read back from text where JSON has no number for them."""
    floats = {name for name, f in kind.__dataclass_fields__.items() if f.type in ("float", float)}
    return {name: float(value) if name in floats else value for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if value is None or isinstance(value, str) else repr(value)


def fingerprint(x: Any) -> str:
    """SHA-256 of an array: its dtype's name, its shape, and its values in C order, little-endian.

    The same for a NumPy array, a memory map and a tensor of the same values. Read in pieces of 8 MiB.

    Raises:
        DTypeError, DeviceError: not an array on the CPU.
    """
    x = _interop.source(x, "x")
    shape = _interop.shape(x, "x")
    if _interop.is_torch(x):
        import torch

        name = str(x.dtype).removeprefix("torch.")
        x = x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    else:
        x = x if isinstance(x, np.ndarray) else np.from_dlpack(x)
        name = x.dtype.name
    digest = hashlib.sha256(f"{name} {list(shape)}\n".encode())
    for part in _pieces(x):
        part = np.ascontiguousarray(part)
        if part.dtype.byteorder == ">" or (part.dtype.byteorder == "=" and not _LITTLE):
            part = part.astype(part.dtype.newbyteorder("<"))
        digest.update(part.view(np.uint8).data if part.size else b"")
    return digest.hexdigest()


_LITTLE = bool(np.array([1], dtype=np.uint16).view(np.uint8)[0])


def _pieces(x: Array) -> Any:
    if x.ndim == 0:
        x = x.reshape(1)
    step = max(1, CHUNK_BYTES // max(1, x[:1].nbytes))
    for start in range(0, len(x), step):
        yield x[start : start + step]


def largest_change(clean: Any, published: Any, norm: str, levels: int | None) -> tuple[float, int | None]:
    """Largest change of a row as stored, in f64; with ``levels`` from the whole numbers behind the values, and under L∞
    that number of levels too.

    Raises:
        ShapeError: arrays of different shapes.
    """
    shape = _interop.shape(clean, "clean")
    if _interop.shape(published, "published") != shape:
        raise ShapeError(f"published: expected shape {shape}, got {_interop.shape(published, 'published')}")
    width = max(1, math.prod(shape[1:]))
    step = max(1, CHUNK_BYTES // (8 * width))
    integers = is_bytes(clean)
    most = 0.0
    for start in range(0, shape[0], step):
        part = slice(start, start + step)
        before, after = (matrix64(a[part]).reshape(-1, width) for a in (clean, published))
        if levels is not None and not integers:
            before, after = np.rint(before * levels), np.rint(after * levels)
        change = np.abs(after - before)
        # Sums of squares of whole numbers are exact far beyond any image.
        most = max(most, float(change.max() if norm == "linf" else (change**2).sum(axis=1).max()))
    if norm == "l2":
        most = math.sqrt(most)
    if levels is None:
        return most, None
    return most / levels, int(most) if norm == "linf" else None


def certify(
    clean: Any,
    published: Any,
    codes: Array,
    classes: Array,
    *,
    bandwidths: Sequence[float],
    norm: str,
    epsilon: float,
    levels: int | None,
    limit: int,
    subsamples: int,
    draws: int,
    seed: int,
    protected_rows: int | None,
    features: Any = None,
    settings: dict[str, Any] | None = None,
) -> Certificate:
    """The certificate of ``published``, both arrays as stored; see :func:`maximize_bayes_error` for the options."""
    n = len(codes)
    pick = np.arange(n) if n <= limit else np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))
    before, after = (_space(a, pick, features) for a in (clean, published))
    chosen = codes[pick]
    present = np.unique(chosen)
    calibration = ("perplexity", min(ESTIMATION_PERPLEXITY, max(1.5, len(pick) / 4)))
    halves = subsamples if len(pick) >= 8 else 0

    def reading(points: Any, rule: Any, queries: Any = None) -> BayesError:
        options = {"queries": queries, "bandwidth": rule, "singleton": "exclude", "seed": seed}
        try:
            return bayes_error(points, classes[chosen], subsamples=halves, **options)
        except DegenerateError:
            return bayes_error(points, classes[chosen], **options)

    def calibrated(points: Any) -> BayesError:
        try:
            return reading(points, calibration if len(pick) >= 8 else list(bandwidths))
        except DegenerateError:
            # Points that coincide calibrate nothing; the ascent's own bandwidth remains.
            return reading(points, list(bandwidths))

    def bounds(points: Any) -> tuple[Bound, ...]:
        found: list[Bound] = []
        width = math.prod(_interop.shape(points, "x")[1:])
        for method in METHODS:
            if method == "bhattacharyya" and len(present) ** 2 / 2 * width**3 > GAUSSIAN_WORK:
                continue
            try:
                found += bayes_error_bounds(points, chosen, methods=(method,))
            except DegenerateError:
                continue
        return tuple(found)

    first = calibrated(before)
    bounds_before, bounds_after = bounds(before), bounds(after)
    both = {b.name for b in bounds_before} & {b.name for b in bounds_after}
    change, whole = largest_change(clean, published, norm, levels)
    smoothed: dict[str, Any] = {"bandwidth": first.bandwidth[0], "draws": draws, "seed": seed}
    return Certificate(
        norm=norm,
        epsilon=epsilon,
        largest_change=change,
        published_before=first,
        published_after=reading(after, first.bandwidth),
        published_refitted=calibrated(after),
        clean_before=reading(before, list(bandwidths), before),
        clean_after=reading(after, list(bandwidths), before),
        rows=len(pick),
        levels=levels,
        largest_levels=whole,
        allowed_levels=None if whole is None or levels is None else math.floor(levels * epsilon + 1e-9),
        protected_rows=n if protected_rows is None else protected_rows,
        total_rows=n,
        space="input" if features is None else "features",
        smoothed_before=smoothed_error(before, chosen, **smoothed) if len(present) > 1 else None,
        smoothed_after=smoothed_error(after, chosen, **smoothed) if len(present) > 1 else None,
        bounds_before=tuple(b for b in bounds_before if b.name in both),
        bounds_after=tuple(b for b in bounds_after if b.name in both),
        clean_sha256=fingerprint(clean),
        published_sha256=fingerprint(published),
        settings=settings or {},
    )


def _space(array: Any, pick: Array, features: Any) -> Any:
    """Rows ``pick`` as the kernels read them, through the feature map if there is one."""
    part = array[pick]
    part = unit(part) if is_bytes(part) else part
    matrix = rows(part, "x")[0]
    return matrix if features is None else features(matrix)
