"""Unlearning losses for language models, on per-sequence log-probabilities.

Every loss is a function of the summed log-probability ``s`` of a sequence, the number ``n`` of counted tokens, and,
where the
method has one, the same sum ``s_ref`` under a frozen reference model. :func:`sequence_logprobs` makes them from
logits, so the
chain into the logits is the job of one kernel. The arithmetic is f64 on the CPU and f32 elsewhere, whatever the
logits are.

Published implementations disagree on reductions and constants. The defaults here follow the papers' definitions;
``preset=``
selects a published convention by name where people must compare. Sequences without counted tokens are left out of the
mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, DegenerateError, ShapeError
from .logprobs import token_logprobs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DIVERGENCES",
    "SequenceLogprobs",
    "dpo",
    "flat",
    "ga",
    "grad_diff",
    "idk_dpo",
    "kl_retain",
    "nll",
    "npo",
    "prompt_decouple",
    "redi",
    "rmu",
    "sequence_logprobs",
    "simnpo",
]


@dataclass(frozen=True)
class SequenceLogprobs:
    """Log-probabilities of the labelled tokens of a batch, in nats.

    Attributes:
        token: ``(B, T)`` per-token values, 0 where not counted.
        mask: ``(B, T)`` True where counted.
        sum: ``(B,)`` sum over counted tokens, f64 on the CPU.
        count: ``(B,)`` number of counted tokens, same dtype as ``sum``.
    """

    token: Tensor
    mask: Tensor
    sum: Tensor
    count: Tensor

    @classmethod
    def from_tokens(cls, token: Tensor, mask: Tensor) -> SequenceLogprobs:
        """Sums ``token`` where ``mask``; both ``(B, T)``.

        Raises:
            ShapeError: the shapes differ or are not two-dimensional.
        """
        import torch

        if token.ndim != 2 or token.shape != mask.shape:
            raise ShapeError(f"token: expected (B, T) like mask {tuple(mask.shape)}, got {tuple(token.shape)}")
        wide = torch.float64 if token.device.type == "cpu" else torch.float32
        # Select, never multiply: -inf * 0 would be NaN.
        counted = torch.where(mask, token, torch.zeros((), dtype=token.dtype, device=token.device)).to(wide)
        return cls(token, mask, counted.sum(-1), mask.sum(-1).to(wide))

    @property
    def mean(self) -> Tensor:
        """``(B,)`` mean over counted tokens; 0 for a sequence without any."""
        return self.sum / self.count.clamp(min=1)


def sequence_logprobs(logits: Tensor, labels: Tensor, ignore_index: int = -100, shift: bool = True) -> SequenceLogprobs:
    """Log-probabilities of ``labels`` under ``logits``, summed per sequence.

    Args:
        logits: ``(B, T, V)``, f64, f32, f16 or bf16; differentiable.
        labels: ``(B, T)`` token ids, ``ignore_index`` where a token does not count.
        ignore_index: label that is skipped.
        shift: logits at ``t`` predict the label at ``t + 1`` (the convention of causal models in transformers).

    Raises:
        ShapeError: shapes that do not fit.
        ArgumentError: a label outside ``[0, V)`` that is not ``ignore_index``.
    """
    token = token_logprobs(logits, labels, ignore_index=ignore_index, shift=shift)
    counted = (labels[:, 1:] if shift else labels) != ignore_index
    return SequenceLogprobs.from_tokens(token, counted.to(token.device))


def _scores(policy: Any, arg: str) -> SequenceLogprobs:
    if isinstance(policy, SequenceLogprobs):
        return policy
    if isinstance(policy, tuple) and len(policy) == 2:
        return sequence_logprobs(*policy)
    raise ArgumentError(f"{arg}: expected SequenceLogprobs or (logits, labels), got {type(policy).__name__}")


def _reference(ref: Any, scores: SequenceLogprobs, arg: str) -> Tensor:
    import torch

    total = ref.sum if isinstance(ref, SequenceLogprobs) else torch.as_tensor(ref)
    total = total.detach().to(scores.sum)
    if total.shape != scores.sum.shape:
        raise ShapeError(f"{arg}: expected one value per sequence {tuple(scores.sum.shape)}, got {tuple(total.shape)}")
    return total


def _mean(values: Tensor, count: Tensor, arg: str) -> Tensor:
    """Mean over the sequences that have counted tokens."""
    import torch

    kept = count > 0
    if not bool(kept.any()):
        raise DegenerateError(f"{arg}: no sequence has a counted token")
    return torch.where(kept, values, torch.zeros_like(values)).sum() / kept.sum()


def _softplus(x: Tensor) -> Tensor:
    """``ln(1 + e^x)`` without the overflow of writing it so, and without the cut-off of torch's."""
    import torch

    return torch.logaddexp(x, torch.zeros_like(x))


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ArgumentError(f"{name}: expected a positive number, got {value}")


