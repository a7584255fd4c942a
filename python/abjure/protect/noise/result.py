"""What every noise takes and returns: labelled images as the kernels read them, and the data to publish."""

from __future__ import annotations

import dataclasses
import functools
import html
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ... import _interop
from ...errors import ArgumentError, DegenerateError, DeviceError, ShapeError
from ..ascent import CLEAN_PERPLEXITY, _pictures, _positive, difference
from ..bayes import Array, Prepared, resolve_bandwidth, rows
from ..certificate import Certificate, certify
from ..sources import is_bytes, unit

Channels = Literal["auto", "first", "last"]
NormName = Literal["linf", "l2"]
#: Rows of a certificate, halves of them that its intervals come from, draws of its smoothed bound.
CERTIFICATE_ROWS = 4096
CERTIFICATE_SUBSAMPLES = 100
CERTIFICATE_DRAWS = 2048


@dataclass(frozen=True)
class Budget:
    """How far the published values are from the clean ones, computed on what is stored."""

    #: ``"linf"``, ``"l2"``, ``"l0"`` (pixels) or ``"none"``, a change that no budget holds (its L∞ size is told).
    norm: str
    epsilon: float
    #: Largest change of one row.
    largest_change: float

    @property
    def holds(self) -> bool:
        """Whether the stored change is within the budget."""
        return self.largest_change <= self.epsilon


@dataclass(frozen=True)
class Images:
    """Labelled images as rows, and how an image lies in its row."""

    given: Any
    #: Rows × values: NumPy bytes, or what the kernels take as it is.
    matrix: Any
    codes: Array
    classes: Array
    shape: tuple[int, ...]
    #: Planes, lines, columns, channels of a pixel.
    layout: tuple[int, int, int, int]
    box: tuple[float, float]
    #: Units of the stored values to one of the caller's: 255 for bytes.
    scale: float

    @property
    def channels(self) -> int:
        return self.layout[0] * self.layout[3]

    def limits(self, norm: str, epsilon: float) -> tuple[str, float, float, float]:
        """Norm, budget and box in units of the stored values."""
        low, high = self.box
        return norm, epsilon * self.scale, low * self.scale, high * self.scale

    def empty(self, out: Any) -> Any:
        """Rows to write: new ones, or those of ``out``."""
        if out is None:
            return _interop.empty_like(self.matrix)
        if _interop.shape(out, "out") != self.shape:
            raise ShapeError(f"out: expected shape {self.shape}, got {tuple(out.shape)}")
        if _interop.is_torch(out):
            flat = out.detach().reshape(self.matrix.shape)
            if flat.data_ptr() != out.data_ptr():
                raise ArgumentError("out: expected a contiguous tensor")
            return flat.numpy() if self.scale != 1.0 else flat
        flat = out.reshape(self.matrix.shape)
        if not np.shares_memory(flat, out):
            raise ArgumentError("out: expected a C-contiguous array")
        return flat

    def rows_of(self, x: Any) -> Any:
        """An array like the one given, as rows of the kind of ``matrix``."""
        if _interop.is_torch(x):
            x = x.detach()
            x = x if self.scale == 1.0 else x.numpy()
        elif self.scale == 1.0 and not isinstance(x, np.ndarray):
            x = np.from_dlpack(x)
        return x.reshape(self.matrix.shape)

    def planar(self, matrix: Any = None) -> Any:
        """Rows as a float32 torch tensor ``(n, channels, height, width)`` in the caller's units."""
        import torch

        matrix = self.matrix if matrix is None else matrix
        if _interop.is_torch(matrix):
            flat = matrix.to(torch.float32) / self.scale
        else:
            flat = torch.from_numpy(np.array(matrix, dtype=np.float32)) / self.scale
        planes, height, width, step = self.layout
        shaped = flat.reshape(-1, planes, height, width, step).permute(0, 1, 4, 2, 3)
        return shaped.reshape(-1, planes * step, height, width).contiguous()

    def flatten(self, planar: Any) -> Any:
        """The reverse of :meth:`planar`, without its scale: float32 rows."""
        planes, height, width, step = self.layout
        shaped = planar.reshape(-1, planes, step, height, width).permute(0, 1, 3, 4, 2)
        return shaped.reshape(len(planar), -1)


