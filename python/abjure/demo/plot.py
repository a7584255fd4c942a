"""Small helpers so that every picture of the demo looks alike. Uses no pyplot state and no display."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .section import Picture

INK, GREY, TEAL, ORANGE, PURPLE, RED = "#1c2330", "#a3adbb", "#0b7a75", "#e08a1e", "#6c5bb5", "#c8443f"
COLOURS = (GREY, TEAL, ORANGE, PURPLE, RED, INK)


def axes(columns: int = 1, width: float = 9.0, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """A figure with ``columns`` plain axes in a row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    row = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in row:
        tidy(ax)
    return figure, row


def tidy(ax: Any) -> None:
    """Removes what carries no information."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=INK, labelsize=8.5)
    ax.xaxis.label.set_size(9)
    ax.yaxis.label.set_size(9)
    ax.title.set_size(10)


def picture(figure: Figure, caption: str) -> Picture:
    """The figure as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=140, facecolor="white")
    return Picture(out.getvalue(), caption)


def image_grid(rows: list[tuple[str, Any, str]], height: float = 0.78) -> Figure:
    """Rows of small grey images: ``(label, images (k, h, w), colour map)``, each in [0, 1] or, for "RdBu", [-1, 1]."""
    count = len(rows[0][1])
    figure = Figure(figsize=(9.0, height * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for r, (label, images, colours) in enumerate(rows):
        low = -1.0 if colours == "RdBu" else 0.0
        for c in range(count):
            ax = figure.add_subplot(len(rows), count, r * count + c + 1)
            ax.imshow(images[c], cmap=colours, vmin=low, vmax=1.0, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            for side in ax.spines.values():
                side.set_color("#dfe4ec")
            if c == 0:
                ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    return figure
