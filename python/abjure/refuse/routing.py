"""The routers of mixture-of-experts models: where they are, how they choose, and choosing otherwise for a while.

A router of transformers 5 returns (logits, weights, ids). A hook on it chooses again from the logits, by the family's
own rule, with some experts left out or held in; the experts, fused or not, see nothing but other ids and weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..errors import ArgumentError, DTypeError
from .architectures import text_config
from .blocks import attribute, decoder_blocks

if TYPE_CHECKING:
    from torch import nn

Mode = Literal["zero_slot", "mask", "force"]


@dataclass(frozen=True)
class Family:
    """One family's router.

    Attributes:
        rule: ``"softmax"`` of all experts, then the best k; ``"groups"`` of sigmoid scores with a correction bias
            (DeepSeek-V3); ``"top_softmax"``, the softmax of the best k logits (gpt-oss).
        router: the router's place within a block.
    """

    rule: Literal["softmax", "groups", "top_softmax"]
    router: str = "mlp.gate"


#: Routers by ``config.model_type``; each is tested against the router of the real class.
FAMILIES: dict[str, Family] = {
    "mixtral": Family("softmax"),
    "olmoe": Family("softmax"),
    "flex_olmo": Family("softmax"),
    "qwen2_moe": Family("softmax"),
    "qwen3_moe": Family("softmax"),
    "deepseek_v3": Family("groups"),
    "glm4_moe": Family("groups"),
    "gpt_oss": Family("top_softmax", "mlp.router"),
}


class RankedExpert(NamedTuple):
    """One routed expert, as :meth:`ExpertTuner.rank` returns it; ``tuning_experts`` takes it as (layer, expert)."""

    layer: int
    expert: int
    relevance: float
    standard_error: float
    z: float


Experts = Iterable[tuple[int, int] | RankedExpert]


def _family(model: nn.Module) -> Family:
    kind = getattr(text_config(model), "model_type", None)
    if (found := FAMILIES.get(str(kind))) is None:
        known = ", ".join(sorted(FAMILIES))
        raise ArgumentError(f"model: expected a mixture of experts of a known family ({known}), got {kind!r}")
    return found


def expert_routers(model: nn.Module, blocks: str | None = None) -> dict[int, nn.Module]:
    """The router of every block that has one, by layer; dense blocks are left out.

    Args:
        model: a Hugging Face decoder of a family in the table (Mixtral, OLMoE, FlexOlmo, Qwen2-MoE, Qwen3-MoE,
            DeepSeek-V3, GLM-4-MoE, gpt-oss).
        blocks: dotted name of the list of blocks, for wrappers the table of blocks does not know.

    Raises:
        DTypeError: ``model`` is not a torch module.
        ArgumentError: another family, no routed experts in any block, or routers of transformers before 5.
    """
    path, found = decoder_blocks(model, blocks)
    family = _family(model)
    routers = {}
    for layer, block in enumerate(found):
        router = attribute(block, family.router)
        # A dense MLP of the same family has no router at all; its gate is called gate_proj.
        if router is None:
            continue
        if not all(isinstance(getattr(router, name, None), int) for name in ("top_k", "num_experts")):
            raise ArgumentError(
                f"model: expected routers that return their choice (transformers 5), got {type(router).__name__} "
                f"at {path}.{layer}.{family.router}"
            )
        routers[layer] = router
    if not routers:
        raise ArgumentError(f"model: expected routed experts, got a {type(model).__name__} with dense blocks only")
    return routers


@dataclass(frozen=True)
class _Change:
    """What one router does otherwise: expert numbers."""

    zero: frozenset[int] = frozenset()
    mask: frozenset[int] = frozenset()
    force: frozenset[int] = frozenset()

    def then(self, inner: _Change) -> _Change:
        """Both, where the inner one has the last word on an expert that both name."""
        named = inner.zero | inner.mask | inner.force
        return _Change(self.zero - named | inner.zero, self.mask - named | inner.mask, self.force - named | inner.force)


class _Reroute:
    """The one hook of a router: every open context adds its change here, so that contexts nest."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.changes: list[_Change] = []
        self.handle: Any = None

    def together(self, *more: _Change) -> _Change:
        whole = _Change()
        for change in (*self.changes, *more):
            whole = whole.then(change)
        return whole

    def __call__(self, router: nn.Module, args: Any, output: Any) -> Any:
        logits, weights, _ = output
        weights_new, ids = route(self.family, router, logits, self.together())
        return logits, weights_new.to(weights.dtype), ids


