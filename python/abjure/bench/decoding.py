"""Decoding: forbidden phrases, gates and biases against the torch and transformers forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import plain
from .timing import Row, compare

#: Rows, vocabulary and phrases of the stated target.
ROWS, VOCAB, PHRASES = 64, 151_936, 1000
CONTEXT = 512
#: Numbers of phrases over which a step must hardly grow.
GROWTH = (100, 1000, 10_000, 100_000)
_SYLLABLES = (
    "ka", "to", "ri", "en", "st", "ing", "er", "a", "o", "th",
    "ch", "pre", "con", "lo", "mi", "na", "es", "qu", "x", "zu",
)  # fmt: skip
#: Scored prompts of the stated target of calibration, under one second.
SCORED = 1_000_000


def phrases(count: int, vocab: int, seed: int = 0, lengths: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> list[list[int]]:
    """Distinct random phrases of 1 to 6 tokens, as many of each length."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(rng.integers(0, vocab, lengths[len(found) % len(lengths)]).tolist())] = None
    return [list(p) for p in found]


class Pieces:
    """A vocabulary of made-up pieces, half of them behind a space, after the 256 bytes."""

    all_special_ids = ()

    def __init__(self, size: int) -> None:
        rng = np.random.default_rng(2)
        self._ids = {f"<0x{b:02X}>": b for b in range(256)}
        while len(self._ids) < size:
            n = len(self._ids)
            draws = rng.integers(0, len(_SYLLABLES), (size, 4))
            for row, parts in zip(draws, 1 + rng.integers(0, 4, size), strict=True):
                text = "".join(_SYLLABLES[i] for i in row[:parts])
                self._ids.setdefault(f"▁{text}" if row.sum() % 2 else text, len(self._ids))
                if len(self._ids) == size:
                    break
            if len(self._ids) == n:  # every piece of up to four syllables is there
                raise ValueError(f"size: expected fewer pieces, got {size}")

    def get_vocab(self) -> dict[str, int]:
        return self._ids


