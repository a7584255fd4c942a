"""The torch half of :mod:`abjure.protect.disagreement`."""

from __future__ import annotations

import math

import torch


def pair_information(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of heads of the mutual information of their batch-averaged joint, in nats; ``(B, H, C)``."""
    b, h, c = probabilities.shape
    p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    flat = p.reshape(b, h * c)
    joint = (flat.T @ flat / b).reshape(h, c, h, c).permute(0, 2, 1, 3)
    marginal = p.mean(dim=0)
    product = marginal[:, None, :, None] * marginal[None, :, None, :]
    # Where a probability is 0, so is its term and its gradient: of xlogy that of the logarithm would be infinite.
    tiny = torch.finfo(p.dtype).tiny
    terms = joint * (joint.clamp_min(tiny).log() - product.clamp_min(tiny).log())
    first, second = torch.triu_indices(h, h, 1, device=p.device)
    return terms[first, second].sum(dim=(1, 2)).mean()


class Heads(torch.nn.Module):
    """Several linear classifiers on one projection of the features."""

    def __init__(self, width: int, classes: int, heads: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.projection = torch.nn.Sequential(
            torch.nn.LayerNorm(width), torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden)
        )
        self.weight = torch.nn.Parameter(torch.empty(heads, classes, hidden))
        self.bias = torch.nn.Parameter(torch.zeros(heads, classes))
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(hidden)
        with torch.no_grad():
            for module in self.projection.modules():
                if isinstance(module, torch.nn.Linear):
                    limit = 1 / math.sqrt(module.in_features)
                    module.weight.uniform_(-limit, limit, generator=generator)
                    module.bias.uniform_(-limit, limit, generator=generator)
            self.weight.uniform_(-bound, bound, generator=generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(B, H, C)`` logits of ``(B, width)`` features."""
        return torch.einsum("bd,hcd->bhc", self.projection(features), self.weight) + self.bias
