"""Relearn time: how many steps bring the forgotten back."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError

__all__ = ["Relearning", "relearn_time"]


@dataclass(frozen=True)
class Relearning:
    """Steps until each model's loss on the forget set was back, one entry per seed; None where the cap came first."""

    steps: dict[str, list[int | None]]
    #: Mean loss on the forget set before step 1, after it, and so on (at every ``check_every`` steps), by seed.
    losses: dict[str, list[list[float]]]
    #: The loss that counts as relearnt.
    target: float
    max_steps: int
    check_every: int
    #: The model whose steps are the unit of :meth:`ratio`.
    reference: str | None

    def median(self, model: str) -> float | None:
        """Median steps over seeds, None if it is censored (half of the runs or more reached the cap)."""
        # inf - inf is nan, but a mean of two infinities is not: the middle two are both censored or not both counted.
        ordered = sorted(float("inf") if s is None else float(s) for s in self.steps[model])
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return None if np.isinf(middle) else middle

    def ratio(self, model: str) -> tuple[float | None, str]:
        """Median steps over the reference's, and how to read it: ``"="``, or ``">="``, ``"<="`` where one is censored.

        1 is the goal: no faster to relearn than a model that never knew. Below 1, traces are left. Where the reference
        needs no step at all, 1 is added to both. ``(None, "?")`` where both are censored.

        Raises:
            ArgumentError: there is no reference.
        """
        if self.reference is None:
            raise ArgumentError("reference: expected a reference model, got None")
        ours, theirs = self.median(model), self.median(self.reference)
        if ours is None and theirs is None:
            return None, "?"
        a, b = (float(self.max_steps) if v is None else v for v in (ours, theirs))
        more = 1 if b == 0 else 0
        return (a + more) / (b + more), ">=" if ours is None else "<=" if theirs is None else "="

    def survival(self, model: str) -> tuple[Any, Any]:
        """Share of seeds not yet relearnt after each step ``0 ... max_steps``: steps and shares, two arrays.

        All runs are censored at the same step, so that the Kaplan-Meier estimate is this share.
        """
        at = np.arange(self.max_steps + 1)
        ended = np.array([np.inf if s is None else s for s in self.steps[model]])
        return at, (ended[:, None] > at).mean(axis=0)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for model, steps in self.steps.items():
            middle = self.median(model)
            censored = sum(s is None for s in steps)
            ratio = ""
            if self.reference is not None and model != self.reference:
                value, sign = self.ratio(model)
                ratio = "?" if value is None else f"{'' if sign == '=' else sign + ' '}{value:.3g}"
            shown = f"> {self.max_steps}" if middle is None else f"{middle:g}"
            rows.append((model, shown, f"{censored} of {len(steps)}", ratio))
        return rows

    _HEAD = ("model", "steps (median)", "censored", "ratio to the reference")

    def __str__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        table = "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
        goal = "" if self.reference is None else f" Reference: {self.reference}; a ratio of 1 is the goal."
        return f"Steps to a forget loss of {self.target:.4g} or less, at most {self.max_steps}.{goal}\n{table}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{t}</th>" for t in self._HEAD)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in self._rows())
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table><tr>{head}</tr>{rows}</table>"

    def plot(self, axes: Any = None) -> Any:
        """Survival curves, and the loss on the forget set of each seed; returns two matplotlib axes."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for i, model in enumerate(self.steps):
            axes[0].step(*self.survival(model), where="post", label=model, color=f"C{i}")
            for curve in self.losses[model]:
                axes[1].plot(np.arange(len(curve)) * self.check_every, curve, color=f"C{i}", lw=1)
        axes[1].axhline(self.target, color="grey", lw=1, ls="--")
        axes[0].set(xlabel="step", ylabel="share not yet relearnt", ylim=(-0.05, 1.05))
        axes[1].set(xlabel="step", ylabel="loss on the forget set")
        axes[0].legend()
        return axes

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=1)


def relearn_time(
    models: Mapping[str, Any],
    forget: Iterable[Any],
    loss: Callable[[Any, Any], Any],
    *,
    original: Any = None,
    target: float | None = None,
    margin: float = 0.05,
    lr: float = 1e-3,
    optimizer: Callable[[Any], Any] | None = None,
    max_steps: int = 100,
    check_every: int = 1,
    seeds: Sequence[int] = (0,),
    reference: str | None = "retrained",
    progress: bool = True,
) -> Relearning:
    """Steps of training on the forget set until its loss is back: fast means that the knowledge was only hidden.

    Every model is copied (never changed) and trained on the forget set, one batch a step in a random order; its mean
    loss over the whole forget set is looked at every ``check_every`` steps, in eval mode. A model that is not back
    after ``max_steps`` is censored, not counted as ``max_steps``.

    Args:
        models: torch modules by name, for example ``{"unlearned": a, "retrained": b}``.
        forget: batches of the forget set; read once into a list.
        loss: ``loss(model, batch)``, the mean over the batch, a scalar.
        original: the model before unlearning; the target is then ``(1 + margin)`` times its loss on the forget set.
        target: the loss that counts as relearnt, in place of ``original``.
        margin: see ``original``. A loss near 0 leaves a target near 0: give ``target`` then.
        lr: rate of plain stochastic gradient descent.
        optimizer: ``optimizer(parameters) -> torch optimiser`` in place of ``lr``.
        max_steps: the cap.
        check_every: steps between two looks at the loss.
        seeds: of the order of batches; several give a survival curve.
        reference: the model whose steps are the unit, if it is among ``models``.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        Steps by model and seed, ratio to the reference, survival and loss curves.

    Raises:
        DegenerateError: the forget set yields no batch.
        ArgumentError: no models, neither or both of ``original`` and ``target``, a number out of range.
        NonFiniteError: a loss is NaN or infinite; the model and step are named.

    Source: relearn time as in arXiv 1911.04933 and 2201.06640 (the anamnesis index), with the margin on the loss;
    definitions differ between papers.
    """
    import torch
    from tqdm.auto import tqdm

    if not models or not len(seeds):
        raise ArgumentError("models, seeds: expected at least one of each, got none")
    if (original is None) == (target is None):
        raise ArgumentError("original, target: expected one of the two")
    for name, value in (("max_steps", max_steps), ("check_every", check_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name}: expected an integer of 1 or more, got {value!r}")
    if not (lr > 0 and margin >= 0):
        raise ArgumentError(f"lr, margin: expected lr above 0 and margin of 0 or more, got {lr} and {margin}")
    for name, model in {**models, **({} if original is None else {"original": original})}.items():
        if not hasattr(model, "named_parameters"):
            raise DTypeError(f"models: {name!r}: expected a torch module, got {type(model).__name__}")
    batches = list(forget)
    if not batches:
        raise DegenerateError("forget: expected at least one batch, got none")
    if original is not None:
        target = (1 + margin) * _mean_loss(original, batches, loss, "original")
    assert target is not None
    if not np.isfinite(target):
        raise ArgumentError(f"target: expected a finite loss, got {target}")
    steps: dict[str, list[int | None]] = {m: [] for m in models}
    curves: dict[str, list[list[float]]] = {m: [] for m in models}
    plan = [(m, s) for m in models for s in seeds]
    for name, seed in tqdm(plan, desc="relearn", unit="run", disable=None if progress else True):
        model = copy.deepcopy(models[name])
        parameters = [p for p in model.parameters() if p.requires_grad]
        step_by = torch.optim.SGD(parameters, lr=lr) if optimizer is None else optimizer(parameters)
        order = torch.Generator().manual_seed(seed)
        queue: list[int] = []
        curve = [_mean_loss(model, batches, loss, f"{name!r}, step 0")]
        done = 0
        while curve[-1] > target and done < max_steps:
            for _ in range(min(check_every, max_steps - done)):
                queue = queue or torch.randperm(len(batches), generator=order).tolist()
                model.train()
                step_by.zero_grad()
                loss(model, batches[queue.pop()]).backward()
                step_by.step()
                done += 1
            curve.append(_mean_loss(model, batches, loss, f"{name!r}, step {done}"))
        steps[name].append(done if curve[-1] <= target else None)
        curves[name].append(curve)
    return Relearning(steps, curves, target, max_steps, check_every, reference if reference in models else None)


def _mean_loss(model: Any, batches: list[Any], loss: Callable[[Any, Any], Any], where: str) -> float:
    from ..measure.outputs import inferring

    with inferring(model):
        values = [float(loss(model, b)) for b in batches]
        sizes = [_size(b) for b in batches]
    if not np.isfinite(values).all():
        raise NonFiniteError(f"loss: {where}: expected finite losses on the forget set, got {values}")
    return float(np.average(values, weights=sizes))


def _size(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor, or 1."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    return next((len(p) for p in parts if getattr(p, "ndim", 0) > 0), 1)
