"""Streaming diagonal importance: means of squared (Fisher) or absolute (label-free) gradients, per parameter."""

from __future__ import annotations

import copy
import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .. import _native
from .._files import replacing
from .._interop import device_path, is_torch, source
from ..errors import AbjureError, ArgumentError, DTypeError, LayoutError, ShapeError
from .params import listed, named

Unit = Literal["batch", "sample"]
_FORMAT = "abjure.fisher.1"


class Fisher:
    """Diagonal Fisher importance, accumulated one gradient at a time.

    ``I = (1/n) Σ w |g|^power`` with ``n = Σ w``, element by element, in ``dtype`` (float32 or float64) whatever the
    dtype of the gradients: squares of half-precision gradients underflow in half precision. What is kept is the sum;
    its relative error after k updates is at most ``(k + 2) * 2**-24`` in float32 (``2**-53`` in float64).

    ``unit`` says what ``g`` is, and importances of different units never mix:

    - ``"batch"``: the gradient of a batch's mean loss, as the published code of Selective Synaptic Dampening
      (arXiv 2308.07707) squares it. Its size depends on the batch size.
    - ``"sample"``: the gradient of one example, the empirical Fisher.

    ``power`` is 2 for the Fisher information, and 1 for the importances of label-free dampening (arXiv 2402.19308),
    means of absolute gradients. The two do not mix either: a ratio of 10 in squares is one of 3.16 in absolute values.

    Gradients must be unscaled (mixed-precision loss scales enter squared) and not yet averaged over processes if the
    batch is meant to be one process's.

    Args:
        unit: ``"batch"`` or ``"sample"``.
        dtype: ``"float32"`` or ``"float64"``, of the sums.
        power: 2 or 1.

    Raises:
        ArgumentError: an unknown unit, dtype or power.
    """

    def __init__(self, unit: Unit = "batch", dtype: str = "float32", power: int = 2) -> None:
        if unit not in ("batch", "sample"):
            raise ArgumentError(f"unit: expected 'batch' or 'sample', got {unit!r}")
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in ("float32", "float64"):
            raise ArgumentError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
        if power not in (1, 2):
            raise ArgumentError(f"power: expected 1 or 2, got {power!r}")
        self._unit: Unit = unit
        self._power = int(power)
        self._provenance: dict[str, Any] = {}
        self._dtype = dtype
        self._count = 0.0
        self._sums: dict[str, Any] = {}

    @property
    def unit(self) -> Unit:
        """What one gradient was: a batch's mean or one sample's."""
        return self._unit

    @property
    def power(self) -> int:
        """2 where squares are summed, 1 where absolute values are."""
        return self._power

    @property
    def provenance(self) -> dict[str, Any]:
        """Where this comes from, as :func:`importance` noted it; saved with it. Entries may be added; JSON only.

        ``model`` (class), ``name``, ``parameters`` (hash), ``loss``, ``batches``, ``examples``, ``data`` (hash),
        ``mode``, ``versions``, ``date``, ``notes``. After ``merge`` and ``subtract``: the two it was made of.
        """
        return self._provenance

    @property
    def dtype(self) -> str:
        """Dtype of the sums."""
        return self._dtype

    @property
    def count(self) -> float:
        """Total weight of the gradients seen."""
        return self._count

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in order."""
        return list(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def sum(self, name: str) -> Any:
        """The sum ``Σ w |g|^power`` of a parameter: the array that is kept, not a copy.

        Raises:
            ArgumentError: no such parameter.
        """
        try:
            return self._sums[name]
        except KeyError:
            raise ArgumentError(f"name: expected one of {listed(self._sums)}, got {name!r}") from None

    def mean(self, name: str) -> Any:
        """The importance ``I`` of a parameter, in its shape; zeros before the first update.

        Raises:
            ArgumentError: no such parameter.
        """
        found = self.sum(name)
        count = found.dtype.type(self._count) if isinstance(found, np.ndarray) else self._count
        return found / count if self._count else found * 0

    def __getitem__(self, name: str) -> Any:
        return self.mean(name)

    def update(self, gradients: Any, weight: float | Sequence[float] = 1.0, *, stacked: bool = False) -> Fisher:
        """Adds the squares (``power=1``: absolute values) of one gradient, or of stacked ones, with ``weight``.

        Args:
            gradients: a torch module, whose ``named_parameters()`` hold ``.grad`` (tied weights once), or a mapping of
                name to gradient, any of the four dtypes. A gradient of None counts as zeros.
            weight: of this gradient; 1 for every batch is what the published code does, ragged last batch included.
            stacked: the gradients carry a leading axis of examples; needs ``unit="sample"``. ``weight`` is each one's,
                or holds one number (0 or more) for each.

        Returns:
            This object.

        Raises:
            NonFiniteError: a gradient is NaN or infinite, or its square overflows the sum; the parameter is named.
            ShapeError, DTypeError, LayoutError, DeviceError: a gradient does not fit.
            ArgumentError: names differ from earlier updates, ``weight`` is not a positive number, or its numbers are
                negative, all 0, or not one for each example.
            Nothing has been added then.
        """
        weights = _weights(weight, stacked)
        if stacked and self._unit != "sample":
            raise ArgumentError("stacked: expected unit='sample', got unit='batch'")
        given, likes = self._gradients(gradients, stacked)
        sums = self._sums or {name: _zeros(like, shape, self._dtype) for name, (like, shape) in likes.items()}
        examples = _examples(given, sums, stacked)
        if len(weights) not in (1, examples):
            raise ArgumentError(f"weight: expected 1 number or {examples}, one for each example, got {len(weights)}")
        flat = {name: _readable(g, name) for name, g in given.items() if g is not None}
        for name, g in flat.items():
            _named_error(name, _check, sums[name], g, weights, self._power)
        for name, g in flat.items():
            _accumulate(sums[name], g, weights, self._power)
        self._sums = sums
        self._count += sum(weights) if len(weights) > 1 else weights[0] * examples
        return self

    def _add(self, name: str, gradient: Any, weight: float) -> None:
        """Adds one parameter's gradient, whose shape is known to fit, and leaves the count alone."""
        g = _readable(gradient, name)
        _named_error(name, _check, self._sums[name], g, [weight], self._power)
        _accumulate(self._sums[name], g, [weight], self._power)

    def _begin(self, parameters: Mapping[str, Any]) -> None:
        """Fixes the names and shapes before the first update."""
        self._sums = {name: _zeros(p, tuple(p.shape), self._dtype) for name, p in parameters.items()}

    def _continue(self, saved: Fisher) -> None:
        """Takes the sums of a file, on the devices of those begun here."""
        import torch

        for name, s in saved._sums.items():
            mine = torch.from_numpy(s if s.flags.writeable else s.copy())
            self._sums[name] = mine.to(self._sums[name].device)
        self._count = saved._count

    def _gradients(
        self, gradients: Any, stacked: bool
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, tuple[int, ...]]]]:
        """Name to gradient or None, and name to (array whose kind the sum takes, shape of the sum)."""
        if isinstance(gradients, Mapping):
            given = dict(gradients)
            for n, g in given.items():
                if g is not None and not hasattr(g, "shape"):
                    raise DTypeError(f"gradients: {n!r}: expected an array, got {type(g).__name__}")
            likes = {n: (g, tuple(g.shape)[1 if stacked else 0 :]) for n, g in given.items() if hasattr(g, "shape")}
        else:
            parameters = named(gradients, "gradients")
            given = {name: p.grad for name, p in parameters.items()}
            likes = {name: (p, tuple(p.shape)) for name, p in parameters.items()}
        if not given:
            raise ArgumentError("gradients: expected at least one parameter, got none")
        known = self._sums or likes
        if given.keys() != known.keys():
            extra, missing = given.keys() - known.keys(), known.keys() - given.keys()
            found = [f"unknown {listed(extra)}"] if extra else []
            found += [f"missing {listed(missing)}"] if missing else []
            expected = "the names of earlier updates" if self._sums else "arrays"
            raise ArgumentError(f"gradients: expected {expected}, got {'; '.join(found)}")
        return given, likes

    def _expect_same_kind(self, other: Fisher) -> None:
        for what in ("unit", "power", "dtype"):
            if getattr(self, what) != getattr(other, what):
                raise ArgumentError(f"other: expected {what} {getattr(self, what)!r}, got {getattr(other, what)!r}")

    def _expect_alike(self, other: Fisher) -> None:
        if not isinstance(other, Fisher):
            raise DTypeError(f"other: expected a Fisher, got {type(other).__name__}")
        self._expect_same_kind(other)
        if self._sums.keys() != other._sums.keys():
            differing = self._sums.keys() ^ other._sums.keys()
            raise ArgumentError(f"other: expected the same parameter names, got a difference in {listed(differing)}")
        for name in self._sums:
            if tuple(self._sums[name].shape) != tuple(other._sums[name].shape):
                found = tuple(other._sums[name].shape)
                raise ShapeError(f"other: {name!r}: expected shape {tuple(self._sums[name].shape)}, got {found}")

    def _combine(self, other: Fisher, subtract: bool) -> Fisher:
        self._expect_alike(other)
        if subtract and other._count > self._count:
            raise ArgumentError(f"other: expected a count of at most {self._count:g}, got {other._count:g}")
        for name, s in self._sums.items():
            _named_error(name, _combine, s, other._sums[name], subtract, True)
        for name, s in self._sums.items():
            _combine(s, other._sums[name], subtract, False)
        if self._provenance or other._provenance:
            operation = "subtract" if subtract else "merge"
            self._provenance = {operation: [self._provenance, copy.deepcopy(other._provenance)]}
        self._count += -other._count if subtract else other._count
        return self

    def merge(self, other: Fisher) -> Fisher:
        """Adds what ``other`` has seen: ``I = (n₁ I₁ + n₂ I₂) / (n₁ + n₂)``, added in float64, in place.

        Raises:
            ArgumentError, ShapeError: unit, power, dtype, names or shapes differ.
            NonFiniteError: a sum overflows. Nothing has been changed then.
        """
        if isinstance(other, Fisher) and not self._sums:
            self._expect_same_kind(other)
            new = other.copy()
            self._sums, self._count, self._provenance = new._sums, new._count, new._provenance
            return self
        return self._combine(other, subtract=False)

    def subtract(self, other: Fisher) -> Fisher:
        """Takes away what ``other`` has seen, which must be part of what this has seen, in place.

        From the importance of all the data and that of the forget set this makes that of the retained data. Needs
        ``unit="sample"`` for that, or batches that did not mix the two. Differences that rounding made negative (by
        less than 1e-3 of what is taken away in float32, 1e-9 in float64) become 0.

        Raises:
            ArgumentError, ShapeError: unit, power, dtype, names or shapes differ, or more is taken away than there is.
            Nothing has been changed then.
        """
        return self._combine(other, subtract=True)

    def copy(self) -> Fisher:
        """An independent copy."""
        new = Fisher(self._unit, self._dtype, self._power)
        new._count = self._count
        new._provenance = copy.deepcopy(self._provenance)
        new._sums = {name: s.clone() if is_torch(s) else s.copy() for name, s in self._sums.items()}
        return new

    def all_reduce(self, group: Any = None) -> Fisher:
        """Sums over the processes of a ``torch.distributed`` group, in place; does nothing where none is initialised.

        Raises:
            ArgumentError: the processes hold different units, powers, dtypes, names or shapes. Nothing is changed then.
        """
        import torch
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        mine = (self._unit, self._power, self._dtype, [(n, tuple(s.shape)) for n, s in self._sums.items()])
        everyone: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(everyone, mine, group=group)
        if any(other != mine for other in everyone):
            raise ArgumentError("all_reduce: expected the same unit, power, dtype and parameters in every process")
        for s in self._sums.values():
            distributed.all_reduce(s if is_torch(s) else torch.from_numpy(s), group=group)
        counts: list[Any] = [None] * len(everyone)
        distributed.all_gather_object(counts, self._count, group=group)
        self._count = float(sum(counts))
        return self

    def state_dict(self) -> dict[str, Any]:
        """``{"unit", "power", "dtype", "count", "sum": {name: array}, "provenance"}``; the arrays that are kept."""
        return {
            "unit": self._unit,
            "power": self._power,
            "dtype": self._dtype,
            "count": self._count,
            "sum": dict(self._sums),
            "provenance": copy.deepcopy(self._provenance),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Fisher:
        """The reverse of :meth:`state_dict`; the arrays are taken, not copied. ``power`` is 2 where it is not given.

        Raises:
            ArgumentError: an entry is missing or the count is negative.
            NonFiniteError, ArgumentError: a sum is NaN, infinite or negative.
            DTypeError: a sum has another dtype.
        """
        missing = {"unit", "dtype", "count", "sum"} - set(state)
        if missing:
            raise ArgumentError(f"state: expected 'unit', 'dtype', 'count' and 'sum', got no {listed(missing)}")
        new = cls(state["unit"], state["dtype"], state.get("power", 2))
        new._provenance = dict(state.get("provenance", {}))
        new._count = float(state["count"])
        if not (np.isfinite(new._count) and new._count >= 0):
            raise ArgumentError(f"state: expected a count of 0 or more, got {new._count}")
        for name, s in state["sum"].items():
            if str(s.dtype).removeprefix("torch.") != new.dtype:
                raise DTypeError(f"state: {name!r}: expected dtype {new.dtype}, got {s.dtype}")
            _named_error(name, _check_sum, s)
            new._sums[name] = s
        return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: the sums by name; unit, power, count, dtype and provenance in the metadata.

        The file appears complete or not at all.

        Raises:
            ArgumentError: the path cannot be written, or the provenance is not JSON.
        """
        self._save(path, {})

    def _save(self, path: str | os.PathLike[str], extra: Mapping[str, str]) -> None:
        from safetensors.numpy import save_file

        try:
            provenance = json.dumps(self._provenance)
        except (TypeError, ValueError) as err:
            raise ArgumentError(f"provenance: expected entries that JSON can hold ({err})") from err
        arrays = {name: np.ascontiguousarray(_to_numpy(s)).reshape(s.shape) for name, s in self._sums.items()}
        metadata = {
            "format": _FORMAT,
            "content": "sum of weighted |gradient| to the power; divide by count",
            "unit": self._unit,
            "power": str(self._power),
            "dtype": self._dtype,
            "count": repr(self._count),
            "provenance": provenance,
            "abjure": _native.__version__,
            **extra,
        }
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Reads what :meth:`save` wrote; the arrays are NumPy's.

        Raises:
            ArgumentError: the file cannot be read or is not a Fisher file.
            NonFiniteError: it holds a value that a Fisher cannot have.
        """
        return cls._load(path)[0]

    @classmethod
    def _load(cls, path: str | os.PathLike[str]) -> tuple[Fisher, dict[str, str]]:
        """What the file holds, and all of its metadata."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ArgumentError(f"path: expected a file of format {_FORMAT!r}, got {metadata.get('format')!r}")
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as err:
            raise ArgumentError(f"path: expected a readable Fisher file, got {os.fspath(path)!r} ({err})") from err
        try:
            state = {
                "unit": metadata["unit"],
                "power": int(metadata.get("power", 2)),
                "dtype": metadata["dtype"],
                "count": float(metadata["count"]),
                "provenance": json.loads(metadata.get("provenance", "{}")),
                "sum": sums,
            }
        except (KeyError, ValueError) as err:
            raise ArgumentError(f"path: expected unit, power, dtype and count in the metadata ({err})") from err
        return cls.from_state_dict(state), metadata

    def _summary(self) -> str:
        size = sum(int(np.prod(s.shape)) for s in self._sums.values())
        kind = f"unit {self._unit!r}" + (", power 1" if self._power == 1 else "")
        return f"{kind}, count {self._count:g}, {len(self)} tensors, {size:,} parameters, {self._dtype}"

    def __repr__(self) -> str:
        return f"Fisher({self._summary()})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{tuple(s.shape)}</td><td>{_mean_of(s, self._count):.3g}</td></tr>"
            for name, s in self._sums.items()
        )
        head = "<tr><th>parameter</th><th>shape</th><th>mean importance</th></tr>"
        facts = "".join(f"<br>{html.escape(f'{k}: {v}')}" for k, v in self._provenance.items())
        return f"<p><b>Fisher</b>: {html.escape(self._summary())}{facts}</p><table>{head}{rows}</table>"


def _mean_of(s: Any, count: float) -> float:
    size = int(np.prod(s.shape))
    total = float(s.double().sum()) if is_torch(s) else float(np.sum(s, dtype=np.float64))
    return total / (count * size) if count and size else 0.0


def _weights(weight: Any, stacked: bool) -> list[float]:
    """One weight, or those of stacked examples."""
    found = np.asarray(weight.detach().cpu() if is_torch(weight) else weight, dtype=np.float64)
    if found.ndim == 0:
        if not (np.isfinite(found) and found > 0):
            raise ArgumentError(f"weight: expected a finite number above 0, got {float(found)}")
        return [float(found)]
    if not stacked or found.ndim > 1:
        expected = "one number, or one for each stacked example" if stacked else "one number"
        raise ArgumentError(f"weight: expected {expected}, got shape {found.shape}")
    if not (np.isfinite(found).all() and (found >= 0).all() and found.any()):
        raise ArgumentError(f"weight: expected finite numbers of 0 or more, not all 0, got {found}")
    return [float(w) for w in found]


def _zeros(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Zeros of the kind of ``like``; on the CPU from calloc, so that a parameter without gradients costs nothing."""
    if is_torch(like):
        import torch

        if like.device.type == "cpu":
            return torch.from_numpy(np.zeros(shape, dtype=dtype))
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device)
    return np.zeros(shape, dtype=dtype)


