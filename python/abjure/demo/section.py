"""What a part of the demo hands back: one content, shown both in the terminal and on the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table of finished cells. ``prose`` columns hold sentences: aligned left and wrapped."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    prose: tuple[int, ...] = (0,)
    #: Index of a row to be read first, if any.
    accent: int | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG for the page."""

    png: bytes
    caption: str


@dataclass
class Section:
    """One part: its question, its answer in a sentence or two, its tables and pictures, and every number."""

    name: str
    title: str
    lead: str
    findings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    #: Why the part did not run; empty when it ran.
    skipped: str = ""
