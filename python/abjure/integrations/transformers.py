"""The logits processors and the stopping criterion as subclasses of transformers' own, for code that checks for it.

Pass processors to ``model.generate(..., logits_processor=LogitsProcessorList([...]))``. They run before temperature,
top-k and top-p, on float32 scores. Criteria go to ``stopping_criteria=``. One object serves one generation at a time.
"""

from __future__ import annotations

from transformers import LogitsProcessor, StoppingCriteria

from ..refuse.any_depth import AnyDepthCriterion
from ..refuse.phrases import ForbiddenPhrases
from ..refuse.tokens import RefusalTokens


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
