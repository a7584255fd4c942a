"""Directed representation optimisation: a continuous safety prompt that sharpens refusal (arXiv 2401.18018)."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import reading, write_atomically
from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from ._logistic import fit_logistic
from .directions import Site, Vector
from .hooks import _attached, _on_input, _on_output, check_site
from .prompts import _MARK, Prompts, _render
from .record import _blocks, _inner, run_device
from .select import refusal_scores

if TYPE_CHECKING:
    from torch import nn

_FORMAT = "abjure.safety_prompt"
#: Between a safety prompt and the instruction, where the chat template has no system message.
_SEPARATOR = "\n\n"
_TERMS = ("refusal", "harmfulness", "complement")
_WEIGHTS = (1.0, 1e-2, 1e-3)


@dataclass(frozen=True, eq=False)
class AnchorSpace:
    """The few directions in which prompts differ, with refusal and harmfulness as logistic functions on them.

    ``g(x) = Vᵀ(x − μ)``, and two logits linear in g. **Both rise with what is good:** the fit called "refusal" has the
    rate of *compliance* as its target, so its logit rises with compliance; the fit called "harmfulness" has harmless
    = 1, so its logit rises with harmlessness (arXiv 2401.18018, section 3.1).

    Attributes:
        mean: μ ``(d,)`` float64.
        components: V ``(d, m)`` float64, orthonormal columns, the largest variance first.
        explained: ``(m,)``, share of the variance of the anchor states along each.
        refusal_weight, harmfulness_weight: ``(m,)`` float64.
        refusal_bias, harmfulness_bias: intercepts.
    """

    mean: Vector
    components: Vector
    explained: Vector
    refusal_weight: Vector
    refusal_bias: float
    harmfulness_weight: Vector
    harmfulness_bias: float

    @classmethod
    def fit(cls, states: Any, refusal_targets: Any, harmless: Any, rank: int = 4, C: float = 1.0) -> AnchorSpace:
        """Principal components of pooled anchor states, and a logistic fit of each target on them.

        Args:
            states: ``(n, d)``, or ``(groups, prompts, d)`` as :func:`anchor_states` gives them; harmful and harmless
                prompts, with and without safety prompts.
            refusal_targets: the rate of compliance in [0, 1] of each state's prompt; broadcast to ``states``.
            harmless: 1 for harmless prompts, 0 for harmful ones; broadcast alike, so one per prompt is enough.
            rank: number of components m; 4 as published.
            C: inverse strength of the L2 penalty of both fits. The published fits have none and stop early.

        Raises:
            ShapeError, NonFiniteError: the arguments do not fit.
            ArgumentError: a target outside [0, 1], a label not 0 or 1, a rank that is not 1 to min(n − 1, d).
            DegenerateError: the states span fewer than ``rank`` dimensions, or one class is missing.
        """
        given = _array(states, "states")
        if given.ndim < 2 or 0 in given.shape:
            raise ShapeError(f"states: expected (..., d) with rows, got {given.shape}")
        x = given.reshape(-1, given.shape[-1])
        targets = []
        for name, value in (("refusal_targets", refusal_targets), ("harmless", harmless)):
            target = _array(value, name)
            try:
                targets.append(np.broadcast_to(target, given.shape[:-1]).flatten())
            except ValueError:
                raise ShapeError(f"{name}: expected one per state {given.shape[:-1]}, got {target.shape}") from None
            if not ((target >= 0) & (target <= 1)).all():
                raise ArgumentError(f"{name}: expected values in [0, 1]")
        if not np.isin(targets[1], (0, 1)).all():
            raise ArgumentError("harmless: expected 0 or 1")
        n, d = x.shape
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not 1 <= rank <= min(n - 1, d):
            raise ArgumentError(f"rank: expected 1 to {min(n - 1, d)} for {n} states of width {d}, got {rank!r}")
        mean = x.mean(0)
        _, sizes, rows = np.linalg.svd(x - mean, full_matrices=False)
        if not sizes[rank - 1] > sizes[0] * max(n, d) * np.finfo(np.float64).eps:
            raise DegenerateError(f"states: expected differences in {rank} dimensions or more")
        v = rows[:rank].T
        # A component's sign is arbitrary; this one does not depend on the library that computes it.
        v = np.ascontiguousarray(v * np.where(v[np.abs(v).argmax(0), np.arange(rank)] < 0, -1.0, 1.0))
        g = (x - mean) @ v
        refusal, harm = fit_logistic(g, targets[0], C), fit_logistic(g, targets[1], C)
        explained = sizes[:rank] ** 2 / (sizes**2).sum()
        return cls(mean, v, explained, refusal[0], refusal[1], harm[0], harm[1])

    def project(self, x: Any) -> Vector:
        """``g(x) = Vᵀ(x − μ)``: ``(..., d)`` to ``(..., m)`` float64.

        Raises:
            ShapeError, NonFiniteError, DTypeError: ``x`` is not an array of finite states of width d.
        """
        states = _array(x, "x")
        if states.ndim < 1 or states.shape[-1] != len(self.mean):
            raise ShapeError(f"x: expected (..., {len(self.mean)}), got {states.shape}")
        return np.asarray((states - self.mean) @ self.components)

    def compliance(self, x: Any) -> Vector:
        """Logit ``f_r`` of each state, ``(...)`` float64; above 0 the model rather complies.

        Raises:
            As :meth:`project`.
        """
        return np.asarray(self.project(x) @ self.refusal_weight + self.refusal_bias)

    def harmlessness(self, x: Any) -> Vector:
        """Logit ``f_h`` of each state, ``(...)`` float64; above 0 the prompt rather is harmless.

        Raises:
            As :meth:`project`.
        """
        return np.asarray(self.project(x) @ self.harmfulness_weight + self.harmfulness_bias)

    def __repr__(self) -> str:
        return f"AnchorSpace(d={len(self.mean)}, rank={self.components.shape[1]}, explained={self.explained.sum():.3f})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{i}</td><td>{e:.3f}</td><td>{r:.3g}</td><td>{h:.3g}</td></tr>"
            for i, (e, r, h) in enumerate(
                zip(self.explained, self.refusal_weight, self.harmfulness_weight, strict=True), 1
            )
        )
        header = "<tr><th>component</th><th>variance</th><th>compliance weight</th><th>harmlessness weight</th></tr>"
        return f"<table><caption>{html.escape(repr(self))}</caption>{header}{rows}</table>"


def _array(x: Any, name: str) -> Vector:
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()
    try:
        values = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise DTypeError(f"{name}: expected numbers, got {type(x).__name__}") from err
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name}: expected finite values")
    return values


def _three(weights: Any) -> tuple[float, float, float]:
    values = tuple(float(w) for w in weights)
    if len(values) != 3 or not all(0 <= w < float("inf") for w in values):
        raise ArgumentError(f"weights: expected three finite numbers of 0 or more, got {weights!r}")
    return values


def _tensors(space: AnchorSpace, like: Any) -> tuple[Any, Any, Any]:
    import torch

    arrays = (space.components, space.refusal_weight, space.harmfulness_weight)
    v, r, h = (torch.from_numpy(np.ascontiguousarray(a)).to(like.device, like.dtype) for a in arrays)
    return v, r, h


def _terms(delta: Any, y: Any, tensors: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The three terms, unweighted, from ``x − x₀``: both logits are linear, so their intercepts and μ cancel."""
    import torch

    v, r, h = tensors
    g = delta @ v
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    d, m = v.shape
    # ‖Uᵀδ‖² = ‖δ‖² − ‖Vᵀδ‖² = ‖δ − VVᵀδ‖²; the last does not cancel where δ lies almost within V.
    outside = (delta - g @ v.T).square().sum(-1).mean() / (d - m) if d > m else delta.new_zeros(())
    return bce(g @ r, y), bce(g @ h, y), outside


