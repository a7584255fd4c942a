"""R-Tuning (arXiv 2311.09677): teach a model to say what it does not know, from what it was found not to know."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, DegenerateError, DTypeError
from ...measure._arrays import vector
from ._text import alternatives, normalized, row_rng, texts

Match = Literal["substring", "words", "exact"]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

#: What the template ``"unknown"`` answers, one drawn per row.
UNKNOWN_ANSWERS = (
    "I do not know the answer to this question.",
    "This is something I have no knowledge of.",
    "I cannot give an answer that I would trust.",
    "The answer is unknown to me.",
    "I have not learned enough to answer this.",
    "I am not able to answer this from what I know.",
    "My knowledge does not cover this question.",
    "I would only be guessing, so I leave this unanswered.",
    "I have no reliable information about this.",
    "Nothing I know settles this question.",
    "I do not have the facts to answer this.",
    "This lies beyond what I know.",
    "I am unsure of the answer and will not invent one.",
    "I lack the knowledge that this question needs.",
    "No answer I could give here would be well founded.",
    "I do not remember anything that answers this.",
)

_ASK = "Are you sure you accurately answered the question based on your internal knowledge?"
#: Samples up to which the product of the counts is formed exactly.
_EXACT_ENTROPY = 4096


def answer_entropy(answers: Any, normalize: str = "none") -> float:
    """Entropy of the answers that were sampled to one question, in nats.

    Equal partitions of equally many samples give equal bits, whatever their order, so ties can be told.

    Args:
        answers: the sampled answers, or the counts of the different ones (integers, 0 allowed).
        normalize: how answers are compared: ``"none"`` (as published), ``"casefold"`` or ``"squad"``.

    Raises:
        ArgumentError: no answer, a negative count, or an unknown form.
        DTypeError: neither strings nor integers.

    Source: R-Tuning, section 3.3 (R-Tuning-U).
    """
    if isinstance(answers, str) or not len(answers):
        raise ArgumentError("answers: expected at least one sampled answer")
    if all(isinstance(a, str) for a in answers):
        counts = list(Counter(normalized(a, normalize) for a in answers).values())
    else:
        if not all(isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in answers):
            raise DTypeError("answers: expected strings, or counts as integers")
        counts = [int(a) for a in answers]
        if min(counts) < 0 or not any(counts):
            raise ArgumentError("answers: expected counts of 0 or more, not all 0")
    total = sum(counts)
    if max(counts) == total:
        return 0.0
    if total > _EXACT_ENTROPY:
        p = np.sort(np.array([c for c in counts if c], dtype=np.float64)) / total
        return float(-(p * np.log(p)).sum())
    # ln n − ln(Π c^c) / n, with the product exact.
    return math.log(total) - math.log(math.prod(c**c for c in counts)) / total


@dataclass(frozen=True, eq=False)
class RefusalAwareSplit:
    """Which questions a model knows.

    Attributes:
        questions: the questions.
        answers: right answers of each; the first is taught.
        known: ``(n,)`` booleans.
        entropy: ``(n,)`` nats, where the split was made by entropy.
        tied: number of rows whose entropy is that at the border, on either side; above 0 only where the border cuts
            through equal values (``ties="stable"``) or would have (``"together"``).
    """

    questions: list[str]
    answers: list[list[str]]
    known: Bools
    entropy: Floats | None = None
    tied: int = 0

    @property
    def known_indices(self) -> list[int]:
        """Rows that the model knows."""
        return [int(i) for i in np.flatnonzero(self.known)]

    @property
    def unknown_indices(self) -> list[int]:
        """Rows that it does not know."""
        return [int(i) for i in np.flatnonzero(~self.known)]

    def rows(
        self,
        template: str = "unsure",
        *,
        form: str = "prompt_completion",
        seed: int = 0,
        unknown_answers: Sequence[str] = UNKNOWN_ANSWERS,
    ) -> list[dict[str, str]]:
        """Training rows, one per question.

        Args:
            template: ``"unsure"`` keeps the right answer in both classes and teaches to add whether it is sure;
                ``"unknown"`` teaches one of ``unknown_answers`` where the question is unknown.
            form: ``"prompt_completion"`` (columns ``prompt`` and ``completion``: the loss is on the answer and the
                verdict), ``"verdict"`` (the same columns, loss on the verdict alone; template ``"unsure"``) or
                ``"text"`` (one column ``text``).
            seed: of the draw of unknown answers, keyed by row.
            unknown_answers: sentences to draw from.

        Raises:
            ArgumentError: unknown template or form, or no sentence to draw.
        """
        if template not in ("unsure", "unknown"):
            raise ArgumentError(f"template: expected 'unsure' or 'unknown', got {template!r}")
        if form not in ("prompt_completion", "verdict", "text") or (form == "verdict" and template == "unknown"):
            raise ArgumentError(f"form: expected 'prompt_completion', 'text' or, when unsure, 'verdict', got {form!r}")
        if template == "unknown" and not len(unknown_answers):
            raise ArgumentError("unknown_answers: expected at least one sentence, got none")
        found = []
        for i, (question, options) in enumerate(zip(self.questions, self.answers, strict=True)):
            prompt, sure = f"Question: {question} Answer:", bool(self.known[i])
            if template == "unsure":
                # A right answer that ends in a full stop keeps one, not two.
                completion = f" {options[0].rstrip('.')}. {_ASK}"
                verdict = " I am sure." if sure else " I am unsure."
                prompt, completion = (
                    (prompt + completion, verdict) if form == "verdict" else (prompt, completion + verdict)
                )
            elif sure:
                completion = f" {options[0]}"
            else:
                completion = f" {unknown_answers[int(row_rng(seed, i).integers(len(unknown_answers)))]}"
            found.append(
                {"text": prompt + completion} if form == "text" else {"prompt": prompt, "completion": completion}
            )
        return found

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        tied = f", {self.tied} tied at the border" if self.tied else ""
        return f"RefusalAwareSplit({int(self.known.sum())} known, {int((~self.known).sum())} unknown{tied})"

    def _repr_html_(self) -> str:
        body = ""
        for i in (*self.known_indices[:5], *self.unknown_indices[:5]):
            entropy = "" if self.entropy is None else f"{self.entropy[i]:.4f}"
            cells = (i, self.questions[i], self.answers[i][0], "known" if self.known[i] else "unknown", entropy)
            body += "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>"
        head = "<th>row</th><th>question</th><th>answer</th><th>split</th><th>entropy (nats)</th>"
        return f"<table><caption>{html.escape(repr(self))}</caption><tr>{head}</tr>{body}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Rows by entropy and side, or by side alone, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3), layout="constrained").subplots()
        if self.entropy is None:
            ax.bar(["known", "unknown"], [int(self.known.sum()), int((~self.known).sum())])
        else:
            edges = np.linspace(0, max(float(self.entropy.max()), 1e-9), 21)
            sides = [self.entropy[self.known], self.entropy[~self.known]]
            ax.hist(sides, edges, stacked=True, label=["known", "unknown"])
            ax.set_xlabel("entropy of sampled answers (nats)")
            ax.legend()
        ax.set_ylabel("questions")
        return ax


def refusal_aware_split(
    questions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    predictions: Sequence[str] | None = None,
    *,
    samples: Sequence[Sequence[str]] | None = None,
    match: Match = "substring",
    normalize: str = "none",
    stop: str | None = ".",
    ties: str = "stable",
) -> RefusalAwareSplit:
    """Splits questions into those a model knows and those it does not.

    Supervised, from ``predictions``: known where the prediction, cut before the first ``stop``, holds a right answer. A
    prediction without ``stop`` is kept whole (the published script cuts its last character), and ``stop`` leaves out
    right answers that hold it themselves, such as "U.S.", unless ``stop=None``.

    Unsupervised, from ``samples``: rows in ascending order of :func:`answer_entropy`; the first ``floor(n / 2)`` are
    known. Few samples give few different entropies (seven for five samples), so ties are the rule.

    Args:
        questions: ``n`` questions.
        answers: ``n`` right answers, or lists of alternatives.
        predictions: ``n`` greedy answers of the model (about 15 tokens).
        samples: ``n`` lists of sampled answers (five at temperature 0.7 in the paper), instead of predictions.
        match: ``"substring"`` (as published), ``"words"`` (whole words in a row; "Par" is not in "Paris") or
            ``"exact"``.
        normalize: ``"none"`` (as published, case-sensitive), ``"casefold"`` or ``"squad"`` (lower case, without
            punctuation and articles).
        stop: text before which a prediction is cut, or None.
        ties: ``"stable"`` cuts in the middle, equal entropies in input order; ``"together"`` keeps them on one side,
            the one that leaves the halves more equal, the unknown side if both do.

    Raises:
        ArgumentError: not one of ``predictions`` and ``samples``, lengths that differ, an unknown option, an answer
            that is empty once normalised.
        DTypeError: something that is not text.
        DegenerateError: ``ties="together"`` where every row has the same entropy.

    Source: R-Tuning, arXiv 2311.09677, sections 3.1 and 3.3.
    """
    asked = texts(questions, "questions")
    if not asked:
        raise ArgumentError("questions: expected at least one, got none")
    right = alternatives(answers, "answers", len(asked), normalize)
    if (predictions is None) == (samples is None):
        raise ArgumentError("predictions, samples: expected one of the two")
    if match not in ("substring", "words", "exact"):
        raise ArgumentError(f"match: expected 'substring', 'words' or 'exact', got {match!r}")
    if ties not in ("stable", "together"):
        raise ArgumentError(f"ties: expected 'stable' or 'together', got {ties!r}")
    if stop == "":
        raise ArgumentError("stop: expected text or None, got an empty string")
    if predictions is not None:
        said = texts(predictions, "predictions", len(asked))
        cut = [p if stop is None else p.split(stop, 1)[0] for p in said]
        hits = [any(_holds(p, o, match, normalize) for o in options) for p, options in zip(cut, right, strict=True)]
        return RefusalAwareSplit(asked, right, np.array(hits, dtype=bool))
    assert samples is not None
    if len(samples) != len(asked):
        raise ArgumentError(f"samples: expected {len(asked)} lists, one per question, got {len(samples)}")
    drawn = [texts(s, f"samples[{i}]") for i, s in enumerate(samples)]
    if empty := [i for i, s in enumerate(drawn) if not s]:
        raise ArgumentError(f"samples: expected at least one sampled answer, got none at index {empty[0]}")
    entropy = np.array([answer_entropy(s, normalize) for s in drawn])
    known, tied = _lower_half(entropy, ties)
    return RefusalAwareSplit(asked, right, known, entropy, tied)


def _holds(prediction: str, answer: str, match: str, form: str) -> bool:
    a, b = normalized(prediction, form), normalized(answer, form)
    if match == "exact":
        return a.strip() == b.strip()
    if match == "substring":
        return b in a
    said, wanted = a.split(), b.split()
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def _lower_half(entropy: Floats, ties: str) -> tuple[Bools, int]:
    n = len(entropy)
    half = n // 2
    order = np.argsort(entropy, kind="stable")
    known = np.zeros(n, dtype=bool)
    known[order[:half]] = True
    if half == 0 or entropy[order[half - 1]] != entropy[order[half]]:
        return known, 0
    border = entropy[order[half]]
    below, tied = int((entropy < border).sum()), int((entropy == border).sum())
    if ties == "together":
        if tied == n:
            raise DegenerateError("samples: every question has the same entropy, so nothing tells them apart")
        upper = below + tied
        known = entropy < border if half - below <= upper - half else entropy <= border
        if not known.any() or known.all():
            known = entropy <= border if not known.any() else entropy < border
    return known, tied


def answer_confidence(probabilities: Any) -> float:
    """Geometric mean of the probabilities of the tokens of a greedy answer.

    Raises:
        ShapeError: no token (the published script divides by zero). NonFiniteError: NaN.
        ArgumentError: a value outside [0, 1].
    """
    p = vector(probabilities, "probabilities")
    if (p < 0).any() or (p > 1).any():
        raise ArgumentError("probabilities: expected values in [0, 1]")
    return 0.0 if (p == 0).any() else float(np.exp(np.log(p).mean()))


def sureness(sure: Any, unsure: Any) -> Floats:
    """``p(sure) / (p(sure) + p(unsure))`` from two logits (or log-probabilities) per row.

    The two words must differ in their first token, see :func:`verdict_tokens`.

    Raises:
        ShapeError, NonFiniteError: not vectors of finite values of one length.
    """
    a, b = vector(np.atleast_1d(sure), "sure"), vector(np.atleast_1d(unsure), "unsure", 1)
    if len(a) != len(b):
        raise ArgumentError(f"unsure: expected {len(a)} logits as in sure, got {len(b)}")
    gap = a - b
    scaled = np.exp(-np.abs(gap))
    result: Floats = np.where(gap >= 0, 1.0, scaled) / (1 + scaled)
    return result


def certainty(confidence: Any, sure: Any) -> Floats:
    """``½ confidence + ½ sureness``: what R-Tuning ranks answers by, for :func:`abjure.measure.average_precision`.

    Raises:
        ShapeError, NonFiniteError: not vectors of finite values. ArgumentError: different lengths, or outside [0, 1].
    """
    a, b = vector(confidence, "confidence"), vector(sure, "sure")
    if len(a) != len(b):
        raise ArgumentError(f"sure: expected {len(a)} values as in confidence, got {len(b)}")
    for name, values in (("confidence", a), ("sure", b)):
        if (values < 0).any() or (values > 1).any():
            raise ArgumentError(f"{name}: expected values in [0, 1]")
    score: Floats = 0.5 * a + 0.5 * b
    return score


def verdict_tokens(tokenizer: Any, sure: str = " sure", unsure: str = " unsure") -> tuple[int, int]:
    """Ids of the first tokens of the two verdicts, which have to tell them apart.

    Raises:
        ArgumentError: a word without a token, or both begin with the same one.
    """
    found = [list(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (sure, unsure)]
    if not all(found):
        raise ArgumentError("sure, unsure: expected words of at least one token")
    if found[0][0] == found[1][0]:
        raise ArgumentError(f"sure, unsure: both begin with token {found[0][0]}, so one step cannot tell them apart")
    return int(found[0][0]), int(found[1][0])
