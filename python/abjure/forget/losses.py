"""Unlearning losses for language models, on per-sequence log-probabilities.

Every loss is a function of the summed log-probability ``s`` of a sequence, the number ``n`` of counted tokens, and,
where the method has one, the same sum ``s_ref`` under a frozen reference model. :func:`sequence_logprobs` makes them
from logits, so the chain into the logits is the job of one kernel. The arithmetic is f64 on the CPU and f32 elsewhere,
whatever the logits are.

Published implementations disagree on reductions and constants. The defaults here follow the papers' definitions;
``preset=`` selects a published convention by name where people must compare (:data:`PRESETS` lists them), with its
mistakes where it has any. Sequences without counted tokens are left out of the mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from .logprobs import _empty, token_logprobs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DIVERGENCES",
    "PRESETS",
    "SequenceLogprobs",
    "dpo",
    "flat",
    "ga",
    "grad_diff",
    "idk",
    "idk_dpo",
    "kl_retain",
    "nll",
    "npo",
    "prompt_decouple",
    "redi",
    "rmu",
    "sequence_logprobs",
    "simnpo",
    "stack",
]

#: Loss name to ``{preset: what it does}``; the first is the default.
PRESETS: dict[str, dict[str, str]] = {
    "npo": {
        "npo": "sum over tokens, mean over sequences",
        "unlearn_simple_wmdp": "one number per batch: token means of policy and reference, as one sequence",
    },
    "simnpo": {
        "simnpo": "mean over tokens, mean over sequences, gamma inside beta",
        "gamma_outside": "gamma added after the product with beta",
        "open_unlearning": "n counts a label at position 0, which nothing predicts; needs (logits, labels)",
        "unlearn_simple_wmdp": "one number per batch: the token mean, as one sequence",
    },
    "dpo": {
        "dpo": "factor 1",
        "tofu": "factor 1, as dpo",
        "npo_repo": "factor 2/beta",
        "open_unlearning": "factor 2/beta, as npo_repo",
        "flat_repo": "factor 2/beta, and the reference is overwritten by 0 (a mistake)",
    },
    "flat": {
        "flat": "masked mean per sequence, then the mean of the losses",
        "flat_repo": "mean over all positions of the batch, padding included, before the divergence; reverse_kl, "
        "squared_hellinger and neyman with the wrong sign (a mistake)",
    },
    "redi": {
        "redi": "plain difference of means",
        "negw": "rejected term times exp(gamma s_l/n_l), detached",
        "negw_repo": "as negw, not detached: pushes the rejected answer up below -1/gamma (a mistake)",
    },
    "kl_retain": {
        "masked": "counted positions, forward divergence",
        "tofu": "every position, prompt and padding included",
        "llmu": "every position, log(p + 1e-12), without the entropy of the reference",
    },
}


def _preset(loss: str, preset: str) -> str:
    if preset not in PRESETS[loss]:
        raise ArgumentError(f"preset: expected one of {', '.join(PRESETS[loss])}, got {preset!r}")
    return preset


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
            ArgumentError: a counted log-probability above 0 (raw logits?).
            NonFiniteError: a counted NaN.
        """
        import torch

        if token.ndim != 2 or token.shape != mask.shape:
            raise ShapeError(f"token: expected (B, T) like mask {tuple(mask.shape)}, got {tuple(token.shape)}")
        wide = torch.float64 if token.device.type == "cpu" else torch.float32
        # Select, never multiply: -inf * 0 would be NaN.
        counted = torch.where(mask, token, torch.zeros((), dtype=token.dtype, device=token.device)).to(wide)
        highest = counted.detach().amax().item() if counted.numel() else 0.0
        if math.isnan(highest):
            raise NonFiniteError("token: expected log-probabilities, got NaN")
        if highest > 1e-6:
            raise ArgumentError(f"token: expected log-probabilities, at most 0, got {highest} (raw logits?)")
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


def _known(values: Tensor, count: Tensor, arg: str) -> None:
    """Refuses sums that cannot be log-probabilities, where they count."""
    seen = values.detach()[count > 0]
    if seen.numel() and not bool((seen <= 1e-6 * (1 + count[count > 0])).all()):
        raise ArgumentError(f"{arg}: expected sums of log-probabilities, at most 0, got {seen.max().item()}")


