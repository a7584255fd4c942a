"""Weight-space ablation of a whole decoder, with a report of every tensor and an exact undo."""

from __future__ import annotations

import html
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import _native
from .._interop import device_path
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from .architectures import Writer, architecture, residual_writers, text_config
from .blocks import Layers, attribute
from .directions import Direction, _finite, orthonormal_basis
from .weights import NormPreserving, WeightReport, orthogonalize_

if TYPE_CHECKING:
    from torch import nn

Tied = Literal["skip", "untie", "edit"]
Scale = float | Mapping[str, float] | Callable[[Writer], float]
_COMPONENTS = ("embedding", "attention", "mlp", "experts")


@dataclass
class ModelEditReport:
    """What :func:`orthogonalize_model_` did.

    Attributes:
        writers: every writer of the chosen layers, edited or not.
        edits: name of an edited tensor to its :class:`WeightReport`.
        scales: name of an edited tensor to the scale it was edited with.
        notes: what was left out, and why.
        direction: where the direction came from, if it was a :class:`Direction`.
    """

    writers: list[Writer]
    edits: dict[str, WeightReport] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    direction: dict[str, Any] | None = None
    _restore: list[Callable[[], None]] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Gives every edited tensor its former bits, and ties again what was untied. Does nothing the second time.

        Raises:
            ArgumentError: the edit was made with ``undo=False``.
        """
        if self._restore is None:
            raise ArgumentError("undo: expected an edit made with undo=True")
        while self._restore:
            self._restore.pop()()

    @property
    def coverage(self) -> list[str]:
        """One line per block: which components were edited, and how many experts."""
        lines = []
        for layer in dict.fromkeys(w.layer for w in self.writers):
            mine = [w for w in self.writers if w.layer == layer]
            done = Counter(w.component for w in mine if w.name in self.edits)
            parts = [f"{component} {n}" for component, n in done.items()]
            parts += [f"experts {w.tensor.shape[0]}" for w in mine if w.tensor.ndim == 3 and w.name in self.edits]
            if skipped := len(mine) - sum(done.values()):
                parts.append(f"not edited {skipped}")
            lines.append(f"{'embeddings' if layer is None else f'block {layer}'}: {', '.join(parts)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything but the undo, in plain types for JSON."""
        tensors = [
            {
                "name": w.name,
                "component": w.component,
                "layer": w.layer,
                "axis": w.axis,
                "scale": self.scales.get(w.name),
                **(vars(self.edits[w.name]) if w.name in self.edits else {}),
            }
            for w in self.writers
        ]
        return {"direction": self.direction, "notes": list(self.notes), "tensors": tensors}

    def __str__(self) -> str:
        before = float(np.linalg.norm([e.residual_before for e in self.edits.values()]))
        after = float(np.linalg.norm([e.residual_after for e in self.edits.values()]))
        head = f"{len(self.edits)} of {len(self.writers)} tensors edited; |QW| {before:.4g} -> {after:.4g}"
        return "\n".join([head, *self.coverage, *self.notes])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(w.name)}</td><td>{w.component}</td><td>{self.scales[w.name]:g}</td>"
            f"<td>{self.edits[w.name].residual_before:.4g}</td><td>{self.edits[w.name].residual_after:.4g}</td></tr>"
            for w in self.writers
            if w.name in self.edits
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        header = "<tr><th>tensor</th><th>component</th><th>scale</th><th>|QW| before</th><th>after</th></tr>"
        return f"<table><caption>Orthogonalised model</caption>{header}{rows}</table>{notes}"


def orthogonalize_model_(
    model: nn.Module,
    q: Any,
    layers: Layers = None,
    *,
    scale: Scale = 1.0,
    norm_preserving: NormPreserving | None = None,
    tied: Tied | None = None,
    blocks: str | None = None,
    undo: bool = True,
) -> ModelEditReport:
    """Edits every tensor that writes to the residual stream so that it no longer writes along ``q``, in place.

    With ``scale=1``, all layers and the embeddings, the model then computes what it computes inside
    :func:`ablating` (Arditi et al. 2024, §4.1), up to rounding. Where a norm follows a branch (Gemma 2 and 3, OLMo 2,
    GLM-4), the tensors are made orthogonal to the direction times that norm's gain, which has the same effect.

    Args:
        model: a Hugging Face decoder of a family in :data:`ARCHITECTURES`, with its adapters merged.
        q: a :class:`Direction`, ``(d,)`` or ``(k, d)``.
        layers: indices of blocks, whose branches alone are edited; None for every block and the embeddings. A
            direction for each layer: one call per layer.
        scale: 1 removes, 2 reflects, negative values amplify. A mapping gives one per component (``"embedding"``,
            ``"attention"``, ``"mlp"``, ``"experts"``), those left out are not edited; a function gives one per
            :class:`Writer`. 0 leaves a tensor as it is.
        norm_preserving: as in :func:`orthogonalize_`; biases know only ``"in"``.
        tied: what to do with an embedding that is also the output head. ``"skip"`` leaves it, so that the component
            the embedding writes stays until an edited block; ``"untie"`` gives the head its own, unedited copy
            (``config.tie_word_embeddings`` becomes False); ``"edit"`` edits both, which changes the logits too. None
            skips, with a warning.
        blocks: dotted name of the list of blocks, where it is not found by itself.
        undo: keep the former bits of the edited tensors, as much memory again, for :meth:`ModelEditReport.undo`.

    Returns:
        A :class:`ModelEditReport`.

    Raises:
        ArgumentError, DTypeError: as :func:`residual_writers`; an unknown option; nothing is left to edit.
        ShapeError: ``q`` has another width than the model.
        NonFiniteError, DegenerateError: ``q`` or a weight is not finite, or ``q`` spans nothing.

        The model is as it was then.
    """
    import torch

    if tied not in (None, "skip", "untie", "edit"):
        raise ArgumentError(f"tied: expected 'skip', 'untie', 'edit' or None, got {tied!r}")
    writers = residual_writers(model, layers, blocks=blocks)
    basis = orthonormal_basis(q)
    for writer in writers:
        if writer.tensor.shape[writer.axis] != basis.shape[1]:
            found = f"{writer.name} has {writer.tensor.shape[writer.axis]} along the stream"
            raise ShapeError(f"q: expected vectors of the model's hidden size ({found}), got {basis.shape[1]}")
    report = ModelEditReport(writers, direction=_facts(q), _restore=[] if undo else None)
    plan = _plan(model, writers, scale, tied, report)
    if not plan:
        raise ArgumentError(f"model: nothing is left to edit; {'; '.join(report.notes) or 'every scale is 0'}")
    for writer in plan:
        _expect_finite(writer)
    restore: list[Callable[[], None]] = []
    try:
        with torch.no_grad():
            for writer, by in plan.items():
                target = writer
                if writer.tied and tied == "untie":
                    target = _untie(model, writer, restore)
                elif undo:
                    restore.append(_snapshot(writer.tensor))
                form = norm_preserving if not _is_bias(writer) or norm_preserving == "in" else None
                report.edits[writer.name] = orthogonalize_(target.tensor, basis, writer.axis, by, form, writer.gain)
                report.scales[writer.name] = by
    except BaseException:
        while restore:
            restore.pop()()
        raise
    if undo:
        report._restore = restore
    return report


