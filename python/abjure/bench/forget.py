"""Dampening and Fisher accumulation against the torch code they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..forget import Fisher, dampen_array_, selection_curve
from . import plain
from .timing import Row, compare

#: Weights at scale 1.
SIZE = 64_000_000
#: The importances are uniform, so that one weight in twenty is selected.
ALPHA, LAM = 10.0, 1.0


def _dampening(n: int) -> Iterator[Row]:
    import torch

    g = torch.Generator().manual_seed(0)
    f, d, start = torch.rand(n, generator=g), torch.rand(n, generator=g), torch.randn(n, generator=g)
    forms: tuple[tuple[str, Callable[..., None]], ...] = (
        ("torch, boolean indexing (published)", plain.dampen_published),
        ("torch.where", plain.dampen_where),
    )
    for dtype in (torch.float32, torch.bfloat16):
        before = start.to(dtype)
        w = before.clone()
        case = f"{n // 10**6} M {str(dtype).removeprefix('torch.')}"
        for label, form in forms:
            ours, theirs = compare(
                lambda w=w: dampen_array_(w, f, d, ALPHA, LAM),  # type: ignore[misc]
                lambda w=w, form=form: form(w, f, d, ALPHA, LAM),  # type: ignore[misc]
                reset=lambda w=w, before=before: w.copy_(before),  # type: ignore[misc]
            )
            yield Row("dampen_array_", case, ours, label, theirs, bytes=n * (8 + 2 * w.element_size()))


def _accumulation(n: int) -> Iterator[Row]:
    import torch

    gradient = torch.randn(n, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float32):
        g = gradient.to(dtype)
        fisher, total = Fisher().update({"w": g}), torch.zeros(n)

        ours, theirs = compare(
            lambda g=g, fisher=fisher: fisher.update({"w": g}),  # type: ignore[misc]
            lambda g=g, total=total: plain.accumulate(total, g),  # type: ignore[misc]
        )
        case = f"{n // 10**6} M {str(dtype).removeprefix('torch.')} into float32"
        yield Row("Fisher.update", case, ours, "torch, squared in float32", theirs, bytes=n * (8 + g.element_size()))


def _curve(n: int) -> Iterator[Row]:
    import torch

    g = torch.Generator().manual_seed(2)
    f, d = torch.rand(n, generator=g), torch.rand(n, generator=g)
    alphas = [1.4**k for k in range(20)]

    ours, theirs = compare(
        lambda: selection_curve(f, d, alphas), lambda: plain.selection_counts(f, d, alphas), repeats=3
    )
    yield Row("selection_curve", f"{n // 10**6} M float32, 20 alphas", ours, "torch, one alpha at a time", theirs)


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Comparisons of this wing; ``scale`` shrinks the 64 M weights of the full size."""
    n = max(int(SIZE * scale), 1000)
    yield from _dampening(n)
    yield from _accumulation(n)
    yield from _curve(n // 4)
