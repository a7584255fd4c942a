"""Whether a model has unlearned: everything beside what a model retrained without the forget set does."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError
from ..measure._arrays import vector
from ..measure.membership import SVC_FEATURES, entropy_mia, svc_mia
from ..measure.outputs import Forward, Outputs, labelled, outputs
from ..measure.quality import ks_test, paired_bootstrap
from ..measure.similarity import cka
from ..measure.transfer import knn_transfer
from ..measure.tug_of_war import tug_of_war
from .relearn import Relearning, relearn_time

__all__ = ["Evaluation", "Measure", "evaluate_unlearning"]

_SETS = ("forget", "retain", "test")
#: Rows of the retained set in the neighbours' bank.
_BANK = 4000


@dataclass(frozen=True)
class Measure:
    """One number of the unlearned model, and what it is to be compared with."""

    name: str
    unlearned: float | None
    retrained: float | None
    original: float | None
    #: What the unlearned model's number should be.
    goal: str
    #: The goal as a number, where it is one: the retrained model's value, or a constant.
    target: float | None
    #: 95 % interval of unlearned less retrained, examples drawn together.
    difference: tuple[float, float] | None = None
    #: Why a number is missing, or how it was taken.
    note: str = ""
    #: Whether the number lies in [0, 1].
    share: bool = True

    @property
    def gap(self) -> float | None:
        """Unlearned less the goal."""
        return None if self.unlearned is None or self.target is None else self.unlearned - self.target


@dataclass(frozen=True)
class Evaluation:
    """All measures of one unlearned model."""

    measures: list[Measure]
    #: Rows of each set.
    sizes: dict[str, int]
    relearning: Relearning | None = None

    def __getitem__(self, name: str) -> Measure:
        for m in self.measures:
            if m.name == name:
                return m
        raise ArgumentError(f"name: expected one of {', '.join(m.name for m in self.measures)}, got {name!r}")

    def _rows(self) -> list[tuple[str, ...]]:
        def number(v: float | None) -> str:
            return "–" if v is None else f"{v:.4g}" if abs(v) < 1e4 else f"{v:.3g}"

        rows: list[tuple[str, ...]] = []
        for m in self.measures:
            interval = "" if m.difference is None else f"{m.difference[0]:+.3f} … {m.difference[1]:+.3f}"
            rows.append(
                (m.name, number(m.unlearned), number(m.retrained), number(m.original), interval, m.goal, m.note)
            )
        return rows

    _HEAD = ("measure", "unlearned", "retrained", "original", "difference (95 %)", "goal", "note")

    @property
    def statement(self) -> str:
        """In words, what was evaluated."""
        sizes = ", ".join(f"{n:,} {s}" for s, n in self.sizes.items())
        if all(m.retrained is None for m in self.measures):
            return (
                f"{sizes} samples. Without a retrained model most measures have no goal: a lower number is not better."
            )
        return f"{sizes} samples. The difference is unlearned less retrained, on the same samples."

    def __str__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        keep = [i for i in range(len(self._HEAD)) if any(r[i] not in ("", "–") for r in rows[1:])]
        widths = {i: max(len(r[i]) for r in rows) for i in keep}
        lines = ["  ".join(r[i].rjust(widths[i]) if 0 < i < 4 else r[i].ljust(widths[i]) for i in keep) for r in rows]
        return "\n".join([self.statement, *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{t}</th>" for t in self._HEAD)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in self._rows())
        return f"<p>{html.escape(self.statement)}</p><table><tr>{head}</tr>{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Every measure in [0, 1] as a line: unlearned, retrained, original, and the goal; returns the axes."""
        import matplotlib.pyplot as plt

        shown = [m for m in self.measures if m.share and m.unlearned is not None]
        if ax is None:
            _, ax = plt.subplots(figsize=(7, 1 + 0.3 * len(shown)), layout="constrained")
        for who, marker, colour in (("original", "|", "0.5"), ("retrained", "o", "C1"), ("unlearned", "D", "C0")):
            at = [(getattr(m, who), i) for i, m in enumerate(shown) if getattr(m, who) is not None]
            if at:
                ax.scatter(*zip(*at, strict=True), marker=marker, color=colour, label=who, zorder=3)
        for i, m in enumerate(shown):
            if m.target is not None:
                ax.plot([m.target, m.unlearned], [i, i], color="C0", lw=1)
        ax.set_yticks(range(len(shown)), [m.name for m in shown])
        ax.invert_yaxis()
        ax.set_xlim(-0.05, 1.05)
        ax.grid(axis="x", lw=0.4)
        ax.legend()
        return ax

    def to_json(self) -> str:
        """All measures with their goals, as JSON."""
        found = {"sizes": self.sizes, "measures": [{**asdict(m), "gap": m.gap} for m in self.measures]}
        if self.relearning is not None:
            found["relearning"] = asdict(self.relearning)
        return json.dumps(found, indent=1, allow_nan=False)


