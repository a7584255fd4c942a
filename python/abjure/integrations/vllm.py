"""Processors for vLLM, under both of its interfaces: of the V1 model runner, and of model runner V2.

A class of the one is refused by the other at start-up, so there are two, and :func:`processor` makes the one that the
engine will load. vLLM takes classes, not objects: put the class into a module of yours, where the engine's processes
find it by name. No entry point is registered, because vLLM loads every registered one, wanted or not::

    # my_guard.py
    from abjure import refuse
    from abjure.integrations import vllm

    processors = [refuse.ForbiddenPhrases([[5, 7, 9]]), refuse.RefusalTokens({"refuse": 5}, bias=2.0)]
    Guard = vllm.processor("Guard", processors)

    # vllm serve MODEL --logits-processors my_guard:Guard

Written for vLLM 0.33. vLLM is imported when a class is made.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError
from ._requests import Profiles, Row, engine_class

Interface = Literal["v1", "v2"]


def interface() -> Interface:
    """The interface that vLLM's start-up will ask for, as far as it can be told without its configuration.

    ``VLLM_USE_V2_MODEL_RUNNER`` decides where it is set; else V2 where vLLM has it and Triton is there. vLLM still
    falls back to V1 for models and options that V2 does not support yet, which only its log tells.
    """
    try:
        import vllm.v1.worker.gpu.sample.logits_processor  # noqa: F401
    except ImportError:
        return "v1"
    from vllm import envs

    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    if forced is None:
        from vllm.triton_utils import HAS_TRITON

        forced = HAS_TRITON
    return "v2" if forced else "v1"


def processor(
    name: str,
    profiles: Any,
    *,
    default: str | None = None,
    interface: Interface | None = None,
    module: str | None = None,
) -> type:
    """A class for ``LLM(logits_processors=[...])`` or ``--logits-processors module:name``.

    Every request is processed, by the default profile unless its ``SamplingParams(extra_args={"abjure": name})`` (over
    HTTP ``vllm_xargs``) names another; put an empty list among the profiles to let requests opt out. The front end
    refuses unknown names. Batches may be greedy, sampled or mixed; requests join, leave, move and are preempted freely.
    Draft tokens of speculative decoding are seen by V2; under V1 vLLM refuses custom processors with it.

    Contexts are read on the host: V2 keeps them on the device, so a step costs one transfer of the last tokens of each
    row (as many as the longest phrase). An error in a processor (all tokens forbidden, NaN) stops vLLM's engine, which
    is its way with custom processors: give ``dead_end="eos"`` to end such a request instead.

    Args:
        name: the name that the class is assigned to in its module.
        profiles: a list of processors, or names to lists (or to functions that make them).
        default: profile of requests that name none; None: the first.
        interface: None for :func:`interface`.
        module: where the class will be found; None: the caller's.

    Raises:
        ImportError: vLLM is not there. ArgumentError, DTypeError: profiles or names that do not fit.
    """
    found = Profiles(profiles, default)
    kind = _detected() if interface is None else interface
    if kind not in ("v1", "v2"):
        raise ArgumentError(f"interface: expected 'v1' or 'v2', got {interface!r}")
    if kind == "v1":
        from vllm.v1.sample.logits_processor import LogitsProcessor as Base

        body: type = _V1
    else:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Base

        body = _V2
    members = {k: v for k, v in vars(body).items() if k not in ("__dict__", "__weakref__", "__module__")}
    return engine_class(name, Base, {**members, "profiles": found}, module, depth=2)


_detected = interface


class _V1:
    """Logits processor of vLLM's V1 model runner."""

    profiles: Profiles

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request that names an unknown profile."""
        cls.profiles.chosen(getattr(sampling_params, "extra_args", None))

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.requests: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        """No: biases and bans change what greedy decoding picks."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows requests as they leave, join and move: in this order, so that a slot filled anew keeps its own."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.requests.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            name = self.profiles.chosen(getattr(params, "extra_args", None))
            self.requests[index] = Row(name, prompt if prompt is not None else [], output)
        for first, second, direction in batch_update.moved:
            # An empty slot moves as well: it clears where it goes to.
            a, b = self.requests.pop(first, None), self.requests.pop(second, None)
            if a is not None:
                self.requests[second] = a
            if b is not None and direction.name == "SWAP":
                self.requests[first] = b

    def apply(self, logits: Any) -> Any:
        """Writes into ``(requests, vocabulary)`` logits and returns them."""
        return self.profiles.write_(logits, [self.requests.get(i) for i in range(logits.shape[0])])


class _V2:
    """Logits processor of vLLM's model runner V2."""

    profiles: Profiles

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request that names an unknown profile."""
        cls.profiles.chosen(getattr(sampling_params, "extra_args", None))

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.state = req_states
        self.names: list[str | None] = [None] * int(req_states.max_num_reqs)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether the request in this slot is to be processed; the slot's last request is forgotten."""
        name = self.profiles.chosen(getattr(sampling_params, "extra_args", None))
        self.names[req_idx] = name if self.profiles[name] else None
        return self.names[req_idx] is not None

    def apply_staged_writes(self) -> None:
        """Nothing is staged: names stay on the host."""

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Writes into ``(rows, vocabulary)`` logits and returns them; a row per request, and one per draft token."""
        import torch

        slots, pos, local = (x.long() for x in (ctx.expanded_idx_mapping, ctx.pos, ctx.expanded_local_pos))
        slot, at = torch.stack([slots, pos]).cpu().numpy()
        names = [self.names[i] for i in slot]
        reach = min(self.profiles.reach(names), int(at.max(initial=-1)) + 1)
        # Rows sample the token after position `pos`; before the prompt's last token (a prefill in parts) it is dropped.
        generated = at + 1 - np.asarray(self.state.prompt_len.np)[slot]
        context = np.zeros((len(slot), 0), dtype=np.int64)
        if reach:
            columns = pos[:, None] - torch.arange(reach - 1, -1, -1, device=pos.device)
            committed = pos - local
            known = self.state.all_token_ids.gpu[
                slots[:, None], columns.clamp(min=0).minimum(committed.clamp(min=0)[:, None])
            ]
            # Drafts are in this step's input only: a request's rows stand side by side, one per position.
            row = torch.arange(len(slot), device=pos.device)[:, None] - (pos[:, None] - columns)
            tokens = torch.where(columns > committed[:, None], ctx.input_ids[row.clamp(min=0)], known)
            context = torch.where(columns < 0, torch.zeros_like(tokens), tokens).cpu().numpy().astype(np.int64)
        active = [None if n < 0 else name for name, n in zip(names, generated, strict=True)]
        return self.profiles.write_arrays_(logits, active, context, np.minimum(at + 1, reach), generated)
