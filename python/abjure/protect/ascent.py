"""Projected gradient ascent of the Bayes error: data that are published so that less can be learnt from them."""

from __future__ import annotations

import html
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import _interop, _native
from .._files import replacing
from ..errors import ArgumentError, NonFiniteError
from .bayes import (
    ESTIMATION_PERPLEXITY,
    Array,
    Bandwidth,
    Objective,
    Prepared,
    options,
    prepare,
    refuse_singletons,
    resolve_bandwidth,
)
from .bounds import matrix64
from .certificate import SUFFIX, Certificate, certify
from .sources import is_bytes, to_bytes, unit

#: Default bandwidth against the clean points: of the width of a class, at which many neighbours vote.
CLEAN_PERPLEXITY = 100.0
#: Default bandwidth against the published points, in bandwidths of the calibrated estimate.
PUBLISHED_WIDENING = 3.5
#: Rows of a mini-batch above this many rows of data.
DEFAULT_BATCH = (2000, 4000)


@dataclass(frozen=True)
class Trace:
    """The course of an ascent."""

    #: Objective of each step's rows before the step (a mini-batch's own rows where there are batches).
    steps: Array
    #: ``(k, 2)``: steps done, and the objective on the same rows every time.
    checks: Array
    #: Steps behind the iterate that was kept.
    best: int


@dataclass(frozen=True)
class Protected:
    """Published data with the course and the certificate of their making."""

    #: Array of the kind, shape and dtype of the input.
    x: Any
    clean: Any = field(repr=False)
    labels: Array = field(repr=False)
    trace: Trace = field(repr=False)
    certificate: Certificate
    bandwidth: tuple[float, ...]
    settings: dict[str, Any]

    @property
    def delta(self) -> Any:
        """What was added: ``x - clean`` in the arithmetic type (int16 for uint8)."""
        if _interop.is_torch(self.x):
            import torch

            wide = {torch.uint8: torch.int16, torch.float64: torch.float64}.get(self.x.dtype, torch.float32)
            return self.x.to(wide) - self.clean.to(wide)
        x, clean = np.asarray(self.x), np.asarray(self.clean)
        name = {"uint8": "int16", "float64": "float64"}.get(x.dtype.name, "float32")
        return x.astype(name) - clean.astype(name)

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


