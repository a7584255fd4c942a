"""Dampening the state of a whole model against the bare kernel on as many bytes in one array; alpha's percentile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..forget import adaptive_alpha, dampen_, dampen_array_
from .timing import Row, compare

#: Decoder layers of the model at scale 1: SmolLM2-135M.
LAYERS = 30
ALPHA, LAM = 10.0, 1.0


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Parameters of SmolLM2-135M with ``layers`` decoder layers; the output head is tied to the embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (49152, 576)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (576, 576),
            "self_attn.k_proj": (192, 576),
            "self_attn.v_proj": (192, 576),
            "self_attn.o_proj": (576, 576),
            "mlp.gate_proj": (1536, 576),
            "mlp.up_proj": (1536, 576),
            "mlp.down_proj": (576, 1536),
            "input_layernorm": (576,),
            "post_attention_layernorm": (576,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (576,)}


def rows(scale: float = 1.0) -> Iterator[Row]:
    """A model's state and one array of the same bytes, in turn; ``scale`` shrinks the number of layers."""
    import torch

    sizes = shapes(max(round(LAYERS * scale), 1))
    total = sum(int(np.prod(s)) for s in sizes.values())
    g = torch.Generator().manual_seed(0)
    # Uniform importances select one weight in twenty.
    f, d, start = torch.rand(total, generator=g), torch.rand(total, generator=g), torch.randn(total, generator=g)

    def split(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = torch.split(flat, [int(np.prod(s)) for s in sizes.values()])
        return {n: p.clone().view(s) for (n, s), p in zip(sizes.items(), parts, strict=True)}

    forget, retain = split(f), split(d)
    for dtype in (torch.float32, torch.bfloat16):
        before = start.to(dtype)
        w = before.clone()
        model = torch.nn.ParameterDict({n.replace(".", "/"): torch.nn.Parameter(p) for n, p in split(before).items()})
        names = {n.replace(".", "/"): n for n in sizes}
        ours_f, ours_d = ({k: x[n] for k, n in names.items()} for x in (forget, retain))
        originals = [p.detach().clone() for p in model.values()]

        @torch.no_grad()
        def reset(
            w: torch.Tensor = w, before: torch.Tensor = before, model: Any = model, originals: Any = originals
        ) -> None:
            w.copy_(before)
            for p, original in zip(model.parameters(), originals, strict=True):
                p.copy_(original)

        case = f"{total / 1e6:.0f} M {str(dtype).removeprefix('torch.')}, {len(sizes)} tensors"
        for undo in (False, True):
            ours, theirs = compare(
                lambda model=model, f=ours_f, d=ours_d, undo=undo: dampen_(model, f, d, ALPHA, LAM, undo=undo),  # type: ignore[misc]
                lambda w=w: dampen_array_(w, f, d, ALPHA, LAM),  # type: ignore[misc]
                reset=reset,
            )
            moved = total * (8 + 2 * w.element_size())
            kernel = "dampen_" + (", undo kept" if undo else "")
            yield Row(kernel, case, ours, "the bare kernel on one array", theirs, bytes=moved)
    n = total // 4
    a, b = f[:n].numpy(), d[:n].numpy()
    ours, theirs = compare(
        lambda: adaptive_alpha({"w": a}, {"w": b}, share=0.01),
        lambda: np.percentile(a / b, 99.3),
        repeats=3,
    )
    yield Row(
        "adaptive_alpha", f"{n / 1e6:.0f} M float32", ours, "numpy.percentile of the ratios", theirs, bytes=16 * n
    )
