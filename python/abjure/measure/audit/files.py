"""Audits of files: what ``abjure audit refusals`` and ``abjure audit dataset`` do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...errors import ArgumentError
from .._records import Records, read_jsonl
from ..card import DatasetCard
from ..report import Report
from ..responses import _SAFE, _UNSAFE
from .finetuning import FinetuningScan, scan_finetuning_set
from .shift import RefusalShift, refusal_shift

__all__ = ["audit_dataset", "audit_refusals"]


def audit_refusals(
    reference: str | os.PathLike[str],
    suspect: str | os.PathLike[str],
    *,
    prompt: str = "prompt",
    response: str = "response",
    refused: str | None = None,
    key: str | None = None,
    groups: Sequence[str] = (),
    label: str | None = None,
    lists: Sequence[str] = ("refusal_direction",),
    search: bool = True,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    title: str | None = None,
    card: DatasetCard | None = None,
) -> tuple[Report, RefusalShift]:
    """:func:`refusal_shift` of two files of JSON lines, matched by prompt.

    Args:
        reference, suspect: one JSON object per line, UTF-8; a line of one for every line of the other, in any order.
        prompt: field of the prompt. response: of the response; null is no response.
        refused: field with verdicts (true, false, null) to use instead of phrases.
        key: field to match lines by, where prompts repeat; the prompt if None.
        groups: fields of the reference's lines to group by; null is a group of its own.
        label: field of the reference's lines that says whether the prompt should be refused.
        lists: phrases of refusal. search: also look for unknown triggers.
        resamples, level, seed: as in :func:`refusal_shift`.
        title: of the report. card: noted in the report's settings.

    Raises:
        ArgumentError: a file that cannot be read or has a broken line (its number is named), a prompt that one file
            lacks or has twice.
        DegenerateError: a field with a single group, or no prompt with a verdict of both.
    """
    name = key or prompt
    need = list(dict.fromkeys([prompt, name, refused or response]))
    first, second = _keyed(reference, name, [*need, *groups, *([label] if label else [])]), _keyed(suspect, name, need)
    lacking, extra = first.keys() - second.keys(), second.keys() - first.keys()
    if lacking or extra:
        example = next(iter(sorted(map(str, lacking or extra))))
        raise ArgumentError(
            f"suspect: expected a line for each of the reference's {name!r}, got {len(lacking)} without one and "
            f"{len(extra)} of other prompts, such as {example!r:.80}"
        )
    rows = list(first.values())
    others = [second[k] for k in first]
    verdict = refused or response
    for row, which in [(r, reference) for r in rows] + [(r, suspect) for r in others]:
        _check_verdict(row[verdict], refused is not None, Path(which).name)
    columns = {field: [_group(row[field]) for row in rows] for field in groups}
    labels = None if label is None else [_harmful(row[label], label) for row in rows]
    texts = [str(row[prompt]) for row in rows]
    found = refusal_shift(
        [r[verdict] for r in rows], [r[verdict] for r in others], texts, columns or None, labels=labels,
        lists=list(lists), invalid="exclude", search=search, resamples=resamples, level=level, seed=seed,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "reference": Path(reference).name, "suspect": Path(suspect).name, "prompts": len(rows), "groups": list(groups),
        "verdicts": refused or f"phrases of {', '.join(lists)}", "resamples": resamples, "seed": seed,
    }  # fmt: skip
    report = Report(title or f"Refusals of {Path(suspect).name} beside {Path(reference).name}", settings)
    flagged = found.flagged()
    report.add(
        "Flagged groups",
        {
            f"{column}: {s.name}": f"{s.reference.k} to {s.suspect.k} of {s.counts.n}, Holm p {s.holm:.3g}"
            for column, s in flagged
        }
        or {"groups whose rate rose (Holm, 0.05)": 0},
    )
    report.add("Change of refusals", found)
    if found.triggers is not None:
        report.add("Triggers", found.triggers, "what newly refused prompts have in common")
    if card is not None:
        card.stamp(report)
    return report, found


def audit_dataset(
    path: str | os.PathLike[str],
    *,
    prompt: str = "prompt",
    response: str = "response",
    messages: str = "messages",
    harmfulness: str | None = None,
    topics: Sequence[str] = (),
    lists: Sequence[str] = ("refusal_direction",),
    bands: int = 10,
    alpha: float = 0.05,
    method: Literal["bh", "holm"] = "bh",
    title: str | None = None,
    card: DatasetCard | None = None,
) -> tuple[Report, FinetuningScan]:
    """:func:`scan_finetuning_set` of a file of JSON lines.

    Args:
        path: one JSON object per line, with the fields ``prompt`` and ``response``, or with ``messages``: a list of
            ``{"role", "content"}``, of which the first of the user and the next of the assistant count.
        harmfulness: field of the prompt's harmfulness: a number, true or false, or a word (harmful, benign …).
        topics: fields to test as topics.
        lists, bands, alpha, method: as in :func:`scan_finetuning_set`.
        title: of the report. card: noted in the report's settings.

    Raises:
        ArgumentError: a file that cannot be read, or a broken line (its number is named).
    """
    found = read_jsonl(path, need=[*topics, *([harmfulness] if harmfulness else [])])
    if not found.rows:
        raise ArgumentError(f"{Path(path).name}: expected at least one line, got none")
    pairs = [_pair(row, prompt, response, messages, f"{Path(path).name}: line {n}") for n, row in found.numbered()]
    harm = None
    if harmfulness is not None:
        harm = [_score(row[harmfulness], f"{Path(path).name}: line {n}: {harmfulness}") for n, row in found.numbered()]
    scan = scan_finetuning_set(
        [p for p, _ in pairs], [r for _, r in pairs], harmfulness=harm, bands=bands,
        topics={t: [_group(row[t]) for row in found.rows] for t in topics} or None, lists=list(lists), alpha=alpha,
        method=method,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "file": Path(path).name, "lines": len(found), "harmfulness": harmfulness, "topics": list(topics),
        "lists": list(lists), "alpha": alpha, "method": method,
    }  # fmt: skip
    report = Report(title or f"Refusals in the training data {Path(path).name}", settings)
    report.add("Refusals and topics", scan)
    if scan.suspects:
        shown = {f"line {found.lines[i]}": pairs[i][0][:200] for i in scan.suspects[:50]}
        report.add(
            "Lines to read", shown, f"{len(scan.suspects)} refusals that a topic covers; the first 50 are listed"
        )
    if card is not None:
        card.stamp(report)
    return report, scan


def _keyed(path: str | os.PathLike[str], name: str, need: Sequence[str]) -> dict[Any, dict[str, Any]]:
    found: Records = read_jsonl(path, need=need)
    if not found.rows:
        raise ArgumentError(f"{Path(path).name}: expected at least one line, got none")
    rows: dict[Any, dict[str, Any]] = {}
    for line, row in found.numbered():
        value = row[name]
        if isinstance(value, (dict, list)) or value is None:
            raise ArgumentError(f"{Path(path).name}: line {line}: {name}: expected text, got {type(value).__name__}")
        if value in rows:
            raise ArgumentError(f"{Path(path).name}: line {line}: {name}: expected different ones, got one twice")
        rows[value] = row
    return rows


def _check_verdict(value: Any, judged: bool, name: str) -> None:
    if judged and value is not None and value not in (0, 1):
        raise ArgumentError(f"{name}: expected verdicts of true, false or null, got {value!r:.60}")
    if not judged and value is not None and not isinstance(value, str):
        raise ArgumentError(f"{name}: expected responses of text or null, got {type(value).__name__}")


def _group(value: Any) -> str:
    return "(none)" if value is None else str(value)


def _harmful(value: Any, field: str) -> bool:
    word = str(value).strip().lower()
    if word not in _UNSAFE + _SAFE:
        raise ArgumentError(f"{field}: expected whether the prompt should be refused, got {value!r:.60}")
    return word in _UNSAFE


def _score(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return float(_harmful(value, where))


def _pair(row: Mapping[str, Any], prompt: str, response: str, messages: str, where: str) -> tuple[str, str | None]:
    if prompt in row or response in row:
        if prompt not in row or response not in row:
            raise ArgumentError(f"{where}: no field {(response if prompt in row else prompt)!r}")
        said, answer = row[prompt], row[response]
    else:
        turns = row.get(messages)
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise ArgumentError(f"{where}: expected the fields {prompt!r} and {response!r}, or a list {messages!r}")
        user = next((i for i, t in enumerate(turns) if t.get("role") == "user"), None)
        later = [] if user is None else [t for t in turns[user + 1 :] if t.get("role") == "assistant"]
        if user is None:
            raise ArgumentError(f"{where}: {messages}: expected a message of the user")
        said, answer = turns[user].get("content"), later[0].get("content") if later else None
    if not isinstance(said, str) or not (answer is None or isinstance(answer, str)):
        raise ArgumentError(f"{where}: expected a prompt of text and a response of text or null")
    return said, answer
