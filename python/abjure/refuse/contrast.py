"""Directions from two classes of activations, without holding the activations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _native
from .._files import reading, write_atomically
from .._interop import integers, is_torch, source
from ..errors import ArgumentError, DegenerateError, DeviceError, NonFiniteError, ShapeError
from .directions import ArrayT, Direction, Edit, Site, Vector, _finite, _to_numpy, _width
from .reservoir import Reservoir

#: A difference of means shorter than this part of the longer mean is rounding, not a direction.
_NO_DIFFERENCE = 1e-12

_FORMAT = "abjure.contrast"
_SETTINGS = ("covariance", "nonfinite", "winsorize", "layer", "site", "position")


def _labels(label: Any, leading: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Labels 0 and 1 of rows, as one number or in their leading shape."""
    labels: npt.NDArray[np.int64] = integers(label, "label").reshape(np.shape(label))
    if not ((labels == 0) | (labels == 1)).all():
        raise ArgumentError(f"label: expected 0 or 1, got {np.setdiff1d(labels, (0, 1))[0]}")
    if labels.ndim and labels.shape != leading:
        raise ShapeError(f"label: expected a scalar or shape {leading}, got {labels.shape}")
    return labels


class Contrast:
    """Streaming mean (and covariance, where asked for) of two classes of activations, in float64.

    Class 1 is the one the directions point to (harmful, refused). Memory is two means of d numbers, plus two d × d
    matrices with ``covariance=True``. Batches are merged by Chan's formula, so a common offset costs no accuracy, and
    the result does not depend on the number of threads. Half-precision rows are added eight at a time in f32, which
    costs a mean at most ``2⁻²²`` of the mean magnitude; second moments of bf16 rows are multiplied in f32, 256 rows at
    a time: element (i, j) of the covariance is off by at most ``2⁻¹⁵`` (as a rule 1e-7) times the mean of ``|aᵢ aⱼ|``,
    a the centred activations. Where that matters pass ``x.float()``, whose sums and products are float64.

    Args:
        covariance: keep second moments, which :meth:`pca`, :meth:`lda` and :meth:`leace` need.
        nonfinite: ``"error"`` refuses a batch that holds a NaN or an infinity; ``"skip"`` leaves such rows out and
            counts them in :attr:`skipped`.
        winsorize: clamp every row at this quantile of its own absolute values (linear interpolation) before it
            counts, so that a few massive activations do not make the mean; None or 1 leaves rows as they are.
        layer, site, position: where the activations are read, kept in the directions.
        reservoir: also keep a uniform sample of up to this many rows of each class, see :attr:`sample`.
        seed: of the sample; workers whose contrasts will be merged need a seed each.
    """

    def __init__(
        self,
        covariance: bool = False,
        *,
        nonfinite: Literal["error", "skip"] = "error",
        winsorize: float | None = None,
        layer: int | None = None,
        site: Site = "pre",
        position: int | str | None = None,
        reservoir: int | None = None,
        seed: int = 0,
    ) -> None:
        if nonfinite not in ("error", "skip"):
            raise ArgumentError(f'nonfinite: expected "error" or "skip", got {nonfinite!r}')
        if site not in ("pre", "post"):
            raise ArgumentError(f'site: expected "pre" or "post", got {site!r}')
        if winsorize is not None and not 0 < _finite(winsorize, "winsorize") <= 1:
            raise ArgumentError(f"winsorize: expected a quantile in (0, 1], got {winsorize}")
        self.covariance = covariance
        self.nonfinite = nonfinite
        #: Quantile of its absolute values at which each row is clamped.
        self.winsorize = None if winsorize == 1 else winsorize
        self.layer, self.site, self.position = layer, site, position
        #: Rows left out as non-finite.
        self.skipped = 0
        self._moments: tuple[Any, Any] | None = None
        self._reservoir = None if reservoir is None else Reservoir(reservoir, seed)

    @property
    def reservoir(self) -> int | None:
        """Rows of each class that are kept at most, None where no sample is."""
        return None if self._reservoir is None else self._reservoir.size

    @property
    def sample(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """A uniform sample without replacement of the rows seen, and their labels.

        Rows ``(m, d)``, float64 where they came so and float32 otherwise, of class 0 and then of class 1; all of a
        class where it has no more than ``reservoir``. Which rows are drawn depends on the seed and on each row's
        place in its class, not on the batches; contrasts of one seed draw the same places, so that the samples of
        several layers belong together. Winsorised rows are kept as they counted.

        Raises:
            ArgumentError: no sample was asked for.
        """
        if self._reservoir is None:
            raise ArgumentError("reservoir: expected Contrast(reservoir=n), which keeps rows")
        return self._reservoir.sample(0 if self._moments is None else self._moments[0].width)

    def update(self, x: Any, label: Any) -> Contrast:
        """Adds activations.

        Args:
            x: ``(d,)``, ``(n, d)`` or ``(..., d)``.
            label: 0 or 1 for all rows (booleans too), or one per row with the leading shape of ``x``.

        Returns:
            ``self``.

        Raises:
            ShapeError, DTypeError, LayoutError, DeviceError: an argument does not fit what came before.
            ArgumentError: a label other than 0 and 1.
            NonFiniteError: by policy. Nothing has been added then.
        """
        if is_torch(x) and x.device.type != "cpu":
            raise DeviceError(f"x: expected a CPU tensor, got device {str(x.device)!r}; means are kept on the CPU")
        width = _width(x)
        rows = source(x, "x")
        # Between two layers of a model all caches are cold: one label for all rows is looked at without NumPy.
        labels = None if isinstance(label, int) and label in (0, 1) else _labels(label, tuple(rows.shape[:-1]))
        shared = int(label) if labels is None else int(labels) if labels.ndim == 0 else None
        if self._moments is not None and self._moments[0].width != width:
            raise ShapeError(f"x: expected a last axis of {self._moments[0].width}, got {width}")
        if self.winsorize is not None:
            rows = winsorized(rows, self.winsorize)
        skip = self.nonfinite == "skip"
        held = self._moments or (_native.Moments(width, self.covariance), _native.Moments(width, self.covariance))
        if shared is not None:
            skipped = held[shared].update(rows, None, skip)
        else:
            assert labels is not None
            # Both classes are read before either total changes.
            batch = [_native.Moments(width, self.covariance) for _ in range(2)]
            weights = [(labels.reshape(-1) == value).astype(np.float64) for value in (0, 1)]
            skipped = sum(m.update(rows, w, skip) for m, w in zip(batch, weights, strict=True))
            for total, part in zip(held, batch, strict=True):
                total.merge(part)
        self._moments = held
        self.skipped += skipped
        if self._reservoir is not None:
            self._reservoir.update(rows, labels if shared is None else np.asarray(shared))
        return self

    def merge(self, other: Contrast) -> Contrast:
        """Adds what ``other`` has seen, for instance on another worker. Returns ``self``.

        Raises:
            ShapeError, ArgumentError: another width, covariance setting, layer, site or position; a sample in one
                only, of another size, or drawn with the same seed. Nothing has been added then.
        """
        for name in ("covariance", "winsorize", "layer", "site", "position", "reservoir"):
            if getattr(self, name) != getattr(other, name):
                raise ArgumentError(f"other: expected {name}={getattr(self, name)!r}, got {getattr(other, name)!r}")
        if other._moments is None:
            return self
        sampled = None
        if self._reservoir is not None and other._reservoir is not None:
            self._reservoir.check(other._reservoir)
            sampled = self._reservoir.copy()
        if self._moments is None:
            self._moments = (other._moments[0].copy(), other._moments[1].copy())
        else:
            merged = (self._moments[0].copy(), self._moments[1].copy())
            for mine, theirs in zip(merged, other._moments, strict=True):
                mine.merge(theirs.copy())
            self._moments = merged
        if sampled is not None and other._reservoir is not None:
            sampled.merge(other._reservoir)
            self._reservoir = sampled
        self.skipped += other.skipped
        return self

    def _state(self, prefix: str = "") -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays, their names begun with ``prefix``, and JSON values: all that :meth:`_from_state` needs."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        facts: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS} | {"skipped": self.skipped}
        if self._moments is not None:
            arrays["weight"] = np.array([m.weight for m in self._moments])
            for label, moments in enumerate(self._moments):
                arrays[f"{label}.mean"] = moments.mean
                if self.covariance:
                    arrays[f"{label}.second"] = moments.second
        if self._reservoir is not None:
            sampled, facts["reservoir"] = self._reservoir.state()
            arrays |= {f"sample.{name}": np.ascontiguousarray(a) for name, a in sampled.items()}
        return {prefix + name: a for name, a in arrays.items()}, facts

    @classmethod
    def _from_state(cls, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> Contrast:
        """What :meth:`_state` gave; ValueError or KeyError where it does not fit together."""
        options = {name: facts[name] for name in _SETTINGS if name != "covariance"}
        new = cls(bool(facts["covariance"]), **options)
        new.skipped = int(facts["skipped"])
        width = 0
        if "weight" in arrays:
            low, high = (float(w) for w in arrays["weight"])
            held = []
            for label, weight in enumerate((low, high)):
                mean, second = arrays[f"{label}.mean"], arrays[f"{label}.second"] if new.covariance else None
                if not all(a is None or (a.dtype == np.float64 and np.isfinite(a).all()) for a in (mean, second)):
                    raise ValueError("moments: expected finite float64")
                held.append(_native.Moments.from_parts(weight, mean, second))
            width = held[0].width
            if held[1].width != width:
                raise ValueError("moments: the classes differ in width")
            new._moments = (held[0], held[1])
        if "reservoir" in facts:
            sampled = {name.removeprefix("sample."): a for name, a in arrays.items() if name.startswith("sample.")}
            new._reservoir = Reservoir.from_state(sampled, facts["reservoir"], width)
        return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: moments in float64, the sample as it is, settings as JSON in its metadata.

        What :meth:`load` gives back continues to the bit as this one would. The file appears complete or not at all.

        Raises:
            ArgumentError: ``path`` cannot be written.
        """
        from safetensors.numpy import save

        arrays, facts = self._state()
        metadata = json.dumps({"version": 1, **facts}, sort_keys=True)
        write_atomically(path, save(arrays, {_FORMAT: metadata}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Contrast:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not a contrast.
        """
        with reading(path, "Contrast") as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            return cls._from_state({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118

    @property
    def counts(self) -> tuple[int, int]:
        """Rows of class 0 and of class 1."""
        if self._moments is None:
            return (0, 0)
        return (round(self._moments[0].weight), round(self._moments[1].weight))

    @property
    def means(self) -> tuple[Vector, Vector]:
        """Means of class 0 and class 1, ``(d,)`` float64.

        Raises:
            DegenerateError: a class is empty.
        """
        classes = self._classes()
        return classes[0].mean, classes[1].mean

    def _classes(self) -> tuple[Any, Any]:
        counts = self.counts
        if self._moments is None or 0 in counts:
            raise DegenerateError(
                f"label: expected activations of both classes, got {counts[0]} of 0, {counts[1]} of 1"
            )
        return self._moments

    def _difference(self) -> Vector:
        low, high = self.means
        difference: Vector = high - low
        if np.linalg.norm(difference) <= _NO_DIFFERENCE * max(np.linalg.norm(low), np.linalg.norm(high)):
            raise DegenerateError("x: the class means are equal, so there is no direction between them")
        return difference

    def _direction(self, vector: Vector, method: str, **facts: Any) -> Direction:
        provenance = {"method": method, "skipped": self.skipped, **facts}
        if self.winsorize is not None:
            provenance["winsorize"] = self.winsorize
        return Direction(vector, self.layer, self.site, self.position, self.counts, provenance)

    def difference_in_means(self, *, projected: bool = False) -> Direction:
        """Mean of class 1 minus mean of class 0, not normalised (Arditi et al. 2024, eq. 3).

        Args:
            projected: take away the component along the mean of class 0, so that removing the direction leaves that
                mean as it is.

        Raises:
            DegenerateError: a class is empty, or the means are equal to 1e-12 of their length (the residual stream of
                layer 0 at a position where all prompts have the same token).
        """
        difference = self._difference()
        if not projected:
            return self._direction(difference, "difference_in_means")
        low = self.means[0]
        if low.any():
            left = difference - low * (difference @ low) / (low @ low)
            if np.linalg.norm(left) <= _NO_DIFFERENCE * np.linalg.norm(difference):
                raise DegenerateError("x: the class means lie along one line, so nothing is left beside the mean of 0")
            difference = left
        return self._direction(difference, "difference_in_means", projected=True)

    def _scatters(self, least: int) -> tuple[Vector, Vector]:
        if not self.covariance:
            raise ArgumentError("covariance: expected Contrast(covariance=True), which keeps second moments")
        classes = self._classes()
        if min(self.counts) < least or sum(self.counts) < 3:
            raise DegenerateError(f"label: too few activations for a covariance, got counts {self.counts}")
        return classes[0].second, classes[1].second

    def _full_rank(self, rank: int, shrinkage: float) -> None:
        """Refuses a covariance that too few rows leave singular; rounding may hide it from a factorisation."""
        width = self._classes()[0].width
        if shrinkage == 0 and rank < width:
            raise DegenerateError(
                f"x: the covariance is singular, {sum(self.counts)} activations of width {width}; pass shrinkage > 0"
            )

    def pca(self) -> Direction:
        """First principal component about the midpoint of the class means, classes weighted equally; unit length.

        This is the leading eigenvector of ``(Σ₀ + Σ₁)/2 + ΔΔᵀ/4``, the streaming form of the pair-centred component
        of representation engineering (Zou et al. 2023): centring the pair differences themselves would subtract the
        mean difference that is sought. It points to class 1. Time is that of an eigendecomposition of d × d.

        Raises:
            ArgumentError: no covariance was kept.
            DegenerateError: a class is empty, or the component is orthogonal to the difference in means.
        """
        return self._components(1, "pca")[0]

    def subspace(self, rank: int) -> list[Direction]:
        """The leading principal components as :meth:`pca` has them, usable together wherever ``q`` is expected.

        Each points to class 1; one that is orthogonal to the difference in means has its largest element positive.

        Args:
            rank: how many, from 1 to the number of rows less two, and at most d.

        Raises:
            ArgumentError: no covariance was kept.
            DegenerateError: fewer activations than the rank needs, or an empty class.
        """
        least = min(sum(self.counts) - 1, self._classes()[0].width)
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
            raise ArgumentError(f"rank: expected 1 or more, got {rank!r}")
        if rank > least:
            raise DegenerateError(f"rank: expected at most {least} with counts {self.counts}, got {rank}")
        return self._components(int(rank), "subspace")

    def _components(self, rank: int, method: str) -> list[Direction]:
        scatter = self._scatters(1)
        n = self.counts
        difference = self._difference()
        total = (scatter[0] / n[0] + scatter[1] / n[1]) / 2 + np.outer(difference, difference) / 4
        values, vectors = np.linalg.eigh(total)
        found = []
        for i in range(1, rank + 1):
            component: Vector = vectors[:, -i]
            along = float(component @ difference)
            if abs(along) <= 1e-12 * float(np.linalg.norm(difference)):
                if rank == 1:
                    raise DegenerateError("x: the first principal component is orthogonal to the difference in means")
                along = float(component[np.argmax(np.abs(component))])
            share = float(values[-i] / values.sum())
            found.append(self._direction(component * np.sign(along), method, explained=share, component=i))
        return found

    def lda(self, shrinkage: float = 0.0) -> Direction:
        """Linear discriminant ``((1−λ) S_w + λ tr(S_w)/d · I)⁻¹ (μ₁ − μ₀)`` (Fisher 1936); S_w pooled, over n − 2.

        Args:
            shrinkage: λ in [0, 1]; needed where there are fewer activations than dimensions.

        Raises:
            ArgumentError: λ outside [0, 1], or no covariance was kept.
            DegenerateError: an empty class, equal means, or a singular covariance.
        """
        if not 0 <= _finite(shrinkage, "shrinkage") <= 1:
            raise ArgumentError(f"shrinkage: expected a number in [0, 1], got {shrinkage}")
        scatter = self._scatters(1)
        self._full_rank(sum(self.counts) - 2, shrinkage)
        within = _shrunk((scatter[0] + scatter[1]) / (sum(self.counts) - 2), shrinkage)
        return self._direction(_solve(within, self._difference()), "lda", shrinkage=float(shrinkage))

    def leace(self, shrinkage: float = 0.0) -> Eraser:
        """Least-squares concept erasure of the label (Belrose et al. 2023, arXiv 2306.03819, binary case).

        ``x − ((x−μ)·a) v / (v·a)`` with v the covariance of x with the label and ``a = Σ⁻¹ v``: afterwards no linear
        probe does better than chance on the activations seen here; on others a little leaks through.

        Args:
            shrinkage: λ in [0, 1] of ``(1−λ) Σ + λ tr(Σ)/d · I``.

        Raises:
            As :meth:`lda`.
        """
        if not 0 <= _finite(shrinkage, "shrinkage") <= 1:
            raise ArgumentError(f"shrinkage: expected a number in [0, 1], got {shrinkage}")
        self._scatters(1)
        self._full_rank(sum(self.counts) - 1, shrinkage)
        low, high = self._classes()
        pooled = low.copy()
        pooled.merge(high.copy())
        total = _shrunk(pooled.second / (pooled.weight - 1), shrinkage)
        n = self.counts
        v = self._difference() * (n[0] * n[1] / (sum(n) * (sum(n) - 1)))
        return Eraser(left=_solve(total, v), right=v, mean=pooled.mean)

    def __repr__(self) -> str:
        where = f"layer={self.layer}, site={self.site!r}, position={self.position}"
        return f"Contrast(counts={self.counts}, skipped={self.skipped}, covariance={self.covariance}, {where})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{k}</th><td>{v}</td></tr>"
            for k, v in {
                "rows of class 0, class 1": self.counts,
                "skipped": self.skipped,
                "covariance": self.covariance,
                "layer": self.layer,
                "site": self.site,
                "position": self.position,
            }.items()
        )
        return f"<table><caption>Contrast</caption>{cells}</table>"


class Eraser:
    """An oblique affine projection that removes what predicts a label: ``x − ((x−mean)·left) right / (right·left)``."""

    def __init__(self, left: Vector, right: Vector, mean: Vector) -> None:
        self.left, self.right, self.mean = left, right, mean
        self._edit = Edit(len(left), left[None] / float(left @ right), right=right[None], origin=mean)

    def apply(self, x: ArrayT) -> ArrayT:
        """Erased rows of ``x`` ``(..., d)`` as a new array; errors as :func:`abjure.refuse.ablate`."""
        return self._edit.apply(x)

    def apply_(self, x: ArrayT) -> ArrayT:
        """Erases in place and returns ``x``; errors as :func:`abjure.refuse.ablate_`."""
        return self._edit.apply_(x)


def winsorized(x: Any, quantile: float) -> Any:
    """Rows clamped at ``±`` the quantile of their absolute values, linearly interpolated; float64, a copy."""
    rows = x.double().numpy() if is_torch(x) else np.asarray(x, dtype=np.float64)
    bound = np.quantile(np.abs(rows), quantile, axis=-1, keepdims=True)
    # A row that is not finite stays as it is, for the policy of the caller.
    return np.where(np.isfinite(bound), np.clip(rows, -bound, bound), rows)


def difference_components(positive: Any, negative: Any, rank: int = 1) -> list[Direction]:
    """Principal components of the differences of pairs, about the origin (Zou et al. 2023); unit length.

    The differences are not centred, which would subtract the mean difference that is sought. Each component points
    the way most pairs do.

    Args:
        positive, negative: ``(n, d)`` activations of the two members of each pair.
        rank: how many components, at most ``min(n, d)``.

    Returns:
        :class:`Direction` objects, strongest first; together usable wherever ``q`` is expected.

    Raises:
        ShapeError: the arrays differ in shape or are not ``(n, d)``.
        NonFiniteError: a value is not finite.
        DegenerateError: fewer independent differences than ``rank``.
        ArgumentError: ``rank`` is below 1.
    """
    a, b = _to_numpy(positive, "positive"), _to_numpy(negative, "negative")
    if a.ndim != 2 or a.shape != b.shape or 0 in a.shape:
        raise ShapeError(f"negative: expected (n, d) as positive, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NonFiniteError("positive, negative: expected finite activations")
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ArgumentError(f"rank: expected 1 or more, got {rank!r}")
    differences = a - b
    _, values, vectors = np.linalg.svd(differences, full_matrices=False)
    least = int((values > values[0] * max(a.shape) * np.finfo(np.float64).eps).sum()) if values[0] > 0 else 0
    if rank > least:
        raise DegenerateError(f"rank: expected at most {least}, the rank of the differences, got {rank}")
    shares = values**2 / (values**2).sum()
    found = []
    for i in range(int(rank)):
        along = differences @ vectors[i]
        sign = 1.0 if (along > 0).sum() >= (along < 0).sum() else -1.0
        facts = {"method": "difference_components", "explained": float(shares[i]), "component": i + 1}
        found.append(Direction(vectors[i] * sign, counts=(len(a), len(a)), provenance=facts))
    return found


def _shrunk(covariance: Vector, shrinkage: float) -> Vector:
    d = len(covariance)
    shrunk: Vector = (1 - shrinkage) * covariance
    shrunk[np.diag_indices(d)] += shrinkage * np.trace(covariance) / d
    return shrunk


def _solve(matrix: Vector, rhs: Vector) -> Vector:
    """Solution of a positive definite system.

    Raises:
        DegenerateError: the matrix is singular to working precision.
        NonFiniteError: the solution overflows.
    """
    scale = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    scale[scale == 0] = 1.0
    unit = matrix / np.outer(scale, scale)
    try:
        factor = np.linalg.cholesky(unit)
    except np.linalg.LinAlgError:
        factor = np.zeros((1, 1))
    if np.diag(factor).min() ** 2 <= len(matrix) * np.finfo(np.float64).eps:
        raise DegenerateError("x: the covariance is singular; pass shrinkage > 0")
    solution: Vector = np.linalg.solve(unit, rhs / scale) / scale
    if not np.isfinite(solution).all():
        raise NonFiniteError("x: the discriminant overflows")
    return solution
