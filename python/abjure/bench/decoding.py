"""Decoding: forbidden phrases, gates and biases against the torch and transformers forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import plain
from .timing import Row, compare

#: Rows, vocabulary and phrases of the stated target.
ROWS, VOCAB, PHRASES = 64, 151_936, 1000
CONTEXT = 512


def phrases(count: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Distinct random phrases of 1 to 6 tokens, as many of each length."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(rng.integers(0, vocab, 1 + len(found) % 6).tolist())] = None
    return [list(p) for p in found]


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Every comparison at ``scale`` times the stated vocabulary and number of phrases."""
    import torch

    vocab, count = max(1000, int(VOCAB * scale)), max(10, int(PHRASES * scale))
    forbidden = phrases(count, vocab)
    ids = torch.randint(0, vocab, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    # Most rows are about to complete a phrase, so that the match is measured and not only its absence.
    for i in range(ROWS):
        start = forbidden[(i * 7 + 1) % count][:-1]
        if start:
            ids[i, -len(start) :] = torch.tensor(start)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _phrases(dtype, forbidden, ids, vocab)
        yield from _gates(dtype, ids, vocab)


def _against(
    kernel: str,
    case: str,
    scores: Any,
    ours: Callable[[Any], object],
    baseline: str,
    theirs: Callable[[Any], object],
    moved: int = 0,
) -> Row:
    """Both sides on fresh copies of ``scores``, right after these are written, as a model does before each step."""
    work = scores.clone()
    reset = lambda: work.copy_(scores)  # noqa: E731
    seconds = compare(lambda: ours(work), lambda: theirs(work), reset=reset, repeats=15, settle=False)
    return Row(kernel, case, seconds[0], baseline, seconds[1], moved)


def _scores(dtype: Any, vocab: int) -> Any:
    import torch

    return torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)


def _case(dtype: Any, vocab: int) -> str:
    return f"{ROWS} x {vocab}, {str(dtype).removeprefix('torch.')}"


def _phrases(dtype: Any, forbidden: list[list[int]], ids: Any, vocab: int) -> Iterator[Row]:
    from transformers import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

    from ..refuse import ForbiddenPhrases

    scores = _scores(dtype, vocab)
    case = f"{_case(dtype, vocab)}, {len(forbidden)} phrases"
    ours = ForbiddenPhrases(forbidden, vocab, scope="all")
    hard = NoBadWordsLogitsProcessor(forbidden)
    yield _against(
        "ForbiddenPhrases",
        case,
        scores,
        lambda z: ours(ids, z),
        "NoBadWordsLogitsProcessor",
        lambda z: hard(ids, z),
    )
    prefix = ForbiddenPhrases(forbidden, vocab, scope="all", mode="prefix", penalty=4.0)
    soft = SequenceBiasLogitsProcessor([[p, -float(i % 7 + 1)] for i, p in enumerate(forbidden)])
    yield _against(
        "ForbiddenPhrases, prefix",
        case,
        scores,
        lambda z: prefix(ids, z),
        "SequenceBiasLogitsProcessor (no prefixes)",
        lambda z: soft(ids, z),
    )


def _gates(dtype: Any, ids: Any, vocab: int) -> Iterator[Row]:
    import torch

    from ..refuse import RefusalTokens, bias_, bias_to_threshold, row_lse, row_max_gap

    scores, case = _scores(dtype, vocab), _case(dtype, vocab)
    # A third of the rows refuse, inside the bounds, so that they need their log-sum-exp.
    scores[: ROWS // 3, 17] = 8.0
    size, threshold = scores.numel() * scores.element_size(), -7.0
    gate = RefusalTokens({"refuse": 17}, threshold=threshold, prompt_length=CONTEXT)

    yield _against(
        "RefusalTokens, all gated",
        case,
        scores,
        lambda z: gate(ids, z),
        "softmax, compare, force",
        lambda z: plain.gate(z, 17, bias_to_threshold(-threshold)),
        size,
    )
    yield _against(
        "row_max_gap",
        case,
        scores,
        lambda z: row_max_gap(z, [17]),
        "amax of two slices",
        lambda z: plain.row_max_gap(z, 17),
        size,
    )
    yield _against(
        "row_lse (float64)",
        case,
        scores,
        row_lse,
        "logsumexp of the float64 copy",
        lambda z: torch.logsumexp(z.double(), dim=1),
        size,
    )
    tokens = torch.linspace(0, vocab - 1, 101).long()
    values = torch.linspace(-1, 1, len(tokens))
    yield _against(
        "bias_, 101 tokens",
        case,
        scores,
        lambda z: bias_(z, tokens, values),
        "dense bias vector",
        lambda z: z.add_(torch.zeros(vocab).index_add_(0, tokens, values)),
    )