def _examples(given: Mapping[str, Any], sums: Mapping[str, Any], stacked: bool) -> int:
    """How many gradients are stacked, after checking every shape."""
    lengths = {}
    for name, g in given.items():
        if g is None:
            continue
        found, expected = tuple(g.shape), tuple(sums[name].shape)
        if stacked and found:
            lengths[name], found = found[0], found[1:]
        elif stacked:
            raise ShapeError(f"gradients: {name!r}: expected a leading axis of examples, got shape ()")
        if found != expected:
            raise ShapeError(f"gradients: {name!r}: expected shape {expected} per example, got {found}")
    if len(set(lengths.values())) > 1:
        raise ShapeError(f"gradients: expected the same number of examples for all, got {lengths}")
    if stacked and not lengths:
        raise ShapeError("gradients: expected at least one stacked gradient, got none")
    return next(iter(lengths.values())) if stacked else 1


def _readable(g: Any, name: str) -> Any:
    """A gradient as C-contiguous memory on its own device."""
    if is_torch(g):
        if g.is_sparse:
            raise LayoutError(f"gradients: {name!r}: expected a dense gradient, got a sparse one; use .to_dense()")
        if g.device.type != "cpu":
            return g.detach()
        return source(g, "gradients").contiguous()
    g = source(np.asarray(g) if isinstance(g, np.generic) else g, "gradients")
    return g if not isinstance(g, np.ndarray) or g.flags.c_contiguous else np.array(g, order="C")


