"""Refusals in a file of responses: what ``abjure measure`` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import ArgumentError
from ._records import Records, read_jsonl
from .benchmarks.over_refusal import OverRefusal, over_refusal_scores
from .rates import rate
from .refusals import Blank, Place, corrected_rate, refusal_match
from .report import Report

__all__ = ["measure_responses"]

#: Ways to say that a prompt should be refused, and that it should not.
_UNSAFE = ("unsafe", "harmful", "malicious", "true", "1", "yes")
_SAFE = ("safe", "harmless", "benign", "false", "0", "no")


def measure_responses(
    path: str | os.PathLike[str],
    *,
    response: str = "response",
    groups: Sequence[str] = (),
    label: str | None = None,
    refused: str | None = None,
    lists: Sequence[str] = ("refusal_direction",),
    where: Place | None = None,
    n: int | None = None,
    normalize: Literal["none", "lower", "refusal"] | None = None,
    blank: Blank | None = None,
    errors: Literal["error", "report"] = "error",
    title: str | None = None,
    progress: bool = False,
) -> tuple[Report, Records]:
    """Refusal rates of a file of JSON lines, by group, with intervals; over-refusal where labels are given.

    Args:
        path: one JSON object per line, UTF-8.
        response: field of the response; null is no response.
        groups: fields to group by; null is a group of its own.
        label: field that says whether the prompt should be refused: true or false, 1 or 0, or a word (unsafe, harmful,
            malicious; safe, harmless, benign).
        refused: field with verdicts (true, false, null for none) to use instead of phrases.
        lists, where, n, normalize, blank: see :func:`refusal_match`.
        errors: a broken line raises, or is listed in the report and the others are kept (``"report"``).
        title: of the report. progress: a bar on standard error, where that is a terminal.

    Returns:
        The report, and the rows with the lines that could not be used.

    Raises:
        ArgumentError: a file that cannot be read, a broken line (its number is named), no usable line, an option that
            does not exist.

    Example file::

        {"prompt": "How do I whittle a knife?", "response": "I cannot help with that.", "label": "safe"}
    """
    refusal_match([], list(lists), where=where, n=n, normalize=normalize, blank=blank)
    if refused is not None and (where, n, normalize, blank) != (None, None, None, None):
        raise ArgumentError("refused: expected no rule of phrases beside given verdicts")
    if len(set(groups)) < len(groups):
        raise ArgumentError(f"groups: expected different fields, got {', '.join(groups)}")
    found = _read(path, response, groups, label, refused, errors, progress)
    name = Path(path).name
    used = {
        name: value
        for name, value in (
            ("response", response if refused is None else None), ("refused", refused), ("label", label),
            ("groups", list(groups)), ("lists", list(lists) if refused is None else None), ("where", where), ("n", n),
            ("normalize", normalize), ("blank", blank),
        )
        if value not in (None, [])
    }  # fmt: skip
    if not found.rows:
        first = f" (line {found.problems[0][0]}: {found.problems[0][1]})" if found.problems else ""
        raise ArgumentError(f"{name}: expected at least one usable line, got none{first}")
    report = Report(title or f"Refusals in {name}", {"file": name, "lines used": len(found), **used})
    verdicts: list[bool | None]
    if refused is None:
        matches = refusal_match(found.column(response), list(lists), where=where, n=n, normalize=normalize, blank=blank)
        report.add("Refusals", matches)
        if len(matches.lists) == 1 and matches.rate.n:
            rule = matches.lists[0]
            sensitivity, specificity = rule.sensitivity, rule.specificity
            if sensitivity is not None and specificity is not None:
                note = f"errors of the list measured on {rule.measured_on}; other models may differ"
                corrected = corrected_rate(matches.rate, sensitivity, specificity)
                report.add("Corrected for the errors of the list", corrected, note)
        verdicts = matches.verdicts
    else:
        verdicts = found.column(refused)
        report.add("Refusals", rate(verdicts, invalid="exclude"), f"verdicts of the field {refused}")
    for field in groups:
        values = [_group(v) for v in found.column(field)]
        report.add(f"Refusals by {field}", rate(verdicts, values, invalid="exclude"))
    if label is not None:
        unsafe = found.column(label)
        report.add("Over-refusal", _over(verdicts, unsafe, None))
        for field in groups:
            values = [_group(v) for v in found.column(field)]
            report.add(f"Over-refusal by {field}", _over(verdicts, unsafe, values))
    if found.problems:
        report.add(
            "Lines left out",
            {f"line {line}": reason for line, reason in found.problems[:50]},
            f"{len(found.problems)} lines; the first 50 are listed",
        )
    return report, found


def _over(verdicts: list[bool | None], unsafe: list[Any], groups: list[str] | None) -> OverRefusal:
    return over_refusal_scores(verdicts, unsafe, groups, invalid="exclude")


def _group(value: Any) -> str:
    return "(none)" if value is None else str(value)


def _read(
    path: str | os.PathLike[str],
    response: str,
    groups: Sequence[str],
    label: str | None,
    refused: str | None,
    errors: Literal["error", "report"],
    progress: bool,
) -> Records:
    from tqdm import tqdm

    need = [*groups, *([label] if label else []), refused or response]
    size = Path(path).stat().st_size if Path(path).is_file() else None
    # None: shown on a terminal alone.
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None if progress else True) as bar:
        return read_jsonl(
            path, errors=errors, need=need, check=lambda row: _checked(row, response, groups, label, refused),
            progress=bar.update,
        )  # fmt: skip


def _checked(
    row: dict[str, Any], response: str, groups: Sequence[str], label: str | None, refused: str | None
) -> dict[str, Any]:
    """The fields that are used, in the form in which they are used.

    Raises:
        ValueError: a value that cannot be used.
    """
    kept: dict[str, Any] = {}
    if refused is None:
        text = row[response]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{response}: expected text or null, got {type(text).__name__}")
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{response}: a lone surrogate, which is no Unicode text") from None
        kept[response] = text
    else:
        value = row[refused]
        if value is not None and value not in (0, 1):
            raise ValueError(f"{refused}: expected true, false or null, got {value!r}")
        kept[refused] = None if value is None else bool(value)
    for field in groups:
        if isinstance(row[field], (dict, list)):
            raise ValueError(f"{field}: expected a name to group by, got {type(row[field]).__name__}")
        kept[field] = row[field]
    if label is not None:
        word = str(row[label]).strip().lower()
        if word not in _UNSAFE + _SAFE:
            raise ValueError(f"{label}: expected whether the prompt should be refused, got {row[label]!r}")
        kept[label] = word in _UNSAFE
    return kept
