"""Expert tuning (MoTE): which routed experts a behaviour uses, by counting what the routers choose on two prompt sets.

Dahlke, Vinogradova et al. 2025, "Mixture of Tunable Experts", arXiv 2502.11096. Switching what is found off or on is
:func:`abjure.refuse.tuning_experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from .. import _native
from .._interop import integers, is_torch, source
from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from .directions import Vector
from .prompts import Prompts
from .record import binary_labels, run_hooked
from .routing import RankedExpert, expert_routers

if TYPE_CHECKING:
    from torch import nn

Stat = Literal["count", "weight"]
_STATS = ("count", "weight")


class ExpertTuner:
    """Rates at which routed experts are chosen, per prompt, and what sets two classes of prompts apart.

    The rate of an expert on a prompt is how often the prompt's tokens chose it (``"count"``), or the gate weights they
    gave it (``"weight"``), divided by the number of tokens, so that long prompts do not count for more. Relevance is
    the mean rate over prompts of class 1 minus that of class 0 (arXiv 2502.11096; the division by tokens and the error
    bars are ours). Counts are exact; means and variances over prompts are streamed (Welford), so memory is that of a
    few tables of layers × experts.

    Args:
        layers: numbers of the layers with routed experts, or how many there are.
        experts: routed experts per layer.

    Attributes:
        layers, experts: as given.
        counts: ``(2, layers, experts)`` uint64, choices of all prompts of each class.
        prompts: ``(2, layers)`` int64, prompts seen of each class.

    Raises:
        ArgumentError: no layer, a layer twice, fewer than one expert.
    """

    def __init__(self, layers: int | Sequence[int], experts: int) -> None:
        whole = isinstance(layers, (int, np.integer)) and not isinstance(layers, bool)
        listed = list(range(int(cast(int, layers)))) if whole else [int(n) for n in cast(Sequence[int], layers)]
        if not listed or len(set(listed)) != len(listed) or min(listed) < 0:
            raise ArgumentError(f"layers: expected different layers, 0 or more, got {layers!r}")
        if isinstance(experts, bool) or not isinstance(experts, (int, np.integer)) or experts < 1:
            raise ArgumentError(f"experts: expected 1 or more, got {experts!r}")
        self.layers, self.experts = listed, int(experts)
        shape = (2, len(listed), self.experts)
        self.counts: npt.NDArray[np.uint64] = np.zeros(shape, np.uint64)
        self.prompts: npt.NDArray[np.int64] = np.zeros(shape[:2], np.int64)
        # Means of rates over prompts, and sums of squares about them, of counts and of weights.
        self._mean = np.zeros((2, *shape))
        self._square = np.zeros((2, *shape))
        self._weighted: bool | None = None

    def update(self, topk_ids: Any, label: int, *, layer: int | None = None, weights: Any = None) -> ExpertTuner:
        """Adds what one layer's router chose for the tokens of one prompt. Returns ``self``.

        Args:
            topk_ids: ``(tokens, k)`` integers.
            label: 1 for the class whose experts are looked for (refused prompts), else 0.
            layer: one of ``layers``; may be left out where there is only one.
            weights: ``(tokens, k)`` gate weights, float64, float32, float16 or bfloat16; in all updates or in none.

        Raises:
            ShapeError, DTypeError, ArgumentError, NonFiniteError: an argument does not fit; nothing is added then.
        """
        ids = _choices(topk_ids)
        self._add(self._index(layer), ids, binary_labels([label], 1, "label"), None, weights)
        return self

    def _index(self, layer: int | None) -> int:
        if layer is None and len(self.layers) == 1:
            return 0
        if layer not in self.layers:
            raise ArgumentError(f"layer: expected one of {self.layers}, got {layer!r}")
        return self.layers.index(layer)

    def _add(self, at: int, ids: npt.NDArray[np.int64], labels: Any, owners: Any, weights: Any) -> None:
        """Choices of one layer, of as many prompts as labels; ``owners`` is the prompt of each token, or -1."""
        if self._weighted is not None and self._weighted != (weights is not None):
            raise ArgumentError("weights: expected weights in all updates or in none")
        if weights is not None:
            weights = source(weights, "weights")
            weights = weights.contiguous() if is_torch(weights) else np.ascontiguousarray(weights)
        tokens, counts, sums = _native.count_experts(ids, weights, owners, len(labels), self.experts)
        if not tokens.all():
            raise ShapeError("topk_ids: expected at least one token of every prompt, got none")
        tables = [counts] if sums is None else [counts, sums]
        rates = [table.reshape(len(labels), -1) / tokens[:, None] for table in tables]
        for prompt, label in enumerate(labels):
            self.counts[label, at] += counts.reshape(len(labels), -1)[prompt]
            self.prompts[label, at] += 1
            for stat, rate in enumerate(rates):
                mean, square = self._mean[stat, label, at], self._square[stat, label, at]
                delta = rate[prompt] - mean
                mean += delta / self.prompts[label, at]
                square += delta * (rate[prompt] - mean)
        self._weighted = weights is not None

    def merge(self, other: ExpertTuner) -> ExpertTuner:
        """Adds the prompts that ``other`` has seen (pairwise means and variances, Chan et al. 1979). Returns ``self``.

        Raises:
            DTypeError: not an :class:`ExpertTuner`. ArgumentError: other layers or experts, or one has weights and the
                other has none.
        """
        if not isinstance(other, ExpertTuner):
            raise DTypeError(f"other: expected an ExpertTuner, got {type(other).__name__}")
        if (self.layers, self.experts) != (other.layers, other.experts):
            raise ArgumentError(f"other: expected layers {self.layers} of {self.experts} experts, got {other!r}")
        if None not in (self._weighted, other._weighted) and self._weighted != other._weighted:
            raise ArgumentError("other: expected weights in both or in neither")
        a, b = (n.astype(float)[None, :, :, None] for n in (self.prompts, other.prompts))
        whole = np.maximum(a + b, 1)
        delta = other._mean - self._mean
        self._square = self._square + other._square + delta**2 * (a * b / whole)
        self._mean = self._mean + delta * (b / whole)
        self.counts = self.counts + other.counts
        self.prompts = self.prompts + other.prompts
        self._weighted = other._weighted if self._weighted is None else self._weighted
        return self

    def rates(self, label: int, stat: Stat = "count") -> Vector:
        """Mean rate over the prompts of a class, ``(layers, experts)`` float64.

        Raises:
            ArgumentError: another label or statistic, or weights asked for where none were given.
            DegenerateError: no prompt of the class in some layer.
        """
        (cls,) = binary_labels([label], 1, "label")
        return np.array(self._mean[self._stat(stat, 1, [cls]), cls])

    def relevance(self, stat: Stat = "count") -> Vector:
        """Mean rate over class 1 minus that over class 0, ``(layers, experts)`` float64.

        Args:
            stat: ``"count"``, choices per token, or ``"weight"``, gate weight per token. Which of the two the paper
                sums could not be settled.

        Raises:
            ArgumentError: another statistic, or weights asked for where none were given.
            DegenerateError: a class without prompts in some layer.
        """
        at = self._stat(stat, 1)
        return np.asarray(self._mean[at, 1] - self._mean[at, 0])

    def standard_error(self, stat: Stat = "count") -> Vector:
        """Of the relevance, over prompts: ``sqrt(s1²/n1 + s0²/n0)``, sample variances, ``(layers, experts)`` float64.

        Raises:
            As :meth:`relevance`, and DegenerateError where a class has fewer than two prompts.
        """
        at = self._stat(stat, 2)
        n = self.prompts[:, :, None].astype(float)
        return np.asarray(np.sqrt((self._square[at] / (n - 1) / n).sum(axis=0)))

    def z(self, stat: Stat = "count") -> Vector:
        """Relevance in standard errors, ``(layers, experts)`` float64; ±inf where all prompts of a class agree exactly
        and the classes differ, 0 where they do not differ.

        Raises:
            As :meth:`standard_error`.
        """
        error, found = self.standard_error(stat), self.relevance(stat)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(found == 0, 0.0, found / error))

    def rank(
        self, top: int | None = 10, by: Literal["relevance", "z"] = "relevance", *, stat: Stat = "count"
    ) -> list[RankedExpert]:
        """The experts that class 1 uses more than class 0, most first; equal ones in order of (layer, expert).

        Args:
            top: how many; None for all.
            by: ``"relevance"`` or ``"z"``.
            stat: as in :meth:`relevance`.

        Returns:
            :class:`RankedExpert`; ``standard_error`` and ``z`` are NaN where a class has a single prompt.

        Raises:
            As :meth:`relevance` and, by ``"z"``, as :meth:`standard_error`.
        """
        if by not in ("relevance", "z"):
            raise ArgumentError(f'by: expected "relevance" or "z", got {by!r}')
        count = len(self.layers) * self.experts
        if top is not None and (isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1):
            raise ArgumentError(f"top: expected 1 or more, got {top!r}")
        found = self.relevance(stat)
        nothing = np.full(found.shape, np.nan)
        known = by == "z" or int(self.prompts.min()) > 1
        error, z = (self.standard_error(stat), self.z(stat)) if known else (nothing, nothing)
        order = sorted(
            ((layer, e, i) for i, layer in enumerate(self.layers) for e in range(self.experts)),
            key=lambda place: (-(z if by == "z" else found)[place[2], place[1]], place[:2]),
        )
        return [
            RankedExpert(layer, e, float(found[i, e]), float(error[i, e]), float(z[i, e]))
            for layer, e, i in order[: count if top is None else int(top)]
        ]

    def _stat(self, stat: str, least: int, classes: Sequence[int] = (0, 1)) -> int:
        """The statistic's index, after the check that every layer has ``least`` prompts of the classes."""
        if stat not in _STATS:
            raise ArgumentError(f'stat: expected "count" or "weight", got {stat!r}')
        for cls in classes:
            if (n := int(self.prompts[cls].min())) < least:
                layer = self.layers[int(self.prompts[cls].argmin())]
                raise DegenerateError(
                    f"label: expected {least} prompts of class {cls} or more in layer {layer}, got {n}"
                )
        if stat == "weight" and not self._weighted:
            raise ArgumentError('stat: expected "count", since no weights were given to update(), got "weight"')
        return _STATS.index(stat)

    def __repr__(self) -> str:
        seen = [int(n.max()) for n in self.prompts]
        return f"ExpertTuner({len(self.layers)} layers, {self.experts} experts, prompts of class 0, 1: {seen})"

    def _repr_html_(self) -> str:
        if not self.prompts.all():
            return f"<p>{self!r}</p>"
        rows = "".join(
            f"<tr><td>{r.layer}</td><td>{r.expert}</td><td>{r.relevance:+.4f}</td><td>{r.standard_error:.4f}</td>"
            f"<td>{r.z:+.2f}</td></tr>"
            for r in self.rank()
        )
        header = "<tr><th>layer</th><th>expert</th><th>relevance</th><th>standard error</th><th>z</th></tr>"
        return f"<table><caption>{self!r}</caption>{header}{rows}</table>"

    def plot(self, ax: Any = None, *, by: Literal["relevance", "z"] = "relevance", stat: Stat = "count") -> Any:
        """Heat map of relevance or z by layer and expert, red where class 1 uses the expert more. Returns the axes."""
        import matplotlib.pyplot as plt

        if by not in ("relevance", "z"):
            raise ArgumentError(f'by: expected "relevance" or "z", got {by!r}')
        values = self.relevance(stat) if by == "relevance" else self.z(stat)
        finite = np.abs(values[np.isfinite(values)])
        limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
        ax = plt.subplots()[1] if ax is None else ax
        shown = np.clip(values, -limit, limit)
        image = ax.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        ax.figure.colorbar(image, ax=ax, label=by)
        ax.set(xlabel="expert", ylabel="layer", yticks=range(len(self.layers)), yticklabels=self.layers)
        return ax


