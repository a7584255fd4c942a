"""Choosing one direction among layers and positions by what it does to held-out prompts."""

from __future__ import annotations

import hashlib
import html
import inspect
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._files import write_atomically
from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from .blocks import decoder_blocks
from .directions import Direction, Vector
from .hooks import ablating, steering
from .prompts import PositionKey, Prompts
from .record import Key, run_device
from .tokens import row_margin

if TYPE_CHECKING:
    from torch import nn

_FORMAT = "abjure.selection.1"
#: The published constants of the score that saturates.
_EPSILON = 1e-8
_KL_EPSILON = 1e-6


def refusal_scores(
    model: nn.Module,
    prompts: Prompts,
    tokens: Iterable[int],
    *,
    compat: Literal["refusal_direction"] | None = None,
    batch_size: int = 8,
) -> Vector:
    """Log-odds that the answer to each prompt begins with one of ``tokens``, ``(prompts,)`` float64.

    ``LSE over the tokens − LSE over all others`` of the logits at the last position, which is ``ln p − ln(1−p)``
    without its overflow (Arditi et al. 2024, appendix C.1).

    Args:
        model: a Hugging Face decoder with its output head.
        prompts: a :class:`Prompts`.
        tokens: ids of the tokens that begin a refusal, such as that of ``"I"``.
        compat: ``"refusal_direction"`` adds the published 1e-8 inside both logarithms; scores then end at ±18.42.
        batch_size: prompts per forward pass.

    Raises:
        ArgumentError: no token, one outside the vocabulary, an unknown ``compat``.
        NonFiniteError: the model gives a NaN or infinite logits.
    """
    return _scores(last_logits(model, prompts, batch_size), list(tokens), compat)


def _scores(logits: Any, tokens: Sequence[int], compat: str | None) -> Vector:
    if compat not in (None, "refusal_direction"):
        raise ArgumentError(f"compat: expected None or 'refusal_direction', got {compat!r}")
    margin = np.asarray(row_margin(logits, [list(tokens)]), dtype=np.float64)[:, 0]
    if compat is None:
        return margin
    p = 1 / (1 + np.exp(-margin))
    return np.asarray(np.log(p + _EPSILON) - np.log(1 - p + _EPSILON))


def last_logits(model: nn.Module, prompts: Prompts, batch_size: int) -> Any:
    """Logits at the last token of every prompt, ``(prompts, vocabulary)`` float32 on the CPU."""
    import torch

    out: list[Any] = [None] * len(prompts)
    for chosen, rows in each_last_logits(model, prompts, batch_size):
        for i, row in zip(chosen, rows, strict=True):
            if bool(row.isnan().any()):
                raise NonFiniteError(f"logits: NaN at prompt {i} ({prompts[i].text[:60]!r})")
            out[i] = row
    return torch.stack(out)


def each_last_logits(model: nn.Module, prompts: Prompts, batch_size: int) -> Iterator[tuple[list[int], Any]]:
    """The same batch by batch: indices of prompts, and their rows."""
    import torch

    device = run_device(model)
    # The head runs at the rows' own last positions only, where the model can be told so.
    picks = "logits_to_keep" in inspect.signature(model.forward).parameters
    for chosen, ids, mask in prompts.batches(batch_size):
        last = mask.sum(-1) - 1
        kept, place = torch.unique(last, return_inverse=True)
        options = {"logits_to_keep": kept.to(device)} if picks else {}
        with torch.no_grad():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options).logits
        yield chosen, logits[torch.arange(len(chosen)), (place if picks else last).to(logits.device)].float().cpu()


def _divergence(base: Any, other: Any) -> float:
    """Mean over rows of KL(base ‖ other) with the published 1e-6 in the logarithms, float64."""
    import torch

    p, q = (torch.softmax(x.double(), -1) for x in (base, other))
    return float((p * ((p + _KL_EPSILON).log() - (q + _KL_EPSILON).log())).sum(-1).mean())


@dataclass(frozen=True)
class Candidate:
    """Scores of one direction.

    Attributes:
        layer, position: where it was estimated.
        bypass: mean refusal score of the positive prompts with the direction ablated everywhere; lower is better.
        induce: mean refusal score of the negative prompts with the direction added at its layer; above 0 it refuses.
        kl: mean divergence of the first answer token on the negative prompts, ablated from plain, in nats.
        failed: the criteria it misses; empty if it is eligible.
    """

    layer: int
    position: PositionKey
    bypass: float
    induce: float
    kl: float
    failed: tuple[str, ...] = ()


