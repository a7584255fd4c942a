"""Dampening and Fisher accumulation against the torch code they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..forget import Fisher, cross_entropy, dampen_array_, importance, selection_curve
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


def _resnet(width: int) -> Any:
    """A residual network of the shape of ResNet-18 for images of 32 x 32 and ten classes; width 64 is 11 M weights."""
    from torch import nn

    def norm_conv(inside: int, outside: int, stride: int, size: int = 3) -> list[Any]:
        return [nn.Conv2d(inside, outside, size, stride, size // 2, bias=False), nn.BatchNorm2d(outside)]

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int) -> None:
            super().__init__()
            first, second = norm_conv(inside, outside, stride), norm_conv(outside, outside, 1)
            self.body = nn.Sequential(*first, nn.ReLU(), *second)
            same = inside == outside
            self.skip = nn.Identity() if same else nn.Sequential(*norm_conv(inside, outside, stride, 1))

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.skip(x)).relu()

    blocks, inside = [], width
    for stage in range(4):
        for k in range(2):
            outside = width << stage
            blocks.append(Block(inside, outside, 2 if stage and not k else 1))
            inside = outside
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10)]
    return nn.Sequential(*norm_conv(3, width, 1), nn.ReLU(), *blocks, *head)


def _pass(scale: float) -> Iterator[Row]:
    import torch

    torch.manual_seed(0)
    width, size, n = (64, 16, 8) if scale >= 1 else (16, 8, 2)
    model = _resnet(width)
    batches = [(torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))) for _ in range(n)]

    ours, theirs = compare(
        lambda: importance(model, batches, cross_entropy, progress=False),
        lambda: plain.importance(model, batches, cross_entropy),
        repeats=3,
    )
    weights = sum(p.numel() for p in model.parameters())
    case = f"ResNet-18 form, {weights / 1e6:.1f} M weights, {n} batches of {size}"
    yield Row("importance", case, ours, "torch (published)", theirs)


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Comparisons of this wing; ``scale`` shrinks the 64 M weights of the full size."""
    n = max(int(SIZE * scale), 1000)
    yield from _dampening(n)
    yield from _accumulation(n)
    yield from _curve(n // 4)
    yield from _pass(scale)
