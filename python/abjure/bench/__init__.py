"""`abjure bench`: every kernel beside the plain torch form of the same work and beside the machine's bandwidth."""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .timing import Row, bandwidth

__all__ = ["GROUPS", "Row", "bandwidth", "main", "run", "run_apart"]

#: Modules with a ``rows(scale)`` generator, in the order of the report.
GROUPS = ("forget", "dampen", "logprobs", "directions", "protect", "decoding", "matching", "text", "measure")


def run(only: Sequence[str] = GROUPS, scale: float = 1.0) -> Iterator[tuple[str, Row]]:
    """Measures the groups in ``only`` and yields ``(group, row)`` as each comparison ends.

    ``scale`` shrinks the arrays (1.0 is the documented size). Needs torch; the decoding group needs transformers.

    Raises:
        ArgumentError: an unknown group, or a scale outside (0, 1].
    """
    unknown = [name for name in only if name not in GROUPS]
    if unknown:
        raise ArgumentError(f"only: expected names among {', '.join(GROUPS)}, got {', '.join(unknown)}")
    if not 0 < scale <= 1:
        raise ArgumentError(f"scale: expected a number in (0, 1], got {scale}")
    for name in only:
        for row in importlib.import_module(f".{name}", __name__).rows(scale):
            yield name, row


def _group(args: tuple[str, float]) -> list[tuple[str, Row]]:
    return list(run([args[0]], args[1]))


def run_apart(only: Sequence[str] = GROUPS, scale: float = 1.0) -> Iterator[tuple[str, Row]]:
    """As :func:`run`, each group in a new process; yields a group's rows together when it ends.

    What one group leaves in the allocator decides whether the next baseline's temporaries fault in new pages, which
    changes that baseline by up to 3 times either way; apart, a group gives what it gives alone.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rows in pool.imap(_group, [(name, scale) for name in only]):
            yield from rows


def machine() -> dict[str, Any]:
    """What a ratio depends on: processor, threads, instruction set, versions."""
    import torch

    from .. import __version__, _native, get_num_threads

    return {
        "abjure": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": get_num_threads(),
        "torch_threads": torch.get_num_threads(),
        "simd": _native.simd_level()[0],
    }


def as_dict(group: str, row: Row, limits: dict[str, float]) -> dict[str, Any]:
    """One row of the JSON report."""
    return {
        "group": group,
        "kernel": row.kernel,
        "case": row.case,
        "seconds": row.seconds,
        "baseline": row.baseline,
        "baseline_seconds": row.baseline_seconds,
        "speedup": row.speedup,
        "gb_per_s": row.gigabytes_per_second if row.bytes else None,
        "of_copy": row.gigabytes_per_second / limits["copy"] if row.bytes else None,
        "of_triad": row.gigabytes_per_second / limits["triad"] if row.bytes else None,
        "gflop_per_s": row.flops / row.seconds / 1e9 if row.flops else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry: prints the table as rows arrive, writes JSON if asked."""
    parser = argparse.ArgumentParser(prog="abjure bench", description=__doc__)
    parser.add_argument("--only", default=",".join(GROUPS), help="comma-separated groups (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the arrays, 1.0 is the documented one")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is not a folder")
    limits = bandwidth()
    report: dict[str, Any] = {"machine": machine(), "bandwidth_gb_per_s": limits, "rows": []}
    print("  ".join(f"{k}={v}" for k, v in report["machine"].items()))
    print(f"memory bandwidth: copy {limits['copy']:.1f} GB/s, triad {limits['triad']:.1f} GB/s")
    header = f"{'kernel':<24} {'case':<34} {'ms':>9} {'GB/s':>6} {'/copy':>6} {'/triad':>6} {'GF/s':>6}  baseline"
    print(header + "\n" + "-" * (len(header) + 24))
    only = [name for name in args.only.split(",") if name]
    for group, row in (run if len(only) < 2 else run_apart)(only, args.scale):
        d = as_dict(group, row, limits)
        report["rows"].append(d)

        def cell(key: str, d: dict[str, Any] = d, digits: int = 2) -> str:
            return f"{d[key]:>6.{digits}f}" if d[key] is not None else f"{'-':>6}"

        print(
            f"{row.kernel:<24} {row.case:<34} {row.seconds * 1e3:>9.2f} {cell('gb_per_s', digits=1)} {cell('of_copy')}"
            f" {cell('of_triad')} {cell('gflop_per_s', digits=0)}  {row.speedup:.1f}x faster than {row.baseline}",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0