def nll(policy: Any) -> Tensor:
    """Negative log-likelihood, mean over all counted tokens of the batch: the usual fine-tuning loss.

    Args:
        policy: :class:`SequenceLogprobs` or ``(logits, labels)``.

    Raises:
        DegenerateError: no counted token.
    """
    scores = _scores(policy, "policy")
    tokens = scores.count.sum()
    if not bool(tokens > 0):
        raise DegenerateError("policy: no sequence has a counted token")
    return -scores.sum.sum() / tokens


def ga(forget: Any) -> Tensor:
    """Gradient ascent: minus the negative log-likelihood of the forget data. Unbounded below; collapses in the
    end."""
    return -nll(forget)


def grad_diff(forget: Any, retain: Any, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Gradient difference: ``gamma · GA(forget) + alpha · NLL(retain)``, both token means (TOFU, arXiv
    2401.06121)."""
    return gamma * ga(forget) + alpha * nll(retain)


def kl_retain(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    shift: bool = True,
    mask: str = "labels",
) -> Tensor:
    """Forward divergence ``KL(p_ref ‖ p_θ)`` per position, mean over counted positions.

    Args:
        logits: ``(B, T, V)`` of the model, differentiable.
        ref_logits: ``(B, T, V)`` of the frozen reference.
        labels: ``(B, T)``.
        ignore_index: label whose position is not counted.
        shift: count the positions that predict a counted label rather than those that hold one.
        mask: ``"labels"`` (default), or ``"all"``: every position, prompt and padding included, as several published
            implementations do.

    Raises:
        ShapeError: shapes that do not fit.
        ArgumentError: an unknown ``mask``.
        DegenerateError: no counted position.
    """
    import torch

    if logits.shape != ref_logits.shape or logits.shape[:-1] != labels.shape:
        raise ShapeError(
            f"ref_logits, labels: expected {tuple(logits.shape)} and {tuple(logits.shape[:-1])}, "
            f"got {tuple(ref_logits.shape)} and {tuple(labels.shape)}"
        )
    if mask not in ("labels", "all"):
        raise ArgumentError(f"mask: expected 'labels' or 'all', got {mask!r}")
    if mask == "all":
        rows, ref_rows = logits.flatten(0, -2), ref_logits.flatten(0, -2)
    else:
        counted = labels != ignore_index
        if shift:
            counted, logits, ref_logits = counted[:, 1:], logits[:, :-1], ref_logits[:, :-1]
        rows, ref_rows = logits[counted], ref_logits[counted]
    if rows.shape[0] == 0:
        raise DegenerateError("labels: no counted position")
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(rows.to(wide), -1)
    log_ref = torch.log_softmax(ref_rows.detach().to(wide), -1)
    return torch.nn.functional.kl_div(log_p, log_ref, reduction="batchmean", log_target=True)


def npo(forget: Any, ref: Any, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation: mean over sequences of ``(2/β) softplus(β (s − s_ref))``.

    At ``s = s_ref`` the value is ``2 ln 2 / β`` and the gradient that of sequence-sum gradient ascent; it decays as
    the
    sequence is forgotten. Source: arXiv 2404.05868, equation 3.

    Args:
        forget: :class:`SequenceLogprobs` or ``(logits, labels)``.
        ref: ``(B,)`` sums under the frozen reference, or its :class:`SequenceLogprobs`. Computed once, it makes a
        second
            model in memory unnecessary.
        beta: inverse temperature, > 0.

    Raises:
        ArgumentError: beta not positive.
        ShapeError: ``ref`` does not have one value per sequence.
        DegenerateError: no counted token.
    """

    _positive("beta", beta)
    scores = _scores(forget, "forget")
    d = scores.sum - _reference(ref, scores, "ref")
    return _mean(2 / beta * _softplus(beta * d), scores.count, "forget")


def simnpo(forget: Any, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """Reference-free NPO: mean over sequences of ``(2/β) softplus(β (s/n + γ))`` (SimNPO, arXiv 2410.07163).

    ``γ`` stands inside ``β``, as in the published code. It is the margin, not the coefficient of the loss (which some
    frameworks also call gamma).

    Raises:
        ArgumentError: beta not positive.
        DegenerateError: no counted token.
    """

    _positive("beta", beta)
    scores = _scores(forget, "forget")
    x = beta * (scores.mean + gamma)
    return _mean(2 / beta * _softplus(x), scores.count, "forget")


def dpo(win: Any, lose: Any, ref_win: Any, ref_lose: Any, beta: float = 0.1, preset: str = "dpo") -> Tensor:
    """Direct preference optimisation: mean of ``c · softplus(−β m)``, ``m = (s_w − ref_w) − (s_l − ref_l)``.

    Args:
        win: preferred answers; lose: rejected answers, one per row of ``win``.
        lose: see ``win``.
        ref_win: reference sums of ``win``; ref_lose: of ``lose``.
        ref_lose: see ``ref_win``.
        beta: inverse temperature, > 0.
        preset: ``"dpo"`` (c = 1, arXiv 2305.18290 equation 7) or ``"npo_repo"`` (c = 2/β, as in implementations that
        share
            the scale of NPO; 20 times larger at β = 0.1, so learning rates do not carry over).

    Raises:
        ArgumentError: beta not positive, unknown preset.
        ShapeError: different numbers of sequences.
        DegenerateError: no pair has counted tokens on both sides.
    """
    import torch

    _positive("beta", beta)
    scale = {"dpo": 1.0, "npo_repo": 2 / beta}.get(preset)
    if scale is None:
        raise ArgumentError(f"preset: expected 'dpo' or 'npo_repo', got {preset!r}")
    w, lo = _scores(win, "win"), _scores(lose, "lose")
    if w.sum.shape != lo.sum.shape:
        raise ShapeError(f"lose: expected {w.sum.shape[0]} sequences as in win, got {lo.sum.shape[0]}")
    margin = (w.sum - _reference(ref_win, w, "ref_win")) - (lo.sum - _reference(ref_lose, lo, "ref_lose"))
    loss = scale * _softplus(-beta * margin)
    return _mean(loss, torch.minimum(w.count, lo.count), "win, lose")


def idk_dpo(idk: Any, forget: Any, ref_idk: Any, ref_forget: Any, beta: float = 0.1, preset: str = "dpo") -> Tensor:
    """DPO that prefers a refusal ("I don't know") to the original answer of the forget set (TOFU, arXiv 2401.06121).

    Arguments as in :func:`dpo`: ``idk`` are the refusals, ``forget`` the original answers.
    """
    return dpo(idk, forget, ref_idk, ref_forget, beta, preset)


def _tanh_half(v: Tensor) -> Tensor:
    return v.tanh() / 2


#: Name to ``(g*, f*∘g*)`` of the variational form of an f-divergence; both increase in v.
DIVERGENCES: dict[str, tuple[Any, Any]] = {
    "total_variation": (_tanh_half, _tanh_half),
    "jensen_shannon": (lambda v: math.log(2) - _softplus(-v), lambda v: _softplus(v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v + v * v / 4),
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "jeffrey": (lambda v: v, lambda v: v + v * v / 4 + v**3 / 16),
    "reverse_kl": (lambda v: -(-v).exp(), lambda v: v - 1),
    "squared_hellinger": (lambda v: 1 - (-v).exp(), lambda v: v.exp() - 1),
    "neyman": (lambda v: 1 - (-v).exp(), lambda v: 2 - 2 * (-v / 2).exp()),
}


def _mean_probability(scores: SequenceLogprobs) -> Tensor:
    import torch

    p = torch.where(scores.mask, scores.token.to(scores.sum.dtype).exp(), torch.zeros_like(scores.sum)[:, None])
    return p.sum(-1) / scores.count.clamp(min=1)


def flat(template: Any, forget: Any, divergence: str = "total_variation") -> Tensor:
    """FLAT: ``mean(−g*(P_e) + f*(g*(P_f)))``, P the mean token probability of a sequence (arXiv 2410.11143).

    Args:
        template: template (refusal) answers, :class:`SequenceLogprobs` or ``(logits, labels)``.
        forget: forget answers, one per row of ``template``.
        divergence: a key of :data:`DIVERGENCES`. For ``reverse_kl``, ``squared_hellinger`` and ``neyman`` the sign
        convention
            is the one that pushes the template's probability up and the forget answer's down; the published code has
            the
            opposite there.

    Raises:
        ArgumentError: unknown divergence.
        ShapeError: different numbers of sequences.
        DegenerateError: no pair has counted tokens on both sides.
    """
    import torch

    if divergence not in DIVERGENCES:
        raise ArgumentError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    e, f = _scores(template, "template"), _scores(forget, "forget")
    if e.sum.shape != f.sum.shape:
        raise ShapeError(f"forget: expected {e.sum.shape[0]} sequences as in template, got {f.sum.shape[0]}")
    g, f_of_g = DIVERGENCES[divergence]
    loss = -g(_mean_probability(e)) + f_of_g(_mean_probability(f))
    return _mean(loss, torch.minimum(e.count, f.count), "template, forget")


def redi(win: Any, lose: Any, c_win: float = 1.0, c_lose: float = 0.8) -> Tensor:
    """REDI: mean over pairs of ``−c_w s_w/n_w + c_l s_l/n_l``, no reference model (arXiv 2505.24850).

    Unbounded below: watch ``lose``'s mean log-probability and stop. ``c_lose = 1`` is the symmetric form.

    Raises:
        ShapeError: different numbers of sequences.
        DegenerateError: no pair has counted tokens on both sides.
    """
    import torch

    w, lo = _scores(win, "win"), _scores(lose, "lose")
    if w.sum.shape != lo.sum.shape:
        raise ShapeError(f"lose: expected {w.sum.shape[0]} sequences as in win, got {lo.sum.shape[0]}")
    return _mean(-c_win * w.mean + c_lose * lo.mean, torch.minimum(w.count, lo.count), "win, lose")


def rmu(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Representation misdirection: mean over sequences of the masked mean of ``mean_d (h − target)²`` (arXiv
    2403.03218).

    The forget term has ``target = c·u`` with one unit vector u for the whole run; the retain term has the frozen
    model's
    hidden states.

    Args:
        hidden: ``(B, T, d)`` activations, differentiable.
        target: broadcastable to ``hidden``.
        mask: ``(B, T)`` True where a token counts.

    Raises:
        ShapeError: shapes that do not fit.
        DegenerateError: no counted token.
    """
    import torch

    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ShapeError(f"mask: expected {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    error = (hidden.to(wide) - target.to(wide)).square().mean(-1)
    counted = torch.where(mask, error, torch.zeros_like(error)).sum(-1)
    n = mask.sum(-1)
    return _mean(counted / n.clamp(min=1), n, "mask")


def prompt_decouple(base: Tensor, decoupled: Any, weight: float) -> Tensor:
    """``base + weight · NLL(decoupled)``: keeps benign prompts that share the forgotten concept answerable.

    In the spirit of SafeEraser (arXiv 2502.12520), whose exact formula is not published; ``weight`` has no default.

    Args:
        base: any forget loss.
        decoupled: :class:`SequenceLogprobs` or ``(logits, labels)`` of benign prompts with their safe answers.
        weight: coefficient.
    """
    return base + weight * nll(decoupled)


def stack(parts: Sequence[SequenceLogprobs]) -> SequenceLogprobs:
    """Joins batches of the same length T into one."""
    import torch

    return SequenceLogprobs(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("token", "mask", "sum", "count"))
    )
