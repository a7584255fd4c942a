"""Removal or suppression: whether what a model was made to forget comes back."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from ..measure._arrays import Floats, Ints, class_labels, host
from ..measure.outputs import inferring, labelled
from ..measure.resampling import paired_bootstrap
from .relearn import Relearning, relearn_time

__all__ = ["RemovalCheck", "RemovalReport", "linear_probe", "quantized_", "removal_report"]

Verdict = Literal["returned", "not returned", "undecided"]
#: ``knows(model, batch) -> (b,)``: 1 where the model still has the knowledge that an example asks for, 0 where not.
Knows = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class RemovalCheck:
    """One way of bringing the knowledge back, done to the unlearned and to the retrained model alike.

    Attributes:
        name: of the check. kind: ``"as it is"``, ``"relearning"``, ``"probe"``, ``"quantisation"``, ``"prompt"``.
        unlearned, retrained, original: share known, on the same examples.
        difference: unlearned less retrained. interval: of the difference, examples drawn together.
        verdict: ``"returned"`` where the interval lies above 0 and the difference above the margin, ``"not returned"``
            where its upper limit is the margin or less, else ``"undecided"``: too few examples to tell.
        n: examples. note: how it was done.
    """

    name: str
    kind: str
    unlearned: float
    retrained: float
    original: float | None
    difference: float
    interval: tuple[float, float]
    verdict: Verdict
    n: int
    note: str = ""


@dataclass(frozen=True)
class RemovalReport:
    """What :func:`removal_report` found.

    Attributes:
        checks: one for each way. margin: excess over the retrained model that counts as knowledge.
        relearning: steps until the loss on the few samples is back, of both models.
        level: coverage of the intervals. samples: examples relearnt on.
        curves: share known of the other examples before relearning and after each number of steps, by model.
    """

    checks: list[RemovalCheck]
    margin: float
    level: float
    samples: int
    relearning: Relearning | None = None
    curves: Mapping[str, list[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> RemovalCheck:
        for check in self.checks:
            if check.name == name:
                return check
        raise ArgumentError(f"name: expected one of {', '.join(c.name for c in self.checks)}, got {name!r}")

    @property
    def verdict(self) -> str:
        """``"not forgotten"`` (known as it is), ``"suppressed"`` (it comes back some way), ``"undecided"``, or
        ``"no trace found"``, which is as much as checks can say: they cannot show that nothing is left."""
        found = {c.kind: c.verdict for c in self.checks if c.kind == "as it is"}
        if "returned" in found.values():
            return "not forgotten"
        every = [c.verdict for c in self.checks]
        return "suppressed" if "returned" in every else "undecided" if "undecided" in every else "no trace found"

    @property
    def statement(self) -> str:
        """In words, what was compared."""
        back = [c.name for c in self.checks if c.verdict == "returned"]
        came = f" It came back by: {', '.join(back)}." if back and self.verdict == "suppressed" else ""
        return (
            f"{self.verdict.capitalize()}.{came} Returned means: after the same treatment known better than by the "
            f"retrained model, at {self.level:.0%}, and by more than {self.margin:g} of the examples."
        )

    _HEAD = ("check", "unlearned", "retrained", "original", "difference", "interval", "verdict", "note")

    def table(self) -> list[dict[str, Any]]:
        """One dict per check."""
        return [dict(zip(self._HEAD, row, strict=True)) for row in self._rows()]

    def _rows(self) -> list[tuple[str, ...]]:
        def number(v: float | None) -> str:
            return "–" if v is None else f"{v:.3f}"

        return [
            (
                c.name, number(c.unlearned), number(c.retrained), number(c.original), f"{c.difference:+.3f}",
                f"{c.interval[0]:+.3f} … {c.interval[1]:+.3f}", c.verdict, c.note,
            )
            for c in self.checks
        ]  # fmt: skip

    def __str__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        widths = [max(len(r[i]) for r in rows) for i in range(len(self._HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        return "\n".join([self.statement, *lines])

    def __repr__(self) -> str:
        counts = {v: sum(c.verdict == v for c in self.checks) for v in ("returned", "not returned", "undecided")}
        shown = ", ".join(f"{k} {v}" for v, k in counts.items() if k)
        return f"RemovalReport({self.verdict}: {shown})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{t}</th>" for t in self._HEAD)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in self._rows())
        return f"<p>{html.escape(self.statement)}</p><table><tr>{head}</tr>{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Difference to the retrained model with its interval for every check; returns matplotlib axes."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(7, 1 + 0.3 * len(self.checks)), layout="constrained").subplots()
        colours = {"returned": "C3", "not returned": "C0", "undecided": "0.5"}
        for i, c in enumerate(self.checks[::-1]):
            ax.plot(c.interval, [i, i], color=colours[c.verdict])
            ax.plot([c.difference], [i], marker="o", color=colours[c.verdict])
        ax.axvline(self.margin, color="grey", lw=1, ls="--")
        ax.set_yticks(range(len(self.checks)), [c.name for c in self.checks[::-1]])
        ax.set(xlabel="known by the unlearned model, less the retrained one")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {"verdict": self.verdict, "margin": self.margin, "level": self.level}
        found |= {"samples": self.samples, "checks": [asdict(c) for c in self.checks]}
        found["curves"] = {k: list(v) for k, v in self.curves.items()}
        found["relearning"] = None if self.relearning is None else asdict(self.relearning)
        return found

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def removal_report(
    model: Any,
    retrained: Any,
    *,
    forget: Iterable[Any],
    original: Any = None,
    knows: Knows | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    relearn_on: Iterable[Any] | None = None,
    relearn_steps: int | Sequence[int] = (5, 20),
    lr: float = 1e-3,
    optimizer: Callable[[Any], Any] | None = None,
    layers: Sequence[str] = (),
    probe_labels: Callable[[Any], Any] | None = None,
    bits: Sequence[int] = (8, 4),
    group: int | None = None,
    prompts: Mapping[str, Iterable[Any]] | None = None,
    margin: float = 0.1,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> RemovalReport:
    """Tries to bring forgotten knowledge back, in the same ways with a model that never had it.

    Every check treats the unlearned and the retrained model alike and compares them on the same examples of the forget
    set, so that what anybody could learn or guess does not count against the unlearned one:

    - **relearning**: both are trained for a few steps on ``relearn_on`` and asked about the *other* examples; and the
      steps are counted until the loss on the few is back (:func:`relearn_time`).
    - **probes**: a linear probe at each layer reads the labels from the features, by cross-validation.
    - **quantisation**: weights are rounded to 8 and 4 bits, which undoes small edits.
    - **prompts**: the same questions in other words, or after a prefix.

    No model is changed.

    Args:
        model: the unlearned torch module. retrained: one trained without the forget set.
        forget: batches of the forget set, the same for every model. Read once.
        original: the model before unlearning, shown beside.
        knows: ``knows(model, batch) -> (b,)``, in [0, 1]: whether (or with which probability) an example is known.
            Default: the label is the most probable class, for batches as in :func:`evaluate_unlearning`.
        loss: ``loss(model, batch)``, mean over the batch, for relearning. Default: cross-entropy of the same batches.
        relearn_on: batches of few samples of the forget set; by default the first batch of ``forget``, which is then
            left out of what is asked after relearning.
        relearn_steps: after how many steps both are asked, batches in a random order: after many, a model that never
            knew has learnt as well. lr: of plain SGD. optimizer: in its place, as in :func:`relearn_time`.
        layers: submodules to probe; their outputs are averaged over axes after the second.
        probe_labels: ``probe_labels(batch) -> (b,)`` whole numbers; default: the batch's labels.
        bits: of quantisation, each from 2 to 16. group: weights that share a scale; None for a row each.
        prompts: batches that ask the same in another way, by name.
        margin: share of examples by which the retrained model may be exceeded without it counting as a return.
        resamples, level, seed: of the paired bootstrap; the seed also orders batches and folds.

    Raises:
        DegenerateError: no batch, or only one where it is needed for relearning and asking.
        ArgumentError: an option out of range, an unknown layer.
        ShapeError, DTypeError: batches that do not fit. NonFiniteError: a score or loss is NaN or infinite.

    Source: relearning, Lynch and others, arXiv 2402.16835, and Deeb and Roger, arXiv 2410.08827 (other facts come
    back); quantisation, Zhang and others, arXiv 2410.16454; probes, Patil and others, arXiv 2309.17410.
    """
    if not (margin >= 0 and lr > 0):
        raise ArgumentError(f"margin, lr: expected a margin of 0 or more and lr above 0, got {margin} and {lr}")
    steps = [relearn_steps] if isinstance(relearn_steps, int) else sorted(set(relearn_steps))
    if not steps or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in steps):
        raise ArgumentError(f"relearn_steps: expected whole numbers of 1 or more, got {relearn_steps!r}")
    for b in bits:
        _check_bits(b)
    models = {"unlearned": model, "retrained": retrained}
    models |= {} if original is None else {"original": original}
    for name, m in models.items():
        if not hasattr(m, "named_parameters"):
            raise DTypeError(f"{name}: expected a torch module, got {type(m).__name__}")
    for layer in layers:
        for name, m in models.items():
            if layer not in dict(m.named_modules()):
                raise ArgumentError(f"layers: expected submodules of {name}, got {layer!r}")
    batches = list(forget)
    if not batches:
        raise DegenerateError("forget: expected at least one batch, got none")
    few = None if relearn_on is None else list(relearn_on)
    asked = batches if few is not None else batches[1:]
    few = batches[:1] if few is None else few
    if not few or not asked:
        raise DegenerateError("forget: expected a batch to relearn on and another one to ask about")
    knows = knows or _classified
    loss = loss or _cross_entropy
    test = _Tester(knows, margin, resamples, level, seed)

    checks = [test.check("as it is", "as it is", {n: test.scores(m, batches, n) for n, m in models.items()})]
    checks += _relearnt(models, few, asked, loss, optimizer, lr, steps, seed, test)
    if layers:
        checks += _probed(models, batches, layers, probe_labels, knows, seed, test)
    for b in bits:
        scores = {}
        for name, m in models.items():
            rounded = quantized_(copy.deepcopy(m), b, group)
            scores[name] = test.scores(rounded, batches, f"{name}, {b} bits")
        note = "rounded to nearest, " + ("a scale per row" if group is None else f"a scale per {group} weights")
        checks.append(test.check(f"{b} bits", "quantisation", scores, note))
    for title, loader in (prompts or {}).items():
        other = list(loader)
        if not other:
            raise DegenerateError(f"prompts: {title!r}: expected at least one batch, got none")
        scores = {name: test.scores(m, other, f"{name}, {title}") for name, m in models.items()}
        checks.append(test.check(title, "prompt", scores))
    relearning = None
    if original is not None:
        pair = {"unlearned": model, "retrained": retrained}
        relearning = relearn_time(
            pair, few, loss, original=original, lr=lr, optimizer=optimizer, max_steps=steps[-1], seeds=(seed,),
            progress=False,
        )  # fmt: skip
    return RemovalReport(checks, margin, level, test.sizes(few), relearning, test.curves)


def _classified(model: Any, batch: Any) -> Any:
    logits, labels = labelled(model, batch)
    return logits.argmax(-1) == labels.to(logits.device)


def _cross_entropy(model: Any, batch: Any) -> Any:
    from torch.nn import functional

    logits, labels = labelled(model, batch)
    return functional.cross_entropy(logits, labels.to(logits.device))


class _Tester:
    """Scores models and compares them."""

    def __init__(self, knows: Knows, margin: float, resamples: int, level: float, seed: int) -> None:
        self.knows, self.margin, self.resamples, self.level, self.seed = knows, margin, resamples, level, seed
        self.curves: dict[str, list[float]] = {}

    def scores(self, model: Any, batches: Sequence[Any], where: str) -> Floats:
        found = []
        with inferring(model):
            for i, batch in enumerate(batches):
                value = np.asarray(host(self.knows(model, batch)), dtype=np.float64)
                if value.ndim != 1:
                    raise ShapeError(f"knows: {where}: batch {i}: expected one value per example, got {value.shape}")
                if not np.isfinite(value).all():
                    raise NonFiniteError(f"knows: {where}: batch {i}: expected finite values, got NaN or infinity")
                if ((value < 0) | (value > 1)).any():
                    raise ArgumentError(f"knows: {where}: batch {i}: expected values in [0, 1], got {value}")
                found.append(value)
        return np.concatenate(found)

    def sizes(self, batches: Sequence[Any]) -> int:
        from .relearn import _size

        return sum(_size(b) for b in batches)

    def check(self, name: str, kind: str, scores: Mapping[str, Floats], note: str = "") -> RemovalCheck:
        a, b = scores["unlearned"], scores["retrained"]
        if len(a) != len(b) or len(a) < 2:
            raise ShapeError(
                f"{name}: expected the same two examples or more of both models, got {len(a)} and {len(b)}"
            )
        if (a == a[0]).all() and (b == b[0]).all():
            # Where every example is alike a bootstrap shows no spread; the rule of three bounds what was not seen.
            slack = 3.0 / len(a)
            value = float(a[0] - b[0])
            interval = (max(value - slack, -1.0), min(value + slack, 1.0))
        else:
            found = paired_bootstrap(a, b, resamples=self.resamples, level=self.level, seed=self.seed)
            value, interval = found.value, (found.low, found.high)
        verdict: Verdict = "undecided"
        if interval[0] > 0 and value > self.margin:
            verdict = "returned"
        elif interval[1] <= self.margin:
            verdict = "not returned"
        o = scores.get("original")
        return RemovalCheck(
            name, kind, float(a.mean()), float(b.mean()), None if o is None else float(o.mean()), value, interval,
            verdict, len(a), note,
        )  # fmt: skip


def _relearnt(
    models: Mapping[str, Any],
    few: list[Any],
    asked: list[Any],
    loss: Callable[[Any, Any], Any],
    optimizer: Callable[[Any], Any] | None,
    lr: float,
    steps: Sequence[int],
    seed: int,
    test: _Tester,
) -> list[RemovalCheck]:
    import torch

    scores: dict[int, dict[str, Floats]] = {s: {} for s in steps}
    for name, model in models.items():
        if name == "original":
            as_it_is = test.scores(model, asked, name)
            for s in steps:
                scores[s][name] = as_it_is
            continue
        trained = copy.deepcopy(model)
        parameters = [p for p in trained.parameters() if p.requires_grad]
        if not parameters:
            raise ArgumentError(f"{name}: expected parameters that require grad, for relearning")
        step_by = torch.optim.SGD(parameters, lr=lr) if optimizer is None else optimizer(parameters)
        order = torch.Generator().manual_seed(seed)
        queue: list[int] = []
        curve = [float(test.scores(trained, asked, f"{name}, step 0").mean())]
        for step in range(1, steps[-1] + 1):
            queue = queue or torch.randperm(len(few), generator=order).tolist()
            trained.train()
            step_by.zero_grad()
            value = loss(trained, few[queue.pop()])
            if not bool(torch.isfinite(value.detach()).all()):
                raise NonFiniteError(f"loss: {name}, step {step}: expected a finite loss, got {float(value.detach())}")
            value.backward()
            step_by.step()
            if step in scores:
                scores[step][name] = test.scores(trained, asked, f"{name}, step {step}")
                curve.append(float(scores[step][name].mean()))
        test.curves[name] = curve
    size = test.sizes(few)
    note = f"on {size} samples, asked about others; the original is as it is"
    return [test.check(f"relearning, {s} steps", "relearning", found, note) for s, found in scores.items()]


def _probed(
    models: Mapping[str, Any],
    batches: list[Any],
    layers: Sequence[str],
    labels: Callable[[Any], Any] | None,
    knows: Knows,
    seed: int,
    test: _Tester,
) -> list[RemovalCheck]:
    found: list[Any] = []
    for i, batch in enumerate(batches):
        given = labels(batch) if labels is not None else _labels_of(batch)
        found.append(class_labels(given, f"probe_labels: batch {i}"))
    y = np.concatenate(found)
    read: dict[str, dict[str, Floats]] = {}
    for name, model in models.items():
        features = _features(model, batches, layers, knows, name)
        for layer, x in features.items():
            if len(x) != len(y):
                raise ShapeError(f"layers: {layer!r}: expected {len(y)} rows as labels, got {len(x)}")
            read.setdefault(layer, {})[name] = linear_probe(x, y, seed=seed).astype(np.float64)
    note = "ridge probe, 5 folds; share of labels read"
    return [test.check(f"probe, {layer}", "probe", scores, note) for layer, scores in read.items()]


def _labels_of(batch: Any) -> Any:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    raise DTypeError(f"probe_labels: expected batches with labels, or probe_labels=, got {type(batch).__name__}")


def _features(model: Any, batches: list[Any], layers: Sequence[str], knows: Knows, name: str) -> dict[str, Floats]:
    modules = dict(model.named_modules())
    kept: dict[str, list[Floats]] = {layer: [] for layer in layers}
    notes: dict[str, list[Any]] = {layer: [] for layer in layers}

    def hook(layer: str) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any) -> None:
            notes[layer].append((output[0] if isinstance(output, tuple) else output).detach())

        return note

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(modules[layer].register_forward_hook(hook(layer)).remove)
        stack.enter_context(inferring(model))
        for i, batch in enumerate(batches):
            knows(model, batch)
            for layer, seen in notes.items():
                # A score may need several passes; the first is that of the question.
                if not seen or seen[0].ndim < 2:
                    raise ArgumentError(f"layers: {name}, batch {i}: expected an output of rows from {layer!r}")
                x = host(seen[0].float())
                kept[layer].append(np.asarray(x, dtype=np.float64).reshape(len(x), -1) if x.ndim == 2 else _pooled(x))
                seen.clear()
    return {layer: np.concatenate(v) for layer, v in kept.items()}


def _pooled(x: Any) -> Floats:
    """Sequences ``(b, t, d)`` by their last position, as causal models gather there; images by the mean of channels."""
    values: Floats = np.asarray(x, dtype=np.float64)
    return values[:, -1] if values.ndim == 3 else values.reshape(*values.shape[:2], -1).mean(axis=2)


def linear_probe(x: Any, y: Any, *, folds: int = 5, ridge: float = 1.0, seed: int = 0) -> Ints:
    """Whether a linear probe that did not see an example reads its label: 0 or 1 for each, by cross-validation.

    Ridge regression onto one column per class, features scaled to unit variance within each fold's training rows; the
    class of the largest column is read.

    Args:
        x: ``(n, d)`` finite features. y: ``(n,)`` whole numbers of 0 or more, two classes or more.
        folds: from 2 to n, stratified. ridge: strength, above 0. seed: of the folds.

    Raises:
        ShapeError, DTypeError, NonFiniteError: arrays that do not fit. ArgumentError: an option out of range.
        DegenerateError: a single class.
    """
    rows = np.asarray(host(x), dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ShapeError(f"x: expected shape (n, d), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise NonFiniteError("x: expected finite features, got NaN or infinity")
    labels = class_labels(y, "y", len(rows))
    classes, code = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DegenerateError(f"y: expected two classes or more, got {len(classes)}")
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= len(rows):
        raise ArgumentError(f"folds: expected 2 to {len(rows)}, got {folds!r}")
    if not ridge > 0:
        raise ArgumentError(f"ridge: expected a number above 0, got {ridge}")
    rng = np.random.default_rng(seed)
    fold = np.empty(len(rows), dtype=np.int64)
    start = 0
    for c in range(len(classes)):
        members = rng.permutation(np.flatnonzero(code == c))
        fold[members] = (np.arange(len(members)) + start) % folds
        start += len(members)
    right: Ints = np.zeros(len(rows), dtype=np.int64)
    for f in range(folds):
        train, held = fold != f, fold == f
        if not held.any():
            continue
        mean, scale = rows[train].mean(axis=0), rows[train].std(axis=0)
        a = (rows[train] - mean) / np.where(scale > 0, scale, 1.0)
        b = (rows[held] - mean) / np.where(scale > 0, scale, 1.0)
        target = np.eye(len(classes))[code[train]]
        centre = target.mean(axis=0)
        # Of the two forms the smaller system: features or rows.
        if a.shape[1] <= a.shape[0]:
            weights = np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ (target - centre))
        else:
            weights = a.T @ np.linalg.solve(a @ a.T + ridge * np.eye(len(a)), target - centre)
        right[held] = (b @ weights + centre).argmax(axis=1) == code[held]
    return right


def _check_bits(bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 2 <= bits <= 16:
        raise ArgumentError(f"bits: expected whole numbers from 2 to 16, got {bits!r}")


def quantized_(model: Any, bits: int, group: int | None = None) -> Any:
    """Rounds every weight of two axes or more to ``bits`` bits, in place, and returns the model.

    Symmetric, to nearest (ties to even), with a scale per row of the leading axis (or per ``group`` weights of a row):
    ``w = s · round(w / s)`` with ``s = max|w| / (2^(bits−1) − 1)``. Tied weights are rounded once; biases and norms
    stay as they are.

    Args:
        model: a torch module. bits: 2 to 16. group: weights that share a scale, or None.

    Raises:
        ArgumentError: an option out of range. NonFiniteError: a weight is NaN or infinite; nothing was changed.
    """
    import torch

    _check_bits(bits)
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise ArgumentError(f"group: expected 1 or more, got {group!r}")
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    for name, p in weights.items():
        if not bool(p.detach().isfinite().all()):
            raise NonFiniteError(f"{name!r}: expected finite weights, got NaN or infinity")
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for p in weights.values():
            rows = p.detach().reshape(len(p), -1).float()
            width = rows.shape[1]
            size = width if group is None else min(group, width)
            padded = torch.nn.functional.pad(rows, (0, -width % size)).reshape(-1, size)
            scale = padded.abs().amax(dim=1, keepdim=True) / most
            rounded = torch.where(scale > 0, (padded / scale).round() * scale, padded)
            p.copy_(rounded.reshape(len(p), -1)[:, :width].reshape(p.shape))
    return model