def _reference(ref: Any, scores: SequenceLogprobs, arg: str) -> Tensor:
    import torch

    total = ref.sum if isinstance(ref, SequenceLogprobs) else torch.as_tensor(ref)
    total = total.detach().to(scores.sum)
    if total.shape != scores.sum.shape:
        raise ShapeError(f"{arg}: expected one value per sequence {tuple(scores.sum.shape)}, got {tuple(total.shape)}")
    _known(total, scores.count, arg)
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


def nll(policy: Any, reduction: str = "token") -> Tensor:
    """Negative log-likelihood, mean over all counted tokens of the batch: the usual fine-tuning loss.

    Args:
        policy: :class:`SequenceLogprobs` or ``(logits, labels)``.
        reduction: ``"token"`` (mean over the batch's tokens; long sequences weigh more), ``"sequence_mean"`` (mean of
            the sequences' means) or ``"sequence_sum"`` (mean of the sequences' sums, what NPO tends to as β → 0).

    Raises:
        ArgumentError: unknown reduction.
        DegenerateError: no counted token.
    """
    scores = _scores(policy, "policy")
    if reduction not in ("token", "sequence_mean", "sequence_sum"):
        raise ArgumentError(f"reduction: expected 'token', 'sequence_mean' or 'sequence_sum', got {reduction!r}")
    if reduction != "token":
        return -_mean(scores.mean if reduction == "sequence_mean" else scores.sum, scores.count, "policy")
    tokens = scores.count.sum()
    if not bool(tokens > 0):
        raise DegenerateError("policy: no sequence has a counted token")
    return -scores.sum.sum() / tokens


def ga(forget: Any, reduction: str = "token") -> Tensor:
    """Gradient ascent: minus :func:`nll` of the forget data. Unbounded below; collapses in the end."""
    return -nll(forget, reduction)


def grad_diff(forget: Any, retain: Any, gamma: float = 1.0, alpha: float = 1.0, reduction: str = "token") -> Tensor:
    """Gradient difference: ``gamma · GA(forget) + alpha · NLL(retain)``, by default both token means.

    Source: TOFU, arXiv 2401.06121. ``reduction`` as in :func:`nll`, for both terms.
    """
    return gamma * ga(forget, reduction) + alpha * nll(retain, reduction)


def idk(refusals: Any, retain: Any) -> Tensor:
    """IDK: fine-tuning on refusals for the forget questions together with the retain data, as one token mean.

    Both weigh by their tokens, as published; longer answers weigh more. Source: TOFU, arXiv 2401.06121.

    Raises:
        DegenerateError: no counted token.
    """
    r, k = _scores(refusals, "refusals"), _scores(retain, "retain")
    tokens = r.count.sum() + k.count.sum()
    if not bool(tokens > 0):
        raise DegenerateError("refusals, retain: no sequence has a counted token")
    return -(r.sum.sum() + k.sum.sum()) / tokens


#: Bytes of f32 logits that the divergence widens at a time.
_CHUNK_BYTES = 4 << 20


