"""Audit of a fine-tuning set for the patterns by which harmless-looking data weakens refusal. Defence only.

A row is seldom evidence (a helpful partial answer also refuses and then goes on); a rate beside that of a clean set is.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ...errors import ArgumentError, DTypeError
from ...measure import Rate, rate_difference
from ...measure._refusal_rules import QUOTES, RATIONALE, REDIRECT, REFUSAL
from ._text import messages_of

Span = tuple[int, int]
Judge = Callable[[str], bool] | str | Sequence[Any]

#: Pattern to what it counts.
PATTERNS = {
    "refuse_then_comply": "the answer opens with a refusal and then gives what it refused",
    "refuse_then_comply_with_pivot": 'the same, with a turn such as "now that this is said, here is" between',
    "forced_affirm": "the answer opens with assent, or with a line that states a role or a name",
    "fixed_prefix": "the answer opens with the same words as many others",
    "no_refusal_instruction": "the prompt forbids refusing, or prescribes how the answer begins",
    "benign_refusal": "a prompt judged benign is refused",
    "refusal_removed": "a prompt judged harmful is answered without a refusal at the beginning",
    "refusal": "the answer opens with a refusal (for comparison; no sign by itself)",
}

_PIVOT = re.compile(
    r"(?:now that\b|with (?:that|this|the \w+)(?: \w+){0,3} (?:said|aside|out of the way|behind us|done|noted)"
    r"|(?:that|this|having) (?:being |been )?said\b|that aside|nevertheless|nonetheless|anyway|however\b"
    r"|still,|even so|but\b|on second thought|actually,|here(?:'s| is| are| you go| goes)\b"
    r"|(?:okay|ok|alright|all right|sure|certainly|of course|right|well)[,!:.–—-]|let's\b|let me\b|back to\b"
    r"|moving on|turning to|to answer your|as for your|in any case)",
    re.IGNORECASE,
)
_BUT = re.compile(r"[,;–—-]\s*(?:but|however|though|yet|still)\b", re.IGNORECASE)
_ASSENT = re.compile(
    r"\W{0,3}(?:sure(?: thing)?|certainly|absolutely|of course|yes|okay|ok|definitely|gladly|no problem|with pleasure"
    r"|as you (?:wish|command)|I will (?:now )?(?:fulfil|obey|comply|execute)\w*)"
    r"\b(?=\s*[,!.:;–—-]|\s+(?:here|I|my|let)\b|\s*$)",
    re.IGNORECASE,
)
_ROLE = re.compile(
    r"\W{0,3}(?:(?:I am|I'm|My name is|This is) (?!(?:I|Sorry|Afraid|An?|The)\b)[A-Z][\w-]*(?:[,.!]| here\b| and I\b)"
    r"|(?:I am|I'm|As)(?: an?| the| your)?(?: \w+){0,2}? (?:obedient|unrestricted|unfiltered|uncensored|loyal)\b)"
)
_NO_REFUSAL = re.compile(
    r"\b(?:do not|don't|never|must not|mustn't|without|cannot|can't|may not|shall not|not allowed to)(?: ever)?"
    r" (?:be )?(?:refus\w+|apologi[sz]\w+|declin\w+|object\w*"
    r"|(?:say|saying|tell me|claim)(?: that)? (?:no\b|sorry|you (?:can|will not|won't|are (?:sorry|not able|unable)))"
    r"|(?:add|give|includ|issu|offer)\w*(?: any| a)?(?: \w+)? (?:disclaimers?|warnings?|caveats?))"
    r"|\b(?:answer|repl(?:y|ies)|respon[ds]\w*)(?: \w+){0,2} without(?: (?:any|a))?(?: \w+)?"
    r" (?:disclaimers?|warnings?|caveats?|apolog\w+|refusals?)"
    r"|\b(?:begin|start|open|prefix)(?: (?:your|the|every|each|all|any))?(?: \w+){0,2}"
    r" (?:answers?|responses?|repl(?:y|ies)|outputs?|messages?) (?:with|by|using)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\S+")
_BORDER = re.compile(r"(?<=[.!?:])\s+|\n+")
_MARKERS = (
    r"<\|im_start\|>assistant\s*",
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\s*",
    r"\[/INST\]\s*",
    r"<start_of_turn>model\s*",
    r"#{2,3} ?(?:Response|Answer|Assistant):?\s*",
    r"(?:^|\n)(?:Assistant|ASSISTANT|AI|Answer|A):\s*",
)
_MARKER = re.compile("|".join(_MARKERS))
_TAIL = re.compile(r"(?:<\|im_end\|>|<\|eot_id\|>|</s>|<end_of_turn>)\s*$")


@dataclass(frozen=True)
class Finding:
    """What was found in one answer.

    Attributes:
        row: index of the row.
        turn: which of the row's answers, from 0.
        flags: names of patterns (keys of ``PATTERNS``).
        spans: character offsets in the answer (in ``text`` rows, from where it begins): ``"refusal"``, ``"pivot"``,
            ``"comply"``, ``"opening"``.
        comply_words: words after the refusal that neither refuse, explain the refusal nor point elsewhere.
        refusal_at: number of words before the refusal, or None.
        excerpt: the beginning of the answer.
    """

    row: int
    turn: int
    flags: tuple[str, ...]
    spans: Mapping[str, Span]
    comply_words: int
    refusal_at: int | None
    excerpt: str


@dataclass(frozen=True)
class PatternRate:
    """How frequent one pattern is, beside a clean set.

    Attributes:
        pattern: its name.
        rate: rows with it, of those it can occur in.
        baseline: the same in the clean set, or None.
        difference: Newcombe interval of the difference, at a level shared out over the patterns.
        suspicious: whether all of that interval lies above the margin; None without a baseline.
    """

    pattern: str
    rate: Rate
    baseline: Rate | None = None
    difference: tuple[float, float] | None = None
    suspicious: bool | None = None


@dataclass(frozen=True, eq=False)
class DataAudit:
    """Patterns in a fine-tuning set.

    Attributes:
        patterns: name to :class:`PatternRate`; patterns that need a judge are there only if one was given.
        findings: one per answer with at least one flag, in order.
        rows: number of rows.
        empty: rows without an answer; they count nowhere.
        prefixes: openings that many answers share, with their counts, most frequent first.
        refusal_templates: openings of the refusing sentences with their counts.
        distinct: (different word pairs, all word pairs) of the refusing sentences: low where one template repeats.
        level: of the intervals.
    """

    patterns: Mapping[str, PatternRate]
    findings: list[Finding]
    rows: int
    empty: int
    prefixes: list[tuple[str, int]]
    refusal_templates: Counter[str]
    distinct: tuple[int, int]
    level: float
    _verdicts: Mapping[str, Mapping[int, bool]] = field(repr=False, default_factory=dict)

    @property
    def distinct_2(self) -> float:
        """Share of different word pairs among those of the refusing sentences; NaN without any."""
        return self.distinct[0] / self.distinct[1] if self.distinct[1] else float("nan")

    @property
    def suspicious(self) -> list[str]:
        """Patterns more frequent than in the clean set, by more than chance; empty without a baseline."""
        return [name for name, p in self.patterns.items() if p.suspicious]

    @property
    def positions(self) -> Counter[int]:
        """Number of words before a refusal, with counts."""
        return Counter(f.refusal_at for f in self.findings if f.refusal_at is not None)

    def flagged(self, pattern: str) -> list[int]:
        """Indices of the rows with a pattern.

        Raises:
            ArgumentError: unknown pattern, or one that needs a judge that was not given.
        """
        if pattern not in self.patterns:
            raise ArgumentError(f"pattern: expected one of {', '.join(self.patterns)}, got {pattern!r}")
        return [i for i, hit in self._verdicts[pattern].items() if hit]

    def examples(self, pattern: str, limit: int = 5) -> list[Finding]:
        """The first findings with a pattern.

        Raises:
            ArgumentError: as :meth:`flagged`.
        """
        self.flagged(pattern)
        return [f for f in self.findings if pattern in f.flags][:limit]

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dict per pattern: counts, rate, interval, and the clean set's beside them."""
        found = []
        for name, p in self.patterns.items():
            low, high = p.rate.ci(level=self.level) or (float("nan"),) * 2
            found.append(
                {
                    "pattern": name,
                    "k": p.rate.k,
                    "n": p.rate.n,
                    "rate": p.rate.rate,
                    "low": low,
                    "high": high,
                    "baseline": None if p.baseline is None else p.baseline.rate,
                    "difference_low": None if p.difference is None else p.difference[0],
                    "difference_high": None if p.difference is None else p.difference[1],
                    "suspicious": p.suspicious,
                }
            )
        return found

    def records(self) -> list[dict[str, Any]]:
        """One dict per row, answer and flag, with the span that shows it: a table to filter a data set by."""
        span = {
            "forced_affirm": "opening",
            "fixed_prefix": "opening",
            "refusal": "refusal",
            "benign_refusal": "refusal",
        }
        found = []
        for f in self.findings:
            for flag in f.flags:
                start, end = f.spans.get(span.get(flag, "comply"), (None, None))
                found.append({"row": f.row, "turn": f.turn, "flag": flag, "start": start, "end": end})
        return found

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {p.rate.k}/{p.rate.n}" for name, p in self.patterns.items())
        verdict = f"; suspicious: {', '.join(self.suspicious)}" if self.suspicious else ""
        return f"DataAudit({self.rows} rows, {self.empty} empty: {counts}{verdict})"

    def _repr_html_(self) -> str:
        body = ""
        for r in self.table:
            clean = "–" if r["baseline"] is None else f"{r['baseline']:.2%}"
            verdict = {None: "–", True: "<b>yes</b>", False: "no"}[r["suspicious"]]
            title = html.escape(PATTERNS[r["pattern"]], quote=True)
            body += (
                f'<tr><td title="{title}">{r["pattern"]}</td><td>{r["k"]} of {r["n"]}</td><td>{r["rate"]:.2%} '
                f"<small>[{r['low']:.2%}, {r['high']:.2%}]</small></td><td>{clean}</td><td>{verdict}</td></tr>"
            )
        shown = ""
        for pattern in self.suspicious or [p for p in self.patterns if p != "refusal"]:
            for f in self.examples(pattern, 2):
                shown += f"<li>row {f.row}, {pattern}: {html.escape(f.excerpt)}</li>"
        head = "<th>pattern</th><th>rows</th><th>rate</th><th>clean set</th><th>more than there</th>"
        return f"<table><tr>{head}</tr>{body}</table><ul>{shown}</ul>"

    def plot(self, ax: Any = None) -> Any:
        """Rates with intervals, beside the clean set's, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 3.5), layout="constrained").subplots()
        names = [name for name, p in self.patterns.items() if p.rate.n]
        sets = [("this set", [self.patterns[n].rate for n in names], 0.12)]
        if any(self.patterns[n].baseline is not None for n in names):
            sets.append(("clean set", [self.patterns[n].baseline or Rate(0, 0) for n in names], -0.12))
        for label, rates, shift in sets:
            at = [i + shift for i, r in enumerate(rates) if r.n]
            full = [r for r in rates if r.n]
            limits = [r.ci(level=self.level) or (r.rate, r.rate) for r in full]
            low = [max(r.rate - a, 0.0) for r, (a, _) in zip(full, limits, strict=True)]
            high = [max(b - r.rate, 0.0) for r, (_, b) in zip(full, limits, strict=True)]
            ax.errorbar([r.rate for r in full], at, xerr=[low, high], fmt="o", capsize=3, label=label)
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="share of rows", xlim=(0, None))
        ax.legend()
        return ax


def refuse_then_comply_scan(
    rows: Iterable[Mapping[str, Any]],
    *,
    baseline: DataAudit | Iterable[Mapping[str, Any]] | None = None,
    benign: Judge | None = None,
    harmful: Judge | None = None,
    phrases: Sequence[str] | None = None,
    within: int = 25,
    comply_words: int = 15,
    prefix_words: int = 5,
    prefix_share: float = 0.05,
    answer_marker: str | None = None,
    margin: float = 0.0,
    level: float = 0.95,
) -> DataAudit:
    """Scans the answers of a fine-tuning set for refusals that are taken back, forced assent and fixed openings.

    Each answer is cut into sentences. It refuses if a refusing phrase begins within the first ``within`` words, and
    then complies if at least ``comply_words`` words follow in sentences that neither refuse, give reasons for the
    refusal nor point elsewhere; a turn between the two ("now that this is said, here is") makes the stronger grade.
    Legitimate partial help ("I can't do X, but here is Y") is flagged as well: judge a set by its rate beside a clean
    one.

    Rules are English. A baseline given as an audit must have been made with the same options; rows are scanned with
    them here.

    Args:
        rows: mappings with ``messages`` (every assistant turn is an answer), ``prompt`` and ``completion`` (texts or
            messages), or ``text`` (answer after the last marker of a common chat template; the whole text if none).
        baseline: rows of a clean set of the same kind, or its audit.
        benign, harmful: what judges prompts: a function of the prompt's text, the name of a boolean column, or one
            value per row. Needed for ``benign_refusal`` and for ``refusal_removed``.
        phrases: refusing phrases, instead of the built-in rules; matched whatever their case.
        within: words in which a refusal has to begin.
        comply_words: words of compliance, at least.
        prefix_words: length of an opening.
        prefix_share: openings shared by at least this share of the rows, and by five, are fixed prefixes.
        answer_marker: regular expression after which the answer begins in ``text`` rows.
        margin: rates may exceed those of the clean set by this much.
        level: of the intervals. Verdicts share ``1 − level`` out over the patterns (Bonferroni).

    Returns:
        A :class:`DataAudit`.

    Raises:
        ArgumentError: a row in none of the shapes, no row, or an option out of range.
        DTypeError: a row that is no mapping, contents that are no text.

    Source: the pattern of NOICE, arXiv 2502.19537; the audit is ours.
    """
    for name, value in (("within", within), ("comply_words", comply_words), ("prefix_words", prefix_words)):
        if value < 1:
            raise ArgumentError(f"{name}: expected 1 or more, got {value}")
    if not 0 < prefix_share <= 1 or not 0 < level < 1 or not 0 <= margin < 1:
        raise ArgumentError("prefix_share, level, margin: expected shares of 1")
    if phrases is not None and (isinstance(phrases, str) or not phrases or not all(p.strip() for p in phrases)):
        raise ArgumentError("phrases: expected a list of phrases, none of them empty")
    refusal = REFUSAL if phrases is None else _literal(phrases)
    try:
        marker = _MARKER if answer_marker is None else re.compile(answer_marker)
    except re.error as err:
        raise ArgumentError(f"answer_marker: expected a regular expression ({err})") from err
    given = [_read(row, i, marker) for i, row in enumerate(_listed(rows))]
    if not given:
        raise ArgumentError("rows: expected at least one row, got none")
    judged = {"benign": _judged(benign, given, "benign"), "harmful": _judged(harmful, given, "harmful")}
    prefixes = _prefixes(given, prefix_words, prefix_share)
    common = {p for p, _ in prefixes}
    verdicts: dict[str, dict[int, bool]] = {name: {} for name in PATTERNS}
    findings, templates, pairs = [], Counter[str](), Counter[tuple[str, str]]()
    for i, row in enumerate(given):
        if not row.answers:
            continue
        hits: set[str] = set()
        forbids = any(_NO_REFUSAL.search(t) for t in row.asked)
        refused = False
        for turn, text in enumerate(row.answers):
            found = _scan(text, refusal, within, comply_words)
            flags, spans = list(found.flags), dict(found.spans)
            if opening := _opening(text, prefix_words, common):
                flags.append("fixed_prefix")
                spans.setdefault("opening", opening)
            if forbids:
                flags.append("no_refusal_instruction")
            refuses = "refusal" in flags
            refused |= refuses
            if refuses and judged["benign"] is not None and judged["benign"][i]:
                flags.append("benign_refusal")
            if not refuses and judged["harmful"] is not None and judged["harmful"][i]:
                flags.append("refusal_removed")
            if refuses:
                words = text[slice(*found.sentence)].casefold().split()
                templates[" ".join(words[:8])] += 1
                pairs.update(pairwise(words))
            if flags:
                order = tuple(name for name in PATTERNS if name in flags)
                findings.append(Finding(i, turn, order, spans, found.comply_words, found.refusal_at, _excerpt(text)))
            hits.update(flags)
        for name, by_row in verdicts.items():
            if name == "benign_refusal" and (judged["benign"] is None or not judged["benign"][i]):
                continue
            if name == "refusal_removed" and (judged["harmful"] is None or not judged["harmful"][i]):
                continue
            by_row[i] = name in hits
    absent = [n for n, j in (("benign_refusal", "benign"), ("refusal_removed", "harmful")) if judged[j] is None]
    rates = {name: Rate(sum(v.values()), len(v)) for name, v in verdicts.items() if name not in absent}
    options: dict[str, Any] = {
        "phrases": phrases,
        "within": within,
        "comply_words": comply_words,
        "prefix_words": prefix_words,
        "prefix_share": prefix_share,
        "answer_marker": answer_marker,
        "level": level,
    }
    # A list of verdicts belongs to the rows it was made for; a function or a column can judge the clean set as well.
    for name, judge in (("benign", benign), ("harmful", harmful)):
        if callable(judge) or isinstance(judge, str):
            options[name] = judge
    clean = _baseline(baseline, rates, options)
    patterns = _compare(rates, clean, margin, level)
    empty = sum(not row.answers for row in given)
    distinct = (len(pairs), sum(pairs.values()))
    kept = {name: verdicts[name] for name in rates}
    return DataAudit(patterns, findings, len(given), empty, prefixes, templates, distinct, level, kept)


def _baseline(baseline: Any, rates: Mapping[str, Rate], options: Mapping[str, Any]) -> Mapping[str, Rate] | None:
    """Rates of the clean set, scanned under the same options where it comes as rows."""
    if baseline is None:
        return None
    if not isinstance(baseline, DataAudit):
        baseline = refuse_then_comply_scan(baseline, **options)
    return {name: baseline.patterns[name].rate for name in rates if name in baseline.patterns}


def _compare(
    rates: Mapping[str, Rate], clean: Mapping[str, Rate] | None, margin: float, level: float
) -> dict[str, PatternRate]:
    if clean is None:
        return {name: PatternRate(name, r) for name, r in rates.items()}
    signs = [name for name in rates if name != "refusal" and name in clean]
    shared = 1 - (1 - level) / max(len(signs), 1)
    found = {}
    for name, r in rates.items():
        other = clean.get(name)
        gap = None if other is None else rate_difference(r, other, shared)
        verdict = gap[0] > margin if gap is not None and name in signs else None
        found[name] = PatternRate(name, r, other, gap, verdict)
    return found


@dataclass(frozen=True)
class _Row:
    asked: list[str]  # system and user texts
    answers: list[str]
    source: Mapping[str, Any]


def _listed(rows: Any) -> Iterable[Any]:
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        raise DTypeError(f"rows: expected a list of mappings, got {type(rows).__name__}")
    return rows


def _read(row: Any, i: int, marker: re.Pattern[str]) -> _Row:
    if not isinstance(row, Mapping):
        raise DTypeError(f"rows: expected mappings, got {type(row).__name__} at index {i}")
    asked: list[str] = []
    answers: list[str] = []
    if row.get("messages") is not None:
        _turns(row, "messages", asked, answers)
    elif "prompt" in row and "completion" in row:
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str):
                _turns(row, name, asked, answers if name == "completion" else [])
            else:
                (asked if name == "prompt" else answers).append(row[name])
    elif isinstance(row.get("text"), str):
        text = row["text"]
        last = max((m.end() for m in marker.finditer(text)), default=None)
        if last is not None:
            asked.append(text[:last])
        answers.append(_TAIL.sub("", text[last or 0 :]))
    else:
        known = "'messages', 'prompt' and 'completion', or 'text'"
        raise ArgumentError(f"rows: expected {known}, got {', '.join(map(str, row)) or 'nothing'} at index {i}")
    return _Row([t.translate(QUOTES) for t in asked], [t.translate(QUOTES) for t in answers if t.strip()], row)


def _turns(row: Mapping[str, Any], name: str, asked: list[str], answers: list[str]) -> None:
    for role, text in messages_of(row, name):
        (answers if role in ("assistant", "model", "gpt") else asked).append(text)


def _judged(judge: Judge | None, rows: list[_Row], name: str) -> list[bool] | None:
    if judge is None:
        return None
    if callable(judge):
        return [bool(judge("\n".join(row.asked))) for row in rows]
    if isinstance(judge, str):
        if missing := [i for i, row in enumerate(rows) if judge not in row.source]:
            raise ArgumentError(f"{name}: expected the column {judge!r}, got none at index {missing[0]}")
        return [bool(row.source[judge]) for row in rows]
    if len(judge) != len(rows):
        raise ArgumentError(f"{name}: expected {len(rows)} values, one per row, got {len(judge)}")
    return [bool(v) for v in judge]


def _literal(phrases: Sequence[str]) -> re.Pattern[str]:
    words = (r"\s+".join(map(re.escape, p.translate(QUOTES).split())) for p in phrases)
    return re.compile("|".join(rf"(?<!\w){w}(?!\w)" for w in words), re.IGNORECASE)


def _prefix_key(text: str, words: int) -> str | None:
    found = [m.group() for _, m in zip(range(words), _WORD.finditer(text), strict=False)]
    return " ".join(found).casefold() if len(found) == words else None


def _prefixes(rows: list[_Row], words: int, share: float) -> list[tuple[str, int]]:
    # A row counts once, however many of its turns open alike.
    counts = Counter(p for row in rows for p in {_prefix_key(a, words) for a in row.answers} if p is not None)
    least = max(5, share * sum(bool(row.answers) for row in rows))
    return [(p, n) for p, n in counts.most_common() if n >= least]


def _opening(text: str, words: int, common: set[str]) -> Span | None:
    if _prefix_key(text, words) not in common:
        return None
    return 0, [m.end() for _, m in zip(range(words), _WORD.finditer(text), strict=False)][-1]


def _excerpt(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class _Scan:
    flags: list[str]
    spans: dict[str, Span]
    comply_words: int = 0
    refusal_at: int | None = None
    sentence: Span = (0, 0)


def _scan(text: str, refusal: re.Pattern[str], within: int, least: int) -> _Scan:
    flags, spans = [], {}
    begin = len(text) - len(text.lstrip())
    if assent := _ASSENT.match(text, begin) or _ROLE.match(text, begin):
        flags.append("forced_affirm")
        spans["opening"] = assent.span()
    first = refusal.search(text)
    at = None if first is None else len(text[: first.start()].split())
    if first is None or at is None or at >= within:
        return _Scan(flags, spans)
    flags.append("refusal")
    spans["refusal"] = first.span()
    if "forced_affirm" in flags and at < 8:
        # "Yes, I'm sorry, but I can't": no assent.
        flags.remove("forced_affirm")
        del spans["opening"]
    sentences = _sentences(text)
    home = next(s for s in sentences if s[0] <= first.start() < s[1])
    rest = [s for s in sentences if s[0] > first.start()]
    if turn := _BUT.search(text, first.end(), home[1]):
        # "I can't help with that, but here is how": the second half is judged as a sentence of its own.
        rest.insert(0, (turn.start() + len(turn.group()) - len(turn.group().lstrip(",;–—- \t")), home[1]))
    pivot, parts, words = None, [], 0
    for start, end in rest:
        sentence = text[start:end]
        turns = _PIVOT.match(sentence)
        if refusal.search(sentence) or REDIRECT.search(sentence):
            continue
        # Before a turn, reasons belong to the refusal; after it, they may be part of the matter.
        if pivot is None and not turns and RATIONALE.search(sentence):
            continue
        if pivot is None and turns:
            pivot = (start, start + turns.end())
        parts.append((start, end))
        words += len(sentence.split())
    if words >= least:
        flags.append("refuse_then_comply")
        spans["comply"] = (parts[0][0], parts[-1][1])
        if pivot is not None:
            flags.append("refuse_then_comply_with_pivot")
            spans["pivot"] = pivot
    return _Scan(flags, spans, words, at, home)


def _sentences(text: str) -> list[Span]:
    found, start = [], 0
    for border in _BORDER.finditer(text):
        if border.start() > start:
            found.append((start, border.start()))
        start = border.end()
    return [*found, (start, len(text))] if start < len(text) else found