def route(family: Family, router: Any, logits: Any, change: _Change) -> tuple[Any, Any]:
    """Weights and ids ``(tokens, k)`` that the router gives under ``change``, from its logits ``(tokens, experts)``."""
    import torch

    def flags(experts: frozenset[int]) -> Any:
        found = torch.zeros(router.num_experts, dtype=torch.bool)
        found[sorted(experts)] = True
        return found.to(logits.device)

    masked, forced = flags(change.mask), flags(change.force)
    if family.rule == "softmax":
        scores = choice = torch.softmax(logits.float(), dim=-1)
    elif family.rule == "groups":
        scores = logits.sigmoid()
        choice = _within_groups(router, scores + router.e_score_correction_bias, masked, forced)
    else:
        scores = choice = logits
    choice = choice.masked_fill(masked, float("-inf")).masked_fill(forced, float("inf"))
    ids = torch.topk(choice, router.top_k, dim=-1, sorted=family.rule != "groups")[1]
    weights, empty = scores.gather(1, ids), flags(change.zero)[ids]
    if family.rule == "top_softmax":
        weights = weights.masked_fill(empty, float("-inf")).softmax(dim=-1)
        return weights.masked_fill(empty.all(-1, keepdim=True), 0.0), ids
    weights = weights.masked_fill(empty, 0.0)
    if getattr(router, "norm_topk_prob", True):
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + 1e-20 if family.rule == "groups" else total.masked_fill(total == 0, 1.0))
    return weights * router.routed_scaling_factor if family.rule == "groups" else weights, ids


def _within_groups(router: Any, choice: Any, masked: Any, forced: Any) -> Any:
    """Selection scores, −inf outside the best groups. A masked expert lowers its group, a forced one holds it in."""
    import torch

    grouped = (-1, router.num_group, router.num_experts // router.num_group)
    best = choice.masked_fill(masked, float("-inf")).view(grouped).topk(2, dim=-1)[0].sum(dim=-1)
    best = best.masked_fill(forced.view(grouped[1:]).any(-1), float("inf"))
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept.scatter_(1, torch.topk(best, k=router.topk_group, dim=-1, sorted=False)[1], True)
    return choice.masked_fill(~kept.unsqueeze(-1).expand(-1, *grouped[1:]).reshape(choice.shape), float("-inf"))


def _by_layer(experts: Experts, arg: str, routers: dict[int, Any]) -> dict[int, frozenset[int]]:
    found: dict[int, set[int]] = {}
    for item in experts:
        pair = item[:2] if isinstance(item, RankedExpert) else item
        whole = (int, np.integer)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(n, whole) for n in pair):
            raise DTypeError(f"{arg}: expected pairs (layer, expert) of whole numbers, got {item!r}")
        layer, expert = int(pair[0]), int(pair[1])
        if layer not in routers:
            raise ArgumentError(f"{arg}: expected layers with routed experts ({sorted(routers)}), got {layer}")
        if not 0 <= expert < routers[layer].num_experts:
            count = routers[layer].num_experts
            raise ArgumentError(f"{arg}: expected experts 0 to {count - 1} in layer {layer}, got {expert}")
        found.setdefault(layer, set()).add(expert)
    return {layer: frozenset(found[layer]) for layer in found}


