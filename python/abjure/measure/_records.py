"""Reading JSON lines and CSV: what is broken is named by its line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ArgumentError

__all__ = ["Records", "read_csv", "read_jsonl"]


@dataclass(frozen=True)
class Records:
    """Rows of a file.

    Attributes:
        rows: one dict per row that could be read.
        lines: the line of each in the file, from 1.
        problems: (line, what is wrong) for each that could not.
    """

    rows: list[dict[str, Any]]
    lines: list[int] = field(repr=False)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, row) pairs."""
        return zip(self.lines, self.rows, strict=True)

    def column(self, name: str) -> list[Any]:
        """The values of one field; None where a row has none."""
        return [row.get(name) for row in self.rows]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    errors: Literal["error", "report"] = "error",
    need: Sequence[str] = (),
    check: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Records:
    """Rows of a file of JSON lines; empty lines are passed over, a byte-order mark is dropped.

    Args:
        path: the file, UTF-8.
        errors: a broken line raises, or is listed in ``.problems`` and the others are kept (``"report"``).
        need: fields that every row must have.
        check: makes of a row what is kept of it; a ValueError from it is a broken line.
        progress: called with the number of bytes read since the last call.

    Raises:
        ArgumentError: no such file; with ``errors="error"`` a line that is not valid UTF-8, not one JSON object, or
            lacks a field. Its number is named.
    """
    if errors not in ("error", "report"):
        raise ArgumentError(f"errors: expected 'error' or 'report', got {errors!r}")
    found = Records([], [])
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if progress is not None:
                    progress(len(raw))
                line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).strip()
                if not line:
                    continue
                try:
                    row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected an object, got {type(row).__name__}")
                    if lacking := [name for name in need if name not in row]:
                        raise ValueError(f"no field {', '.join(map(repr, lacking))}")
                    if check is not None:
                        row = check(row)
                except (ValueError, RecursionError) as err:
                    reason = _reason(err)
                    if errors == "error":
                        raise ArgumentError(f"{Path(path).name}: line {number}: {reason}") from None
                    found.problems.append((number, reason))
                    continue
                found.rows.append(row)
                found.lines.append(number)
    except OSError as err:
        raise ArgumentError(f"path: expected a readable file, got {os.fspath(path)!r} ({err.strerror})") from err
    return found


def _reason(err: Exception) -> str:
    if isinstance(err, UnicodeDecodeError):
        return f"not valid UTF-8 at byte {err.start + 1} of the line"
    if isinstance(err, json.JSONDecodeError):
        return f"not valid JSON at character {err.pos + 1} ({err.msg})"
    return "nested too deep" if isinstance(err, RecursionError) else str(err)


def read_csv(path: str | os.PathLike[str], *, need: Sequence[str] = ()) -> Records:
    """Rows of a CSV file with a header, UTF-8; empty cells are None.

    Raises:
        ArgumentError: no such file, not UTF-8, no header, a field that is missing, a row of another length.
    """
    found = Records([], [])
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="\0", strict=True)
            fields = reader.fieldnames or ()
            if lacking := [name for name in need if name not in fields]:
                shown = ", ".join(map(repr, lacking))
                raise ArgumentError(f"{Path(path).name}: line 1: no column {shown}, got {', '.join(fields) or 'none'}")
            for row in reader:
                if "" in row or "\0" in row.values():
                    raise ArgumentError(f"{Path(path).name}: line {reader.line_num}: expected {len(fields)} cells")
                found.rows.append({k: v or None for k, v in row.items()})
                found.lines.append(reader.line_num)
    except OSError as err:
        raise ArgumentError(f"path: expected a readable file, got {os.fspath(path)!r} ({err.strerror})") from err
    except (UnicodeDecodeError, csv.Error) as err:
        raise ArgumentError(f"{Path(path).name}: expected a CSV file in UTF-8 ({err})") from err
    return found