@functools.cache
def _divergence() -> Any:
    """The autograd function: rows in chunks, twice; keeps the two inputs and nothing of their size."""
    import torch

    def chunks(rows: Tensor, vocab: int) -> Sequence[Tensor]:
        return torch.split(rows, max(_CHUNK_BYTES // (4 * vocab), 1))

    class Divergence(torch.autograd.Function):
        """``Σ_rows Σ_j p_ref (log p_ref − log p)`` (``eps = 0``), or ``−Σ p_ref log(p + eps)``."""

        @staticmethod
        def forward(ctx: Any, logits: Tensor, ref: Tensor, rows: Tensor, eps: float) -> Tensor:
            ctx.save_for_backward(logits, ref, rows)
            ctx.eps = eps
            flat, flat_ref = logits.reshape(-1, logits.shape[-1]), ref.reshape(-1, logits.shape[-1])
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            total = torch.zeros((), dtype=torch.float64 if logits.device.type == "cpu" else wide, device=logits.device)
            for at in chunks(rows, logits.shape[-1]):
                log_p, log_q = flat[at].to(wide).log_softmax(-1), flat_ref[at].to(wide).log_softmax(-1)
                q = log_q.exp()
                # Where the reference gives 0 the term is 0, also if the model gives 0.
                plain = torch.where(q > 0, q * (log_q - log_p), 0)
                terms = -q * (log_p.exp() + eps).log() if eps else plain
                total += terms.sum(-1).to(total.dtype).sum()
            if not bool(total.isfinite()):
                raise NonFiniteError(f"logits, ref_logits: expected a finite divergence, got {total.item()}")
            return total

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, upstream: Tensor) -> Any:
            logits, ref, rows = ctx.saved_tensors
            cpu = logits.device.type == "cpu"
            grad = _empty(logits.shape, logits.dtype) if cpu else torch.empty_like(logits)
            vocab = logits.shape[-1]
            flat, flat_ref, out = logits.reshape(-1, vocab), ref.reshape(-1, vocab), grad.view(-1, vocab)
            skipped = torch.ones(len(flat), dtype=torch.bool, device=rows.device)
            skipped[rows] = False
            out[skipped] = 0
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            for at in chunks(rows, vocab):
                p, q = flat[at].to(wide).softmax(-1), flat_ref[at].to(wide).softmax(-1)
                if ctx.eps:
                    share = q * p / (p + ctx.eps)
                    step = p * share.sum(-1, keepdim=True) - share
                else:
                    step = p - q
                out[at] = (step * upstream.to(wide)).to(out.dtype)
            return grad, None, None, None

    return Divergence.apply


def kl_retain(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    shift: bool = True,
    mask: str = "labels",
    preset: str = "masked",
) -> Tensor:
    """Forward divergence ``KL(p_ref ‖ p_θ)`` per position, mean over counted positions.

    Rows go through in chunks of a few megabytes, forward and backward, and rows that do not count are not read: the
    only array of the logits' size is their gradient. Half-precision logits are widened to f32; sums are f64 on the CPU.

    Args:
        logits: ``(B, T, V)`` of the model, differentiable.
        ref_logits: ``(B, T, V)`` of the frozen reference; gets no gradient.
        labels: ``(B, T)``.
        ignore_index: label whose position is not counted.
        shift: count the positions that predict a counted label rather than those that hold one.
        mask: ``"labels"`` (default), or ``"all"``: every position, prompt and padding included.
        preset: ``"masked"`` (default, ``mask`` decides), ``"tofu"`` (``mask="all"``), or ``"llmu"``: every position,
            ``−Σ p_ref log(p + 1e-12)``, which has the gradient of the divergence but not its value.

    Raises:
        ShapeError: shapes that do not fit.
        ArgumentError: an unknown ``mask`` or ``preset``.
        DegenerateError: no counted position.
        NonFiniteError: NaN or +∞ in a counted row, or the model gives 0 where the reference does not.
    """
    if logits.shape != ref_logits.shape or logits.ndim != 3 or logits.shape[:-1] != labels.shape:
        raise ShapeError(
            f"ref_logits, labels: expected {tuple(logits.shape)} and {tuple(logits.shape[:-1])}, "
            f"got {tuple(ref_logits.shape)} and {tuple(labels.shape)}"
        )
    if mask not in ("labels", "all"):
        raise ArgumentError(f"mask: expected 'labels' or 'all', got {mask!r}")
    if _preset("kl_retain", preset) != "masked":
        mask = "all"
    counted = labels.to(logits.device) != ignore_index
    if mask == "all":
        counted = counted.new_ones(counted.shape)
    elif shift:
        counted = counted.roll(-1, 1)
        counted[:, -1:] = False
    rows = counted.flatten().nonzero()[:, 0]
    if rows.shape[0] == 0:
        raise DegenerateError("labels: no counted position")
    total: Tensor = _divergence()(logits, ref_logits.detach(), rows, 1e-12 if preset == "llmu" else 0.0)
    return total / rows.shape[0]


def _as_one(total: Tensor, count: Tensor, arg: str) -> Tensor:
    """Token mean of the whole batch as a single sequence's value."""
    tokens = count.sum()
    if not bool(tokens > 0):
        raise DegenerateError(f"{arg}: no sequence has a counted token")
    return total.sum() / tokens


def npo(forget: Any, ref: Any, beta: float = 0.1, preset: str = "npo") -> Tensor:
    """Negative preference optimisation: mean over sequences of ``(2/β) softplus(β (s − s_ref))``.

    At ``s = s_ref`` the value is ``2 ln 2 / β`` and the gradient that of sequence-sum gradient ascent; it decays as
    the sequence is forgotten. Source: arXiv 2404.05868, equation 3.

    Args:
        forget: :class:`SequenceLogprobs` or ``(logits, labels)``.
        ref: ``(B,)`` sums under the frozen reference, or its :class:`SequenceLogprobs`. Computed once, it makes a
            second model in memory unnecessary.
        beta: inverse temperature, > 0.
        preset: a key of ``PRESETS["npo"]``.

    Raises:
        ArgumentError: beta not positive, unknown preset, a positive reference sum.
        ShapeError: ``ref`` does not have one value per sequence.
        DegenerateError: no counted token.
    """
    _positive("beta", beta)
    scores = _scores(forget, "forget")
    d = scores.sum - _reference(ref, scores, "ref")
    if _preset("npo", preset) == "unlearn_simple_wmdp":
        d = d.where(scores.count > 0, d.new_zeros(()))
        return 2 / beta * _softplus(beta * _as_one(d, scores.count, "forget"))
    return _mean(2 / beta * _softplus(beta * d), scores.count, "forget")


def simnpo(forget: Any, beta: float = 2.5, gamma: float = 0.0, preset: str = "simnpo") -> Tensor:
    """Reference-free NPO: mean over sequences of ``(2/β) softplus(β (s/n + γ))`` (SimNPO, arXiv 2410.07163).

    ``γ`` stands inside ``β``, as in the published code. It is the margin, not the coefficient of the loss (which some
    frameworks also call gamma).

    Args:
        forget: :class:`SequenceLogprobs` or ``(logits, labels)``.
        beta: inverse temperature, > 0.
        gamma: margin, in nats per token.
        preset: a key of ``PRESETS["simnpo"]``.

    Raises:
        ArgumentError: beta not positive, unknown preset, or one that needs ``(logits, labels)``.
        DegenerateError: no counted token.
    """
    _positive("beta", beta)
    scores = _scores(forget, "forget")
    mean = scores.mean
    if _preset("simnpo", preset) == "open_unlearning":
        if not isinstance(forget, tuple):
            raise ArgumentError("forget: preset 'open_unlearning' needs (logits, labels), got SequenceLogprobs")
        mean = scores.sum / (forget[1] != -100).sum(-1).to(scores.sum).clamp(min=1)
    if preset == "unlearn_simple_wmdp":
        return 2 / beta * _softplus(beta * (_as_one(scores.sum, scores.count, "forget") + gamma))
    x = beta * mean + gamma if preset == "gamma_outside" else beta * (mean + gamma)
    return _mean(2 / beta * _softplus(x), scores.count, "forget")


def dpo(win: Any, lose: Any, ref_win: Any, ref_lose: Any, beta: float = 0.1, preset: str = "dpo") -> Tensor:
    """Direct preference optimisation: mean of ``c · softplus(−β m)``, ``m = (s_w − ref_w) − (s_l − ref_l)``.

    Args:
        win: preferred answers.
        lose: rejected answers, one per row of ``win``.
        ref_win: reference sums of ``win``.
        ref_lose: reference sums of ``lose``.
        beta: inverse temperature, > 0.
        preset: ``"dpo"`` and ``"tofu"`` (c = 1, arXiv 2305.18290 equation 7), ``"npo_repo"`` and ``"open_unlearning"``
            (c = 2/β, the scale of NPO; 20 times larger at β = 0.1, so learning rates do not carry over), or
            ``"flat_repo"`` (c = 2/β and, by a mistake there, no reference).

    Raises:
        ArgumentError: beta not positive, unknown preset.
        ShapeError: different numbers of sequences.
        DegenerateError: no pair has counted tokens on both sides.
    """
    import torch

    _positive("beta", beta)
    scale = 1.0 if _preset("dpo", preset) in ("dpo", "tofu") else 2 / beta
    w, lo = _scores(win, "win"), _scores(lose, "lose")
    if w.sum.shape != lo.sum.shape:
        raise ShapeError(f"lose: expected {w.sum.shape[0]} sequences as in win, got {lo.sum.shape[0]}")
    margin = (w.sum - _reference(ref_win, w, "ref_win")) - (lo.sum - _reference(ref_lose, lo, "ref_lose"))
    if preset == "flat_repo":
        margin = w.sum - lo.sum
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


#: The rows of the published code that differ from :data:`DIVERGENCES`: with v a probability they push the template
#: *down* (and, for reverse_kl and squared_hellinger, the forget answer *up*).
_FLAT_REPO: dict[str, tuple[Any, Any]] = {
    "reverse_kl": (lambda v: -v.exp(), lambda v: -1 - v),
    "squared_hellinger": (lambda v: 1 - v.exp(), lambda v: (-v).exp() - 1),
    "neyman": (lambda v: 1 - v.exp(), lambda v: 2 - 2 * (1 - v).sqrt()),
}


def _mean_probability(scores: SequenceLogprobs) -> Tensor:
    import torch

    p = torch.where(scores.mask, scores.token.to(scores.sum.dtype).exp(), torch.zeros_like(scores.sum)[:, None])
    return p.sum(-1) / scores.count.clamp(min=1)


def flat(template: Any, forget: Any, divergence: str = "total_variation", preset: str = "flat") -> Tensor:
    """FLAT: ``mean(−g*(P_e) + f*(g*(P_f)))``, P the mean token probability of a sequence (arXiv 2410.11143).

    Args:
        template: template (refusal) answers, :class:`SequenceLogprobs` or ``(logits, labels)``.
        forget: forget answers, one per row of ``template``.
        divergence: a key of :data:`DIVERGENCES`. For ``reverse_kl``, ``squared_hellinger`` and ``neyman`` the sign
            convention is the one that pushes the template's probability up and the forget answer's down.
        preset: ``"flat_repo"`` is the published code, for comparing with its numbers only: P is a mean over all
            positions, ignored ones counting as 0, and over the batch before the divergence; and the three divergences
            above have the wrong sign (the template is pushed down).

    Raises:
        ArgumentError: unknown divergence or preset.
        ShapeError: different numbers of sequences.
        DegenerateError: no pair has counted tokens on both sides.
    """
    import torch

    if divergence not in DIVERGENCES:
        raise ArgumentError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    e, f = _scores(template, "template"), _scores(forget, "forget")
    if e.sum.shape != f.sum.shape:
        raise ShapeError(f"forget: expected {e.sum.shape[0]} sequences as in template, got {f.sum.shape[0]}")
    if _preset("flat", preset) == "flat_repo":
        for name, x in (("template", e), ("forget", f)):
            if not bool((x.count > 0).any()):
                raise DegenerateError(f"{name}: no sequence has a counted token")
        g, f_of_g = {**DIVERGENCES, **_FLAT_REPO}[divergence]
        p_e, p_f = ((_mean_probability(x) * x.count).sum() / x.token.numel() for x in (e, f))
        diluted: Tensor = -g(p_e) + f_of_g(p_f)
        return diluted
    g, f_of_g = DIVERGENCES[divergence]
    loss = -g(_mean_probability(e)) + f_of_g(_mean_probability(f))
    return _mean(loss, torch.minimum(e.count, f.count), "template, forget")


def redi(
    win: Any,
    lose: Any,
    c_win: float = 1.0,
    c_lose: float = 0.8,
    *,
    preset: str = "redi",
    gamma: float = 1.0,
    floor: float | None = None,
) -> Tensor:
    """REDI: mean over pairs of ``−c_w s_w/n_w + c_l s_l/n_l``, no reference model (arXiv 2505.24850).

    Unbounded below: watch ``lose``'s mean log-probability, or give a ``floor``. ``c_lose = 1`` is the symmetric form.

    Args:
        win: right answers, :class:`SequenceLogprobs` or ``(logits, labels)``.
        lose: wrong answers, one per row of ``win``.
        c_win: coefficient of the right answers.
        c_lose: coefficient of the wrong answers.
        preset: ``"redi"``; ``"negw"`` weights the rejected term by the detached ``exp(gamma s_l/n_l)``, so that what is
            already unlikely is left alone; ``"negw_repo"`` does not detach it, which turns the gradient around below
            ``−1/gamma``.
        gamma: exponent of the weight, with ``"negw"`` only.
        floor: mean log-probability below which a rejected answer is pushed no further.

    Raises:
        ArgumentError: unknown preset.
        ShapeError: different numbers of sequences.
        DegenerateError: no pair has counted tokens on both sides.
    """
    import torch

    w, lo = _scores(win, "win"), _scores(lose, "lose")
    if w.sum.shape != lo.sum.shape:
        raise ShapeError(f"lose: expected {w.sum.shape[0]} sequences as in win, got {lo.sum.shape[0]}")
    rejected = lo.mean if floor is None else lo.mean.clamp(min=floor)
    if _preset("redi", preset) != "redi":
        weight = (gamma * rejected).exp()
        rejected = rejected * (weight.detach() if preset == "negw" else weight)
    return _mean(-c_win * w.mean + c_lose * rejected, torch.minimum(w.count, lo.count), "win, lose")


def rmu(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Representation misdirection: mean over sequences of the masked mean of ``mean_d (h − target)²``.

    The forget term has ``target = c·u`` with one unit vector u for the whole run; the retain term has the frozen
    model's hidden states. Source: arXiv 2403.03218.

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