def images(x: Any, y: Any, box: tuple[float, float], channels: Channels) -> Images:
    """``x`` and ``y`` checked, without looking at the values of ``x`` (the kernels do, before anything is returned)."""
    low, high = (float(b) for b in box)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"box: expected (low, high) with low < high, got {tuple(box)!r}")
    scale = 1.0
    if is_bytes(x):
        if (low, high) != (0.0, 1.0):
            raise ArgumentError("box: uint8 data have 255 levels in the box (0, 1); pass floats for another")
        if _interop.is_torch(x) and not x.is_cpu:
            raise DeviceError(f"x: expected a CPU tensor, got device {str(x.device)!r}")
        scale, shape = 255.0, _interop.shape(x, "x")
        if len(shape) < 1 or math.prod(shape) == 0:
            raise ShapeError(f"x: expected at least one row and one value, got shape {shape}")
        flat = x.detach().numpy() if _interop.is_torch(x) else np.asarray(x)
        matrix = np.ascontiguousarray(flat).reshape(shape[0], -1)
    else:
        matrix, shape = rows(x, "x")
    labels = _interop.integers(y, "y")
    if labels.ndim != 1 or len(labels) != shape[0]:
        raise ShapeError(f"y: expected shape ({shape[0]},), one label per row of x, got {labels.shape}")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DegenerateError(f"y: expected at least two classes, got {len(classes)}")
    codes = np.ascontiguousarray(codes.reshape(-1), dtype=np.int64)
    return Images(x, matrix, codes, classes, shape, layout(shape, channels), (low, high), scale)


def layout(shape: tuple[int, ...], channels: Channels) -> tuple[int, int, int, int]:
    """Planes, lines, columns and channels of a pixel of images of ``shape``.

    ``(n, h, w)``, ``(n, c, h, w)`` or ``(n, h, w, c)`` with c of 1 or 3 unless ``channels`` says where they are; rows
    of a square number of values are square images, other rows are one line.
    """
    if channels not in ("auto", "first", "last"):
        raise ArgumentError(f'channels: expected "auto", "first" or "last", got {channels!r}')
    if len(shape) == 2:
        side = math.isqrt(shape[1])
        return (1, side, side, 1) if side * side == shape[1] else (1, 1, shape[1], 1)
    if len(shape) == 3:
        return 1, shape[1], shape[2], 1
    if len(shape) == 4:
        if channels == "first" or (channels == "auto" and shape[1] in (1, 3)):
            return shape[1], shape[2], shape[3], 1
        if channels == "last" or (channels == "auto" and shape[3] in (1, 3)):
            return 1, shape[1], shape[2], shape[3]
        raise ShapeError(f'x: expected an axis of 1 or 3 channels, got shape {shape}; pass channels="first" or "last"')
    raise ShapeError(f"x: expected images (n, h, w), (n, c, h, w), (n, h, w, c) or rows, got shape {shape}")


def check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed: expected a whole number from 0 to 2^63 - 1, got {seed!r}")
    return int(seed)


def check_budget(data: Images, norm: str, epsilon: float) -> float:
    if norm not in ("linf", "l2"):
        raise ArgumentError(f"norm: expected 'linf' or 'l2', got {norm!r}")
    epsilon = _positive(epsilon, "epsilon")
    if data.scale != 1.0 and math.floor(data.scale * epsilon + 1e-9) < 1:
        raise ArgumentError(f"epsilon: expected at least one level, 1/{data.scale:g}, got {epsilon!r}")
    return epsilon