def texts(count: int, seed: int = 3) -> list[str]:
    """Distinct made-up phrases of two words."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        first, second = 2 + rng.integers(0, 2), 2 + rng.integers(0, 3)
        row = [_SYLLABLES[i] for i in rng.integers(0, len(_SYLLABLES), first + second)]
        found["".join(row[:first]) + " " + "".join(row[first:])] = None
    return list(found)


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
    yield from _steps(ids, vocab, [max(10, int(n * scale)) for n in GROWTH])
    yield from _calibration(max(1000, int(SCORED * scale)))


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


def _steps(ids: Any, vocab: int, counts: list[int]) -> Iterator[Row]:
    """One decoding step in bfloat16 beside one softmax of the same logits, and how long the largest automata build."""
    import torch
    from transformers import NoBadWordsLogitsProcessor

    from ..refuse import ForbiddenPhrases, RefusalTokens, TokenBytes

    scores, case = _scores(torch.bfloat16, vocab), _case(torch.bfloat16, vocab)
    scores[: ROWS // 3, 17] = 8.0

    def step(kernel: str, what: str, ours: Callable[[Any], object]) -> Row:
        return _against(kernel, f"{case}, {what}", scores, ours, "one softmax", lambda z: torch.softmax(z, -1))

    def through(prompt: list[int], processor: Any) -> Callable[[Any], object]:
        gate = RefusalTokens({"a": 17, "b": 18, "c": 19}, threshold=-7.0, prompt_length=prompt)
        return lambda z: processor(ids, gate(ids, z))

    several = (2, 3, 4, 5, 6)
    stated = phrases(counts[2], vocab, lengths=several)
    processor = ForbiddenPhrases(stated, vocab, scope="all")
    eighth = [CONTEXT if i % 8 == 0 else CONTEXT // 2 for i in range(ROWS)]
    for rows_gated, prompt in (("1 row in 8", eighth), ("all rows", [CONTEXT] * ROWS)):
        what = f"3 categories in {rows_gated}, {len(stated)} phrases of 2-6 tokens"
        yield step("gate and ForbiddenPhrases", what, through(prompt, processor))
    for n in counts:
        many = ForbiddenPhrases(phrases(n, vocab, lengths=several), vocab, scope="all")
        yield step("ForbiddenPhrases", f"{n} phrases of 2-6 tokens", lambda z, p=many: p(ids, z))  # type: ignore[misc]
    single = ForbiddenPhrases(phrases(min(counts[2], vocab // 2), vocab, lengths=(1,)), vocab, scope="all")
    yield step("ForbiddenPhrases", f"{len(single)} phrases of 1 token", lambda z: single(ids, z))

    table = TokenBytes(Pieces(vocab), scheme="metaspace", proof=())
    for n in counts:
        forbidden = texts(n)
        # Every row ends within a phrase, at a byte of its own.
        context = torch.full_like(ids, 32)
        for i in range(ROWS):
            text = forbidden[(i * 7) % n].encode()
            part = text[: 1 + i % (len(text) - 1)]
            context[i, -len(part) :] = torch.tensor(list(part))
        spelt = ForbiddenPhrases(forbidden, vocab, tokenizer=table, mode="bytes", boundary="word", scope="all")
        yield step(
            "ForbiddenPhrases, bytes",
            f"{n} phrases of two words",
            lambda z, p=spelt, c=context: p(c, z),  # type: ignore[misc]
        )

    largest, largest_texts = phrases(counts[3], vocab, lengths=several), texts(counts[3])
    for kernel, build in (
        ("ForbiddenPhrases, build", lambda: ForbiddenPhrases(largest, vocab)),
        ("ForbiddenPhrases, bytes, build", lambda: ForbiddenPhrases(largest_texts, tokenizer=table, mode="bytes")),
    ):
        seconds = compare(build, lambda: NoBadWordsLogitsProcessor(largest), repeats=3, settle=False)
        yield Row(kernel, f"{counts[3]} phrases", seconds[0], "NoBadWordsLogitsProcessor(...)", seconds[1])


def _calibration(count: int) -> Iterator[Row]:
    """Calibration of scored prompts, against the sort that a quantile takes and against the same solve in NumPy."""
    from ..refuse import CategoryScores, calibrate

    rng = np.random.default_rng(0)
    odds = rng.normal(-4, 2, size=(count, 3))
    log_rest = np.log1p(np.exp(odds).sum(axis=1))
    one = CategoryScores.from_margins(odds[:, 0])
    margins = odds - np.log(1 + np.exp(odds).sum(axis=1, keepdims=True) - np.exp(odds))
    three = CategoryScores.from_margins(margins, ["a", "b", "c"], leads=odds)
    case, rates = f"{count} prompts", {"a": 0.1, "b": 0.05, "c": 0.02}
    seconds = compare(
        lambda: calibrate(one, max_over_refusal=0.05, delta=0.05), lambda: np.sort(odds[:, 0]), repeats=5, settle=False
    )
    yield Row("calibrate, bound", case, seconds[0], "np.sort of the scores", seconds[1], 0)
    log_p = np.column_stack([-log_rest, odds - log_rest[:, None]])
    wanted = np.array(list(rates.values()))
    seconds = compare(
        lambda: calibrate(three, decoder="sampling", target_rate=rates),
        lambda: plain.joint_bias(log_p, wanted),
        repeats=3,
        settle=False,
    )
    yield Row("calibrate, joint biases of 3", case, seconds[0], "NumPy, Newton", seconds[1], 0)
    seconds = compare(
        lambda: calibrate(three, decoder="greedy", target_rate=rates),
        lambda: np.sort(odds, axis=0),
        repeats=3,
        settle=False,
    )
    yield Row("calibrate, joint shares of 3", case, seconds[0], "np.sort of the scores", seconds[1], 0)
