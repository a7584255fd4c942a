"""Chain-of-Note (arXiv 2311.09210): notes on each retrieved document before the answer, and saying "unknown"."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ArgumentError, ShapeError
from ...measure.benchmarks.notes import (
    ANSWER_LINE,
    ChainOfNoteScores,
    chain_of_note_scores,
    parse_chain_of_note,
)
from ._text import texts

__all__ = ["ChainOfNoteScores", "chain_of_note_row", "chain_of_note_scores", "parse_chain_of_note"]


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
    if any(ANSWER_LINE.search(note) for note in written):
        raise ArgumentError("notes: a line begins with 'Answer:', which marks where the notes end")
    listed = "\n".join(f"Document {i}: {text.strip()}" for i, text in enumerate(shown, 1))
    noted = "\n".join(f"Note {i}: {text.strip()}" for i, text in enumerate(written, 1))
    ask = f"If neither the documents nor what you know answer it, say {unknown}."
    return {
        "prompt": f"{listed}\nQuestion: {question.strip()}\nWrite a note on each document, then the answer. {ask}\n",
        "completion": f"{noted}\nAnswer: {said.strip()}",
    }
