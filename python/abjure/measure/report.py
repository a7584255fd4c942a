"""Results gathered into one page: Markdown, HTML with pictures, JSON. The same results give the same bytes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .._files import write_atomically
from ..errors import ArgumentError, DTypeError
from ._scores import Estimate, Row, Scores, decimal_places, shown_cells
from .rates import Rate
from .refusals import CorrectedRate, RefusalMatches

__all__ = ["Report"]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2330}"
    "table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;margin:.5rem 0}"
    "th,td{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid #e3e7ee}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%;height:auto}"
    ".note,footer,caption{color:#5a6475;font-size:13.5px}section{margin:2rem 0}.wide{overflow-x:auto}"
)
_HEAD: tuple[str, ...] = ("", "k", "n", "invalid", "value", "interval", "")


@dataclass(frozen=True)
class _Section:
    name: str
    note: str
    result: Any


@dataclass(frozen=True)
class _Table:
    title: str
    head: tuple[str, ...]
    rows: list[list[str]]


class Report:
    """Results under one title.

    Takes anything: rates, matches and scores of this package, mappings of names to numbers, data classes, objects with
    ``to_dict``. Numbers of rates are rounded from their counts, half away from zero, so that a table printed twice is
    the same to the last digit. No time and no path is written.

    Args:
        title: of the page.
        settings: what produced the results (model, decoding, data), written below the title.

    Raises:
        ArgumentError: an empty title.
    """

    def __init__(self, title: str, settings: Mapping[str, Any] | None = None) -> None:
        if not isinstance(title, str) or not title.strip():
            raise ArgumentError(f"title: expected text, got {title!r}")
        self.title = title
        self.settings = dict(settings or {})
        self._sections: list[_Section] = []

    def add(self, name: str, result: Any, note: str = "") -> Report:
        """Adds a result under a heading and returns the report.

        Raises:
            ArgumentError: a name that is empty or taken. DTypeError: a result that cannot be written as JSON.
        """
        if not isinstance(name, str) or not name.strip():
            raise ArgumentError(f"name: expected text, got {name!r}")
        if name in self:
            raise ArgumentError(f"name: {name!r} is in the report already")
        _plain(result)
        self._sections.append(_Section(name, note, result))
        return self

    def __len__(self) -> int:
        return len(self._sections)

    def __contains__(self, name: object) -> bool:
        return any(s.name == name for s in self._sections)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what is not defined is None."""
        return {
            "title": self.title,
            "abjure": __version__,
            "settings": _plain(self.settings),
            "digest": self.digest,
            "results": [{"name": s.name, "note": s.note, "result": _plain(s.result)} for s in self._sections],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of settings and results, 16 hexadecimal digits: two reports with one digest say the same."""
        content = [_plain(self.settings), [[s.name, s.note, _plain(s.result)] for s in self._sections]]
        return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """JSON with a line end, without NaN."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Markdown with one table per result."""
        out = [f"# {_md(self.title)}", ""]
        if self.settings:
            out += [*(f"- {_md(str(k))}: {_md(_text(v))}" for k, v in self.settings.items()), ""]
        for s in self._sections:
            out += [f"## {_md(s.name)}", ""]
            if s.note:
                out += [_md(s.note), ""]
            for table in _tables(s.result):
                if table.title and table.title != s.name:
                    out += [f"**{_md(table.title)}**", ""]
                # Of columns that are empty throughout nothing is shown.
                keep = [i for i, h in enumerate(table.head) if h or any(r[i] for r in table.rows)]
                out.append("| " + " | ".join(_md(table.head[i]) for i in keep) + " |")
                out.append("|" + "|".join("---" if i == 0 else "---:" for i in keep) + "|")
                out += ["| " + " | ".join(_md(r[i]) for i in keep) + " |" for r in table.rows]
                out.append("")
            out += [*(f"- {_md(n)}" for n in _notes(s.result)), ""] if _notes(s.result) else []
        out.append(f"abjure {__version__}, digest {self.digest}")
        return "\n".join(out) + "\n"

    def to_html(self, plots: bool = True) -> str:
        """One HTML page that needs nothing else; pictures are inside, as PNG.

        Args:
            plots: whether to draw results that have ``.plot()``; without matplotlib the page says that they are
                missing.
        """
        draw = plots and importlib.util.find_spec("matplotlib") is not None
        body = []
        for s in self._sections:
            parts = [f"<h2>{html.escape(s.name)}</h2>"]
            if s.note:
                parts.append(f'<p class="note">{html.escape(s.note)}</p>')
            parts += map(_html_table, _tables(s.result))
            if notes := _notes(s.result):
                parts.append('<ul class="note">' + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>")
            if draw and callable(getattr(s.result, "plot", None)):
                data = base64.b64encode(_png(s.result)).decode("ascii")
                parts.append(f'<img alt="{html.escape(s.name, quote=True)}" src="data:image/png;base64,{data}">')
            body.append("<section>" + "\n".join(parts) + "</section>")
        settings = "".join(f"<li>{html.escape(str(k))}: {html.escape(_text(v))}</li>" for k, v in self.settings.items())
        missing = "" if draw or not plots else "<p class=note>Pictures need matplotlib: pip install abjure[plot]</p>"
        title = html.escape(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
            f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n<ul>{settings}</ul>{missing}\n"
            + "\n".join(body)
            + f"\n<footer>abjure {__version__}, digest {self.digest}</footer></body></html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Markdown (``.md``), HTML (``.html``) or JSON (``.json``), by the ending; all of the file or nothing.

        Raises:
            ArgumentError: another ending, or a path that cannot be written.
        """
        writers = {".md": self.to_markdown, ".html": self.to_html, ".json": self.to_json}
        ending = Path(path).suffix.lower()
        if ending not in writers:
            raise ArgumentError(f"path: expected one of {', '.join(writers)}, got {os.fspath(path)!r}")
        write_atomically(path, writers[ending]().encode("utf-8"))

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self)} results)"

    def _repr_html_(self) -> str:
        parts = [f"<h3>{html.escape(self.title)}</h3>"]
        for s in self._sections:
            parts += [f"<h4>{html.escape(s.name)}</h4>", *map(_html_table, _tables(s.result))]
        return "".join(parts)


def _png(result: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = result.plot().figure
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    # The version of the library would make the bytes differ between machines for no visible reason.
    figure.savefig(out, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _html_table(table: _Table) -> str:
    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>\n" for r in table.rows)
    return f'<div class="wide"><table>{caption}<tr>{head}</tr>\n{rows}</table></div>'


def _md(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for mark in "\\`*_|<>[]#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _text(value: Any) -> str:
    value = _plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _notes(result: Any) -> list[str]:
    if isinstance(result, Scores):
        return result.notes()
    if isinstance(result, RefusalMatches):
        return [f"{p.name}: {p.source}" for p in result.lists if p.source] + [
            f"{p.name}: {note}" for p in result.lists for note in p.notes
        ]
    return []


def _tables(result: Any) -> list[_Table]:
    if isinstance(result, Scores):
        head = (*_HEAD[:5], f"{result.level:.0%} interval", "")
        return [_Table(result.title, head, [shown_cells(r, result.level) for r in result.rows()])]
    if isinstance(result, RefusalMatches):
        rows = [Row("refused", result.rate)]
        rows += [Row(name, m.rate) for name, m in result.per_list.items()]
        fired = [[p, str(k)] for p, k in result.counts.most_common(15)]
        found = [_Table("", _HEAD, [shown_cells(r) for r in rows])]
        return [*found, _Table("phrase that comes first", ("phrase", "responses"), fired)] if fired else found
    if isinstance(result, CorrectedRate):
        estimate = Estimate(result.rate, result.interval, result.observed.n)
        rows = [Row("corrected rate", estimate), Row("observed", result.observed)]
        rows += [Row("sensitivity", result.sensitivity), Row("specificity", result.specificity)]
        return [_Table("", _HEAD, [shown_cells(r) for r in rows])]
    if isinstance(result, Rate):
        rows = [Row(str(name), r) for name, r in result.groups.items()] + [Row("all", result)]
        return [_Table("", _HEAD, [shown_cells(r) for r in rows])]
    table = getattr(result, "table", None)
    listed = table() if callable(table) else table
    if isinstance(listed, list) and listed and all(isinstance(r, Mapping) for r in listed):
        names = tuple(dict.fromkeys(str(k) for r in listed for k in r))
        return [_Table("", names, [[_cell(r.get(h)) for h in names] for r in listed])]
    plain = result if isinstance(result, Mapping) else _plain(result)
    if isinstance(plain, Mapping):
        if plain and all(isinstance(v, (Rate, Estimate)) for v in plain.values()):
            return [_Table("", _HEAD, [shown_cells(Row(str(k), v)) for k, v in plain.items()])]
        return [_Table("", ("", "value"), [[str(k), _cell(v)] for k, v in plain.items()])]
    return [_Table("", ("value",), [[_cell(plain)]])]


def _cell(value: Any) -> str:
    if isinstance(value, (Rate, Estimate)):
        cells = shown_cells(Row("", value))
        return f"{cells[4]} [{cells[5]}]"
    value = _plain(value)
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    return decimal_places(value) if isinstance(value, float) else _text(value)


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it; what is not finite becomes None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (Decimal, Fraction, Path)):
        return str(value)
    if isinstance(value, Rate):
        found: dict[str, Any] = {"kind": "rate", "k": value.k, "n": value.n, "invalid": value.invalid}
        found |= {"rate": value.rate if value.n else None, "wilson_95": _plain(value.ci())}
        found["shown"] = shown_cells(Row("", value))[4] if value.n else None
        return found | ({"groups": {str(k): _plain(r) for k, r in value.groups.items()}} if value.groups else {})
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        return {_key(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f.name for f in dataclasses.fields(value) if not f.name.startswith("_"))
        return {"kind": type(value).__name__, **{name: _plain(getattr(value, name)) for name in fields}}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        # A set has no order of its own.
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_plain(v) for v in items]
    raise DTypeError(f"result: expected something that can be written as JSON, got {type(value).__name__}")


def _key(key: Any) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
