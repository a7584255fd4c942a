"""`abjure demo`: the package's main job on real input, with its effect measured.

Four parts, each of which runs alone: ``forget``, ``protect``, ``refuse``, ``speed``. Output: tables in the terminal,
``index.html`` (one file, pictures inside) and ``demo.json`` (every number). Works offline.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AbjureError, ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from .section import Section

__all__ = ["PARTS", "MissingInput", "run"]

PARTS = ("forget", "protect", "refuse", "speed")

#: Import names of the ``demo`` extra and what to ask pip for.
REQUIRED = {
    "torch": "torch",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "transformers": "transformers",
    "gguf": "gguf",
    "accelerate": "accelerate",  # transformers asks for it to read GGUF
}

#: How a part says what it is doing.
Say = Callable[[str], None]


class MissingInput(AbjureError):
    """A part needs a file that is not installed; the message says how to get it."""


def run(
    out: str | os.PathLike[str] = "demo-out",
    only: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and returns what it wrote to ``demo.json``.

    Args:
        out: folder for ``index.html`` and ``demo.json``; made if absent.
        only: one of ``PARTS``; None runs them all, skipping with a notice a part whose model is not installed.
        seed: of splits, initial weights and noise, 0 to 2**32 - 1.
        console: where to print (rich); None prints to standard output.

    The files are written anew after every part, so that a failure keeps what was finished before it.

    Raises:
        ArgumentError: an unknown part, a bad seed, a folder that cannot be written, all before any work.
        MissingInput: packages of the ``demo`` extra, or the model that ``only`` asks for, are not installed.
    """
    if only is not None and only not in PARTS:
        raise ArgumentError(f"only: expected one of {', '.join(PARTS)}, got {only!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ArgumentError(f"seed: expected an integer from 0 to 4294967295, got {seed!r}")
    folder = writable_folder(out)
    require_packages()

    from rich.console import Console

    from .table import show

    console = console or Console()
    sections: list[Section] = []
    report: dict[str, Any] = {}
    for name in PARTS if only is None else (only,):
        with console.status(name) as status:
            sections.append(run_part(name, seed, status.update, only is not None))
        show(sections[-1], console)
        report = write(folder, sections, seed)
    console.print(
        f"\nThe page with pictures: {folder / 'index.html'}\nEvery number: {folder / 'demo.json'}", style="bold"
    )
    return report


def run_part(name: str, seed: int, say: Say, strict: bool) -> Section:
    """One part, timed. A missing model is an error if ``strict``, else a section that says why it is empty."""
    from .section import Section

    part = importlib.import_module(f".{name}", __name__)
    start = time.perf_counter()
    try:
        section: Section = part.run(seed, say)
    except MissingInput as missing:
        if strict:
            raise
        section = Section(name, part.TITLE, part.LEAD, skipped=str(missing), numbers={"skipped": str(missing)})
    section.seconds = time.perf_counter() - start
    return section


def writable_folder(out: str | os.PathLike[str]) -> Path:
    """The folder, made and tried with a real write, so that an hour's work never ends at a closed door."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in ("index.html", "demo.json"):
            if (folder / name).exists():
                (folder / name).open("r+b").close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArgumentError(f"out: expected a folder that can be written, got {str(out)!r} ({reason})") from error
    return folder


def require_packages() -> None:
    """Names everything of the ``demo`` extra that is missing, at once."""
    missing = [pip for name, pip in REQUIRED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingInput(f"the demo needs {', '.join(missing)}: pip install 'abjure[demo]'")


def machine() -> dict[str, Any]:
    """What the seconds depend on."""
    from .. import __version__, _native, get_num_threads

    return {
        "abjure": __version__,
        "Python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "cores": os.cpu_count(),
        "threads": get_num_threads(),
        "instruction_set": _native.simd_level()[0],
    }


def write(folder: Path, sections: list[Section], seed: int) -> dict[str, Any]:
    """Writes both files from the finished sections and returns the report."""
    from .page import html_page

    facts = machine()
    report = {
        "machine": facts,
        "seed": seed,
        "parts": {s.name: {"seconds": s.seconds, "findings": s.findings, **s.numbers} for s in sections},
    }
    (folder / "demo.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(html_page(sections, facts, seed), encoding="utf-8")
    return report