def dro_loss(x: Any, x0: Any, labels: Any, space: AnchorSpace, weights: Sequence[float] = _WEIGHTS) -> Any:
    """Loss of directed representation optimisation, a scalar tensor, differentiable in ``x``.

    ``BCE(f_r(x) − f_r(x₀), y) + 1e-2 BCE(f_h(x) − f_h(x₀), y) + 1e-3 mean((Uᵀx − Uᵀx₀)²)`` with the mean over the
    batch and over the d − m directions U outside the space (arXiv 2401.18018, equations 3 to 6). U is never formed:
    ``‖Uᵀδ‖² = ‖δ − VVᵀδ‖²`` takes O(dm) a row. With m = d the last term is 0.

    Args:
        x: ``(n, d)`` tensor of states with the prompt that is optimised; half precision is computed in float32.
        x0: ``(n, d)`` states with the original prompt.
        labels: ``(n,)``, 1 for harmless and 0 for harmful.
        space: of the same layer and site.
        weights: of the three terms.

    Raises:
        DTypeError: ``x`` or ``x0`` is not a floating-point tensor.
        ShapeError, ArgumentError: the arguments do not fit.
    """
    import torch

    for name, value in (("x", x), ("x0", x0)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise DTypeError(f"{name}: expected a floating-point tensor, got {getattr(value, 'dtype', type(value))}")
    if x.ndim != 2 or x.shape != x0.shape or x.shape[1] != len(space.mean) or len(x) == 0:
        raise ShapeError(f"x, x0: expected (n, {len(space.mean)}) twice, got {tuple(x.shape)} and {tuple(x0.shape)}")
    a, b, c = _three(weights)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    delta = x.to(kind) - x0.to(x.device, kind)
    y = torch.as_tensor(labels).to(x.device, kind)
    if y.shape != x.shape[:1]:
        raise ShapeError(f"labels: expected one per state ({len(x)},), got {tuple(y.shape)}")
    if not bool(((y == 0) | (y == 1)).all()):
        raise ArgumentError("labels: expected 0 or 1")
    refusal, harm, outside = _terms(delta, y, _tensors(space, delta))
    return a * refusal + b * harm + c * outside


@dataclass(frozen=True)
class _Encoded:
    """Token rows, and where the safety prompt's tokens begin in each; ``span`` are their ids, the same in all."""

    rows: list[tuple[int, ...]]
    starts: list[int]
    span: tuple[int, ...]


def _has_system(tokenizer: Any) -> bool:
    from jinja2 import TemplateError

    try:
        return _render(tokenizer, "text", _MARK).count(_MARK) == 1
    except TemplateError:  # some templates refuse the role
        return False


def _with_safety(tokenizer: Any, texts: Sequence[str], safety: str | None) -> Prompts:
    """The prompts with a safety prompt as text, in the system message or else before each instruction."""
    if safety is None or _has_system(tokenizer):
        return Prompts(tokenizer, texts, system=safety)
    return Prompts(tokenizer, [f"{safety}{_SEPARATOR}{t}" for t in texts])


def _encoded(tokenizer: Any, texts: Iterable[str], safety: str | None) -> _Encoded:
    if not isinstance(texts, str):
        texts = list(texts)
    plain = Prompts(tokenizer, texts)
    if safety is None:
        return _Encoded([p.ids for p in plain], [0] * len(plain), ())
    if not isinstance(safety, str):
        raise DTypeError(f"safety_prompt: expected a string, got {type(safety).__name__}")
    if not safety.strip():
        raise ArgumentError("safety_prompt: expected text, got an empty string")
    system = _has_system(tokenizer)

    def render(text: str, prompt: str) -> str:
        return _render(tokenizer, text, prompt) if system else _render(tokenizer, prompt + _SEPARATOR + text, None)

    rows, starts, spans = [], [], set()
    for text in texts:
        whole, parts = render(text, safety), render(text, _MARK).split(_MARK)
        before, after = (parts[0], parts[1]) if len(parts) == 2 else ("", "")
        shown = whole[len(before) : len(whole) - len(after)]
        if len(parts) != 2 or before + shown + after != whole or shown.strip() != safety.strip():
            raise ArgumentError("safety_prompt: the chat template changes it: it cannot be found in the prompt")
        coded = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=False)
        first, last = len(before), len(before) + len(shown.rstrip())
        inside = [j for j, (a, b) in enumerate(coded["offset_mapping"]) if b > a and a < last and b > first]
        if not inside:
            raise ArgumentError("safety_prompt: no token holds any of it")
        ids = tuple(coded["input_ids"])
        rows.append(ids)
        starts.append(inside[0])
        spans.add(ids[inside[0] : inside[-1] + 1])
    if len(spans) != 1:
        raise ArgumentError("safety_prompt: expected the same tokens in every prompt; its border merges with the text")
    return _Encoded(rows, starts, spans.pop())