def _check_values(data: Prepared, box: tuple[float, float], levels: float | None) -> None:
    """NonFiniteError, or ArgumentError for values outside the box or between the levels."""
    matrix = data.matrix if hasattr(data.matrix, "min") else np.from_dlpack(data.matrix)
    least, most = float(matrix.min()), float(matrix.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        index = int(np.flatnonzero(~np.isfinite(matrix64(matrix)))[0])
        raise NonFiniteError(f"x: non-finite value at flat index {index}")
    if least < box[0] or most > box[1]:
        raise ArgumentError(f"x: expected values in the box {box}, got {least:g} to {most:g}; pass box=(low, high)")
    if levels is not None:
        scaled = matrix64(matrix) * levels
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


def _ascent_bandwidth(data: Prepared, rule: Bandwidth | None, against: str) -> list[float]:
    if rule is not None:
        return resolve_bandwidth(data, rule)
    n = data.shape[0]
    if against == "clean":
        return resolve_bandwidth(data, ("perplexity", min(CLEAN_PERPLEXITY, max(1.5, n / 4))))
    estimate = resolve_bandwidth(data, ("perplexity", min(ESTIMATION_PERPLEXITY, max(1.5, n / 4))))
    return [PUBLISHED_WIDENING * h for h in estimate]


def maximize_bayes_error(
    x: Any,
    y: Any,
    *,
    epsilon: float = 8 / 255,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 60,
    against: Literal["clean", "published"] = "clean",
    per: Literal["class", "sample", "both"] = "class",
    objective: Objective = "soft",
    bandwidth: Bandwidth | None = None,
    box: tuple[float, float] = (0.0, 1.0),
    step_size: float | None = None,
    batch: tuple[int, int] | int | Literal["auto"] | None = "auto",
    quantize: int | None = None,
    class_share: float = 0.6,
    cap: bool = True,
    leave_one_out: bool | Literal["corrected", "plain", "none"] = True,
    singleton: Literal["error", "exclude", "keep"] = "error",
    tau: float = 1.0,
    jitter: float = 1e-3,
    seed: int = 0,
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
        y: ``(n,)`` integer labels.
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
        box: admissible values.
        step_size: ``3 epsilon / steps`` if None.
        batch: rows drawn per step, ``(queries, centres)``; None takes all, ``"auto"`` takes all up to 4 000 rows and
            (2 000, 4 000) above. Against published only the second number counts.
        quantize: values are multiples of ``1 / quantize`` and stay so, within ``floor(quantize · epsilon)`` levels.
        class_share: see ``per``.
        cap: see ``objective``.
        leave_one_out: ``False`` lets every point vouch for itself.
        singleton: as in :func:`bayes_error`.
        tau: as in :func:`bayes_error`.
        jitter: size, as a part of epsilon, of the seeded noise a per-sample ascent against published starts from.
        seed: of batches and jitter (SplitMix64; the result is the same for every number of threads).
        certificate_rows: rows, drawn with ``seed``, that the certificate's readings are computed on.
        certificate_subsamples: random halves of them that the intervals of the readings come from; 0 for none.
        certificate_draws: draws of the certificate's smoothed bound.
        progress: True or False shows or hides a bar, None shows it on a terminal; or a callable given the steps done.

    Returns:
        The published data, like ``x``, with trace and certificate. The budget holds for the values as stored.

    Raises:
        ArgumentError: an unknown option, ``epsilon`` or another number outside its domain, values outside ``box``.
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
    for value, arg, known in (
        (norm, "norm", ("linf", "l2")),
        (against, "against", ("clean", "published")),
        (per, "per", ("class", "sample", "both")),
    ):
        if value not in known:
            raise ArgumentError(f"{arg}: expected one of {', '.join(map(repr, known))}, got {value!r}")

    as_bytes = is_bytes(x)
    if as_bytes:
        if quantize not in (None, 255) or (low, high) != (0.0, 1.0):
            raise ArgumentError("quantize, box: uint8 data have 255 levels in the box (0, 1); pass floats for another")
        quantize = 255
    if quantize is not None and quantize < 1:
        raise ArgumentError(f"quantize: expected a positive whole number, got {quantize!r}")
    levels = None if quantize is None else float(quantize)
    if levels is not None and norm == "linf" and math.floor(levels * epsilon + 1e-9) < 1:
        raise ArgumentError(f"epsilon: expected at least one level, 1/{levels:g}, got {epsilon!r}")

    data = prepare(unit(x) if as_bytes else x, y)
    _check_values(data, (low, high), levels)
    bandwidths = _ascent_bandwidth(data, bandwidth, against)
    name = "soft_capped" if objective == "soft" and against == "published" and cap else objective
    chosen = options(data, bandwidths, name, tau, leave_one_out, singleton, None, corrected=against == "published")
    refuse_singletons(data, chosen["leave_one_out"], singleton)
    sizes = _batch(batch, data.shape[0])
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
    }
    if chosen["leave_one_out"] != "none" and min(sizes) < data.shape[0]:
        # A class can be left with one member in a batch by chance.
        chosen = {**chosen, "singleton": "exclude"}
    out = _interop.empty_like(data.matrix)
    with _Bar(progress, steps) as report:
        taken, checks, best = _native.ascend(
            data.matrix, data.codes, len(data.classes), out, chosen, plan, progress=report
        )
    if best == 0:
        warnings.warn(
            "maximize_bayes_error: no step raised the objective, so x is returned (almost) as it was; "
            "a wider bandwidth gives a stronger gradient",
            stacklevel=2,
        )
    published = out.reshape(data.shape)
    trace = Trace(np.asarray(taken), np.asarray(checks, dtype=np.float64).reshape(-1, 2), best)
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
    }
    result = to_bytes(published) if as_bytes else _interop.like(published, x)
    clean = x if as_bytes else data.matrix.reshape(data.shape)
    labels = data.classes[data.codes]
    certificate = certify(
        clean,
        to_bytes(published) if as_bytes else published,
        data.codes,
        data.classes,
        bandwidths=bandwidths,
        norm=norm,
        epsilon=epsilon,
        levels=quantize,
        limit=certificate_rows,
        subsamples=certificate_subsamples,
        draws=certificate_draws,
        seed=seed,
        protected_rows=None,
        settings=settings,
    )
    return Protected(result, clean, labels, trace, certificate, tuple(bandwidths), settings)


class _Bar:
    """A tqdm bar, a caller's own callback, or nothing."""

    def __init__(self, progress: Any, total: int) -> None:
        self._callback = progress if callable(progress) else None
        self._hidden = None if progress is None else not progress
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> Callable[[int], object] | None:
        if self._callback is not None or self._hidden is True:
            return self._callback
        from tqdm.auto import tqdm

        self._bar = tqdm(total=self._total, desc="ascent", unit="step", disable=self._hidden)
        return self._show

    def _show(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