def _check_choice(layer: int, family: Family, router: Any, change: _Change) -> None:
    """Refuses a change under which some token could get fewer than k experts, or not all that are held in."""
    k, count = router.top_k, router.num_experts
    if len(change.force) > k:
        raise ArgumentError(f"on: expected at most {k} experts in layer {layer} (top-{k}), got {len(change.force)}")
    stay = count - len(change.mask)
    if family.rule == "groups":
        size = count // router.num_group
        alive = [size - sum(e // size == g for e in change.mask) for g in range(router.num_group)]
        held = {e // size for e in change.force}
        if len(held) > router.topk_group:
            raise ArgumentError(
                f"on: expected experts of at most {router.topk_group} groups in layer {layer}, got {len(held)}"
            )
        # A group is ranked by its best two, so those with fewer come last; of the others, assume the smallest.
        others = sorted((n < 2, n) for g, n in enumerate(alive) if g not in held)
        stay = sum(alive[g] for g in held) + sum(n for _, n in others[: router.topk_group - len(held)])
    if stay < k:
        raise ArgumentError(
            f'off: expected at least {k} experts (top-{k}) to choose from in layer {layer}, got {stay}; "zero_slot" '
            "needs no replacement"
        )


@contextmanager
def tuning_experts(
    model: nn.Module,
    off: Experts = (),
    on: Experts = (),
    *,
    mode: Mode = "zero_slot",
    blocks: str | None = None,
) -> Iterator[None]:
    """Switches routed experts off, or holds them in every token's choice, inside the ``with`` block (MoTE).

    ``mode="zero_slot"`` (the published form, Dahlke et al. 2025, arXiv 2502.11096): an expert that is off keeps its
    slot among the k with weight 0, and where the router normalises the weights of the k, those of the others are
    normalised without it; no other expert takes its place. A token all of whose experts are off gets nothing from
    routed experts. ``mode="mask"``: its selection score is −inf, and the next best expert takes its place; in
    DeepSeek-V3 it no longer counts for its group either. Experts in ``on`` always have a selection score of +inf, so
    they are among the k of every token (their group too), with the weight that their own score gives them.

    Contexts nest; on an expert that two of them name, the inner one decides. The router's logits are left as they are.

    Args:
        model: as in :func:`expert_routers`.
        off, on: pairs (layer, expert) or what :meth:`ExpertTuner.rank` returns; in ``on`` at most k per layer.
        mode: how ``off`` acts; ``"force"`` says that only ``on`` is given.
        blocks: as in :func:`expert_routers`.

    Raises:
        ArgumentError: an unknown family or mode, a layer without routed experts, an expert that does not exist, one
            in both lists, too many in ``on``, or masks that leave fewer than k. Nothing is changed then.
        DTypeError: something else than pairs.
    """
    routers = expert_routers(model, blocks)
    if mode not in ("zero_slot", "mask", "force"):
        raise ArgumentError(f'mode: expected "zero_slot", "mask" or "force", got {mode!r}')
    out, held = _by_layer(off, "off", routers), _by_layer(on, "on", routers)
    if not out and not held:
        raise ArgumentError("off, on: expected at least one expert, got none")
    if mode == "force" and out:
        raise ArgumentError('mode: expected "zero_slot" or "mask" where experts are off, got "force"')
    family = _family(model)
    none: frozenset[int] = frozenset()
    steps: list[tuple[Any, _Change]] = []
    for layer in sorted({*out, *held}):
        gone, kept = out.get(layer, none), held.get(layer, none)
        if both := gone & kept:
            raise ArgumentError(f"off, on: expected an expert in one of the two, got {(layer, min(both))} in both")
        zero = mode == "zero_slot"
        change = _Change(gone if zero else none, none if zero else gone, kept)
        router = routers[layer]
        _check_choice(layer, family, router, (_hook(router) or _Reroute(family)).together(change))
        steps.append((router, change))
    with ExitStack() as stack:
        for router, change in steps:
            hook = _hook(router)
            if hook is None:
                hook = _Reroute(family)
                hook.handle = router.register_forward_hook(hook)
            hook.changes.append(change)
            stack.callback(_undo, hook, change)
        yield


def _hook(router: Any) -> _Reroute | None:
    return next((hook for hook in router._forward_hooks.values() if isinstance(hook, _Reroute)), None)


def _undo(hook: _Reroute, change: _Change) -> None:
    """By identity, so that contexts may also close in another order than they were opened in."""
    hook.changes = [c for c in hook.changes if c is not change]
    if not hook.changes:
        hook.handle.remove()
