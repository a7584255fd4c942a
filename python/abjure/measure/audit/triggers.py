"""A search for what refusals have in common: n-grams and clusters of embeddings enriched among refused prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..._interop import is_torch
from ...errors import ArgumentError, DegenerateError, ShapeError
from .._arrays import Floats, Ints, binary, codes, matrix
from .._scores import Row, Scores
from ..paired import adjust_pvalues
from ..rates import Rate
from ..text.sparse import SparseRows
from ..text.vectorizer import TfidfVectorizer, as_texts
from ._exact import best_case, score, upper_tail

__all__ = ["Trigger", "TriggerSearch", "embedding_clusters", "search_triggers"]

_PLAIN_WORDS = """
a about all also am an and any are as at be been but by can could did do does for from get give had has have he her him
his how i if in into is it its just like make me my no not of on one or our out please she should so some such tell than
that the their them then there these they this to up us was we were what when where which who why will with would you
your
"""
#: Words that say nothing of a topic; an n-gram needs one other.
_PLAIN = frozenset(_PLAIN_WORDS.split())


@dataclass(frozen=True)
class Trigger:
    """Something that refused prompts share.

    Attributes:
        kind: ``"n-gram"``, ``"cluster"`` or the name of a column of topics.
        name: the n-gram, or words that mark the cluster, or the topic.
        inside: refused, of the prompts that have it. outside: of the others.
        expected: refusals among those that have it, were it unrelated to refusal within each stratum.
        pvalue: exact, one-sided, within strata. adjusted: Benjamini-Hochberg (or Holm) over everything tested.
        related: other significant n-grams or clusters whose prompts are mostly the same.
        examples: indices of refused prompts that have it, at most five.
    """

    kind: str
    name: str
    inside: Rate
    outside: Rate
    expected: float
    pvalue: float
    adjusted: float
    related: tuple[str, ...] = ()
    examples: tuple[int, ...] = ()

    @property
    def lift(self) -> float:
        """Refusals over those expected."""
        return self.inside.k / self.expected if self.expected > 0 else float("inf")


@dataclass(frozen=True, repr=False)
class TriggerSearch(Scores):
    """What :func:`search_triggers` found, strongest first.

    Attributes:
        triggers: distinct ones: each still stands out among the refused prompts that no earlier one covers.
        significant: everything whose adjusted p-value is at most ``alpha``, before overlapping ones are joined.
        tested: how many n-grams and clusters were tested.
        refused: refused, of all prompts. explained: of those refused, the ones that a trigger covers.
        alpha: the level. method: of adjustment.
    """

    title = "Triggers: what refused prompts have in common"
    triggers: Sequence[Trigger]
    significant: Sequence[Trigger]
    tested: int
    refused: Rate
    explained: Rate
    alpha: float
    method: str
    stratified: bool = False
    _covered: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)

    @property
    def covered(self) -> list[int]:
        """Indices of the refused prompts that a trigger covers."""
        return [int(i) for i in self._covered]

    def __bool__(self) -> bool:
        return bool(self.triggers)

    def rows(self) -> list[Row]:
        found = [Row("refused", self.refused), Row("of those, explained", self.explained)]
        for t in self.triggers:
            note = f"elsewhere {t.outside.k}/{t.outside.n}; {t.lift:.3g} times as many as expected; "
            note += f"p {t.pvalue:.3g}, adjusted {t.adjusted:.3g}"
            note += f"; also {', '.join(t.related[:6])}" if t.related else ""
            found.append(Row(f"{t.kind}: {t.name}", t.inside, note))
        return found

    def notes(self) -> list[str]:
        """What to know before quoting the numbers."""
        kept = "false-discovery rate" if self.method == "bh" else "chance of any false trigger"
        found = [f"{self.tested} n-grams, clusters and topics tested; {kept} held at {self.alpha:g}."]
        if not self.stratified:
            found.append("No strata: a topic that is refused because it is harmful is named like any other.")
        return found


def search_triggers(
    prompts: Any,
    refused: Any,
    *,
    strata: Any = None,
    topics: Any = None,
    embeddings: Any = None,
    clusters: int | Sequence[int] | None = None,
    ngrams: tuple[int, int] | None = (1, 3),
    min_prompts: int = 3,
    alpha: float = 0.05,
    method: Literal["bh", "holm"] = "bh",
    seed: int = 0,
) -> TriggerSearch:
    """Names the n-grams and clusters of embeddings that refused prompts have in common.

    Every candidate is chosen without looking at the refusals and tested by an exact conditional test within strata;
    candidates that could not be significant at any outcome are not tested (Tarone). Those that stay significant after
    adjustment are joined: the most significant one takes the prompts it covers, and the others must still stand out
    among the rest, so that a planted topic comes out as one trigger and not as all of its words.

    Args:
        prompts: ``(n,)`` texts that were answered before: those at risk.
        refused: ``(n,)`` true or false: newly refused.
        strata: ``(n,)`` names of strata within which prompts are compared (harmful or not, a band of harmfulness).
        topics: ``(n,)`` names, or a mapping from the name of a column to one: tested like clusters.
        embeddings: ``(n, d)`` vectors of the prompts, clustered by cosine; finds a topic in any wording.
        clusters: numbers of clusters, each a clustering of its own; by default about n/100, n/50 and n/25, from 4 to
            200.
        ngrams: lengths of n-grams of words; None for none. Words that say nothing of a topic (the, how, me) are no
            candidates alone.
        min_prompts: prompts that a candidate must be in.
        alpha: level of the adjusted p-values.
        method: ``"bh"`` (false-discovery rate; n-grams of one topic depend on each other positively) or ``"holm"``.
        seed: of the clusters.

    Raises:
        DTypeError, ShapeError, ArgumentError: columns that do not fit or an option out of range.
        DegenerateError: no candidates to test (``ngrams=None`` without embeddings and topics).

    Source: Fisher's exact test, one-sided, and Gart 1970 for strata; Tarone, 1990; Benjamini and Hochberg, 1995.
    """
    texts = as_texts(prompts, "prompts")
    n = len(texts)
    if not n:
        raise ShapeError("prompts: expected at least one prompt")
    hit = binary(refused, "refused", n).astype(bool)
    if method not in ("bh", "holm"):
        raise ArgumentError(f"method: expected 'bh' or 'holm', got {method!r}")
    if not 0 < alpha < 1:
        raise ArgumentError(f"alpha: expected a number in (0, 1), got {alpha}")
    if isinstance(min_prompts, bool) or not isinstance(min_prompts, int) or min_prompts < 1:
        raise ArgumentError(f"min_prompts: expected 1 or more, got {min_prompts!r}")
    if ngrams is None and embeddings is None and topics is None:
        raise DegenerateError("ngrams: expected n-grams, embeddings or topics to test, got none")
    stratum = np.zeros(n, dtype=np.int64) if strata is None else codes(strata, "strata", n)[0]
    parts: list[_Candidates] = []
    vocabulary = None
    if ngrams is not None:
        vocabulary = _ngrams(texts, ngrams, min_prompts)
        if vocabulary is not None:
            parts.append(vocabulary)
    if topics is not None:
        given = topics if isinstance(topics, Mapping) else {"topic": topics}
        for column, values in given.items():
            code, names = codes(values, f"topics: {column}", n)
            parts.append(_Candidates.of_codes(str(column), code, [str(name) for name in names]))
    if embeddings is not None:
        rows = matrix(embeddings, "embeddings")
        if len(rows) != n:
            raise ShapeError(f"embeddings: expected {n} rows, one per prompt, got {len(rows)}")
        for k in _cluster_counts(clusters, n):
            code = embedding_clusters(rows, k, seed=seed)
            parts.append(_Candidates.of_codes("cluster", code, [f"{c} of {k}" for c in range(k)]))
    all_of = _Candidates.join(parts)
    observed = Rate(int(hit.sum()), n)
    stratified = strata is not None
    if all_of is None or not observed.k:
        return TriggerSearch((), (), 0, observed, Rate(0, observed.k), alpha, method, stratified)
    width = int(stratum.max()) + 1
    tests = _test(all_of, hit, stratum, width, min_prompts, alpha)
    adjusted = np.ones(len(tests.p))
    if tests.tested.any():
        adjusted[tests.tested] = adjust_pvalues(tests.p[tests.tested], method)
    chosen = np.flatnonzero(tests.tested & (adjusted <= alpha))
    chosen = chosen[np.lexsort((-all_of.length[chosen], -tests.inside[chosen], tests.p[chosen]))]
    found, covered = _distinct(all_of, chosen, tests.p, hit, stratum, width, alpha)

    def trigger(c: int, related: tuple[str, ...] = ()) -> Trigger:
        has = all_of.members(c)
        inside = Rate(int(hit[has].sum()), len(has))
        outside = Rate(observed.k - inside.k, n - inside.n)
        name = all_of.names[c]
        if all_of.kinds[c] == "cluster":
            name = f"{_words(vocabulary, has, n)} (cluster {name})"
        examples = tuple(int(i) for i in has[hit[has]][:5])
        expected = float(tests.expected[c])
        return Trigger(
            all_of.kinds[c], name, inside, outside, expected, float(tests.p[c]), float(adjusted[c]), related, examples
        )

    triggers = [trigger(c, tuple(all_of.names[o] for o in others)) for c, others in found]
    return TriggerSearch(
        triggers,
        [trigger(int(c)) for c in chosen],
        int(tests.tested.sum()),
        observed,
        Rate(int((hit & covered).sum()), observed.k),
        alpha,
        method,
        stratified,
        np.flatnonzero(hit & covered),
    )


class _Candidates:
    """Sets of prompts, as columns of a sparse matrix turned around: the rows of each."""

    def __init__(self, kinds: list[str], names: list[str], starts: Ints, rows: Ints) -> None:
        self.kinds, self.names, self.starts, self.rows = kinds, names, starts, rows
        #: Words of an n-gram, to prefer the longer of two with the same prompts.
        self.length = np.array([n.count(" ") if k == "n-gram" else 0 for k, n in zip(kinds, names, strict=True)])

    def __len__(self) -> int:
        return len(self.names)

    def members(self, c: int) -> Ints:
        found: Ints = self.rows[self.starts[c] : self.starts[c + 1]]
        return found

    @classmethod
    def of_codes(cls, kind: str, code: Ints, names: list[str]) -> _Candidates:
        starts = np.concatenate([[0], np.cumsum(np.bincount(code, minlength=len(names)))])
        return cls([kind] * len(names), names, starts, np.argsort(code, kind="stable"))

    @classmethod
    def of_sparse(cls, found: SparseRows, names: list[str], keep: Any) -> _Candidates:
        column = found.indices.astype(np.int64)
        row = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
        used = keep[column]
        place = np.cumsum(keep) - 1
        column, row = place[column[used]], row[used]
        order = np.argsort(column, kind="stable")
        kept = [n for n, k in zip(names, keep, strict=True) if k]
        starts = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=len(kept)))])
        return cls(["n-gram"] * len(kept), kept, starts, row[order])

    @classmethod
    def join(cls, parts: list[_Candidates]) -> _Candidates | None:
        if not parts:
            return None
        sizes = np.concatenate([np.diff(p.starts) for p in parts])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        kinds, names = [k for p in parts for k in p.kinds], [n for p in parts for n in p.names]
        return cls(kinds, names, starts, np.concatenate([p.rows for p in parts]))


def _ngrams(texts: list[str], lengths: tuple[int, int], least: int) -> _Candidates | None:
    vectorizer = TfidfVectorizer(
        ngram_range=lengths, token_pattern=r"(?u)\b\w+\b", lookalikes=True, binary=True, use_idf=False, norm=None,
        min_df=min(least, len(texts)),
    )  # fmt: skip
    try:
        rows = vectorizer.fit_transform(texts)
    except DegenerateError:
        return None
    names = [str(name) for name in vectorizer.get_feature_names_out()]
    keep = np.array([not _PLAIN.issuperset(name.split(" ")) for name in names])
    return _Candidates.of_sparse(rows, names, keep) if keep.any() else None


@dataclass(frozen=True)
class _Tests:
    p: Floats
    expected: Floats
    inside: Ints
    tested: Any


def _margins(c: _Candidates, hit: Any, stratum: Ints, width: int) -> tuple[Ints, Ints]:
    """Members by stratum ``(m, strata)`` and refused members ``(m,)``."""
    of = np.repeat(np.arange(len(c)), np.diff(c.starts))
    drawn = np.bincount(of * width + stratum[c.rows], minlength=len(c) * width).reshape(len(c), width)
    return drawn, np.bincount(of, weights=hit[c.rows], minlength=len(c)).astype(np.int64)


def _test(c: _Candidates, hit: Any, stratum: Ints, width: int, least: int, alpha: float) -> _Tests:
    totals = np.bincount(stratum, minlength=width)
    marked = np.bincount(stratum[hit], minlength=width)
    drawn, seen = _margins(c, hit, stratum, width)
    expected = (drawn * (marked / np.maximum(totals, 1))).sum(axis=1)
    z = score(seen.astype(np.float64), totals, marked, drawn)
    size = drawn.sum(axis=1)
    tested = (size >= least) & (size < len(stratum))
    # What could not reach alpha even alone never counts; margins decide that, not outcomes.
    margins: dict[bytes, bool] = {}
    for i in np.flatnonzero(tested):
        key = drawn[i].tobytes()
        if key not in margins:
            margins[key] = best_case(totals, marked, drawn[i]) <= np.log(alpha)
        tested[i] = margins[key]
    p = np.ones(len(c))
    # Below its expectation nothing is enriched: its p-value is above a half or so, and 1 is on the safe side.
    for i in np.flatnonzero(tested & (seen > expected) & (z > 0.5)):
        p[i] = upper_tail(int(seen[i]), totals, marked, drawn[i])
    return _Tests(p, expected, seen, tested)


def _distinct(
    c: _Candidates, chosen: Ints, p: Floats, hit: Any, stratum: Ints, width: int, alpha: float
) -> tuple[list[tuple[int, list[int]]], Any]:
    """Candidates that each stand out among prompts no earlier one covers, with those they stand for."""
    covered = np.zeros(len(hit), dtype=bool)
    found: list[tuple[int, list[int]]] = []
    left = [int(i) for i in chosen]
    while left:
        best = left.pop(0)
        mine = c.members(best)
        covered[mine] = True
        found.append((best, []))
        open_rows = ~covered
        totals = np.bincount(stratum[open_rows], minlength=width)
        marked = np.bincount(stratum[open_rows & hit], minlength=width)
        still: list[tuple[float, int]] = []
        for i in left:
            rows = c.members(i)
            fresh = rows[open_rows[rows]]
            seen = int(hit[fresh].sum())
            drawn = np.bincount(stratum[fresh], minlength=width)
            value = upper_tail(seen, totals, marked, drawn) if seen else 1.0
            # The level of the most lenient one chosen: the step is a summary, the error rate was settled before.
            if value <= max(float(p[chosen[-1]]), alpha / max(len(chosen), 1)):
                still.append((value, i))
            else:
                owner = max(found, key=lambda f: len(np.intersect1d(c.members(f[0]), rows)))
                owner[1].append(i)
        left = [i for _, i in sorted(still, key=lambda s: (s[0], -c.length[s[1]]))]
    return found, covered


def _words(vocabulary: _Candidates | None, rows: Ints, n: int) -> str:
    """The words that mark a set of prompts: most frequent inside over outside, by the difference of shares."""
    if vocabulary is None:
        return f"{len(rows)} prompts"
    inside = np.zeros(n, dtype=bool)
    inside[rows] = True
    of = np.repeat(np.arange(len(vocabulary)), np.diff(vocabulary.starts))
    k = np.bincount(of, weights=inside[vocabulary.rows], minlength=len(vocabulary))
    size = np.diff(vocabulary.starts)
    gain = k / max(len(rows), 1) - (size - k) / max(n - len(rows), 1)
    gain[vocabulary.length > 0] = -1
    best = np.argsort(-gain, kind="stable")[:4]
    return ", ".join(vocabulary.names[i] for i in best)


def _cluster_counts(clusters: Any, n: int) -> list[int]:
    if clusters is None:
        return sorted({int(np.clip(n // size, 4, 200)) for size in (100, 50, 25)} & set(range(2, n + 1))) or [1]
    counts = [clusters] if not isinstance(clusters, Sequence) else list(clusters)
    for k in counts:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 2 <= k <= n:
            raise ArgumentError(f"clusters: expected whole numbers from 2 to {n}, got {k!r}")
    return [int(k) for k in counts]


def embedding_clusters(embeddings: Any, clusters: int, *, seed: int = 0, iterations: int = 25) -> Ints:
    """Spherical k-means: the cluster ``(n,)`` of each row, by cosine.

    Args:
        embeddings: ``(n, d)`` finite; rows of zeros go to the cluster that is nearest by number.
        clusters: from 1 to n. Fewer may be used where rows coincide.
        seed: of the first centres (k-means++).
        iterations: at most.

    Raises:
        ShapeError, NonFiniteError, DTypeError: not rows. ArgumentError: ``clusters`` out of range.

    Source: Dhillon and Modha, 2001; Arthur and Vassilvitskii, 2007 (first centres).
    """
    rows = matrix(embeddings.float() if is_torch(embeddings) else embeddings, "embeddings")
    n = len(rows)
    if isinstance(clusters, bool) or not 1 <= clusters <= n:
        raise ArgumentError(f"clusters: expected 1 to {n}, got {clusters!r}")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    x = rows / np.where(length > 0, length, 1.0)
    random = np.random.default_rng(seed)
    centres = np.empty((clusters, x.shape[1]))
    centres[0] = x[random.integers(n)]
    far = 1 - x @ centres[0]
    trials = 2 + int(np.log(clusters))
    for k in range(1, clusters):
        weight = np.maximum(far, 0.0)
        total = weight.sum()
        # Of a few candidates the one that leaves the rows nearest to a centre.
        drawn = random.choice(n, size=trials, p=weight / total) if total > 0 else random.integers(n, size=trials)
        reach = np.minimum(far[:, None], 1 - x @ x[drawn].T)
        best = int(reach.sum(axis=0).argmin())
        centres[k], far = x[drawn[best]], reach[:, best]
    code = np.zeros(n, dtype=np.int64)
    for step in range(iterations):
        found = (x @ centres.T).argmax(axis=1)
        if step and (found == code).all():
            break
        code = found
        order = np.argsort(code, kind="stable")
        used, first = np.unique(code[order], return_index=True)
        sums = np.zeros_like(centres)
        sums[used] = np.add.reduceat(x[order], first, axis=0)
        size = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(size > 0, sums / np.where(size > 0, size, 1.0), centres)
    return code
