"""The logits processors and the stopping criterion as subclasses of transformers' own, for code that checks for it, and
the form that continuous batching takes.

Pass processors to ``model.generate(..., logits_processor=LogitsProcessorList([...]))``. They run before temperature,
top-k and top-p, on float32 scores. Criteria go to ``stopping_criteria=``. One object serves one generation at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import LogitsProcessor, StoppingCriteria

from ..errors import ArgumentError
from ..refuse.aligned_prefill import RefusalRecheck
from ..refuse.any_depth import AnyDepthCriterion
from ..refuse.phrases import ForbiddenPhrases
from ..refuse.tokens import RefusalTokens
from ._requests import ARGUMENT, Profiles, Row


class RefusalTokensProcessor(RefusalTokens, LogitsProcessor):  # type: ignore[misc]
    """:class:`abjure.refuse.RefusalTokens` as a ``transformers.LogitsProcessor``.

    Under beam search the scores are log-probabilities and a bias is never normalised away again: gate there, or pass
    ``renormalize_logits=True`` to ``generate()``.
    """


class ForbiddenPhrasesProcessor(ForbiddenPhrases, LogitsProcessor):  # type: ignore[misc]
    """:class:`abjure.refuse.ForbiddenPhrases` as a ``transformers.LogitsProcessor``.

    With ``scope="all"`` it forbids what ``NoBadWordsLogitsProcessor`` forbids, at a cost that does not grow with the
    number of phrases.
    """


class AnyDepthStoppingCriteria(AnyDepthCriterion, StoppingCriteria):
    """:class:`abjure.refuse.AnyDepthCriterion` as a ``transformers.StoppingCriteria``.

    ``AnyDepthStoppingCriteria(guard, model)`` does what ``guard.criterion(model)`` does.
    """


class RefusalRecheckStoppingCriteria(RefusalRecheck, StoppingCriteria):
    """:class:`abjure.refuse.RefusalRecheck` as a ``transformers.StoppingCriteria``."""


def continuous_batching(manager: Any, profiles: Any, *, default: str | None = None) -> Any:
    """Adds processors to a continuous batching manager that has not started; they run before all others.

    Each request is worked out from its own state, whenever it joined and however it was preempted. A request picks a
    profile with ``manager.add_request(ids, abjure=name)``::

        plain = ContinuousBatchingConfig(use_async_batching=False)
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=plain)
        continuous_batching(manager, [refuse.ForbiddenPhrases([[5, 7, 9]])])
        manager.start()

    Args:
        manager: of ``model.init_continuous_batching()``.
        profiles: a list of processors, or names to lists.
        default: profile of requests that name none; None: the first.

    Returns:
        The processor that was added.

    Raises:
        ArgumentError: the manager has started; it batches asynchronously (the newest token is not known on the host
            then), or captures graphs or compiles the step (which would leave host code out).
        ArgumentError, DTypeError: profiles that do not fit.

    Written for transformers 5.23, whose own register takes no processors of users.
    """
    found = Profiles(profiles, default)
    if manager.is_running() or getattr(manager, "batch_processor", None) is not None:
        raise ArgumentError("manager: expected one that has not started: it lays out its memory then")
    config = manager.continuous_batching_config
    if getattr(config, "use_async_batching", False):
        raise ArgumentError(
            "manager: expected use_async_batching=False: the newest token is not known on the host else"
        )
    if any(config.cuda_graph_booleans) or config.varlen_compile_config or config.decode_compile_config:
        raise ArgumentError("manager: expected no graphs and no compiled step, which would leave the processors out")
    made = _per_request()(found)
    listed = manager.logit_processor
    listed.logits_processor.insert(0, made)
    listed.tensors_required += 1
    listed.do_processing = True
    listed._retrieve_processors_kwargs()
    return made


@lru_cache
def _per_request() -> Any:
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class PerRequest(ContinuousBatchingLogitsProcessor):
        """Processors of each request's profile, from its state on the host.

        The engine passes one 32-bit number per request from the preparation of a step to its logits: the number under
        which the request's context was put down; -1 for none.
        """

        supported_kwargs = {ARGUMENT: str}  # noqa: RUF012
        ignored_kwargs = ()

        def __init__(self, profiles: Profiles) -> None:
            self.profiles = profiles
            self._number = 0
            self._waiting: dict[int, Row] = {}

        def fill_defaults(self, int32_tensor: Any) -> None:
            """No context."""
            int32_tensor.fill_(-1)

        def prepare_tensor_args(self, requests_with_new_token: Any) -> Any:
            """Puts down the contexts of one step."""
            import torch

            self._waiting.clear()
            numbers = []
            for request in requests_with_new_token:
                state = request.state
                # A request that was preempted comes back with its response at the end of its prompt.
                prompt = getattr(state, "_true_initial_tokens", 0) or len(state.initial_tokens)
                output = [*state.initial_tokens[prompt:], *state.generated_tokens]
                name = self.profiles.chosen(state.logit_processor_kwargs)
                self._number = (self._number + 1) % 2**31
                self._waiting[self._number] = Row(name, state.initial_tokens[:prompt], output)
                numbers.append(self._number)
            return torch.tensor(numbers, dtype=torch.int32)

        def __call__(self, scores: Any, tensor_arg: Any) -> Any:
            """Writes into ``(rows, vocabulary)`` scores and returns them."""
            numbers = tensor_arg[: scores.shape[0]].tolist()
            return self.profiles.write_(scores, [self._waiting[n] if n >= 0 else None for n in numbers])

    return PerRequest