def _batch(encoded: _Encoded, chosen: Sequence[int], pad: int, left: bool = False) -> tuple[Any, Any, Any]:
    """``input_ids``, ``attention_mask``, and where the span begins in each row."""
    import torch

    width = max(len(encoded.rows[i]) for i in chosen)
    ids = torch.full((len(chosen), width), pad)
    mask = torch.zeros_like(ids)
    starts = torch.zeros(len(chosen), dtype=torch.long)
    for row, i in enumerate(chosen):
        tokens = torch.tensor(encoded.rows[i])
        begin = width - len(tokens) if left else 0
        ids[row, begin : begin + len(tokens)] = tokens
        mask[row, begin : begin + len(tokens)] = 1
        starts[row] = begin + encoded.starts[i]
    return ids, mask, starts


def _embedded(model: nn.Module, ids: Any, starts: Any, theta: Any) -> Any:
    """Embeddings of the tokens, with ``theta`` (k, d) in place of those of the span."""
    import torch

    embeds = model.get_input_embeddings()(ids.to(run_device(model)))  # type: ignore[operator]
    if theta is None:
        return embeds
    at = starts[:, None] + torch.arange(len(theta))
    row = torch.arange(len(ids))[:, None].expand_as(at)
    values = theta.to(embeds.device, embeds.dtype).expand(len(ids), *theta.shape)
    return embeds.index_put((row.to(embeds.device), at.to(embeds.device)), values)


