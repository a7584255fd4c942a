"""Projected gradient ascent of the Bayes error: data that are published so that less can be learnt from them."""

from __future__ import annotations

import contextlib
import html
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import _interop, _native
from .._files import replacing
from ..errors import ArgumentError, DegenerateError, DTypeError, LayoutError, NonFiniteError, ShapeError
from .bayes import (
    ESTIMATION_PERPLEXITY,
    Array,
    Bandwidth,
    Objective,
    Prepared,
    options,
    refuse_singletons,
    resolve_bandwidth,
)
from .bayes import rows as data_rows
from .bounds import arithmetic, matrix64
from .certificate import SUFFIX, Certificate, certify, fingerprint
from .climb import Ascent, Climb, Rows, Space, identity
from .features import FeatureMap, feature_maps
from .sources import is_bytes, is_path, is_within, load_array, spool, to_bytes, unit

#: Default bandwidth against the clean points: of the width of a class, at which many neighbours vote.
CLEAN_PERPLEXITY = 100.0
#: Default bandwidth against the published points, in bandwidths of the calibrated estimate.
PUBLISHED_WIDENING = 3.5
#: Rows of a mini-batch above this many rows of data.
DEFAULT_BATCH = (2000, 4000)
#: Rows that a bandwidth is found from where the data are not in memory, or have to pass through a map.
BANDWIDTH_ROWS = 8192


@dataclass(frozen=True)
class Trace:
    """The course of an ascent."""

    #: Objective of each step's rows before the step (a mini-batch's own rows where there are batches).
    steps: Array
    #: ``(k, 2)``: steps done, and the objective on the same rows every time.
    checks: Array
    #: Steps behind the iterate that was kept.
    best: int
    #: How far its objective can be from that of all centres (``truncate``); 0 where all were seen.
    error_bound: float = 0.0