def _named_error(name: str, call: Any, *args: Any) -> None:
    """Runs ``call``; its error, if any, is raised again with the parameter's name."""
    try:
        call(*args)
    except AbjureError as err:
        raise type(err)(f"{name!r}: {err}") from None


def _check(s: Any, g: Any, weights: list[float], power: int) -> None:
    path = device_path(g, "fisher_accumulate")
    if path is not None:
        path(s, g, weights, power, check_only=True)
    else:
        _native.fisher_check(s, g, weights, power)


def _accumulate(s: Any, g: Any, weights: list[float], power: int) -> None:
    path = device_path(g, "fisher_accumulate")
    if path is not None:
        path(s, g, weights, power)
    else:
        _native.fisher_accumulate(s, g, weights, power, checked=True)


def _combine(s: Any, other: Any, subtract: bool, check_only: bool) -> None:
    path = device_path(s, "fisher_combine")
    if path is not None:
        path(s, other, subtract, check_only=check_only)
    else:
        _native.fisher_combine(s, other, subtract, check_only)


def _check_sum(s: Any) -> None:
    if is_torch(s) and s.device.type != "cpu":
        if not bool((s.isfinite() & (s >= 0)).all()):
            raise ArgumentError("expected finite sums of 0 or more")
        return
    try:
        _native.check_importances(s, s)
    except AbjureError as err:
        raise type(err)(f"expected finite sums of 0 or more ({err})") from None


def _to_numpy(s: Any) -> np.ndarray[Any, Any]:
    return s.cpu().numpy() if is_torch(s) else np.asarray(s)
