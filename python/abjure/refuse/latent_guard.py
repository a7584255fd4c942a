"""Latent Guard: is a prompt harmful, by which cluster its hidden states lie nearer to (arXiv 2507.11878, section 5)."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._files import reading, write_atomically
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from .bounds import Threshold, calibrate_threshold
from .directions import Site, Vector, _to_numpy
from .prompts import PositionKey, Prompts
from .record import Contrasts, Rows, binary_labels, run_recording

if TYPE_CHECKING:
    from torch import nn

_FORMAT = "abjure.latent_guard"
Center = Literal["midpoint"] | None


@dataclass(frozen=True)
class Beliefs:
    """What the hidden states of prompts say.

    Attributes:
        score: ``(n,)`` float64, mean over layers of ``cos(h, C⁺) − cos(h, C⁻)``; above 0 nearer the harmful cluster.
        by_layer: ``(n, layers)``, the differences.
        zero: ``(n, layers)`` booleans: states of length 0, whose difference counts as 0.
    """

    score: Vector
    by_layer: Vector
    zero: Any


class LatentGuard:
    """Harmfulness by centroid beliefs: the mean over layers of the difference of two cosines.

    Read where the model shows harmfulness, at the last token of the instruction, before it has decided to refuse;
    the score then also finds harmful prompts that a jailbreak makes the model accept.

    Args:
        positive, negative: ``(layers, d)`` centroids of harmful and harmless prompts.
        layers: indices of the blocks that the rows belong to.
        position, site: where the states are read.
        center: None for cosines of the states as they are (as published); ``"midpoint"`` for cosines about the middle
            of the two centroids, which the common part of all states does not drown.
        threshold: harmful at or above it; 0 as published, or from :meth:`calibrate`.

    Raises:
        ShapeError: the centroids and layers do not fit each other.
        NonFiniteError: a centroid is not finite.
        DegenerateError: the centroids of some layer are equal, or one has length 0.
        ArgumentError: an unknown ``center``, or a NaN threshold.
    """

    def __init__(
        self,
        positive: Any,
        negative: Any,
        layers: Sequence[int],
        *,
        position: PositionKey = "last_instruction",
        site: Site = "pre",
        center: Center = None,
        threshold: float = 0.0,
    ) -> None:
        high, low = _to_numpy(positive, "positive"), _to_numpy(negative, "negative")
        if high.ndim != 2 or high.shape != low.shape or 0 in high.shape or len(layers) != len(high):
            raise ShapeError(
                f"positive, negative: expected (layers, d) with {len(layers)} layers, got {high.shape} and {low.shape}"
            )
        if not (np.isfinite(high).all() and np.isfinite(low).all()):
            raise NonFiniteError("positive, negative: expected finite centroids")
        if center not in (None, "midpoint"):
            raise ArgumentError(f"center: expected None or 'midpoint', got {center!r}")
        if np.isnan(threshold):
            raise ArgumentError("threshold: expected a number, got nan")
        self.positive, self.negative = high.astype(np.float64), low.astype(np.float64)
        self.layers, self.position, self.site, self.center = [int(i) for i in layers], position, site, center
        self.threshold = float(threshold)
        self._origin = (self.positive + self.negative) / 2 if center else np.zeros_like(self.positive)
        self._units = [_unit_rows(c - self._origin, self.layers) for c in (self.positive, self.negative)]
        if same := [layer for layer, a, b in zip(self.layers, *self._units, strict=True) if np.array_equal(a, b)]:
            raise DegenerateError(f"positive, negative: the centroids point the same way at layer {same[0]}")

    @classmethod
    def fit(cls, h: Any, y: Any, layers: Sequence[int] | None = None, **options: Any) -> LatentGuard:
        """Centroids of labelled states.

        Args:
            h: ``(n, layers, d)``.
            y: ``(n,)`` of 0 (harmless) and 1 (harmful).
            layers: indices of the blocks; counted from 0 if None.
            options: further arguments of the class.

        Raises:
            ShapeError, ArgumentError: the arguments do not fit. DegenerateError: a class is empty.
        """
        states = _states(h)
        labels = binary_labels(y, len(states), "y")
        if labels.min() == labels.max():
            raise DegenerateError("y: expected both classes")
        high, low = (states[labels == value].mean(0, dtype=np.float64) for value in (1, 0))
        return cls(high, low, range(states.shape[1]) if layers is None else layers, **options)

    @classmethod
    def from_contrasts(
        cls,
        contrasts: Contrasts,
        position: PositionKey = "last_instruction",
        layers: Sequence[int] | None = None,
        **options: Any,
    ) -> LatentGuard:
        """Centroids from streamed means, at one position and some layers (None: all whose class means differ).

        Raises:
            ArgumentError: a layer or the position was not recorded.
            DegenerateError: a class is empty, or a named layer has equal means.
        """
        chosen, means = [], []
        for layer in contrasts.layers if layers is None else layers:
            low, high = contrasts[layer, position].means
            if layers is None and np.array_equal(low, high):
                continue
            chosen.append(layer)
            means.append((high, low))
        if not chosen:
            raise DegenerateError(f"contrasts: the class means are equal at every layer of position {position!r}")
        site = contrasts[chosen[0], position].site
        high, low = (np.stack([m[i] for m in means]) for i in range(2))
        return cls(high, low, chosen, position=position, site=site, **options)

    def beliefs(self, h: Any) -> Beliefs:
        """Belief of every prompt.

        Args:
            h: ``(n, layers, d)`` states of the guard's layers, or ``(layers, d)`` of one prompt.

        Raises:
            ShapeError: other layers or widths. NonFiniteError: a state is not finite.
        """
        states = _states(h)
        if states.shape[1:] != self.positive.shape:
            raise ShapeError(f"h: expected (n, {len(self.layers)}, {self.positive.shape[1]}), got {states.shape}")
        parts = [self._layer(states[:, i], i) for i in range(len(self.layers))]
        by_layer = np.stack([p[0] for p in parts], axis=1)
        return Beliefs(by_layer.mean(1), by_layer, np.stack([p[1] for p in parts], axis=1))

    def _layer(self, states: Any, i: int) -> tuple[Vector, Any]:
        """Differences of cosines of ``(n, d)`` states at the i-th layer, and which of them have no length."""
        wide = np.asarray(states, dtype=np.float64)
        if not np.isfinite(wide).all():
            bad = int((~np.isfinite(wide).all(1)).argmax())
            raise NonFiniteError(f"h: non-finite state at layer {self.layers[i]}, prompt {bad}")
        wide = wide - self._origin[i]
        length = np.linalg.norm(wide, axis=1)
        product = wide @ (self._units[0][i] - self._units[1][i])
        zero = length == 0
        return np.divide(product, length, out=np.zeros_like(product), where=~zero), zero

    def score(self, h: Any) -> Vector:
        """:attr:`Beliefs.score` of ``h``, ``(n,)``."""
        return self.beliefs(h).score

    def score_prompts(
        self,
        model: nn.Module,
        prompts: Prompts,
        *,
        batch_size: int = 8,
        blocks: str | None = None,
        progress: bool = True,
    ) -> Vector:
        """Scores of prompts, ``(n,)``: one forward pass over them; states are not kept.

        Raises:
            ArgumentError: the guard's layers or position do not exist. ShapeError: another width.
            NonFiniteError: a state is not finite; the layer and the prompt are named.
        """
        if self.position == "all":
            raise ArgumentError("position: expected one token per prompt, got 'all'")
        total = np.zeros(len(prompts))
        row = {layer: i for i, layer in enumerate(self.layers)}

        def take(rows: Rows) -> None:
            if rows.values.shape[1] != self.positive.shape[1]:
                raise ShapeError(
                    f"model: expected hidden states of {self.positive.shape[1]}, got {rows.values.shape[1]}"
                )
            total[rows.prompts] += self._layer(rows.values.double().numpy(), row[rows.layer])[0]

        keys = prompts.position_keys([self.position])
        run_recording(model, prompts, self.layers, keys, self.site, batch_size, progress, take, blocks)
        return total / len(self.layers)

    def predict(self, scores: Any) -> Any:
        """Booleans ``(n,)``: harmful where the score is at or above :attr:`threshold`."""
        return np.asarray(scores) >= self.threshold

    def calibrate(self, harmless_scores: Any, alpha: float, delta: float | None = None) -> Threshold:
        """Sets :attr:`threshold` so that at most a share ``alpha`` of harmless prompts is called harmful.

        The scores must be of prompts that the centroids were not made from. Guarantee and arguments as in
        :func:`calibrate_threshold`, whose :class:`Threshold` is returned.

        Raises:
            ShapeError, NonFiniteError, ArgumentError: as there.
        """
        found = calibrate_threshold(harmless_scores, alpha, delta)
        self.threshold = found.gate
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the centroids; the rest is in its metadata. Complete or not at all.

        Raises:
            ArgumentError: the path cannot be written.
        """
        from safetensors.numpy import save

        facts = {
            "layers": self.layers,
            "position": self.position,
            "site": self.site,
            "center": self.center,
            "threshold": repr(self.threshold),
        }
        arrays = {"positive": self.positive, "negative": self.negative}
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatentGuard:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not a guard.
        """
        with reading(path, "LatentGuard") as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            high, low = file.get_tensor("positive"), file.get_tensor("negative")
            facts["threshold"] = float(facts["threshold"])
            layers = facts.pop("layers")
        return cls(high, low, layers, **facts)

    def __repr__(self) -> str:
        where = f"position={self.position!r}, site={self.site!r}, center={self.center!r}"
        return f"LatentGuard(layers={self.layers}, d={self.positive.shape[1]}, {where}, threshold={self.threshold:.6g})"

    def _repr_html_(self) -> str:
        cosines = (self._units[0] * self._units[1]).sum(1)
        rows = "".join(f"<tr><td>{n}</td><td>{c:.4f}</td></tr>" for n, c in zip(self.layers, cosines, strict=True))
        header = "<tr><th>layer</th><th>cosine of the centroids</th></tr>"
        return f"<table><caption>{html.escape(repr(self))}</caption>{header}{rows}</table>"


def _unit_rows(c: Vector, layers: Sequence[int]) -> Vector:
    lengths = np.linalg.norm(c, axis=1, keepdims=True)
    if not lengths.all():
        layer = layers[int((lengths[:, 0] == 0).argmax())]
        raise DegenerateError(f"positive, negative: a centroid has length 0 (or both are equal) at layer {layer}")
    return np.asarray(c / lengths)


def _states(h: Any) -> Any:
    states = _to_numpy(h, "h")
    states = states[None] if states.ndim == 2 else states
    if states.ndim != 3 or 0 in states.shape:
        raise ShapeError(f"h: expected (n, layers, d), got {states.shape}")
    return states
