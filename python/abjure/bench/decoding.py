"""Decoding: forbidden phrases, gates and biases against the torch and transformers forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

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
    from transformers import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

    from ..refuse import ForbiddenPhrases, RefusalTokens, bias_, row_lse, row_max_gap

    vocab, count = max(1000, int(VOCAB * scale)), max(10, int(PHRASES * scale))
    forbidden = phrases(count, vocab)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (ROWS, CONTEXT), generator=generator)
    # Every row is about to complete a phrase, so that the match is measured and not only its absence.
    for row in range(ROWS):
        start = forbidden[(row * 7 + 1) % count][:-1]
        if start:
            ids[row, -len(start) :] = torch.tensor(start)
    case = f"{ROWS} x {vocab}"
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        scores = torch.randn(ROWS, vocab, generator=generator).to(dtype)
        work = scores.clone()
        size = scores.numel() * scores.element_size()

        def row(
            kernel: str,
            ours: Callable[[], object],
            baseline: str,
            theirs: Callable[[], object],
            moved: int = 0,
            case: str = case,
            name: str = name,
            work: Any = work,
            scores: Any = scores,
        ) -> Row:
            seconds = compare(ours, theirs, reset=lambda: work.copy_(scores), repeats=9)
            return Row(kernel, f"{case}, {name}", seconds[0], baseline, seconds[1], moved)

        ours = ForbiddenPhrases(forbidden, vocab, scope="all")
        hard = NoBadWordsLogitsProcessor(forbidden)
        soft = SequenceBiasLogitsProcessor([[p, -float(i % 7 + 1)] for i, p in enumerate(forbidden)])
        listed = f"{case}, {len(forbidden)} phrases"
        yield row(
            "ForbiddenPhrases",
            lambda ours=ours, work=work: ours(ids, work),
            "NoBadWordsLogitsProcessor",
            lambda hard=hard, work=work: hard(ids, work),
            case=listed,
        )
        prefix = ForbiddenPhrases(forbidden, vocab, scope="all", mode="prefix", penalty=4.0)
        yield row(
            "ForbiddenPhrases, prefix",
            lambda prefix=prefix, work=work: prefix(ids, work),
            "SequenceBiasLogitsProcessor (no prefixes)",
            lambda soft=soft, work=work: soft(ids, work),
            case=listed,
        )
        # The refusal token is made probable enough that the bounds leave a third of the rows open.
        gate = RefusalTokens({"refuse": 17}, threshold=-7.0, prompt_length=CONTEXT)
        scores[: ROWS // 3, 17] = 8.0

        def gate_by_softmax(work: Any = work) -> None:
            p = torch.softmax(work.float(), dim=-1)[:, 17]
            fires = p >= 0.000911
            work[fires, :] = -torch.inf
            work[fires, 17] = 0.0

        yield row(
            "RefusalTokens, all gated",
            lambda gate=gate, work=work: gate(ids, work),
            "softmax, compare, force",
            gate_by_softmax,
            size,
        )
        yield row(
            "row_max_gap",
            lambda work=work: row_max_gap(work, [17]),
            "amax of two slices",
            lambda work=work: work[:, 17] - torch.maximum(work[:, :17].amax(1), work[:, 18:].amax(1)),
            size,
        )
        yield row(
            "row_lse (float64)",
            lambda work=work: row_lse(work),
            "logsumexp of the float64 copy",
            lambda work=work: torch.logsumexp(work.double(), dim=1),
            size,
        )
        tokens = torch.linspace(0, vocab - 1, 101).long()
        values = torch.linspace(-1, 1, len(tokens))
        yield row(
            "bias_, 101 tokens",
            lambda work=work, t=tokens, v=values: bias_(work, t, v),
            "dense bias vector",
            lambda work=work, t=tokens, v=values: work.add_(torch.zeros(vocab).index_add_(0, t, v)),
        )