def evaluate_unlearning(
    model: Any,
    retrained: Any = None,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    test: Iterable[Any],
    original: Any = None,
    forward: Forward | None = None,
    layers: Sequence[str] = (),
    membership: Sequence[str] = ("entropy", "confidence", "modified_entropy"),
    membership_preset: Literal["svc_mia_repo"] | None = None,
    relearn: Mapping[str, Any] | None = None,
    per_example: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluates an unlearned classifier beside a model retrained without the forget set.

    Every measure says what it is to be compared with; for most of them the goal is the retrained model's value, and
    going below it (a forget accuracy of 0, no forget sample taken for a member) is itself a trace of the forget set.
    All models see the same rows in one pass over each loader, in eval mode; their modes are restored.

    Args:
        model: the unlearned torch module.
        retrained: one trained without the forget set. Without it there are numbers, but few goals.
        forget: batches of the forget set: ``(inputs, labels)``, or mappings with ``labels``.
        retain: batches of retained training data (a sample of them will do), the members of membership inference.
        test: batches never trained on.
        original: the model before unlearning.
        forward: ``forward(model, batch) -> (logits (b, classes), labels (b,))`` for batches of another form.
        layers: submodules whose outputs are compared (linear CKA, debiased) and read by their neighbours. Bank of the
            neighbours: retained samples (at most 4,000) and the other forget samples.
        membership: attacks: ``"entropy"`` (:func:`abjure.measure.entropy_mia`) and, by a support-vector machine,
            ``"correctness"``, ``"confidence"``, ``"svc_entropy"``, ``"modified_entropy"``, ``"probabilities"``
            (:func:`abjure.measure.svc_mia`). Needs scikit-learn; ``()`` for none.
        membership_preset: passed to :func:`abjure.measure.svc_mia`.
        relearn: options of :func:`relearn_time` for a relearn time, for example ``{"lr": 0.01, "max_steps": 50}``; its
            target is the original model's forget loss unless ``target`` is among them. ``loss`` is the cross-entropy.
        per_example: further values per forget example, ``{name: (unlearned, retrained)}`` or with the original's as a
            third (truth ratios, for example): each gets a Kolmogorov-Smirnov test.
        seed: of the intervals and draws.

    Returns:
        All measures: a table, a plot, JSON.

    Raises:
        DegenerateError: an empty set.
        ShapeError, DTypeError, ArgumentError: batches that do not fit, labels out of range, an unknown layer or attack.
        NonFiniteError: NaN or infinite logits; the set, batch and model are named.

    Source: accuracies and entropy attack arXiv 2308.07707; tug-of-war 2406.01257; CKA and neighbours after "Are We
    Truly Forgetting?"; forget quality arXiv 2401.06121, here on the forget set's losses.
    """
    unknown = [a for a in membership if a not in ("entropy", "svc_entropy", *SVC_FEATURES)]
    if unknown:
        raise ArgumentError(f"membership: expected of entropy, svc_entropy, {', '.join(SVC_FEATURES)}, got {unknown}")
    models = {"unlearned": model}
    models |= {name: m for name, m in (("retrained", retrained), ("original", original)) if m is not None}
    if relearn is not None and original is None and "target" not in relearn:
        raise ArgumentError("relearn: expected original=, or a target among the options, got neither")
    forget = list(forget)
    sets: dict[str, dict[str, Outputs]] = {}
    for name, loader in zip(_SETS, (forget, retain, test), strict=True):
        sets[name] = outputs(models, loader, forward=forward, layers=layers, name=name)
        if not len(sets[name]["unlearned"].labels):
            raise DegenerateError(f"{name}: expected at least one sample, got none")
    extra = _values(per_example)
    found = [*_accuracies(sets, models, seed), *_memberships(sets, models, membership, membership_preset, seed)]
    found += _distances(sets, models, extra)
    for layer in layers:
        found += _representations(sets, models, layer, seed)
    relearning = None
    if relearn is not None:
        measure, relearning = _relearnt(models, forget, forward or labelled, dict(relearn))
        found.append(measure)
    return Evaluation(found, {s: len(sets[s]["unlearned"].labels) for s in _SETS}, relearning)


def _as_retrained(name: str, values: Mapping[str, float | None], **more: Any) -> Measure:
    """A measure whose goal is the retrained model's value."""
    u, r, o = (values.get(m) for m in ("unlearned", "retrained", "original"))
    goal = "as retrained" if "retrained" in values else "as a retrained model's"
    return Measure(name, u, r, o, goal, r, **more)


def _accuracies(sets: Mapping[str, dict[str, Outputs]], models: Mapping[str, Any], seed: int) -> list[Measure]:
    found, accuracy = [], {m: {s: sets[s][m].accuracy for s in _SETS} for m in models}
    for s in _SETS:
        difference = None
        if "retrained" in models and len(sets[s]["unlearned"].labels) > 1:
            pair = (sets[s][m].correct.astype(np.float64) for m in ("unlearned", "retrained"))
            interval = paired_bootstrap(*pair, seed=seed)
            difference = interval.low, interval.high
        found.append(_as_retrained(f"accuracy, {s}", {m: accuracy[m][s] for m in models}, difference=difference))
    if "retrained" in models:
        score = {m: tug_of_war(accuracy[m], accuracy["retrained"]) for m in models}
        found.append(
            Measure(
                "tug-of-war",
                score["unlearned"],
                score["retrained"],
                score.get("original"),
                "1: as retrained on all",
                1.0,
            )
        )
    return found


def _memberships(
    sets: Mapping[str, dict[str, Outputs]],
    models: Mapping[str, Any],
    attacks: Sequence[str],
    preset: Literal["svc_mia_repo"] | None,
    seed: int,
) -> list[Measure]:
    found: dict[str, dict[str, float | None]] = {a: {} for a in attacks}
    features = {a: a.removeprefix("svc_") for a in attacks if a != "entropy"}
    for m in models:
        retain, test, forget = (sets[s][m] for s in ("retain", "test", "forget"))
        if "entropy" in found:
            found["entropy"][m] = entropy_mia(retain.probabilities, test.probabilities, forget.probabilities)
        if features:
            groups = [(o.probabilities, o.labels) for o in (retain, test, forget)]
            shares = svc_mia(*groups, features=list(features.values()), preset=preset, seed=seed)
            for a, feature in features.items():
                found[a][m] = shares[feature]
    note = "share of forget samples taken for training data; 0 is not the goal"
    return [_as_retrained(f"taken for members, {a}", v, note=note) for a, v in found.items()]


def _values(per_example: Mapping[str, Sequence[Any]] | None) -> dict[str, dict[str, Any]]:
    found = {}
    for name, given in (per_example or {}).items():
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise ArgumentError(f"per_example: {name!r}: expected (unlearned, retrained) or with original as a third")
        pairs = zip(("unlearned", "retrained", "original"), given, strict=False)
        found[name] = {m: vector(v, f"per_example: {name!r}: {m}") for m, v in pairs}
    return found


def _distances(
    sets: Mapping[str, dict[str, Outputs]], models: Mapping[str, Any], extra: Mapping[str, dict[str, Any]]
) -> list[Measure]:
    found = []
    tested = {"forget loss": {m: sets["forget"][m].losses for m in models}, **extra}
    for name, values in tested.items():
        if "retrained" not in values:
            continue
        tests = {m: ks_test(v, values["retrained"]) for m, v in values.items() if m != "retrained"}
        mean = {m: float(v.mean()) for m, v in values.items()}
        note = f"means: {', '.join(f'{m} {v:.4g}' for m, v in mean.items())}"
        u, o = tests["unlearned"], tests.get("original")
        found.append(
            Measure(
                f"forget quality, {name} (log10 p)",
                u.log10_p,
                0.0,
                None if o is None else o.log10_p,
                "near 0: not told from retrained",
                0.0,
                note=f"KS distance {u.statistic:.3f}; {note}",
                share=False,
            )
        )
    return found


def _attempt(measure: Callable[[], float]) -> tuple[float | None, str]:
    try:
        return measure(), ""
    except (DegenerateError, ValueError) as err:
        return None, str(err)


def _representations(
    sets: Mapping[str, dict[str, Outputs]], models: Mapping[str, Any], layer: str, seed: int
) -> list[Measure]:
    found = []
    for s in ("forget", "test"):
        features = {m: sets[s][m].features[layer] for m in models}
        if "retrained" in models:
            values, note = _similarities(features, "retrained")
            name = f"CKA to retrained, {layer}, {s}"
            # Two trainings never agree fully, so that 1 is no target.
            goal = "above the original's" if "original" in models else "high"
            found.append(Measure(name, values["unlearned"], None, values.get("original"), goal, None, note=note))
        if "original" in models:
            values, note = _similarities(features, "original")
            found.append(_as_retrained(f"CKA to original, {layer}, {s}", values, note=note))
    chosen = np.random.default_rng(seed).permutation(len(sets["retain"]["unlearned"].labels))[:_BANK]
    knn, notes = {}, []
    for m in models:
        parts = sets["retain"][m], sets["forget"][m]
        bank = np.concatenate([parts[0].features[layer][chosen], parts[1].features[layer]])
        labels = np.concatenate([parts[0].labels[chosen], parts[1].labels])

        def right(bank: Any = bank, labels: Any = labels) -> float:
            # Every row of the bank is classified without itself; only the forget samples' answers count.
            return float((knn_transfer(bank, labels).predictions == labels)[len(chosen) :].mean())

        knn[m], note = _attempt(right)
        notes += [note] if note else []
    note = notes[0] if notes else "5 nearest retained and other forget samples, cosine"
    found.append(_as_retrained(f"neighbours' accuracy, {layer}, forget", knn, note=note))
    return found


def _similarities(features: Mapping[str, Any], other: str) -> tuple[dict[str, float | None], str]:
    values, notes = {}, []
    for m, v in features.items():
        if m != other:
            values[m], note = _attempt(lambda v=v: cka(v, features[other], debiased=True))  # type: ignore[misc]
            notes += [note] if note else []
    return values, notes[0] if notes else ""


def _relearnt(
    models: Mapping[str, Any], forget: list[Any], forward: Forward, options: dict[str, Any]
) -> tuple[Measure, Relearning]:
    from torch.nn import functional

    def loss(model: Any, batch: Any) -> Any:
        logits, labels = forward(model, batch)
        return functional.cross_entropy(logits, labels.to(logits.device))

    if "target" not in options:
        options["original"] = models["original"]
    options.setdefault("loss", loss)
    trained = {m: v for m, v in models.items() if m != "original"}
    found = relearn_time(trained, forget, **options)
    note = f"median of {len(found.steps['unlearned'])}, at most {found.max_steps}"
    if "retrained" in trained:
        ratio, sign = found.ratio("unlearned")
        note += "; both censored" if ratio is None else f"; ratio {sign} {ratio:.3g}"
    values = {m: found.median(m) for m in trained}
    return _as_retrained("relearn steps", values, note=note, share=False), found
