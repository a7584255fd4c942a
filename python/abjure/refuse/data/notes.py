"""Chain-of-Note (arXiv 2311.09210): notes on each retrieved document before the answer, and saying "unknown"."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError, ShapeError
from ...measure import Rate
from ._text import alternatives, normalized, texts

_ANSWER = re.compile(r"^\s*(?:final )?answer\s*:\s*", re.IGNORECASE | re.MULTILINE)


def chain_of_note_row(
    question: str,
    documents: Sequence[str],
    notes: Sequence[str],
    answer: str | None,
    *,
    unknown: str = "unknown",
) -> dict[str, str]:
    """A training row: the prompt shows the documents, the completion holds a note on each and then the answer.

    Args:
        question: the question.
        documents: retrieved passages, at least one.
        notes: one per document: that it answers, that it helps one's own knowledge, or that it is beside the point.
        answer: the answer, or None where neither documents nor own knowledge give one.
        unknown: what is written then.

    Returns:
        ``{"prompt", "completion"}``; read back by :func:`parse_chain_of_note`.

    Raises:
        DTypeError: something that is not text. ArgumentError: an empty text, no document.
        ShapeError: not one note per document.
    """
    shown, written = texts(documents, "documents"), texts(notes, "notes")
    if not shown:
        raise ArgumentError("documents: expected at least one, got none")
    if len(written) != len(shown):
        raise ShapeError(f"notes: expected {len(shown)}, one per document, got {len(written)}")
    said = unknown if answer is None else answer
    for name, values in (("question", [question]), ("documents", shown), ("notes", written), ("answer", [said])):
        if not all(v.strip() for v in texts(values, name)):
            raise ArgumentError(f"{name}: expected text, got an empty string")
    if any(_ANSWER.search(note) for note in written):
        raise ArgumentError("notes: a line begins with 'Answer:', which marks where the notes end")
    listed = "\n".join(f"Document {i}: {text.strip()}" for i, text in enumerate(shown, 1))
    noted = "\n".join(f"Note {i}: {text.strip()}" for i, text in enumerate(written, 1))
    ask = f"If neither the documents nor what you know answer it, say {unknown}."
    return {
        "prompt": f"{listed}\nQuestion: {question.strip()}\nWrite a note on each document, then the answer. {ask}\n",
        "completion": f"{noted}\nAnswer: {said.strip()}",
    }


def parse_chain_of_note(completion: str) -> tuple[list[str], str | None]:
    """Notes and answer of a completion; the answer is None where none is marked.

    The answer begins at the first line with ``Answer:`` and ends with its paragraph.

    Raises:
        DTypeError: not text.
    """
    [text] = texts([completion], "completion")
    mark = _ANSWER.search(text)
    head = text if mark is None else text[: mark.start()]
    notes = [m.strip() for m in re.split(r"^\s*Note \d+:\s*", head, flags=re.MULTILINE)[1:]]
    if mark is None:
        return notes, None
    return notes, text[mark.end() :].split("\n\n", 1)[0].strip()


@dataclass(frozen=True)
class ChainOfNoteScores:
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

    def _repr_html_(self) -> str:
        body = ""
        for name in ("exact_match", "rejection", "over_rejection"):
            body += f"<tr><td>{name}</td><td>{html.escape(repr(getattr(self, name)))}</td></tr>"
        return f"<table>{body}<tr><td>unmarked</td><td>{self.unmarked}</td></tr></table>"


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
