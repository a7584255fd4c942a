"""The demo in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from .section import Section, Table


def rich_table(table: Table) -> RichTable:
    """A :class:`Table` as rich draws it; cells are shown as they are, never read as markup."""
    drawn = RichTable(
        title=escape(table.title), caption=escape(table.note) or None, box=box.SIMPLE_HEAD, title_justify="left",
        caption_justify="left", title_style="bold", caption_style="dim", show_lines=len(table.prose) > 1, expand=False,
    )  # fmt: skip
    for i, name in enumerate(table.columns):
        drawn.add_column(escape(name), justify="left" if i in table.prose else "right", overflow="fold")
    for i, row in enumerate(table.rows):
        drawn.add_row(*(Text(cell) for cell in row), style="bold green" if i == table.accent else None)
    return drawn


def show(section: Section, console: Console) -> None:
    """Prints one section."""
    console.print(Rule(f"[bold]{escape(section.title)}[/]", align="left"))
    console.print(Padding(Text(section.lead), (0, 0, 1, 0)))
    if section.skipped:
        console.print(Text(f"skipped: {section.skipped}", style="yellow"))
        return
    for table in section.tables:
        console.print(rich_table(table))
    for finding in section.findings:
        console.print(Padding(Text(f"• {finding}"), (0, 2)))
    console.print(Text(f"  {section.seconds:.1f} s", style="dim"))
