"""The plain torch forms that kernels are compared with, here and in the criterion benchmarks, which read this file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def dampen_published(w: Any, f: Any, d: Any, alpha: float, lam: float) -> None:
    """Dampening as the published code has it: boolean indexing over dense temporaries."""
    locations = torch.where(f > d.mul(alpha))
    weight = d.mul(lam).div(f).pow(1)
    update = weight[locations]
    update[torch.where(update > 1)] = 1
    w[locations] = w[locations].mul(update.to(w.dtype))


def dampen_where(w: Any, f: Any, d: Any, alpha: float, lam: float) -> None:
    """Dampening in the dense form one would write by hand."""
    factor = (d * lam / f).clamp(max=1)
    w.copy_(torch.where(f > alpha * d, w * factor.to(w.dtype), w))


def accumulate(total: Any, g: Any) -> None:
    """Adds squared gradients, squared in the dtype of the sum."""
    total.add_(g.to(total.dtype).pow(2))


def importance(model: Any, batches: Any, loss: Any) -> dict[str, Any]:
    """The importance pass as published: gradients into ``.grad``, squares added to zeros, divided at the end."""
    model.eval()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                sums[n] += p.grad.clone().pow(2)
    return {n: s / len(batches) for n, s in sums.items()}


def selection_counts(f: Any, d: Any, alphas: list[float]) -> list[int]:
    """Weights selected, one alpha at a time."""
    return [int((f > alpha * d).sum()) for alpha in alphas]


def token_logprobs(logits: Any, labels: Any) -> Any:
    """Log-probabilities of labels through the whole log-softmax in f32 or f64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def ablate(x: Any, q: Any) -> Any:
    """Projects rows off the orthonormal rows of ``q`` in their own dtype, as published hooks do."""
    return x - (x @ q[0]).unsqueeze(-1) * q[0] if len(q) == 1 else x - (x @ q.T) @ q


def orthogonalize(w: Any, r: Any) -> Any:
    """Projects the columns of a weight off a unit vector as published code does: by transposing it and back."""
    t = w.T.contiguous()
    return (t - (t @ r).unsqueeze(-1) * r).T.contiguous()


def count_experts(ids: Any, gates: Any, owners: Any, prompts: int, experts: int) -> tuple[Any, Any]:
    """How often each prompt's tokens chose each expert, and the sums of their gates, through indices of both."""
    flat = (owners.unsqueeze(-1) * experts + ids).flatten()
    counts = torch.bincount(flat, minlength=prompts * experts)
    sums = torch.bincount(flat, gates.flatten().double(), minlength=prompts * experts)
    return counts.view(prompts, experts), sums.view(prompts, experts)


def row_max_gap(z: Any, token: int) -> Any:
    """A token's logit above the largest of the others."""
    return z[:, token] - torch.maximum(z[:, :token].amax(1), z[:, token + 1 :].amax(1))


def gate(z: Any, token: int, probability: float) -> None:
    """Forces a token in the rows that give it this probability."""
    fires = torch.softmax(z.float(), dim=-1)[:, token] >= probability
    kept = z[fires, token]
    z[fires] = -torch.inf
    z[fires, token] = kept


def bayes_error_gradient(points: Any, y: Any, classes: int, bandwidth: float) -> tuple[Any, Any]:
    """Published reading (gini, leave-one-out) and hand-derived gradient, with the n × n matrices in memory."""
    onehot = torch.nn.functional.one_hot(y, classes).to(points.dtype)
    z = points - points.mean(0)
    norms = (z * z).sum(1)
    exponent = (norms[:, None] + norms[None] - 2 * (z @ z.T)).clamp_(min=0).mul_(-0.5 / bandwidth**2)
    exponent.fill_diagonal_(-torch.inf)
    shift = exponent.max(1, keepdim=True).values
    kernel = (exponent - shift).exp_()
    sums = kernel @ onehot
    counts = onehot.sum(0)
    p = (sums.log() + shift + (counts / len(z)).log() - (counts - onehot).log()).softmax(1)
    squares = (p * p).sum(1, keepdim=True)
    slope = -2 * p * (p - squares) / len(z)
    weights = kernel * ((slope / sums.clamp(min=1e-30)) @ onehot.T)
    pulls = weights + weights.T
    return (1 - squares).mean(), (pulls @ z - pulls.sum(1, keepdim=True) * z) / bandwidth**2


def clean_error(queries: Any, own: Any, centres: Any, labels: Any, of: Any, bandwidth: float, classes: int) -> Any:
    """Clean reading (soft): ``of`` are the queries' labels, ``own`` masks the centre each must not see."""
    squared = (
        (queries * queries).sum(1)[:, None] + (centres * centres).sum(1)[None] - 2 * (queries @ centres.T)
    ).clamp(min=0)
    exponent = (squared * (-0.5 / bandwidth**2)).masked_fill(own, -torch.inf)
    onehot = torch.nn.functional.one_hot(labels, classes).to(centres.dtype)
    shift = exponent.max(1, keepdim=True).values.detach()
    joint = ((exponent - shift).exp() @ onehot + 1e-30).log()
    return (1 - joint.softmax(1).gather(1, of[:, None])).mean()


