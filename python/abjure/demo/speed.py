"""Each kernel beside the plain torch form of the same work and beside the machine's copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..bench import GROUPS, Row, as_dict, bandwidth
from ..bench import run as compare
from .plot import GREY, TEAL, axes, picture
from .section import Section, Table

TITLE = "Speed: kernels beside the plain form"
LEAD = (
    "The same work in the same process, ours and the plain torch or transformers form in turn. Where memory is the "
    "limit, "
    "the share of this machine's copy bandwidth says how much could still be gained."
)
#: Share of the documented sizes, by group, so that all of it takes seconds; `abjure bench` runs the full ones.
SCALES = {"forget": 0.125, "directions": 0.25, "protect": 0.2, "decoding": 1.0}


def run(seed: int, say: Callable[[str], None]) -> Section:
    """Runs every group of the benchmark at a small size; timings do not depend on the seed."""
    say("copy bandwidth")
    limits = bandwidth()
    rows: list[tuple[str, Row]] = []
    for group in GROUPS:
        say(group)
        rows += compare([group], SCALES[group])
    return section(rows, limits)


def section(rows: list[tuple[str, Row]], limits: dict[str, float]) -> Section:
    """Table, picture and numbers."""
    numbers = [as_dict(group, row, limits) for group, row in rows]
    table = Table(
        "Median times",
        ("kernel", "case", "ours, ms", "plain, ms", "times faster", "GB/s", "of copy", "plain form"),
        [
            (
                d["kernel"], d["case"], f"{d['seconds'] * 1e3:.2f}", f"{d['baseline_seconds'] * 1e3:.2f}",
                f"{d['speedup']:.1f}", optional(d["gb_per_s"], ".1f"), optional(d["of_copy"], ".2f"), d["baseline"],
            )
            for d in numbers
        ],
        note=f"Copy bandwidth of this machine now: {limits['copy']:.1f} GB/s (read + write), triad "
        f"{limits['triad']:.1f} "
        "GB/s. GB/s counts only bytes that must move; arrays here are smaller than in abjure bench and may partly "
        "stay in "
        "cache.",
        prose=(0, 1, 7),
    )  # fmt: skip
    slowest = min(numbers, key=lambda d: float(d["speedup"]))
    fastest = max(numbers, key=lambda d: float(d["speedup"]))
    findings = [
        f"From {slowest['speedup']:.1f} ({slowest['kernel']}, {slowest['case']}) to {fastest['speedup']:.0f} times "
        f"({fastest['kernel']}, {fastest['case']}) the speed of the plain form.",
    ]
    return Section(
        "speed", TITLE, LEAD, findings, [table], [draw(numbers)], {"bandwidth_gb_per_s": limits, "rows": numbers}
    )


def optional(value: float | None, form: str) -> str:
    """A number, or a dash where memory is not the limit."""
    return "-" if value is None else format(value, form)


def draw(numbers: list[dict[str, Any]]) -> Any:
    """Speed-ups as bars on a logarithmic axis."""
    shown = numbers[::-1]
    figure, (ax,) = axes(1, height=0.6 + 0.24 * len(shown))
    speedups = [d["speedup"] for d in shown]
    ax.barh(range(len(shown)), speedups, color=TEAL, height=0.65)
    ax.set_yticks(range(len(shown)), [f"{d['kernel']}  {d['case']}" for d in shown])
    ax.set_xscale("log")
    ax.axvline(1, color=GREY, lw=1, ls="--")
    for i, value in enumerate(speedups):
        ax.annotate(f"{value:.1f}", (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_xlabel("times the speed of the plain form (logarithmic)")
    return picture(figure, "Dashed: as fast as the plain form.")
