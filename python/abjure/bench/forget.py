"""Dampening and Fisher accumulation against the torch code they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..forget import Fisher, dampen_array_, selection_curve
from .timing import Row, compare

#: Weights at scale 1.
SIZE = 64_000_000
#: The importances are uniform, so that one weight in twenty is selected.
ALPHA, LAM = 10.0, 1.0


def _published(w: Any, f: Any, d: Any) -> None:
    """As the published code: boolean indexing over dense temporaries."""
    import torch

    locations = torch.where(f > d.mul(ALPHA))
    weight = d.mul(LAM).div(f).pow(1)
    update = weight[locations]
    update[torch.where(update > 1)] = 1
    w[locations] = w[locations].mul(update.to(w.dtype))


def _where(w: Any, f: Any, d: Any) -> None:
    """The dense form one would write by hand."""
    import torch

    factor = (d * LAM / f).clamp(max=1)
    w.copy_(torch.where(f > ALPHA * d, w * factor.to(w.dtype), w))


def _dampening(n: int) -> Iterator[Row]:
    import torch

    g = torch.Generator().manual_seed(0)
    f, d, start = torch.rand(n, generator=g), torch.rand(n, generator=g), torch.randn(n, generator=g)
    forms: tuple[tuple[str, Callable[..., None]], ...] = (
        ("torch, boolean indexing (published)", _published),
        ("torch.where", _where),
    )
    for dtype in (torch.float32, torch.bfloat16):
        before = start.to(dtype)
        w = before.clone()
        case = f"{n // 10**6} M {str(dtype).removeprefix('torch.')}"
        for label, form in forms:
            ours, theirs = compare(
                lambda w=w: dampen_array_(w, f, d, ALPHA, LAM),  # type: ignore[misc]
                lambda w=w, form=form: form(w, f, d),  # type: ignore[misc]
                reset=lambda w=w, before=before: w.copy_(before),  # type: ignore[misc]
            )
            yield Row("dampen_array_", case, ours, label, theirs, bytes=n * (8 + 2 * w.element_size()))


def _accumulation(n: int) -> Iterator[Row]:
    import torch

    gradient = torch.randn(n, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float32):
        g = gradient.to(dtype)
        fisher, total = Fisher().update({"w": g}), torch.zeros(n)

        def plain(g: Any = g, total: Any = total) -> None:
            total.add_(g.float().pow(2))

        ours, theirs = compare(lambda g=g, fisher=fisher: fisher.update({"w": g}), plain)  # type: ignore[misc]
        case = f"{n // 10**6} M {str(dtype).removeprefix('torch.')} into float32"
        yield Row("Fisher.update", case, ours, "torch, squared in float32", theirs, bytes=n * (8 + g.element_size()))


def _curve(n: int) -> Iterator[Row]:
    import torch

    g = torch.Generator().manual_seed(2)
    f, d = torch.rand(n, generator=g), torch.rand(n, generator=g)
    alphas = [1.4**k for k in range(20)]

    def plain() -> list[int]:
        return [int((f > alpha * d).sum()) for alpha in alphas]

    ours, theirs = compare(lambda: selection_curve(f, d, alphas), plain, repeats=3)
    yield Row("selection_curve", f"{n // 10**6} M float32, 20 alphas", ours, "torch, one alpha at a time", theirs)


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Comparisons of this wing; ``scale`` shrinks the 64 M weights of the full size."""
    n = max(int(SIZE * scale), 1000)
    yield from _dampening(n)
    yield from _accumulation(n)
    yield from _curve(n // 4)