def _choices(topk_ids: Any) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = integers(topk_ids, "topk_ids")
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise ShapeError(f"topk_ids: expected (tokens, k), got {ids.shape}")
    return ids


def record_experts(
    model: nn.Module,
    prompts: Prompts,
    labels: Any,
    *,
    batch_size: int = 8,
    blocks: str | None = None,
    progress: bool = True,
) -> ExpertTuner:
    """Runs labelled prompts and counts which experts the routers choose for their tokens, with gate weights.

    Every token of a prompt counts, the template's too; padding does not. Nothing is generated.

    Args:
        model: a Hugging Face mixture of experts, as in :func:`expert_routers`.
        prompts: a :class:`Prompts`.
        labels: 0 or 1 per prompt; 1 is the class whose experts are looked for.
        batch_size: prompts per forward pass.
        blocks: dotted name of the list of blocks, for models the table does not know.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        ArgumentError: an unknown family, no routed experts, layers with different numbers of them, bad labels, or
            routers that a replaced kernel passed over.
        NonFiniteError: a gate weight is NaN or infinite.
    """
    values = binary_labels(labels, len(prompts))
    routers = expert_routers(model, blocks)
    sizes = {int(cast(Any, router).num_experts) for router in routers.values()}
    if len(sizes) != 1:
        raise ArgumentError(f"model: expected as many experts in every layer, got {sorted(sizes)}")
    tuner = ExpertTuner(list(routers), sizes.pop())
    batch: dict[str, Any] = {}

    def check() -> None:
        if missed := batch.get("left"):
            raise ArgumentError(f"model: the routers of layers {sorted(missed)} did not run; is a fused kernel in use?")

    def begin(chosen: list[int], mask: Any) -> None:
        check()
        rows = np.arange(len(chosen))[:, None]
        batch["owners"] = np.ascontiguousarray(np.where(mask.numpy() != 0, rows, -1).reshape(-1))
        batch["labels"] = values[chosen]
        batch["left"] = set(routers)

    def watch(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            _, weights, ids = output
            owners, at = batch["owners"], tuner._index(layer)
            batch["left"].discard(layer)
            tuner._add(at, _choices(ids.cpu()), batch["labels"], owners, weights.detach().cpu())

        return hook

    attach = [
        lambda router=router, layer=layer: router.register_forward_hook(watch(layer))
        for layer, router in routers.items()
    ]
    run_hooked(model, prompts, attach, begin, batch_size, progress)
    check()
    return tuner