def _facts(q: Any) -> dict[str, Any] | None:
    if not isinstance(q, Direction):
        return None
    return {"layer": q.layer, "site": q.site, "position": q.position, "counts": q.counts, "norm": q.norm}


def _is_bias(writer: Writer) -> bool:
    return writer.name.endswith("bias")


def _plan(
    model: nn.Module, writers: list[Writer], scale: Scale, tied: Tied | None, report: ModelEditReport
) -> dict[Writer, float]:
    """Which writers are edited by how much; the reasons for the others go into the report."""
    if isinstance(scale, Mapping) and (unknown := [k for k in scale if k not in _COMPONENTS]):
        raise ArgumentError(f"scale: expected components among {_COMPONENTS}, got {unknown[0]!r}")
    plan: dict[Writer, float] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    norm = architecture(model).embedding_norm
    for writer in writers:
        if isinstance(scale, Mapping):
            by = scale.get(writer.component, 0.0)
        else:
            by = scale(writer) if callable(scale) else scale
        by = _finite(by, "scale")
        memory = (writer.tensor.data_ptr(), tuple(writer.tensor.shape))
        if by == 0.0:
            continue
        if memory in seen and writer.tensor.numel():
            report.notes.append(f"{writer.name}: shares its memory with a tensor that is edited already")
            continue
        if writer.component == "embedding" and norm:
            if tied == "edit":
                raise ArgumentError(f"tied: {writer.name} passes {norm}, so no edit of it removes q; use ablating()")
            report.notes.append(f"{writer.name}: left as it is, {norm} follows it; the first block still reads q")
            continue
        if writer.tied and tied in (None, "skip"):
            report.notes.append(f"{writer.name}: left as it is, since the output head is tied to it (tied='skip')")
            if tied is None:
                warnings.warn(
                    f"{writer.name} is tied to the output head and left as it is, so the first block still reads q; "
                    "pass tied='skip', 'untie' or 'edit'",
                    UserWarning,
                    stacklevel=3,
                )
            continue
        if writer.tied:
            done = "untied from the output head" if tied == "untie" else "edited, and the output head with it"
            report.notes.append(f"{writer.name}: {done}")
        seen.add(memory)
        plan[writer] = by
    return plan


def _expect_finite(writer: Writer) -> None:
    import torch

    weight = writer.tensor.detach()
    try:
        if device_path(weight, "orthogonalize_") is None:
            for part in weight if weight.ndim == 3 else [weight]:
                _native.check_weight(part)
        elif not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("weight: expected finite values, got a NaN or an infinity")
    except NonFiniteError as err:
        raise NonFiniteError(f"{writer.name}: {err}") from None
    if writer.gain is not None and not bool(writer.gain.any()):
        raise DegenerateError(f"{writer.name}: the norm behind it has a gain of zero")


def _snapshot(tensor: Any) -> Callable[[], None]:
    import torch

    former = tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(former)

    return restore


def _untie(model: nn.Module, writer: Writer, restore: list[Callable[[], None]]) -> Writer:
    """Gives the embedding a tensor of its own; the output head keeps the one they shared."""
    from dataclasses import replace

    from torch import nn

    path, _, name = writer.name.rpartition(".")
    module = attribute(model, path)
    own = nn.Parameter(writer.tensor.detach().clone(), requires_grad=writer.tensor.requires_grad)
    setattr(module, name, own)
    restore.append(lambda: setattr(module, name, writer.tensor))
    for config in {id(c): c for c in (getattr(model, "config", None), text_config(model)) if c is not None}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            restore.append(lambda config=config: setattr(config, "tie_word_embeddings", True))  # type: ignore[misc]
    keys = getattr(model, "all_tied_weights_keys", None)
    if isinstance(keys, dict) and keys:
        former = dict(keys)
        for key in [k for k, v in keys.items() if writer.name in (k, v)]:
            del keys[key]
        restore.append(lambda: keys.update(former))
    return replace(writer, tensor=own, tied=False)