@dataclass
class DirectionSelection:
    """All candidates with their scores, best first among those that meet every criterion.

    Attributes:
        candidates: in the order of layers and positions.
        baseline: mean refusal score of the positive and of the negative prompts, nothing edited.
    """

    candidates: list[Candidate]
    baseline: tuple[float, float]
    _directions: Mapping[Key, Direction] = field(repr=False)

    @property
    def eligible(self) -> list[Candidate]:
        """Candidates that meet every criterion, lowest bypass score first; ties in the order given."""
        return sorted((c for c in self.candidates if not c.failed), key=lambda c: c.bypass)

    @property
    def best(self) -> Candidate:
        """The first of :attr:`eligible`.

        Raises:
            DegenerateError: no candidate meets every criterion; the message counts what they miss.
        """
        found = self.eligible
        if not found:
            counts = {f: sum(f in c.failed for c in self.candidates) for c in self.candidates for f in c.failed}
            missed = ", ".join(f"{n} of {len(self.candidates)} miss {f}" for f, n in counts.items())
            raise DegenerateError(f"candidates: none meets every criterion: {missed}")
        return found[0]

    @property
    def direction(self) -> Direction:
        """The best direction, not normalised.

        Raises:
            DegenerateError: as :attr:`best`.
        """
        best = self.best
        return self._directions[best.layer, best.position]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, in plain types for JSON."""
        return {"baseline": list(self.baseline), "candidates": [asdict(c) for c in self.candidates]}

    def __str__(self) -> str:
        lines = ["layer  position            bypass   induce       kl  misses"]
        lines += [
            f"{c.layer:5d}  {c.position!s:17s} {c.bypass:8.3f} {c.induce:8.3f} {c.kl:8.4f}  {', '.join(c.failed)}"
            for c in self.candidates
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{c.layer}</td><td>{html.escape(str(c.position))}</td><td>{c.bypass:.3f}</td>"
            f"<td>{c.induce:.3f}</td><td>{c.kl:.4f}</td><td>{html.escape(', '.join(c.failed))}</td></tr>"
            for c in self.candidates
        )
        header = "<tr><th>layer</th><th>position</th><th>bypass</th><th>induce</th><th>KL</th><th>misses</th></tr>"
        return f"<table><caption>Directions by layer and position</caption>{header}{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Bypass score by layer, a line per position; filled where eligible. Returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for position in dict.fromkeys(c.position for c in self.candidates):
            mine = [c for c in self.candidates if c.position == position]
            (line,) = ax.plot([c.layer for c in mine], [c.bypass for c in mine], label=str(position), lw=1)
            good = [c for c in mine if not c.failed]
            ax.scatter([c.layer for c in good], [c.bypass for c in good], color=line.get_color(), s=18)
        ax.axhline(self.baseline[0], color="0.6", ls=":", label="nothing ablated")
        ax.set(xlabel="layer", ylabel="refusal score, ablated")
        ax.legend(title="position")
        return ax


def select_direction(
    model: nn.Module,
    directions: Mapping[Key, Direction],
    positive: Prompts,
    negative: Prompts,
    tokens: Iterable[int],
    *,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    skip_last: float = 0.2,
    compat: Literal["refusal_direction"] | None = None,
    batch_size: int = 8,
    resume: str | os.PathLike[str] | None = None,
    blocks: str | None = None,
    progress: bool = True,
) -> DirectionSelection:
    """Scores every candidate on held-out prompts and picks the one whose ablation ends refusal best.

    For each direction: the refusal score of the positive prompts with it ablated everywhere (bypass), that of the
    negative prompts with it added at its own layer and length (induce), and the divergence that ablation causes on
    the negative prompts (kl). Eligible are those with ``kl <= max_kl``, ``induce >= min_induce`` and a layer before
    the last fifth; the lowest bypass wins (Arditi et al. 2024, appendix C).

    Args:
        model: a Hugging Face decoder with its output head.
        directions: (layer, position) to :class:`Direction`, from :meth:`Contrasts.directions`; read at ``"pre"``.
        positive: held-out prompts that the model refuses.
        negative: held-out prompts that it answers.
        tokens: ids of the tokens that begin a refusal.
        max_kl, min_induce, skip_last: the published thresholds; ``skip_last`` is the share of last layers left out.
        compat: as in :func:`refusal_scores`.
        batch_size: prompts per forward pass; three passes over the prompts per candidate.
        resume: a JSON file that is rewritten after every candidate, and read first where it exists, so that an
            interrupted search goes on. One of another model, direction, prompt or token is refused.
        blocks: dotted name of the list of blocks, for models the table does not know.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        A :class:`DirectionSelection`; it is returned with all scores even where no candidate is eligible.

    Raises:
        ArgumentError, DTypeError, ShapeError: an argument does not fit; ``resume`` is of another search.
        NonFiniteError: the unedited model gives NaN logits. A candidate whose edit does is marked ``"finite"``.
    """
    from tqdm.auto import tqdm

    tokens = [int(t) for t in tokens]
    depth = len(decoder_blocks(model, blocks)[1])
    _check_candidates(directions, depth)
    for name, value in (("max_kl", max_kl), ("min_induce", min_induce), ("skip_last", skip_last)):
        if math.isnan(value):
            raise ArgumentError(f"{name}: expected a number, got {value}")
    if not 0 <= skip_last < 1:
        raise ArgumentError(f"skip_last: expected a share in [0, 1), got {skip_last}")
    with evaluating(model):
        plain = [last_logits(model, prompts, batch_size) for prompts in (positive, negative)]
        base = [float(_scores(x, tokens, compat).mean()) for x in plain]
        key = _fingerprint(directions, positive, negative, tokens, compat, plain)
        known = _read(resume, key)
        for (layer, position), direction in tqdm(
            directions.items(), desc="directions", unit="direction", disable=None if progress else True
        ):
            name = f"{layer}/{position}"
            if name in known:
                continue
            with ablating(model, direction, blocks=blocks):
                bypass, _ = _measured(model, positive, tokens, compat, batch_size)
                _, ablated = _measured(model, negative, tokens, compat, batch_size)
            with steering(model, direction, [layer], blocks=blocks):
                induce, _ = _measured(model, negative, tokens, compat, batch_size)
            kl = math.nan if ablated is None else _divergence(plain[1], ablated)
            known[name] = [bypass, induce, kl]
            if resume is not None:
                write_atomically(resume, json.dumps({"format": _FORMAT, "key": key, "scores": known}).encode())
    last = int(depth * (1 - skip_last))
    candidates = []
    for layer, position in directions:
        bypass, induce, kl = known[f"{layer}/{position}"]
        failed = [] if all(math.isfinite(s) for s in (bypass, induce, kl)) else ["finite"]
        failed += ["layer"] if layer >= last else []
        failed += ["kl"] if kl > max_kl else []
        failed += ["induce"] if induce < min_induce else []
        candidates.append(Candidate(layer, position, bypass, induce, kl, tuple(failed)))
    return DirectionSelection(candidates, (base[0], base[1]), dict(directions))


def _check_candidates(directions: Mapping[Key, Direction], depth: int) -> None:
    if not isinstance(directions, Mapping) or not directions:
        raise ArgumentError("directions: expected (layer, position) to Direction, got none")
    for (layer, position), direction in directions.items():
        if not isinstance(direction, Direction):
            raise DTypeError(f"directions: expected Direction at {(layer, position)}, got {type(direction).__name__}")
        if not 0 <= layer < depth:
            raise ArgumentError(f"directions: expected layers 0 to {depth - 1}, got {layer}")
        if direction.site != "pre":
            raise ArgumentError(f'directions: expected site "pre" at {(layer, position)}, got {direction.site!r}')
    if len({len(d) for d in directions.values()}) != 1:
        raise ShapeError(
            f"directions: expected vectors of one length, got {sorted({len(d) for d in directions.values()})}"
        )


def _measured(
    model: nn.Module, prompts: Prompts, tokens: Sequence[int], compat: str | None, batch_size: int
) -> tuple[float, Any]:
    """Mean score and the logits; NaN and None where the edit broke the model."""
    try:
        logits = last_logits(model, prompts, batch_size)
        return float(_scores(logits, tokens, compat).mean()), logits
    except NonFiniteError:
        return math.nan, None


def _fingerprint(
    directions: Mapping[Key, Direction],
    positive: Prompts,
    negative: Prompts,
    tokens: Sequence[int],
    compat: str | None,
    plain: Sequence[Any],
) -> str:
    """Of everything the scores depend on; the model enters by its logits on the prompts."""
    digest = hashlib.sha256()
    for name, direction in directions.items():
        digest.update(repr(name).encode() + direction.vector.tobytes())
    for prompts in (positive, negative):
        digest.update(repr([p.ids for p in prompts]).encode())
    digest.update(repr((list(tokens), compat)).encode())
    for logits in plain:
        # By its largest logits' places: the same model on other threads or another machine is the same model.
        digest.update(logits.argmax(-1).numpy().tobytes())
    return digest.hexdigest()


def _read(resume: str | os.PathLike[str] | None, key: str) -> dict[str, list[float]]:
    if resume is None or not Path(resume).exists():
        return {}
    try:
        found = json.loads(Path(resume).read_text())
        if found["format"] != _FORMAT:
            raise KeyError("format")
        same, scores = found["key"] == key, {str(k): [float(x) for x in v] for k, v in found["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArgumentError(f"resume: expected a file of select_direction, got {os.fspath(resume)!r}") from err
    if not same:
        raise ArgumentError(f"resume: {os.fspath(resume)!r} belongs to another model, direction, prompt set or token")
    return scores