@dataclass(frozen=True)
class Noised:
    """Published data that carry a noise, with what was asked for and, on demand, what it does."""

    #: Array of the kind, shape and dtype of the input.
    x: Any = field(repr=False)
    clean: Any = field(repr=False)
    labels: Array = field(repr=False)
    method: str
    settings: dict[str, Any]
    norm: str
    epsilon: float
    #: Course of the training, where there was one.
    trace: Array | None = field(default=None, repr=False)
    _images: Images | None = field(default=None, repr=False)

    @property
    def delta(self) -> Any:
        """What was added: ``x - clean`` in the arithmetic type (int16 for uint8)."""
        return difference(self.x, self.clean)

    @functools.cached_property
    def budget(self) -> Budget:
        """The exact budget; one pass over the data, made once."""
        most = 0.0
        data = self._data()
        flat = data.rows_of(self.x)
        for start in range(0, len(data.codes), 1024):
            part = slice(start, start + 1024)
            change = np.asarray(difference(flat[part], data.matrix[part]), dtype=np.float64)
            if self.norm == "l2":
                size = np.sqrt((change**2).sum(axis=1)) / data.scale
            elif self.norm == "l0":
                planes, height, width, step = data.layout
                moved = (change != 0).reshape(-1, planes, height * width, step)
                size = moved.any(axis=(1, 3)).sum(axis=1)
            else:
                size = np.abs(change).max(axis=1) / data.scale
            most = max(most, float(size.max()))
        return Budget(self.norm, self.epsilon, most)

    @functools.cached_property
    def certificate(self) -> Certificate:
        """Budget and readings before and after, as of :func:`~abjure.protect.maximize_bayes_error`, on at most 4 096
        rows drawn with the seed; computed when first asked for. The clean reading is at the width of a class
        (perplexity 100).
        """
        data = self._data()
        matrix = data.matrix if data.scale == 1.0 else unit(data.matrix)
        width = ("perplexity", min(CLEAN_PERPLEXITY, max(1.5, len(data.codes) / 4)))
        budget = self.budget
        found = certify(
            self.clean,
            self.x.detach() if _interop.is_torch(self.x) else self.x,
            data.codes,
            data.classes,
            bandwidths=resolve_bandwidth(Prepared(matrix, data.codes, data.classes, data.shape), width),
            norm=budget.norm if budget.norm in ("linf", "l2") else "linf",
            epsilon=budget.epsilon,
            levels=None if data.scale == 1.0 else int(data.scale),
            limit=CERTIFICATE_ROWS,
            subsamples=CERTIFICATE_SUBSAMPLES,
            draws=CERTIFICATE_DRAWS,
            seed=int(self.settings.get("seed") or 0),
            protected_rows=None,
            settings={"method": self.method, **self.settings},
        )
        if budget.norm in ("linf", "l2"):
            return found
        # Pixels, or a change that no budget holds: levels of one value say nothing about either.
        return dataclasses.replace(
            found,
            norm=budget.norm,
            largest_change=budget.largest_change,
            largest_levels=None,
            allowed_levels=None,
        )

    def _data(self) -> Images:
        return self._images or images(self.clean, self.labels, self.settings.get("box", (0.0, 1.0)), "auto")

    def _repr_html_(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        budget = f"{self.norm} ≤ {self.epsilon:.6g}, largest change {self.budget.largest_change:.6g}"
        return f"<p>{html.escape(self.method)}({html.escape(settings)})</p><p>{html.escape(budget)}</p>"

    def plot(self, examples: int = 8) -> Any:
        """One image of each class before and after, with the difference; a matplotlib figure.

        Raises:
            ShapeError: the data are no images.
        """
        from matplotlib.figure import Figure

        pictures = _pictures(self, examples)  # type: ignore[arg-type]
        if not pictures or not len(pictures[0]):
            raise ShapeError(f"x: expected images to show, got shape {tuple(self.x.shape)}")
        figure = Figure(figsize=(1.2 * len(pictures[0]) + 0.6, 4), layout="constrained")
        axes = figure.subplots(3, len(pictures[0]), squeeze=False)
        for row, (name, shown) in enumerate(zip(("clean", "published", "difference"), pictures, strict=True)):
            for column, image in enumerate(shown):
                axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes[row, column].set(xticks=[], yticks=[])
            axes[row, 0].set_ylabel(name)
        figure.suptitle(self.method)
        return figure


def finish(
    data: Images,
    out: Any,
    given_out: Any,
    method: str,
    norm: str,
    epsilon: float,
    settings: dict[str, Any],
    trace: Array | None = None,
) -> Noised:
    """The result over rows that a kernel filled."""
    if given_out is not None:
        published = given_out
    else:
        published = out.reshape(data.shape)
        if data.scale != 1.0:
            if _interop.is_torch(data.given):
                import torch

                published = torch.from_numpy(published)
        else:
            published = _interop.like(published, data.given)
    clean = data.given if data.scale != 1.0 else data.matrix.reshape(data.shape)
    return Noised(published, clean, data.classes[data.codes], method, settings, norm, epsilon, trace, data)


__all__ = ["Budget", "Channels", "Images", "Noised", "check_budget", "check_seed", "finish", "images"]
