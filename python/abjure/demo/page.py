"""The demo as one HTML file that needs nothing else: styles and pictures are inside."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from .section import Picture, Section, Table

STYLE = """
:root{--ink:#1c2330;--soft:#5a6475;--line:#dfe4ec;--back:#f6f7fa;--card:#fff;--mark:#0b7a75;--tint:#e5f4f2}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main,footer{max-width:1060px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:34px;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:23px;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:28px 0 6px}
p{margin:0 0 12px}.soft,footer,figcaption,.note{color:var(--soft)}
nav{margin:18px 0 26px;display:flex;flex-wrap:wrap;gap:8px}
nav a{color:var(--mark);text-decoration:none;border:1px solid var(--line);background:var(--card);
border-radius:99px;padding:4px 14px;font-size:14px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:26px 30px;margin:0 0 26px}
ul{margin:14px 0 4px;padding:14px 18px 14px 34px;background:var(--tint);border-radius:8px}
li{margin:2px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:50%}
th{font-weight:600;color:var(--soft);border-bottom:1px solid var(--line)}
th,td{padding:5px 14px 5px 0;text-align:right;vertical-align:top}
td{border-bottom:1px solid #eef1f5}
th.prose,td.prose{text-align:left}
tr.accent td{font-weight:650;color:var(--mark)}
.note{font-size:13.5px;margin-top:6px;max-width:75ch}
figure{margin:26px 0 0}img{max-width:100%;height:auto;display:block}
figcaption{font-size:13.5px;margin-top:4px;max-width:80ch}
.skipped{border-left:4px solid #d99a1c;background:#fdf6e7;padding:10px 14px;border-radius:6px}
footer{font-size:13.5px;padding-bottom:48px}
@media(max-width:640px){section{padding:18px 16px}}
"""


def html_table(table: Table) -> str:
    """One table, scrolled sideways where the window is narrow."""

    def cells(tag: str, row: tuple[str, ...]) -> str:
        kind = ("", ' class="prose"')
        return "".join(f"<{tag}{kind[i in table.prose]}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    accent = ("", " class=accent")
    body = "\n".join(f"<tr{accent[i == table.accent]}>{cells('td', row)}</tr>" for i, row in enumerate(table.rows))
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n<div class=scroll><table>\n"
        f"<thead><tr>{cells('th', table.columns)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n{note}"
    )


def html_picture(picture: Picture) -> str:
    """One figure with its picture inlined."""
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def html_section(section: Section) -> str:
    """One part of the demo."""
    if section.skipped:
        body = f'<p class="skipped">Skipped: {escape(section.skipped)}</p>'
    else:
        findings = "".join(f"<li>{escape(text)}</li>" for text in section.findings)
        parts = [f"<ul>{findings}</ul>" if findings else ""]
        parts += map(html_table, section.tables)
        parts += map(html_picture, section.pictures)
        body = "\n".join(parts)
    head = f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.lead)}</p>"
    return f'<section id="{section.name}">{head}\n{body}\n</section>'


def html_page(sections: list[Section], machine: dict[str, Any], seed: int) -> str:
    """The whole page."""
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections)
    facts = ", ".join(f"{escape(str(k).replace('_', ' '))} {escape(str(v))}" for k, v in machine.items())
    total = sum(s.seconds for s in sections)
    body = "\n".join(map(html_section, sections))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>abjure demo</title><style>{STYLE}</style></head><body>
<header><h1>abjure demo</h1>
<p class="soft">What a model forgets, what can be learned from data, what a model refuses: each changed here, and
measured.</p>
<nav>{links}</nav></header>
<main>{body}</main>
<footer>Run in {total:.0f} s with seed {seed}: {facts}. Every number on this page is in <code>demo.json</code>.</footer>
</body></html>
"""
