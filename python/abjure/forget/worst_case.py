"""Worst-case forget sets: the samples that are hardest to unlearn (Fan and others, "Challenging Forgets")."""

from __future__ import annotations

import copy
import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError

__all__ = ["SignUnlearning", "WorstCase", "project_capped_simplex", "top_m", "worst_case_forget_set"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def project_capped_simplex(a: Any, m: float) -> Floats:
    """The point nearest to ``a`` with entries in [0, 1] that sum to ``m``: ``clip(a - mu, 0, 1)`` with the exact mu.

    The sum is a piecewise linear function of mu with its corners at ``a_i`` and ``a_i - 1``; sorting them finds the
    piece that holds m, which is then solved. (Bisection to a width of 1e-5, as published, leaves the sum wrong by up to
    n * 1e-5.) O(n log n).

    Args:
        a: ``(n,)``, finite.
        m: the sum, in [0, n].

    Returns:
        ``(n,)`` f64 whose sum is m up to rounding.

    Raises:
        ShapeError, NonFiniteError: not one axis, or NaN or infinity.
        ArgumentError: m outside [0, n].
    """
    values = np.asarray(a, dtype=np.float64)
    if values.ndim != 1:
        raise ShapeError(f"a: expected shape (n,), got {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError("a: expected finite values, got NaN or infinity")
    n = len(values)
    if not 0 <= m <= n:
        raise ArgumentError(f"m: expected a number in [0, {n}], got {m}")
    if m == 0 or m == n:
        return np.full(n, float(m == n))
    corners = np.sort(np.concatenate([values, values - 1]))
    low, high = 0, len(corners) - 1
    # The sum falls from n at the first corner to 0 at the last; find neighbours with sum(low) >= m > sum(high).
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(values - corners[middle], 0, 1).sum() >= m:
            low = middle
        else:
            high = middle
    full = values - 1 >= corners[high]
    inside = (values > corners[low]) & ~full
    # Between two corners no entry changes its kind; without an entry inside, the sum is m all along the piece.
    mu = (values[inside].sum() + full.sum() - m) / inside.sum() if inside.any() else corners[low]
    projected: Floats = np.clip(values - mu, 0, 1)
    projected[full] = 1
    return projected


def top_m(w: Any, m: int) -> Indices:
    """Indices of the m largest entries, in increasing order; of equal entries, the lower index comes first."""
    return np.sort(np.argsort(-np.asarray(w, dtype=np.float64), kind="stable")[:m])


@dataclass(frozen=True)
class WorstCase:
    """A selected forget set, and how the selection went."""

    #: The m selected samples (or groups), in increasing order.
    indices: Indices
    #: The m selected units of every outer step.
    steps: list[Indices]
    #: Weight of every sample (or group) after the last step, ``(n,)`` or ``(groups,)``, in [0, 1] with sum m.
    weights: Floats
    #: Upper objective of the weights that each outer step began with.
    objective: list[float]
    direction: str
    groups: npt.NDArray[np.int64] | None = None

    @property
    def samples(self) -> Indices:
        """The selected samples: ``indices``, or all members of the selected groups."""
        return self.indices if self.groups is None else np.flatnonzero(np.isin(self.groups, self.indices))

    @property
    def agreement(self) -> list[float]:
        """Share of the selection that each outer step kept from the one before."""
        m = max(len(self.indices), 1)
        return [len(np.intersect1d(a, b)) / m for a, b in zip(self.steps, self.steps[1:], strict=False)]

    def __str__(self) -> str:
        unit = "samples" if self.groups is None else f"groups ({len(self.samples)} samples)"
        kept = f", the last step kept {self.agreement[-1]:.0%} of the selection" if self.agreement else ""
        return (
            f"{self.direction} {len(self.indices)} of {len(self.weights)} {unit} after {len(self.steps)} outer steps; "
            f"objective {self.objective[0]:.6g} to {self.objective[-1]:.6g}{kept}."
        )

    def _repr_html_(self) -> str:
        shares = [float("nan"), *self.agreement]
        rows = "".join(
            f"<tr><td>{i + 1}</td><td>{o:.6g}</td><td>{'' if i == 0 else f'{s:.0%}'}</td></tr>"
            for i, (o, s) in enumerate(zip(self.objective, shares, strict=True))
        )
        head = "<tr><th>outer step</th><th>objective</th><th>kept from the step before</th></tr>"
        return f"<p>{html.escape(str(self))}</p><table>{head}{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """The objective against the outer step; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        ax.plot(range(1, len(self.objective) + 1), self.objective, marker=".")
        ax.set_xlabel("outer step")
        ax.set_ylabel("weighted loss of the forget set after unlearning")
        ax.set_title(f"{self.direction} {len(self.indices)} of {len(self.weights)}")
        return ax


def worst_case_forget_set(
    unlearn: Callable[[Floats], None],
    losses: Callable[[], Any],
    n: int,
    m: int,
    *,
    outer: int = 10,
    w_lr: float = 0.01,
    gamma: float = 0.0,
    binarize_every: int = 20,
    direction: Literal["hardest", "easiest"] = "hardest",
    groups: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> WorstCase:
    """The m samples that are hardest to unlearn: those whose loss stays low although they were unlearned.

    ``min over w in [0, 1]^n with sum m of sum_i w_i l_i(theta(w)) + gamma ||w||^2``, where ``theta(w)`` is the model
    after unlearning with forget weights w. As the lower problem is solved by steps along the sign of the gradient
    (:class:`SignUnlearning`), theta does not depend on w almost everywhere: the upper gradient is ``l + 2 gamma w``.
    Each outer step unlearns from the original model, reads the losses of all samples, steps, and projects exactly.

    Args:
        unlearn: ``unlearn(w)`` takes forget weights ``(n,)`` in [0, 1] (1: forget) and unlearns, each time from the
            original model; :meth:`SignUnlearning.unlearn`, or any method that takes weights.
        losses: ``losses()`` gives the loss of each of the n samples under the model that ``unlearn`` left, best in
            eval mode.
        n: number of samples.
        m: samples (or groups) to select, in [0, n].
        outer: outer steps. The published value is 10.
        w_lr: step of the weights.
        gamma: coefficient of ``||w||^2``. For the easiest set too it keeps its sign (published: flipped with the loss).
        binarize_every: outer steps after which w becomes the indicator of its top m, at most ``outer``; 0 for never.
        direction: ``"easiest"`` for the samples whose loss rises most.
        groups: ``(n,)`` integers: one weight per group (class, prompt) in place of one per sample; m counts groups, and
            the loss of a group is the sum over its samples.
        seed: of the random m units that the first step starts from.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The selection with its history. Equal weights are resolved to the lower index.

    Raises:
        ArgumentError: m outside [0, n] (or the number of groups), or another number out of range.
        ShapeError: losses or groups that are not one per sample.
        NonFiniteError: a loss is NaN or infinite; the outer step is named.

    Source: Fan, Liu, Hero, Liu, "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning",
    arXiv 2403.07362, and its code.
    """
    from tqdm.auto import tqdm

    for name, value, least in (("n", n, 1), ("outer", outer, 1), ("binarize_every", binarize_every, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ArgumentError(f"{name}: expected an integer of {least} or more, got {value!r}")
    if not (np.isfinite(w_lr) and w_lr > 0 and np.isfinite(gamma) and gamma >= 0):
        raise ArgumentError(f"w_lr, gamma: expected w_lr above 0 and gamma of 0 or more, got {w_lr} and {gamma}")
    if direction not in ("hardest", "easiest"):
        raise ArgumentError(f"direction: expected 'hardest' or 'easiest', got {direction!r}")
    member = _groups(groups, n)
    units = n if member is None else int(member.max()) + 1
    if isinstance(m, bool) or not isinstance(m, (int, np.integer)) or not 0 <= m <= units:
        raise ArgumentError(f"m: expected an integer in [0, {units}], got {m!r}")
    every = min(binarize_every, outer)
    sign = 1.0 if direction == "hardest" else -1.0
    w = np.zeros(units)
    w[np.random.default_rng(seed).permutation(units)[:m]] = 1
    objective, steps = [], []
    for step in tqdm(
        range(1, outer + 1), desc="worst-case forget set", unit="step", disable=None if progress else True
    ):
        unlearn(w.copy() if member is None else w[member])
        found = _losses(losses(), n, step)
        if member is not None:
            found = np.bincount(member, weights=found, minlength=units).astype(np.float64)
        objective.append(float(w @ found + gamma * (w @ w)))
        w = project_capped_simplex(w - w_lr * (sign * found + 2 * gamma * w), m)
        steps.append(top_m(w, int(m)))
        if every and step % every == 0:
            w = np.zeros(units)
            w[steps[-1]] = 1
    return WorstCase(steps[-1], steps, w, objective, direction, member)


def _groups(groups: Any, n: int) -> npt.NDArray[np.int64] | None:
    if groups is None:
        return None
    found = np.asarray(groups.cpu() if hasattr(groups, "cpu") else groups)
    if found.shape != (n,):
        raise ShapeError(f"groups: expected one group per sample, shape ({n},), got {found.shape}")
    if found.dtype.kind not in "iu":
        raise DTypeError(f"groups: expected integers, got {found.dtype}")
    missing = np.setdiff1d(np.arange(found.max() + 1), found)
    if found.min() < 0 or len(missing):
        what = f"{found.min()}" if found.min() < 0 else f"no member of {missing[0]}"
        raise ArgumentError(f"groups: expected groups 0 to their number less 1, each with a member, got {what}")
    return found.astype(np.int64)


def _losses(found: Any, n: int, step: int) -> Floats:
    values = found.detach().double().cpu().numpy() if hasattr(found, "detach") else np.asarray(found, dtype=np.float64)
    if values.shape != (n,):
        raise ShapeError(f"losses: outer step {step}: expected shape ({n},), got {values.shape}")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise NonFiniteError(f"losses: outer step {step}: expected finite losses, got {values[bad]} for sample {bad}")
    found64: Floats = values
    return found64


class SignUnlearning:
    """The published lower problem: sign descent on ``sum_i (1 - w_i) l_i`` from the original parameters.

    Works on a copy of the model; the model itself is never touched. ``theta <- theta - lr * sign(gradient)``, without
    momentum or weight decay (which the published code accepts and ignores). The copy stays in eval mode: with dropout
    or batch statistics of train mode the losses would be noisy, and the running statistics would move.

    Args:
        model: a torch module.
        x: inputs ``(n, ...)``, a tensor on the model's device.
        y: targets ``(n, ...)``.
        lr: step of every parameter. Published: 0.01, in the example 1e-3.
        epochs: passes over the data per outer step. Published: 10, in the example 2.
        batch_size: rows per step.
        loss: ``loss(model, x, y) -> (b,)`` per-sample losses; by default the cross-entropy.
        train_mode: unlearn in train mode (losses are read in eval mode all the same).
        seed: of the order of rows.

    Raises:
        ShapeError: x and y of different lengths, or none.
        ArgumentError: a number out of range.
        NonFiniteError: (in :meth:`unlearn`) the loss became NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any,
        *,
        lr: float = 0.01,
        epochs: int = 10,
        batch_size: int = 256,
        loss: Callable[[Any, Any, Any], Any] | None = None,
        train_mode: bool = False,
        seed: int = 0,
    ) -> None:
        if not hasattr(model, "named_parameters"):
            raise DTypeError(f"model: expected a torch module, got {type(model).__name__}")
        if len(x) != len(y) or not len(x):
            raise ShapeError(f"x, y: expected the same number of rows, above 0, got {len(x)} and {len(y)}")
        if not (lr > 0 and epochs >= 1 and batch_size >= 1):
            given = f"{lr}, {epochs}, {batch_size}"
            raise ArgumentError(f"lr, epochs, batch_size: expected lr above 0 and the others 1 or more, got {given}")
        self.model = copy.deepcopy(model).eval()
        self._start = {k: v.clone() for k, v in self.model.state_dict().items()}
        self._x, self._y, self._loss = x, y, loss or _cross_entropy
        self._lr, self._epochs, self._batch, self._train, self._seed = lr, epochs, batch_size, train_mode, seed

    def unlearn(self, w: Any) -> None:
        """From the original parameters, descends the losses weighted by ``1 - w``; w ``(n,)`` in [0, 1]."""
        import torch

        w = torch.as_tensor(np.asarray(w), dtype=torch.float64)
        if w.shape != (len(self._x),) or not bool(((w >= 0) & (w <= 1)).all()):
            raise ArgumentError(f"w: expected {len(self._x)} weights in [0, 1], got shape {tuple(w.shape)}")
        self.model.load_state_dict(self._start)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        order = torch.Generator().manual_seed(self._seed)
        self.model.train(self._train)
        try:
            for _ in range(self._epochs):
                for rows in torch.split(torch.randperm(len(w), generator=order), self._batch):
                    loss = self._loss(self.model, self._x[rows], self._y[rows])
                    total = ((1 - w[rows]).to(loss) * loss).sum()
                    if not torch.isfinite(total):
                        raise NonFiniteError(
                            f"loss: expected finite losses while unlearning, got a sum of {total.detach().item()}"
                        )
                    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
                    with torch.no_grad():
                        for p, g in zip(parameters, gradients, strict=True):
                            if g is not None:
                                p.sub_(g.sign(), alpha=self._lr)
        finally:
            self.model.eval()

    def losses(self) -> Floats:
        """Loss of every sample under the model as unlearned, ``(n,)`` f64, in eval mode."""
        import torch

        with torch.no_grad():
            parts: Iterable[Any] = (
                self._loss(self.model, self._x[i : i + self._batch], self._y[i : i + self._batch]).double().cpu()
                for i in range(0, len(self._x), self._batch)
            )
            found: Floats = torch.cat(list(parts)).numpy()
        return found


def _cross_entropy(model: Any, x: Any, y: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
