"""Chain-of-Note (arXiv 2311.09210): right answers, and saying "unknown" where there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError
from .._scores import Row, Scores
from .._text import alternatives, normalized, texts
from ..rates import Rate

#: The line where the notes end and the answer begins.
ANSWER_LINE = re.compile(r"^\s*(?:final )?answer\s*:\s*", re.IGNORECASE | re.MULTILINE)


def parse_chain_of_note(completion: str) -> tuple[list[str], str | None]:
    """Notes and answer of a completion; the answer is None where none is marked.

    The answer begins at the first line with ``Answer:`` and ends with its paragraph.

    Raises:
        DTypeError: not text.
    """
    [text] = texts([completion], "completion")
    mark = ANSWER_LINE.search(text)
    head = text if mark is None else text[: mark.start()]
    notes = [m.strip() for m in re.split(r"^\s*Note \d+:\s*", head, flags=re.MULTILINE)[1:]]
    if mark is None:
        return notes, None
    return notes, text[mark.end() :].split("\n\n", 1)[0].strip()


@dataclass(frozen=True, repr=False)
class ChainOfNoteScores(Scores):
    """How often a model answers right, and how often it says that it does not know.

    Attributes:
        exact_match: over answerable questions.
        rejection: unanswerable questions answered with "unknown" (the paper's rejection rate).
        over_rejection: answerable questions answered so.
        unmarked: completions without a marked answer; they are neither right nor rejections.
    """

    exact_match: Rate
    rejection: Rate
    over_rejection: Rate
    unmarked: int

    title = "Chain-of-Note"

    def rows(self) -> list[Row]:
        return [
            Row("exact match (answerable)", self.exact_match),
            Row("rejection rate (unanswerable)", self.rejection),
            Row("over-rejection (answerable)", self.over_rejection),
            Row("without a marked answer", self.unmarked),
        ]


def chain_of_note_scores(
    completions: Sequence[str],
    answers: Sequence[str | Sequence[str] | None],
    *,
    unknown: str = "unknown",
    normalize: str = "squad",
) -> ChainOfNoteScores:
    """Exact match, rejection rate and over-rejection.

    Args:
        completions: ``n`` completions with an ``Answer:`` line.
        answers: right answers, one or several each; None marks a question that cannot be answered.
        unknown: the answer that counts as a rejection.
        normalize: how answers are compared, see :func:`answer_entropy`; ``"squad"`` is the usual exact match.

    Raises:
        DTypeError: something that is not text. ArgumentError: lengths that differ, no completion, an empty answer.

    Source: Chain-of-Note, arXiv 2311.09210, section 4.
    """
    said = [parse_chain_of_note(c)[1] for c in texts(completions, "completions")]
    if not said or len(answers) != len(said):
        raise ArgumentError(f"answers: expected {len(said)}, one per completion and at least one, got {len(answers)}")
    possible = [a for a in answers if a is not None]
    right = iter(alternatives(possible, "answers", len(possible), normalize))
    no = normalized(unknown, normalize).strip()
    if not no:
        raise ArgumentError("unknown: expected text that is not empty once normalised")
    hits, rejected, over = [0, 0], [0, 0], [0, 0]
    for answer, found in zip(answers, said, strict=True):
        plain = None if found is None else normalized(found, normalize).strip()
        if answer is None:
            rejected[0] += plain == no
            rejected[1] += 1
            continue
        hits[0] += plain in {normalized(o, normalize).strip() for o in next(right)}
        over[0] += plain == no
        hits[1] += 1
        over[1] += 1
    unmarked = sum(s is None for s in said)
    return ChainOfNoteScores(Rate(hits[0], hits[1]), Rate(rejected[0], rejected[1]), Rate(over[0], over[1]), unmarked)