@dataclass(frozen=True)
class Protected:
    """Published data with the course and the certificate of their making."""

    #: Array of the kind, shape and dtype of the input, or the memory map of ``out``.
    x: Any
    #: The clean data as given (a memory map of a file); None where they came in chunks.
    clean: Any = field(repr=False)
    labels: Array = field(repr=False)
    trace: Trace = field(repr=False)
    certificate: Certificate
    bandwidth: tuple[float, ...]
    settings: dict[str, Any]
    #: Rows that could change, None for all.
    protected: Array | None = field(default=None, repr=False)

    @property
    def delta(self) -> Any:
        """What was added: ``x - clean`` in the arithmetic type (int16 for uint8).

        Raises:
            ArgumentError: the clean data came in chunks and are no longer there.
        """
        self._need_clean()
        return difference(self.x, self.clean)

    def _need_clean(self) -> None:
        if self.clean is None:
            raise ArgumentError("x: the clean data came in chunks and were not kept")

    def _repr_html_(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        return f"<p>maximize_bayes_error({html.escape(settings)})</p>{self.certificate._repr_html_()}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the published data as ``.npy``, and the certificate beside them as ``<path>.certificate.json``.

        Raises:
            ArgumentError: another suffix, bfloat16 (``.npy`` holds none), or a path that cannot be written.
        """
        if Path(path).suffix != ".npy":
            raise ArgumentError(f"path: expected a .npy file, got {os.fspath(path)!r}")
        array = _stored(self.x)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
        self.certificate.save(os.fspath(path) + SUFFIX)

    def plot(self, examples: int = 8) -> Any:
        """The objective by step and, for images, examples before and after with their difference; a matplotlib figure.

        Arrays ``(n, h, w)``, ``(n, h, w, 1 or 3)``, ``(n, 1 or 3, h, w)`` and rows of a square number of features are
        shown as images.
        """
        from matplotlib.figure import Figure

        self._need_clean()
        pictures = _pictures(self, examples)
        figure = Figure(figsize=(10, 7 if pictures else 3), layout="constrained")
        parts = figure.subfigures(2 if pictures else 1, 1, squeeze=False)
        axis = parts[0, 0].subplots()
        axis.plot(self.trace.steps, label="rows of the step", color="0.7")
        axis.plot(self.trace.checks[:, 0], self.trace.checks[:, 1], marker=".", label="fixed rows")
        axis.axvline(self.trace.best, linestyle=":", color="0.4", label="kept")
        axis.set(xlabel="step", ylabel=str(self.settings["objective"]))
        axis.legend()
        if pictures:
            axes = parts[1, 0].subplots(3, len(pictures[0]), squeeze=False)
            for row, (name, images) in enumerate(zip(("clean", "published", "difference"), pictures, strict=True)):
                for column, image in enumerate(images):
                    axes[row, column].imshow(image, cmap="gray", interpolation="nearest")
                    axes[row, column].set(xticks=[], yticks=[])
                axes[row, 0].set_ylabel(name)
        return figure


def _stored(x: Any) -> Array:
    if str(getattr(x, "dtype", "")) in ("torch.bfloat16", "bfloat16"):
        raise ArgumentError("path: .npy does not hold bfloat16; save x as safetensors and the certificate beside it")
    if _interop.is_torch(x):
        return np.asarray(x.numpy())
    return x if isinstance(x, np.ndarray) else np.asarray(np.from_dlpack(x))


def difference(x: Any, clean: Any) -> Any:
    """``x - clean`` in the arithmetic type (int16 for uint8)."""
    if _interop.is_torch(x):
        import torch

        wide = {torch.uint8: torch.int16, torch.float64: torch.float64}.get(x.dtype, torch.float32)
        return x.to(wide) - clean.to(wide)
    x, clean = np.asarray(x), np.asarray(clean)
    name = {"uint8": "int16", "float64": "float64"}.get(x.dtype.name, "float32")
    return x.astype(name) - clean.astype(name)


def _pictures(protected: Protected, examples: int) -> list[list[Array]]:
    def numpy(a: Any) -> Array:
        a = a.detach().double().numpy() if _interop.is_torch(a) else np.asarray(a).astype(np.float64)
        return _as_images(a[pick])

    _, first = np.unique(protected.labels, return_index=True)
    pick = first[:examples]
    clean, published = numpy(protected.clean), numpy(protected.x)
    if clean.size == 0:
        return []
    difference = published - clean
    top = max(float(np.abs(difference).max()), 1e-12)
    scale = 255.0 if clean.max() > 1.5 else 1.0
    return [
        list(np.clip(clean / scale, 0, 1)),
        list(np.clip(published / scale, 0, 1)),
        list(difference / top / 2 + 0.5),
    ]


def _as_images(a: Array) -> Array:
    if a.ndim == 2 and math.isqrt(a.shape[1]) ** 2 == a.shape[1]:
        side = math.isqrt(a.shape[1])
        return a.reshape(-1, side, side)
    if a.ndim == 4 and a.shape[1] in (1, 3):
        a = np.moveaxis(a, 1, 3)
    if a.ndim == 4 and a.shape[3] in (1, 3):
        return a[..., 0] if a.shape[3] == 1 else a
    return a if a.ndim == 3 else np.empty(0)


def _positive(value: Any, arg: str) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ArgumentError(f"{arg}: expected a positive number, got {value!r}")
    return number


def _whole(value: Any, arg: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{arg}: expected a whole number, at least {least}, got {value!r}")
    return value


def _check_values(data: Rows, box: tuple[float, float], levels: float | None) -> None:
    """NonFiniteError, or ArgumentError for values outside the box or between the levels."""
    for part in data.chunks():
        matrix = matrix64(data.stored(part))
        least, most = float(matrix.min()), float(matrix.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            index = part.start * data.width + int(np.flatnonzero(~np.isfinite(matrix))[0])
            raise NonFiniteError(f"x: non-finite value at flat index {index}")
        if least < box[0] or most > box[1]:
            raise ArgumentError(f"x: expected values in the box {box}, got {least:g} to {most:g}; pass box=(low, high)")
        if levels is not None:
            scaled = matrix * levels
            if np.abs(scaled - np.rint(scaled)).max() > 1e-3:
                raise ArgumentError(f"quantize: expected values of x that are multiples of 1/{levels:g}")


def _batch(batch: Any, n: int) -> tuple[int, int]:
    if batch is None:
        return (n, n)
    if isinstance(batch, str):
        if batch != "auto":
            raise ArgumentError(f'batch: expected "auto", None or (queries, centres), got {batch!r}')
        return (n, n) if n <= DEFAULT_BATCH[1] else DEFAULT_BATCH
    sizes = (batch, batch) if isinstance(batch, int) else tuple(batch)
    if len(sizes) != 2 or not all(isinstance(b, int) and b >= 2 for b in sizes):
        raise ArgumentError(f"batch: expected (queries, centres), two whole numbers above 1, got {batch!r}")
    return sizes


def _ascent_bandwidth(data: Prepared, rule: Bandwidth | None, against: str, part: float = 1.0) -> list[float]:
    """The bandwidths of the ascent from rows that are ``part`` of all: so much smaller is the perplexity among them."""
    n = data.shape[0]
    whole = n / part

    def effective(k: float) -> float:
        return min(max(1.5, k * part), max(1.5, n / 4), n - 1.5)

    if rule is None and against == "clean":
        rule = ("perplexity", min(CLEAN_PERPLEXITY, max(1.5, whole / 4)))
    elif rule is None:
        estimate = resolve_bandwidth(data, ("perplexity", effective(min(ESTIMATION_PERPLEXITY, max(1.5, whole / 4)))))
        return [PUBLISHED_WIDENING * h for h in estimate]
    if part < 1 and isinstance(rule, tuple) and len(rule) == 2 and rule[0] == "perplexity":
        rule = ("perplexity", effective(_positive(rule[1], "bandwidth")))
    elif part < 1 and rule == "perplexity":
        rule = ("perplexity", effective(ESTIMATION_PERPLEXITY))
    return resolve_bandwidth(data, rule)


def _protected(protect: Any, n: int) -> Array | None:
    """``protect`` as a mask of rows, None for all."""
    if protect is None:
        return None
    values = _interop.integers(protect, "protect") if not _is_mask(protect) else None
    if values is None:
        mask = np.asarray(protect.numpy() if _interop.is_torch(protect) else protect, dtype=bool)
        if mask.shape != (n,):
            raise ShapeError(f"protect: expected a mask of shape ({n},), got {mask.shape}")
    else:
        if values.ndim != 1 or (len(values) and (values.min() < 0 or values.max() >= n)):
            raise ArgumentError(f"protect: expected rows from 0 to {n - 1}, or a mask")
        mask = np.zeros(n, dtype=bool)
        mask[values] = True
    if not mask.any():
        raise ArgumentError("protect: expected at least one row to protect, got none")
    return None if mask.all() else mask


def _is_mask(protect: Any) -> bool:
    return str(getattr(protect, "dtype", "")) in ("bool", "torch.bool") or (
        isinstance(protect, (list, tuple)) and len(protect) > 0 and all(isinstance(v, bool) for v in protect)
    )


def maximize_bayes_error(
    x: Any,
    y: Any = None,
    *,
    epsilon: float = 8 / 255,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 60,
    against: Literal["clean", "published"] = "clean",
    per: Literal["class", "sample", "both"] = "class",
    objective: Objective = "soft",
    bandwidth: Bandwidth | None = None,
    features: Any = None,
    protect: Any = None,
    box: tuple[float, float] = (0.0, 1.0),
    step_size: float | None = None,
    momentum: float = 0.0,
    patience: int | None = None,
    tolerance: float = 1e-3,
    batch: tuple[int, int] | int | Literal["auto"] | None = "auto",
    truncate: float | None = None,
    quantize: int | None = None,
    class_share: float = 0.6,
    cap: bool = True,
    leave_one_out: bool | Literal["corrected", "plain", "none"] = True,
    singleton: Literal["error", "exclude", "keep"] = "error",
    tau: float = 1.0,
    jitter: float = 1e-3,
    seed: int = 0,
    key: str | None = None,
    out: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    certificate_rows: int = 4096,
    certificate_subsamples: int = 100,
    certificate_draws: int = 2048,
    progress: bool | Callable[[int], object] | None = None,
) -> Protected:
    """Perturb labelled data within a budget so that their kernel density Bayes error rises.

    Projected gradient ascent. ``against="clean"`` raises the error that the best rule learnt from the published points
    makes on the clean ones: the form that carries over to models trained afresh. ``against="published"`` raises the
    Bayes error of the published points themselves, which a model that averages over its neighbourhood need not notice.
    The idea is that of Zhang, Sun, Lim and Zhang (arXiv 2511.08191); the estimator is this library's own.

    Args:
        x: ``(n, ...)`` clean data: f64, f32, f16, bf16, or uint8 images, whose values are read as multiples of 1/255.
            With ``out`` also what does not fit in memory: the path of a ``.npy`` or ``.safetensors`` file, a memory
            map, or an iterable of chunks ``(b, ...)`` or ``(chunk, labels)``, which go to a file beside ``out`` first.
        y: ``(n,)`` integer labels, or the path of a ``.npy`` file; None where the chunks bring them.
        epsilon: budget of one row, in the units of ``x`` (of 1 = 255 for uint8).
        norm: ``"linf"`` (sign steps) or ``"l2"`` (normalised steps, exact projection on ball and box).
        steps: number of steps.
        against: see above.
        per: one perturbation per ``"class"``, per ``"sample"``, or ``"both"``: a shared one of ``class_share`` of the
            budget, and of the steps, then one per row in what is left.
            A shared one is clipped to ``box`` only where it is added to a row, and its gradient is the sum of its rows'
            gradients at the clipped points, straight through the clip: a value held at the edge of the box counts
            as any other. One per row never leaves the box, so nothing is clipped there.
        objective: as in :func:`bayes_error`. With ``against="published"`` and ``cap``, ``"soft"`` stops counting a row
            once its own label is no likelier than chance, so that points become ambiguous and not merely swapped.
        bandwidth: as in :func:`bayes_error`, frozen during the ascent, several are averaged. None: perplexity 100 (at
            most n/4) against clean, 3.5 times the perplexity-10 bandwidth against published.
        features: distances are taken in the values of this map: a callable of a tensor ``(b, ...)`` that torch can
            differentiate, an ``nn.Module`` (run in eval mode, otherwise left alone), a :class:`FeatureMap`, or several
            of these, whose objectives are averaged; None among them is the data themselves.
        protect: rows that may change, as a mask or row numbers; None for all. The others are published bit for bit as
            they are, and still count as centres and queries.
        box: admissible values.
        step_size: ``3 epsilon / steps`` if None.
        momentum: part of the last step's direction that the next one keeps, gradients being divided by their L1 norms
            first (Dong et al. 2018, eq. 6); 0 for none.
        patience: stop after so many checks in a row (of every step, or with batches of every tenth part of the steps)
            that gain no more than ``tolerance`` of the best objective; None takes all steps. The shared part of
            ``per="both"`` ends in the same way and the rest begins.
        tolerance: see ``patience``.
        batch: rows drawn per step, ``(queries, centres)``; None takes all, ``"auto"`` takes all up to 4 000 rows and
            (2 000, 4 000) above. Against published only the second number counts.
        truncate: all rows are queries and centres in every step, but each block of 128 neighbouring queries sees this
            part of each class's centres, those that weigh most for it; the others stand still as a mass. One exact pass
            picks them and bounds, for every perturbation within the budget, the error of the objective, which
            ``trace.error_bound`` gives. For ``per="class"`` against clean, in memory; not for ``"entropy"`` and
            ``"softmax_tau"``.
        quantize: values are multiples of ``1 / quantize`` and stay so, within ``floor(quantize · epsilon)`` levels.
        class_share: see ``per``.
        cap: see ``objective``.
        leave_one_out: ``False`` lets every point vouch for itself.
        singleton: as in :func:`bayes_error`.
        tau: as in :func:`bayes_error`.
        jitter: size, as a part of epsilon, of the seeded noise a per-sample ascent against published starts from.
        seed: of batches and jitter (SplitMix64; the result is the same for every number of threads).
        key: tensor of a safetensors file that holds several.
        out: where the published data go: the path of a ``.npy`` file, written completely or not at all, or a writable
            array. Then no more than batches are held in memory, beside four bytes per row; ``per="sample"`` keeps its
            perturbations in files beside ``out`` while it runs. Bandwidths are found from 8 192 rows, at a perplexity
            as much smaller.
        checkpoint: file that the run's state is written to ten times, completely or not at all, and that a run with the
            same data and options goes on from with the same result. Feature maps are not part of what is compared.
        certificate_rows: rows, drawn with ``seed``, that the certificate's readings are computed on.
        certificate_subsamples: random halves of them that the intervals of the readings come from; 0 for none.
        certificate_draws: draws of the certificate's smoothed bound.
        progress: True or False shows or hides a bar, None shows it on a terminal; or a callable given the steps done.

    Returns:
        The published data, like ``x`` (a memory map of ``out`` if that is a path), with trace and certificate. The
        budget holds for the values as stored.

    Raises:
        ArgumentError: an unknown option, ``epsilon`` or another number outside its domain, values outside ``box``, no
            row to protect, a map without a gradient, a file that cannot be read or written, a full disk, a checkpoint
            of another run.
        ShapeError, DTypeError, NonFiniteError, DegenerateError: as :func:`bayes_error`.
    """
    epsilon = _positive(epsilon, "epsilon")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps: expected a positive whole number, got {steps!r}")
    step_size = 3 * epsilon / steps if step_size is None else _positive(step_size, "step_size")
    low, high = (float(b) for b in box)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"box: expected (low, high) with low < high, got {tuple(box)!r}")
    if not 0 < class_share < 1:
        raise ArgumentError(f"class_share: expected a number between 0 and 1, got {class_share!r}")
    if not (math.isfinite(jitter) and 0 <= jitter <= 1):
        raise ArgumentError(f"jitter: expected a number from 0 to 1, got {jitter!r}")
    if not 0 <= seed < 2**64:
        raise ArgumentError(f"seed: expected a whole number from 0 to 2^64 - 1, got {seed!r}")
    _whole(certificate_draws, "certificate_draws", 2)
    if certificate_subsamples != 0:
        _whole(certificate_subsamples, "certificate_subsamples", 2)
    if certificate_rows < 64:
        raise ArgumentError(f"certificate_rows: expected at least 64, got {certificate_rows!r}")
    if not (math.isfinite(momentum) and 0 <= momentum < 1):
        raise ArgumentError(f"momentum: expected a number from 0 up to 1, got {momentum!r}")
    if patience is not None:
        _whole(patience, "patience", 1)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ArgumentError(f"tolerance: expected a number, 0 or above, got {tolerance!r}")
    for value, arg, known in (
        (norm, "norm", ("linf", "l2")),
        (against, "against", ("clean", "published")),
        (per, "per", ("class", "sample", "both")),
    ):
        if value not in known:
            raise ArgumentError(f"{arg}: expected one of {', '.join(map(repr, known))}, got {value!r}")

    if truncate is not None:
        if not 0 < truncate < 1:
            raise ArgumentError(f"truncate: expected a number between 0 and 1, got {truncate!r}")
        for wrong, name in (
            (per != "class", 'per="class"'),
            (against != "clean", 'against="clean"'),
            (objective in ("entropy", "softmax_tau"), "another objective"),
            (batch not in ("auto", None), "batch=None, as all rows take part"),
            (features is not None or protect is not None or momentum != 0, "no features, protect or momentum"),
            (out is not None or checkpoint is not None or patience is not None, "no out, checkpoint or patience"),
        ):
            if wrong:
                raise ArgumentError(f"truncate: expected with {name}")
        batch = None
    maps = feature_maps(features)
    with _source(x, y, key, out) as (x, y, scratch):
        as_bytes = is_bytes(x)
        if as_bytes:
            if quantize not in (None, 255) or (low, high) != (0.0, 1.0):
                raise ArgumentError(
                    "quantize, box: uint8 data have 255 levels in the box (0, 1); pass floats for another"
                )
            quantize = 255
        if quantize is not None and quantize < 1:
            raise ArgumentError(f"quantize: expected a positive whole number, got {quantize!r}")
        levels = None if quantize is None else float(quantize)
        if levels is not None and norm == "linf" and math.floor(levels * epsilon + 1e-9) < 1:
            raise ArgumentError(f"epsilon: expected at least one level, 1/{levels:g}, got {epsilon!r}")

        held = scratch is None
        stored = _stored_rows(x, as_bytes)
        rows = Rows(stored)
        codes, classes = _codes(y, rows.n)
        _check_values(rows, (low, high), levels)
        mask = _protected(protect, rows.n)
        name = "soft_capped" if objective == "soft" and against == "published" and cap else objective
        sizes = _batch(batch, rows.n)
        spaces = _spaces(
            rows, codes, classes, maps, bandwidth, against, held, name, tau, leave_one_out, singleton, sizes
        )
        plan = {
            "against": against,
            "per": per,
            "class_share": class_share,
            "norm": norm,
            "epsilon": epsilon,
            "low": low,
            "high": high,
            "steps": steps,
            "step_size": step_size,
            "batch_queries": sizes[0],
            "batch_centres": sizes[1],
            "seed": seed,
            "jitter": jitter,
            "levels": levels,
            "truncate": truncate,
        }
        settings = {
            "epsilon": epsilon,
            "norm": norm,
            "steps": steps,
            "against": against,
            "per": per,
            "objective": objective,
            "box": (low, high),
            "step_size": step_size,
            "batch": sizes,
            "quantize": quantize,
            "seed": seed,
            "bandwidths": [s.options["bandwidths"] for s in spaces],
            "momentum": momentum,
            "truncate": truncate,
        }
        target = _Target(out, stored)
        plain = all(m.map is None for m in maps) and len(maps) == 1 and mask is None and momentum == 0
        with _Bar(progress, steps) as report:
            if plain and held and patience is None and checkpoint is None:
                matrix = data_matrix(stored)
                published = _interop.empty_like(matrix)
                taken, checks, best, off = _native.ascend(
                    matrix, codes, len(classes), published, spaces[0].options, plan, progress=report
                )
                result = published.reshape(_interop.shape(stored, "x"))
                result = to_bytes(result) if as_bytes else _interop.like(result, x)
            else:
                run = {**settings, **plan, "class_share": class_share, "patience": patience, "tolerance": tolerance}
                climb = Climb(
                    rows,
                    codes,
                    len(classes),
                    spaces,
                    plan,
                    mask,
                    momentum,
                    patience,
                    tolerance,
                    None if checkpoint is None else Path(checkpoint),
                    "" if checkpoint is None else identity(run, fingerprint(stored), codes, mask),
                    scratch,
                )
                ascent = Ascent(climb)
                state = ascent.run(report)
                taken, checks, best, off = state.steps, state.checks, state.best_step, 0.0
                with target.writing() as write:
                    ascent.publish(state, write)
                result = target.result(x)
        if best == 0:
            warnings.warn(
                "maximize_bayes_error: no step raised the objective, so x is returned (almost) as it was; "
                "a wider bandwidth gives a stronger gradient",
                stacklevel=2,
            )
        first = spaces[0]
        mapped = all(s.map.map is not None for s in spaces)
        bandwidths = first.options["bandwidths"]
        if not mapped:
            bandwidths = next(s.options["bandwidths"] for s in spaces if s.map.map is None)
        certificate = certify(
            stored,
            result,
            codes,
            classes,
            bandwidths=bandwidths,
            norm=norm,
            epsilon=epsilon,
            levels=quantize,
            limit=certificate_rows,
            subsamples=certificate_subsamples,
            draws=certificate_draws,
            seed=seed,
            protected_rows=None if mask is None else int(mask.sum()),
            features=(lambda part: first.map.values(arithmetic(part), rows.shape)) if mapped else None,
            settings=settings,
        )
        trace = Trace(np.asarray(taken), np.asarray(checks, dtype=np.float64).reshape(-1, 2), best, off)
        # Chunks are gone with the files they were put into.
        clean = None if scratch is not None and is_within(stored, scratch) else stored
        return Protected(result, clean, classes[codes], trace, certificate, tuple(bandwidths), settings, mask)


def data_matrix(stored: Any) -> Any:
    """In-memory data as the matrix that the compiled ascent reads."""
    return data_rows(unit(stored) if is_bytes(stored) else stored, "x")[0]


def _stored_rows(x: Any, as_bytes: bool) -> Any:
    """``x`` as rows to index: itself, or contiguous where it is neither a NumPy array nor a tensor."""
    x = _interop.source(x, "x")
    if not (isinstance(x, np.ndarray) or _interop.is_torch(x)):
        x = np.from_dlpack(x)
    if not as_bytes:
        data_rows(x[:1], "x")
    if len(_interop.shape(x, "x")) < 1 or math.prod(_interop.shape(x, "x")) == 0:
        raise ShapeError(f"x: expected at least one row and one feature, got shape {_interop.shape(x, 'x')}")
    return x


def _codes(y: Any, n: int) -> tuple[Array, Array]:
    labels = _interop.integers(y, "y")
    if labels.ndim != 1 or len(labels) != n:
        raise ShapeError(f"y: expected shape ({n},), one label per row of x, got {labels.shape}")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DegenerateError(f"y: expected at least two classes, got {len(classes)}")
    return np.ascontiguousarray(codes.reshape(-1), dtype=np.int64), classes


def _spaces(
    rows: Rows,
    codes: Array,
    classes: Array,
    maps: tuple[FeatureMap, ...],
    rule: Bandwidth | None,
    against: str,
    held: bool,
    objective: str,
    tau: float,
    leave_one_out: bool | str,
    singleton: str,
    sizes: tuple[int, int],
) -> tuple[Space, ...]:
    """Each map with its bandwidths and options; those of the data in memory are found from all rows."""
    n = rows.n
    shape = (n, *rows.shape)
    found = []
    total = sum(m.weight for m in maps)
    for each in maps:
        own = each.bandwidth if each.bandwidth is not None else rule
        if each.map is None and held:
            data = Prepared(data_matrix(rows.array), codes, classes, shape)
            widths = _ascent_bandwidth(data, own, against)
        elif own is not None and not isinstance(own, (str, tuple)):
            widths = resolve_bandwidth(Prepared(None, codes, classes, shape), own)
        else:
            pick = np.arange(n) if n <= BANDWIDTH_ROWS else _native.draw_rows(0, n, BANDWIDTH_ROWS)[0]
            points = each.values(rows.points(pick), rows.shape)
            # A class may be missing from the draw; the rules do not mind.
            data = Prepared(points, np.ascontiguousarray(codes[pick]), classes, (len(pick), points.shape[1]))
            widths = _ascent_bandwidth(data, own, against, len(pick) / n)
        everything = Prepared(None, codes, classes, shape)
        chosen = options(
            everything, widths, objective, tau, leave_one_out, singleton, None, corrected=against == "published"
        )
        refuse_singletons(everything, chosen["leave_one_out"], singleton)
        if chosen["leave_one_out"] != "none" and min(sizes) < n:
            # A class can be left with one member in a batch by chance.
            chosen = {**chosen, "singleton": "exclude"}
        found.append(Space(each, chosen, each.weight / total))
    return tuple(found)


@contextlib.contextmanager
def _source(x: Any, y: Any, key: str | None, out: Any) -> Iterator[tuple[Any, Any, Path | None]]:
    """Arrays or memory maps of ``x`` and ``y``, and a directory beside ``out`` for as long as they are worked on."""
    chunks = not is_path(x) and not hasattr(x, "shape") and not isinstance(x, (list, tuple, int, float))
    if out is None:
        if is_path(x) or chunks:
            found = f"the path {os.fspath(x)!r}" if is_path(x) else type(x).__name__
            raise DTypeError(f"x: expected an array, or with out= a file or chunks to read it from, got {found}")
        if y is None:
            raise ArgumentError("y: expected labels, got None")
        yield x, y, None
        return
    if is_path(out) and Path(out).suffix != ".npy":
        raise ArgumentError(f"out: expected a .npy file or an array, got {os.fspath(out)!r}")
    if not is_path(out) and not isinstance(out, np.ndarray):
        raise ArgumentError(f"out: expected a .npy file or a NumPy array, got {type(out).__name__}")
    if is_path(x) and is_path(out) and Path(x).exists() and Path(out).exists() and os.path.samefile(x, out):
        raise ArgumentError("out: expected another file than x, which is still to be read")
    if is_path(out):
        place = Path(out).parent
    else:
        place = (
            Path(out.filename).parent if isinstance(out, np.memmap) and out.filename else Path(tempfile.gettempdir())
        )
    try:
        directory = tempfile.TemporaryDirectory(prefix=".abjure-", dir=place)
    except OSError as err:
        raise ArgumentError(f"out: {os.fspath(place)!r} cannot be written ({err.strerror or err})") from err
    with directory as name:
        if chunks:
            x, labels = spool(x, Path(name) / "clean.rows")
            y = labels if y is None else y
        x = load_array(x, "x", key)
        if y is None:
            raise ArgumentError("y: expected labels, got None")
        yield x, load_array(y, "y"), Path(name)


class _Target:
    """Where the published rows are put: a file, the caller's array, or a new array."""

    def __init__(self, out: Any, stored: Any) -> None:
        self._out, self._stored = out, stored
        self._array: Any = None
        if isinstance(out, np.ndarray):
            shape = _interop.shape(stored, "x")
            if out.shape != shape:
                raise ShapeError(f"out: expected shape {shape}, got {out.shape}")
            if str(out.dtype) != str(stored.dtype).removeprefix("torch."):
                raise DTypeError(f"out: expected dtype {stored.dtype}, got {out.dtype}")
            if not out.flags.writeable:
                raise LayoutError("out: the array is read-only")
            if isinstance(stored, np.ndarray) and np.shares_memory(out, stored):
                raise LayoutError("out: shares memory with x, which is still to be read")

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Any], object]]:
        """Takes the rows in order, piece by piece; a file appears where the block ends without an error."""
        as_bytes, shape = is_bytes(self._stored), _interop.shape(self._stored, "x")
        if is_path(self._out):
            if str(self._stored.dtype).endswith("bfloat16"):
                raise ArgumentError("out: .npy does not hold bfloat16; convert the data to float32 first")
            dtype = np.dtype(str(self._stored.dtype).removeprefix("torch."))
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            with replacing(self._out) as temporary, open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)

                def write(part: Any) -> None:
                    part = to_bytes(part) if as_bytes else part
                    file.write(np.ascontiguousarray(part.numpy() if _interop.is_torch(part) else part).data)

                yield write
            return
        self._array = self._out if self._out is not None else _interop.empty_like(self._stored)
        flat, at = self._array.reshape(shape[0], -1), 0

        def put(part: Any) -> None:
            nonlocal at
            part = to_bytes(part) if as_bytes else part
            if _interop.is_torch(part) and not _interop.is_torch(flat):
                part = part.numpy()
            flat[at : at + len(part)] = part
            at += len(part)

        yield put

    def result(self, x: Any) -> Any:
        if is_path(self._out):
            return load_array(self._out, "out")
        return _interop.like(self._array, x)


class _Bar:
    """A tqdm bar, a caller's own callback, or nothing."""

    def __init__(self, progress: Any, total: int, name: str = "ascent", unit: str = "step") -> None:
        self._name, self._unit = name, unit
        self._callback = progress if callable(progress) else None
        self._hidden = None if progress is None else not progress
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> Callable[[int], object] | None:
        if self._callback is not None or self._hidden is True:
            return self._callback
        from tqdm.auto import tqdm

        self._bar = tqdm(total=self._total, desc=self._name, unit=self._unit, disable=self._hidden)
        return self._show

    def _show(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
