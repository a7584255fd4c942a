"""Noise that is trained against a network: error-minimising noise and adversarial poisoning; needs torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ... import _native
from ...errors import ArgumentError
from ..ascent import _Bar, _positive
from .onepass import _whole
from .result import Channels, Images, Noised, check_budget, check_seed, finish, images

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Rows whose perturbations go through the budget's kernel at a time.
STORE_ROWS = 2048


def store(data: Images, delta: Any, limits: tuple[str, float, float, float], out: Any) -> None:
    """``out = x + delta`` with one perturbation per row (float32, in units of one), exactly within budget and box."""
    for start in range(0, len(data.codes), STORE_ROWS):
        part = slice(start, start + STORE_ROWS)
        rows = np.asarray(data.flatten(delta[part]).numpy(), dtype=np.float64) * data.scale
        every = np.arange(len(rows), dtype=np.int64)
        _native.noise_add(data.matrix[part], every, rows.reshape(-1), limits, out[part])


def check_values(data: Images) -> None:
    """Refuses values outside the box before a model is trained on them."""
    low, high = data.box
    _native.noise_class_sums(data.matrix, data.codes, len(data.classes), (low * data.scale, high * data.scale))


def _surrogate(factory: Any, data: Images, seed: int) -> nn.Module:
    from .. import networks

    planes, height, width, step = data.layout
    if factory is None:
        return networks.fresh(
            lambda shape, classes: networks.cnn(shape, classes, norm=True),
            (planes * step, height, width),
            len(data.classes),
            seed,
        )
    return networks.fresh(factory, (planes * step, height, width), len(data.classes), seed)


def error_minimizing(
    x: Any,
    y: Any,
    *,
    epsilon: float = 8 / 255,
    per: Literal["sample", "class"] = "sample",
    steps: int | None = None,
    step_size: float | None = None,
    stop_error: float | None = None,
    train_batches: int = 10,
    class_share: float = 0.2,
    max_rounds: int = 100,
    model: Callable[[tuple[int, int, int], int], nn.Module] | None = None,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    progress: bool | Callable[[int], object] | None = None,
) -> Noised:
    """Perturb data so that a network has nothing left to learn from them: min over weights and noise of the loss (EM).

    Huang, Ma, Erfani, Bailey and Wang, "Unlearnable examples" (ICLR 2021), equations 3 and 4 and algorithm 1. Rounds
    of: ``train_batches`` steps of SGD (momentum 0.9, weight decay 5e-4) on perturbed batches, then ``steps`` sign
    steps *down* the loss of every row's perturbation, until the training error on perturbed data is below
    ``stop_error``. Per class, a class's perturbation becomes the mean of its rows' new ones, batch by batch, on
    ``class_share`` of the data.

    Args:
        epsilon: L∞ budget of a row in units of ``x`` (of 1 = 255 for uint8); it holds for the stored values.
        per: ``"sample"`` or ``"class"``.
        steps: None is the paper's 20 per sample, 1 per class.
        step_size: None is the paper's ``epsilon / 10``.
        stop_error: None is the paper's 0.01 per sample, 0.1 per class.
        train_batches: M of the paper.
        max_rounds: after which it ends with a warning.
        model: makes the surrogate from ``(channels, height, width)`` and the number of classes; None is a small
            convolutional network with batch normalisation (the paper takes a ResNet-18).
        learning_rate, batch_size: of the surrogate.
        x, y, box, channels: as in :func:`class_mean_shift`.
        seed: of weights, batches and the start (zero per sample; uniform noise per class).
        progress: True or False shows or hides a bar of rounds, None shows it on a terminal; or a callable.

    Returns:
        The published data; ``trace`` is the training error after every round.

    Raises:
        As :func:`class_mean_shift`.
    """
    data = images(x, y, box, channels)
    epsilon, seed = check_budget(data, "linf", epsilon), check_seed(seed)
    if per not in ("sample", "class"):
        raise ArgumentError(f"per: expected 'sample' or 'class', got {per!r}")
    steps = _whole((20 if per == "sample" else 1) if steps is None else steps, "steps", 1)
    step_size = epsilon / 10 if step_size is None else _positive(step_size, "step_size")
    stop_error = (0.01 if per == "sample" else 0.1) if stop_error is None else float(stop_error)
    if not 0 <= stop_error <= 1:
        raise ArgumentError(f"stop_error: expected a number from 0 to 1, got {stop_error!r}")
    train_batches, max_rounds = _whole(train_batches, "train_batches", 1), _whole(max_rounds, "max_rounds", 1)
    batch_size = _whole(batch_size, "batch_size", 2)
    learning_rate = _positive(learning_rate, "learning_rate")
    if not 0 < class_share <= 1:
        raise ArgumentError(f"class_share: expected a number above 0, at most 1, got {class_share!r}")
    check_values(data)
    import torch
    from torch.nn import functional as F

    from .. import networks

    net = _surrogate(model, data, seed)
    generator = torch.Generator().manual_seed(seed)
    clean, labels = data.planar(), torch.from_numpy(data.codes)
    n, low, high = len(labels), *data.box
    optimiser = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    if per == "sample":
        noise = torch.zeros_like(clean)
        members = torch.arange(n)
    else:
        start = torch.rand((len(data.classes), *clean.shape[1:]), generator=generator)
        noise = (2 * start - 1) * epsilon
        share = max(int(n * class_share), min(n, 2 * len(data.classes)))
        members = torch.randperm(n, generator=generator)[:share].sort().values

    def delta(rows: Tensor) -> Tensor:
        part = noise[rows] if per == "sample" else noise[labels[rows]]
        moved: Tensor = (clean[rows] + part).clamp(low, high) - clean[rows]
        return moved

    def endless() -> Any:
        while True:
            yield from networks.shuffled(n, batch_size, generator)

    batches, trace = endless(), []
    with _Bar(progress, max_rounds, "error-minimising noise", "round") as report:
        for done in range(1, max_rounds + 1):
            net.train()
            for _ in range(train_batches):
                rows = next(batches)
                optimiser.zero_grad()
                loss = F.cross_entropy(net(clean[rows] + delta(rows)), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            net.eval()
            for part in torch.split(members, batch_size):
                own = delta(part)
                for _ in range(steps):
                    own.requires_grad_(True)
                    loss = F.cross_entropy(net(clean[part] + own), labels[part])
                    (gradient,) = torch.autograd.grad(loss, own)
                    with torch.no_grad():
                        own = (own - step_size * gradient.sign()).clamp(-epsilon, epsilon)
                        own = (clean[part] + own).clamp(low, high) - clean[part]
                if per == "sample":
                    noise[part] = own
                else:
                    codes = labels[part]
                    for c in np.unique(codes.numpy()):
                        noise[c] = own[codes == c].mean(0).clamp(-epsilon, epsilon)
            with torch.no_grad():
                hits = 0
                for rows in torch.split(torch.arange(n), 512):
                    hits += int((net(clean[rows] + delta(rows)).argmax(1) == labels[rows]).sum())
            trace.append(1 - hits / n)
            if report is not None:
                report(done)
            if trace[-1] < stop_error:
                break
        else:
            warnings.warn(
                f"error_minimizing: the training error is {trace[-1]:.3f} after {max_rounds} rounds, above "
                f"stop_error={stop_error}",
                stacklevel=2,
            )
    settings = {
        "epsilon": epsilon,
        "per": per,
        "steps": steps,
        "step_size": step_size,
        "stop_error": stop_error,
        "train_batches": train_batches,
        "box": data.box,
        "seed": seed,
    }
    return _publish(data, noise if per == "sample" else noise[labels], "error_minimizing", epsilon, settings, trace)


def _publish(
    data: Images, delta: Any, method: str, epsilon: float, settings: dict[str, Any], trace: list[float]
) -> Noised:
    target = data.empty(None)
    store(data, delta, data.limits("linf", epsilon), target)
    return finish(data, target, None, method, "linf", epsilon, settings, np.asarray(trace))


def adversarial_poison(
    x: Any,
    y: Any,
    *,
    epsilon: float = 8 / 255,
    steps: int = 250,
    restarts: int = 8,
    step_size: float | None = None,
    target: Literal["next", "away"] = "next",
    augment: bool = True,
    epochs: int = 10,
    model: Callable[[tuple[int, int, int], int], nn.Module] | None = None,
    learning_rate: float = 2e-3,
    batch_size: int = 128,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    progress: bool | Callable[[int], object] | None = None,
) -> Noised:
    """Turn data into adversarial examples of a network that was trained on them clean (TAP).

    Fowl, Goldblum, Chiang, Geiping, Czaja and Goldstein, "Adversarial examples make strong poisons" (NeurIPS 2021),
    section
    3: projected sign steps *toward* the label after the own one (``"next"``, the class-targeted recipe), or up the
    loss of the own (``"away"``, which the authors find sensitive to the seed), through random crops and flips, the
    best of ``restarts`` starts for each row. The paper's steps and starts cost ``steps · restarts`` passes over the
    data. Its code steps by signed Adam with a rate of 0.05 in units of normalised pixels; here a step is ``step_size``.

    Args:
        epsilon: L∞ budget of a row in units of ``x`` (of 1 = 255 for uint8); it holds for the stored values.
        steps, restarts: the paper's 250 and 8; tens and 1 do most of the work.
        step_size: None is ``epsilon / 10`` at 250 steps and in proportion more for fewer, at most ``epsilon / 2``.
        target: see above.
        augment: whether gradients are those of randomly moved and mirrored images.
        epochs, learning_rate, batch_size: of the surrogate (Adam with a falling rate).
        model: as in :func:`error_minimizing` (the paper takes a ResNet-18).
        x, y, box, channels: as in :func:`class_mean_shift`.
        seed: of weights, batches, starts (normal, of standard deviation ``epsilon / 2``, clipped) and augmentation.
        progress: True or False shows or hides a bar of batches, None shows it on a terminal; or a callable.

    Returns:
        The published data; ``trace`` is the mean loss by step over all rows, of the last start.

    Raises:
        As :func:`class_mean_shift`.
    """
    data = images(x, y, box, channels)
    epsilon, seed = check_budget(data, "linf", epsilon), check_seed(seed)
    steps, restarts = _whole(steps, "steps", 1), _whole(restarts, "restarts", 1)
    if target not in ("next", "away"):
        raise ArgumentError(f"target: expected 'next' or 'away', got {target!r}")
    epochs, batch_size = _whole(epochs, "epochs", 1), _whole(batch_size, "batch_size", 2)
    learning_rate = _positive(learning_rate, "learning_rate")
    step_size = min(25 * epsilon / steps, epsilon / 2) if step_size is None else _positive(step_size, "step_size")
    check_values(data)
    import torch
    from torch.nn import functional as F

    from .. import networks

    net = _surrogate(model, data, seed)
    clean, labels = data.planar(), torch.from_numpy(data.codes)
    networks.train(net, clean, labels, epochs=epochs, seed=seed, batch_size=batch_size, learning_rate=learning_rate)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    goal = (labels + 1) % len(data.classes) if target == "next" else labels
    sign = -1.0 if target == "next" else 1.0
    low, high = data.box
    noise, trace = torch.zeros_like(clean), np.zeros(steps)
    batches = torch.split(torch.arange(len(labels)), batch_size)
    with _Bar(progress, len(batches), "adversarial poison", "batch") as report:
        for done, rows in enumerate(batches):
            images_, wanted = clean[rows], goal[rows]
            best = torch.full((len(rows),), -math.inf)
            for restart in range(restarts):
                own = (torch.randn(images_.shape, generator=generator) * epsilon / 2).clamp(-epsilon, epsilon)
                own = (images_ + own).clamp(low, high) - images_
                for step in range(steps):
                    own.requires_grad_(True)
                    shown = images_ + own
                    if augment:
                        shown = networks.crop_and_flip(shown, generator)
                    losses = F.cross_entropy(net(shown), wanted, reduction="none")
                    (gradient,) = torch.autograd.grad(losses.sum(), own)
                    if restart == restarts - 1:
                        trace[step] += float(losses.detach().sum()) / len(labels)
                    with torch.no_grad():
                        own = (own + sign * step_size * gradient.sign()).clamp(-epsilon, epsilon)
                        own = (images_ + own).clamp(low, high) - images_
                with torch.no_grad():
                    score = sign * F.cross_entropy(net(images_ + own), wanted, reduction="none")
                better = score > best
                best = torch.where(better, score, best)
                noise[rows[better]] = own[better]
            if report is not None:
                report(done + 1)
    settings = {
        "epsilon": epsilon,
        "steps": steps,
        "restarts": restarts,
        "step_size": step_size,
        "target": target,
        "augment": augment,
        "epochs": epochs,
        "box": data.box,
        "seed": seed,
    }
    return _publish(data, noise, "adversarial_poison", epsilon, settings, list(trace))


__all__ = ["adversarial_poison", "error_minimizing"]