def ascend(
    points: Any,
    y: Any,
    classes: int,
    bandwidth: float,
    per: str,
    batch: tuple[int, int],
    epsilon: float,
    steps: int,
) -> Any:
    """Projected ascent against clean queries, its gradient by autograd."""
    draw = torch.Generator().manual_seed(0)
    delta = torch.zeros((classes if per == "class" else len(points)), points.shape[1], dtype=points.dtype)
    alpha = 3 * epsilon / steps
    for _ in range(steps):
        rows = torch.randperm(len(points), generator=draw)[: batch[0]]
        own = torch.randperm(len(points), generator=draw)[: batch[1]]
        leaf = delta.clone().requires_grad_(True)
        z = (points[own] + (leaf[y[own]] if per == "class" else leaf[own])).clamp(0, 1)
        value = clean_error(points[rows], rows[:, None] == own[None], z, y[own], y[rows], bandwidth, classes)
        (gradient,) = torch.autograd.grad(value, leaf)
        delta = (delta + alpha * gradient.sign()).clamp(-epsilon, epsilon)
    return delta


def joint_bias(log_p: Any, rates: Any) -> Any:
    """Biases of K outcomes with wanted mean rates, from log-probabilities ``(n, K + 1)``, all else first."""
    b = np.zeros(len(rates))
    while True:
        z = log_p + np.append(0.0, b)
        e = np.exp(z - z.max(axis=1, keepdims=True))
        q = (e / e.sum(axis=1, keepdims=True))[:, 1:]
        step = np.linalg.solve(np.diag(q.mean(axis=0)) - q.T @ q / len(q), q.mean(axis=0) - rates)
        step *= min(1.0, 2.0 / np.abs(step).max())
        b = b - step
        if np.abs(step).max() < 1e-12:
            return b


def cka_products(x: Any, y: Any) -> Any:
    """The matrix products of linear CKA, without anything else."""
    return x.T @ y, x.T @ x, y.T @ y


def rbf_cka(x: Any, y: Any, sigma: float) -> float:
    """Unbiased CKA with RBF kernels from whole n × n matrices."""
    n = len(x)

    def gram(a: Any) -> Any:
        a = a - a.mean(dim=0)
        squares = (a * a).sum(dim=1)
        distances = (squares[:, None] + squares - 2 * (a @ a.T)).clamp_min_(0)
        return distances.mul_(-1 / (2 * sigma**2)).exp_().fill_diagonal_(0)

    def hsic(k: Any, m: Any) -> Any:
        r, s = k.sum(dim=1).double(), m.sum(dim=1).double()
        trace = (k * m).sum(dtype=torch.float64)
        return trace + r.sum() * s.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (r @ s)

    k, m = gram(x), gram(y)
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def bootstrap_means(values: Any, resamples: int) -> Any:
    """Means of resamples, one index vector at a time."""
    import numpy as np

    rng = np.random.default_rng(0)
    n = len(values)
    return np.array([values[rng.integers(0, n, n)].mean() for _ in range(resamples)])


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence of two lists of words."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, best[j] = best[j], before + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]


def refit_without(x: Any, y: Any, penalty: float, theta: Any, records: list[int]) -> list[Any]:
    """Logistic regressions without one record each, by Newton's method from ``theta``; NumPy."""
    found = []
    eye = penalty * np.eye(x.shape[1])
    for i in records:
        kept, labels, t = np.delete(x, i, axis=0), np.delete(y, i), theta.copy()
        for _ in range(50):
            p = 1 / (1 + np.exp(-kept @ t))
            gradient = kept.T @ (p - labels) + penalty * t
            step = np.linalg.solve((kept.T * (p * (1 - p))) @ kept + eye, gradient)
            t -= step
            if step @ gradient < 1e-16:
                break
        found.append(t)
    return found


def grow_tree(codes: Any, targets: list[Any], classes: list[int], alpha: float, leaves: int, leaf_rows: int) -> int:
    """The privacy-aware tree, best first, with the counts of every feature and code by one ``bincount``; its nodes."""
    width = int(codes.max()) + 1
    features = codes.shape[1]
    places = codes.astype(np.int64) + np.arange(features) * width

    def impurity(counts: Any) -> Any:
        ginis = [1 - ((c / np.maximum(c.sum(-1, keepdims=True), 1)) ** 2).sum(-1) for c in counts]
        return (1 - alpha) * ginis[0] + alpha * (0.5 - sum(ginis[1:]) / (len(ginis) - 1))

    def best(rows: Any) -> tuple[float, int, int]:
        counts = []
        for t, k in zip(targets, classes, strict=True):
            flat = np.bincount((places[rows] * k + t[rows][:, None]).ravel(), minlength=features * width * k)
            counts.append(flat.reshape(features, width, k))
        left = [c.cumsum(axis=1) for c in counts]
        right = [c[:, -1:] - c for c in left]
        below, above = left[0].sum(-1), right[0].sum(-1)
        gain = impurity([c[0, -1] for c in left]) - (below * impurity(left) + above * impurity(right)) / len(rows)
        gain = np.where((below >= leaf_rows) & (above >= leaf_rows), gain, -np.inf)
        at = int(gain.argmax())
        return float(gain.flat[at]) * len(rows), at // width, at % width

    every = np.arange(len(codes))
    waiting, nodes = [(*best(every), every)], 1
    for _ in range(leaves - 1):
        waiting.sort(key=lambda w: w[0])
        if not waiting or waiting[-1][0] <= 0:
            break
        _, feature, code, rows = waiting.pop()
        left = codes[rows, feature] <= code
        for side in (rows[left], rows[~left]):
            waiting.append((*best(side), side))
        nodes += 2
    return nodes