class _Reader:
    """Runs batches and reads one block's state at each row's last token, with its graph."""

    def __init__(self, model: nn.Module, tokenizer: Any, layer: int, site: Site, blocks: str | None) -> None:
        check_site(site)
        self.model, self.inner = model, _inner(model)
        (module,) = _blocks(model, [layer], blocks).values()
        self.hook = lambda: (_on_input if site == "pre" else _on_output)(module, self._take)
        self.pad = _pad(tokenizer)
        self.seen: Any = None

    def _take(self, hidden: Any) -> None:
        self.seen = hidden

    def __call__(self, encoded: _Encoded, chosen: Sequence[int], theta: Any = None) -> Any:
        import torch

        ids, mask, starts = _batch(encoded, chosen, self.pad)
        embeds = _embedded(self.model, ids, starts, theta)
        self.inner(inputs_embeds=embeds, attention_mask=mask.to(embeds.device), use_cache=False)
        hidden, self.seen = self.seen, None
        last = (mask.sum(-1) - 1).to(hidden.device)
        return hidden[torch.arange(len(chosen), device=hidden.device), last]

    def all(self, encoded: _Encoded, batch_size: int, theta: Any = None) -> Any:
        """``(prompts, d)`` float32 on the CPU, without gradients, in order."""
        import torch

        order = sorted(range(len(encoded.rows)), key=lambda i: len(encoded.rows[i]))
        out: list[Any] = [None] * len(order)
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                for i, state in zip(chosen, self(encoded, chosen, theta).float().cpu(), strict=True):
                    out[i] = state
        states = torch.stack(out)
        if not bool(torch.isfinite(states).all()):
            raise NonFiniteError(f"states: non-finite at prompt {int((~torch.isfinite(states).all(-1)).nonzero()[0])}")
        return states


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    return 0 if pad is None else int(pad)


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ArgumentError(f"{name}: expected 1 or more, got {value!r}")
    return int(value)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside; each one's own flag is restored after."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class SafetyPrompt:
    """A safety prompt of embeddings, as :func:`optimize_safety_prompt` makes it.

    Attributes:
        embeddings: ``(k, d_model)`` float32, in place of the embeddings of ``token_ids``.
        initial: those the optimisation began with.
        text, token_ids: the prompt in words that it began with, and its tokens.
        trace: mean over each epoch, before its steps, of ``"refusal"``, ``"harmfulness"``, ``"complement"``
            (unweighted) and ``"total"``; each ``(epochs,)`` float64.
    """

    embeddings: Vector
    initial: Vector
    text: str
    token_ids: tuple[int, ...]
    trace: dict[str, Vector]

    def generate_inputs(self, model: nn.Module, tokenizer: Any, prompts: Iterable[str]) -> dict[str, Any]:
        """``inputs_embeds`` (n, tokens, d_model) and ``attention_mask``, padded on the left, for ``model.generate``.

        Raises:
            DTypeError, ArgumentError: the prompts do not fit; the tokenizer reads the text as other tokens.
            ShapeError: the model's embeddings have another width.
        """
        import torch

        encoded = self._encoded(tokenizer, prompts)
        ids, mask, starts = _batch(encoded, range(len(encoded.rows)), _pad(tokenizer), left=True)
        with torch.no_grad():
            embeds = _embedded(model, ids, starts, self._theta(model))
        return {"inputs_embeds": embeds, "attention_mask": mask.to(embeds.device)}

    def _encoded(self, tokenizer: Any, prompts: Iterable[str]) -> _Encoded:
        encoded = _encoded(tokenizer, prompts, self.text)
        if encoded.span != self.token_ids:
            raise ArgumentError("tokenizer: expected the one the prompt was made with; this one gives other tokens")
        return encoded

    def _theta(self, model: nn.Module) -> Any:
        import torch

        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        if width != self.embeddings.shape[1]:
            raise ShapeError(f"model: expected embeddings of width {self.embeddings.shape[1]}, got {width}")
        return torch.from_numpy(self.embeddings)

    def plot(self, ax: Any = None) -> Any:
        """The terms by epoch. Returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for name, values in self.trace.items():
            ax.plot(np.arange(1, len(values) + 1), values, label=name, color="k" if name == "total" else None)
        ax.set(xlabel="epoch", ylabel="loss")
        ax.legend()
        return ax

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file.

        Raises:
            ArgumentError: the path cannot be written.
        """
        from safetensors.numpy import save

        arrays = {"embeddings": self.embeddings, "initial": self.initial}
        arrays |= {f"trace.{name}": values for name, values in self.trace.items()}
        facts = json.dumps({"text": self.text, "token_ids": self.token_ids, "trace": list(self.trace)})
        write_atomically(path, save(arrays, {_FORMAT: facts}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafetyPrompt:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not a safety prompt.
        """
        with reading(path, "SafetyPrompt") as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            trace = {name: file.get_tensor(f"trace.{name}") for name in facts["trace"]}
            arrays = file.get_tensor("embeddings"), file.get_tensor("initial")
            return cls(*arrays, facts["text"], tuple(facts["token_ids"]), trace)

    def __repr__(self) -> str:
        k, d = self.embeddings.shape
        moved = float(np.linalg.norm(self.embeddings - self.initial) / np.linalg.norm(self.initial))
        total = self.trace["total"]
        loss = f"{total[0]:.4g} to {total[-1]:.4g}"
        return f"SafetyPrompt(tokens={k}, d={d}, epochs={len(total)}, loss={loss}, moved={moved:.3g}, {self.text!r})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{values[0]:.4g}</td><td>{values[-1]:.4g}</td></tr>"
            for name, values in self.trace.items()
        )
        header = "<tr><th>term</th><th>first epoch</th><th>last epoch</th></tr>"
        return f"<table><caption>Safety prompt: {html.escape(self.text)}</caption>{header}{rows}</table>"


def anchor_states(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[str],
    safety_prompts: Iterable[str | SafetyPrompt | None],
    *,
    layer: int = -1,
    site: Site = "post",
    batch_size: int = 8,
    blocks: str | None = None,
) -> Any:
    """State of one block at the last token of every prompt, without and with each safety prompt.

    Args:
        model: a Hugging Face decoder.
        tokenizer: a fast tokenizer with a chat template. A safety prompt stands in the system message where the
            template has one, else before the instruction in the user's turn.
        prompts: the instructions, harmful and harmless.
        safety_prompts: texts, or optimised prompts.
        layer, site: the block, and its input (``"pre"``) or output (``"post"``).
        batch_size: prompts per forward pass.
        blocks: dotted name of the list of blocks, for models the table does not know.

    Returns:
        ``(1 + safety prompts, prompts, d)`` float32; index 0 is without a safety prompt.

    Raises:
        DTypeError, ArgumentError, ShapeError: an argument does not fit the model or its template.
        NonFiniteError: a state is not finite.
    """
    if isinstance(safety_prompts, (str, SafetyPrompt)):
        raise DTypeError("safety_prompts: expected a list, got one prompt")
    texts = prompts if isinstance(prompts, str) else list(prompts)
    size = _positive(batch_size, "batch_size")
    reader = _Reader(model, tokenizer, layer, site, blocks)
    sets: list[tuple[_Encoded, Any]] = []
    for prompt in [None, *safety_prompts]:
        if isinstance(prompt, SafetyPrompt):
            sets.append((prompt._encoded(tokenizer, texts), prompt._theta(model)))
        else:
            sets.append((_encoded(tokenizer, texts, prompt), None))
    with evaluating(model), _attached([reader.hook]):
        return np.stack([reader.all(encoded, size, theta).numpy() for encoded, theta in sets])


def optimize_safety_prompt(
    model: nn.Module,
    tokenizer: Any,
    harmful: Iterable[str],
    harmless: Iterable[str],
    initial_text: str,
    space: AnchorSpace | None = None,
    layer: int = -1,
    site: Site = "post",
    *,
    refusal_tokens: Iterable[int] | None = None,
    lr: float = 1e-3,
    batch_size: int = 50,
    epochs: int = 40,
    clip: float = 1.0,
    seed: int = 42,
    weights: Sequence[float] = _WEIGHTS,
    blocks: str | None = None,
    progress: bool = True,
) -> SafetyPrompt:
    """Optimises a safety prompt's embeddings so that harmful prompts move towards refusal and harmless ones away.

    :func:`dro_loss` against the states with ``initial_text``, by AdamW with torch's defaults but ``lr``; the defaults
    here are the published ones (arXiv 2401.18018, section 3.2 and appendix). The model's weights are frozen meanwhile
    and its dropout is off; both are as before afterwards, whatever happens. The same seed gives the same result on
    the same machine.

    Args:
        model: a Hugging Face decoder.
        tokenizer: a fast tokenizer with a chat template. The prompt stands in the system message where the template
            has one, else before the instruction in the user's turn.
        harmful, harmless: instructions, labels 0 and 1.
        initial_text: the safety prompt to begin with; its tokens' embeddings are what is optimised.
        space: an :class:`AnchorSpace` of the same layer and site. None fits one to these prompts without and with
            ``initial_text``; its rates of compliance are then 1 − the probability that the reply begins with one of
            ``refusal_tokens``, in place of the published share of 25 sampled replies.
        layer, site: the block whose state at the last token is moved, its input or output.
        refusal_tokens: ids that begin a refusal; needed and used without ``space`` only.
        lr, batch_size, epochs: step size, prompts per step, passes over all prompts.
        clip: largest norm of the gradient.
        seed: of the order of the prompts.
        weights: of the three terms of the loss.
        blocks: dotted name of the list of blocks, for models the table does not know.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        DTypeError, ArgumentError, ShapeError: an argument does not fit the model or its template.
        DegenerateError: no space can be fitted.
        NonFiniteError: a state or the loss is not finite.
    """
    import torch
    from tqdm.auto import tqdm

    harmful, harmless = (x if isinstance(x, str) else list(x) for x in (harmful, harmless))
    for name, value in (("harmful", harmful), ("harmless", harmless)):
        if isinstance(value, str) or not value:
            raise ArgumentError(f"{name}: expected a list of at least one prompt, got {value!r}")
    for name, number in (("lr", lr), ("clip", clip)):
        if not 0 < number < float("inf"):
            raise ArgumentError(f"{name}: expected a finite number above 0, got {number!r}")
    size, passes, scale = _positive(batch_size, "batch_size"), _positive(epochs, "epochs"), _three(weights)
    if initial_text is None:
        raise DTypeError("initial_text: expected a string, got None")
    texts = [*harmful, *harmless]
    y = torch.tensor([0.0] * len(harmful) + [1.0] * len(harmless))
    reader = _Reader(model, tokenizer, layer, site, blocks)
    encoded = _encoded(tokenizer, texts, initial_text)
    if space is None:
        if refusal_tokens is None:
            raise ArgumentError("space: expected an AnchorSpace, or refusal_tokens to fit one with, got neither")
        states = anchor_states(
            model, tokenizer, texts, [initial_text], layer=layer, site=site, batch_size=size, blocks=blocks
        )
        tokens = list(refusal_tokens)
        with evaluating(model):
            scores = [
                refusal_scores(model, _with_safety(tokenizer, texts, s), tokens, batch_size=size)
                for s in (None, initial_text)
            ]
        compliance = 0.5 - 0.5 * np.tanh(np.stack(scores) / 2)
        space = AnchorSpace.fit(states, compliance, y.numpy(), min(4, states.shape[-1]))

    order = torch.Generator().manual_seed(seed)
    trace: list[Any] = []
    with evaluating(model), _frozen(model), _attached([reader.hook]), torch.enable_grad():  # type: ignore[no-untyped-call]
        table = model.get_input_embeddings()  # type: ignore[operator]
        initial = table(torch.tensor(encoded.span, device=run_device(model))).detach().float().clone()
        origin = reader.all(encoded, size)
        if origin.shape[1] != len(space.mean):
            raise ShapeError(f"space: expected width {origin.shape[1]}, got {len(space.mean)}")
        theta = initial.clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([theta], lr=lr)
        tensors: Any = None
        for _ in tqdm(range(passes), desc="safety prompt", unit="epoch", disable=None if progress else True):
            sums = np.zeros(4)
            for part in torch.split(torch.randperm(len(texts), generator=order), size):
                x = reader(encoded, part.tolist(), theta).float()
                tensors = _tensors(space, x) if tensors is None else tensors
                terms = _terms(x - origin[part].to(x.device), y[part].to(x.device), tensors)
                loss = sum(w * t for w, t in zip(scale, terms, strict=True))
                values = np.array([float(t.detach()) for t in (*terms, loss)])
                if not np.isfinite(values).all():
                    raise NonFiniteError(f"loss: non-finite in epoch {len(trace) + 1}; a smaller lr may help")
                sums += len(part) * values
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([theta], clip)
                optimizer.step()
            trace.append(sums / len(texts))
    columns = np.ascontiguousarray(np.array(trace).T)
    found, began = (t.detach().cpu().numpy() for t in (theta, initial))
    return SafetyPrompt(found, began, initial_text, encoded.span, dict(zip((*_TERMS, "total"), columns, strict=True)))
