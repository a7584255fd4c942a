"""Label-Agnostic Forgetting (Shen and others, arXiv 2404.00506): unlearning through embeddings, without labels."""

from __future__ import annotations

import copy
import html
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .._modes import modes_kept
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError

__all__ = [
    "LAF_PRESETS",
    "LAFReport",
    "alignment_loss",
    "bounded_error",
    "kl_to_standard_normal",
    "label_agnostic_forget",
]

#: The published constants, by data set and kind of request (class removal; random or mislabelled samples).
LAF_PRESETS: dict[str, dict[str, float | int]] = {
    "cnn_random": {"latent": 8, "epochs": 20, "lr_extractor": 5e-5, "lr_alignment": 1e-4, "temperature": 5.0},
    "cnn_class": {"latent": 8, "epochs": 20, "lr_extractor": 5e-5, "lr_alignment": 1e-4, "temperature": 20.0},
    "cnn_noisy": {"latent": 8, "epochs": 20, "lr_extractor": 5e-5, "lr_alignment": 1e-4, "temperature": 20.0},
    "resnet_random": {"latent": 16, "epochs": 40, "lr_extractor": 1e-5, "lr_alignment": 4e-5, "temperature": 20.0},
    "resnet_class": {"latent": 16, "epochs": 40, "lr_extractor": 1e-5, "lr_alignment": 5e-5, "temperature": 20.0},
    "resnet_noisy": {"latent": 16, "epochs": 40, "lr_extractor": 1e-5, "lr_alignment": 4e-5, "temperature": 5.0},
}


def bounded_error(reconstruction: Any, e: Any) -> Any:
    """``sum_i phi(||e^_i - e_i||^2)`` with ``phi(m) = exp(m / (m + 1))`` in [1, e): an outlier cannot dominate.

    Args:
        reconstruction: ``(b, d)`` tensor, the autoencoder's output.
        e: ``(b, d)`` embeddings; the gradient flows through both.

    Returns:
        A scalar tensor.
    """
    m = (reconstruction - e).square().sum(dim=1)
    # 1 - 1 / (m + 1) stays finite, gradient included, where m overflows.
    return (1 - 1 / (m + 1)).exp().sum()


def alignment_loss(retain: Any, retain_teacher: Any, forget: Any, forget_teacher: Any, temperature: float) -> Any:
    """``sum_i d_i^R - b_R logsumexp_j(d_j^F / T)`` with ``d = 1 - cos(e, teacher's e)``.

    Retained embeddings stay with the original model's, forgotten ones leave them. The published code takes the log of a
    quotient of exponentials; this is the same, rearranged. The cosine of a row of zeros counts as 0.

    Args:
        retain, retain_teacher: ``(b_R, d)`` embeddings of retained samples, by the model and by the original.
        forget, forget_teacher: ``(b_F, d)``, those of samples to be forgotten.
        temperature: T, above 0.

    Returns:
        A scalar tensor.
    """
    from torch.nn import functional

    away = 1 - functional.cosine_similarity(retain, retain_teacher, dim=1)
    gone = 1 - functional.cosine_similarity(forget, forget_teacher, dim=1)
    return away.sum() - len(away) * (gone / temperature).logsumexp(dim=0)


def kl_to_standard_normal(mu: Any, sigma: Any) -> Any:
    """``-1/2 sum (ln(sigma^2 + 1e-8) + 1 - mu^2 - sigma^2) / b``, as published; mu and sigma ``(b, latent)``."""
    return -0.5 * ((sigma.square() + 1e-8).log() + 1 - mu.square() - sigma.square()).sum() / len(mu)


@dataclass(frozen=True)
class LAFReport:
    """How the losses of :func:`label_agnostic_forget` went, one mean per epoch."""

    #: Autoencoder losses: ``"retain"`` (on all or on retained data) and ``"forget"``.
    autoencoders: dict[str, list[float]]
    extractor: list[float]
    alignment: list[float]
    repair: list[float] = field(default_factory=list)
    #: Pairs of batches per epoch.
    pairs: int = 0

    def __str__(self) -> str:
        parts = [f"{name} autoencoder {v[0]:.4g} to {v[-1]:.4g}" for name, v in self.autoencoders.items()]
        for name in ("extractor", "alignment", "repair"):
            v = getattr(self, name)
            if v:
                parts.append(f"{name} loss {v[0]:.4g} to {v[-1]:.4g}")
        return f"{len(self.extractor)} epochs of {self.pairs} pairs of batches; " + ", ".join(parts) + "."

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{i + 1}</td><td>{a:.6g}</td><td>{b:.6g}</td></tr>"
            for i, (a, b) in enumerate(zip(self.extractor, self.alignment, strict=True))
        )
        head = "<tr><th>epoch</th><th>extractor loss</th><th>alignment loss</th></tr>"
        return f"<p>{html.escape(str(self))}</p><table>{head}{rows}</table>"

    def plot(self, axes: Any = None) -> Any:
        """Autoencoder losses, and the two losses of the unlearning, by epoch; returns two matplotlib axes."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for name, v in self.autoencoders.items():
            axes[0].plot(range(1, len(v) + 1), v, marker=".", label=f"autoencoder, {name}")
        for name in ("extractor", "alignment"):
            v = getattr(self, name)
            axes[1].plot(range(1, len(v) + 1), v, marker=".", label=name)
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.set_ylabel("loss")
            ax.legend()
        return axes


def label_agnostic_forget(
    model: Any,
    retain: Iterable[Any],
    forget: Iterable[Any],
    *,
    embedding: str | None = None,
    latent: int = 16,
    epochs: int = 40,
    lr_extractor: float = 1e-5,
    lr_alignment: float = 4e-5,
    temperature: float = 20.0,
    autoencoder_epochs: int = 10,
    autoencoder_lr: float = 1e-3,
    kl_weight: float = 0.025,
    autoencoder_data: Literal["all", "retain"] = "all",
    decoder: Literal["linear", "sigmoid"] = "linear",
    train_mode: bool = False,
    repair_epochs: int = 0,
    repair_lr: float = 1e-4,
    repair_head: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LAFReport:
    """Unlearns in place without labels: moves the embeddings of the forget set away from their distribution.

    Two variational autoencoders learn the original embeddings, one of all training data and one of the forget set.
    Then, for every pair of batches: a step of the extractor loss, ``sum_retain phi - sum_forget phi`` of their
    reconstruction errors (:func:`bounded_error`), and a step of :func:`alignment_loss` against the original model. An
    epoch ends with the shorter loader, as published. The losses are sums over a batch, so that the rates go with its
    size. If anything fails or is interrupted, the model has its original weights.

    Args:
        model: a torch classifier; modified.
        retain: batches of retained training data: inputs, ``(inputs, ...)`` or mappings (``labels`` is left out). Read
            once per epoch.
        forget: batches of the forget set, the same.
        embedding: name of the submodule whose output ``(b, d)`` is the embedding; by default the input of the last
            ``torch.nn.Linear``.
        latent, epochs, lr_extractor, lr_alignment, temperature: published values by model and request are in
            :data:`LAF_PRESETS` (``**LAF_PRESETS["cnn_class"]``); the defaults are those of a ResNet.
        autoencoder_epochs, autoencoder_lr, kl_weight: of the two autoencoders (Adam).
        autoencoder_data: what the first autoencoder learns from: all training data, as the published code, or the
            retained data.
        decoder: ``"linear"`` last layer, or ``"sigmoid"`` as published, which cannot reach embeddings outside (0, 1).
        train_mode: unlearn in train mode. By default the model stays in eval mode: no dropout, running statistics as
            they are.
        repair_epochs: epochs of supervised repair of the head alone, with the labels of ``retain`` (pairs, or mappings
            with ``labels``); published, but not used there.
        repair_lr: its rate (Adam).
        repair_head: name of the submodule to repair; by default the last ``torch.nn.Linear``.
        seed: of the autoencoders' initial weights and noise. The global random state is left as it was.
        progress: show progress bars where standard error is a terminal.

    Returns:
        The losses.

    Raises:
        DegenerateError: an empty loader, or one that can be read only once.
        ArgumentError: a number out of range, an unknown submodule, or no ``torch.nn.Linear``.
        ShapeError: embeddings that are not ``(b, d)``.
        NonFiniteError: an embedding or a loss is NaN or infinite.
        The model is unchanged then.

    Source: Shen and others, "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models",
    ICLR 2024, arXiv 2404.00506, and its code.
    """
    import torch

    _check(
        latent=(latent, 1),
        epochs=(epochs, 1),
        autoencoder_epochs=(autoencoder_epochs, 1),
        repair_epochs=(repair_epochs, 0),
    )
    for name, rate in (
        ("lr_extractor", lr_extractor),
        ("lr_alignment", lr_alignment),
        ("temperature", temperature),
        ("autoencoder_lr", autoencoder_lr),
        ("repair_lr", repair_lr),
    ):
        if not rate > 0:
            raise ArgumentError(f"{name}: expected a number above 0, got {rate}")
    if autoencoder_data not in ("all", "retain") or decoder not in ("linear", "sigmoid"):
        given = f"{autoencoder_data!r} and {decoder!r}"
        raise ArgumentError(
            f"autoencoder_data, decoder: expected 'all' or 'retain', 'linear' or 'sigmoid', got {given}"
        )
    for loader, name in ((retain, "retain"), (forget, "forget")):
        if iter(loader) is loader:
            raise DegenerateError(f"{name}: expected a loader that can be read again, got an iterator")
    teacher = copy.deepcopy(model).eval()
    embed, embed_teacher = _Embedder(model, embedding), _Embedder(teacher, embedding)
    head = _submodule(model, repair_head, "repair_head") if repair_epochs else None
    start = {k: v.clone() for k, v in model.state_dict().items()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with modes_kept(model):
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                with torch.no_grad():
                    kept, gone = (_all(embed_teacher, x, n) for x, n in ((retain, "retain"), (forget, "forget")))
                fit = _Fit(latent, decoder == "sigmoid", autoencoder_epochs, autoencoder_lr, kl_weight, progress)
                everything = torch.cat([kept, gone]) if autoencoder_data == "all" else kept
                coders, curves = {}, {}
                for name, rows in (("retain", everything), ("forget", gone)):
                    coders[name], curves[name] = fit(rows, name)
                model.train(train_mode)
                traces = _unlearn(
                    embed,
                    embed_teacher,
                    coders,
                    retain,
                    forget,
                    epochs,
                    lr_extractor,
                    lr_alignment,
                    temperature,
                    progress,
                )
                repaired = _repair(model, head, retain, repair_epochs, repair_lr) if head is not None else []
        except BaseException:
            model.load_state_dict(start)
            raise
    return LAFReport(curves, traces[0], traces[1], repaired, traces[2])


def _check(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}: expected an integer of {least} or more, got {value!r}")


def _submodule(model: Any, name: str | None, argument: str) -> Any:
    """The named submodule, or the last linear layer."""
    import torch

    if not hasattr(model, "named_modules"):
        raise DTypeError(f"model: expected a torch module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    if name is None:
        linear = [m for m in modules.values() if isinstance(m, torch.nn.Linear)]
        if not linear:
            raise ArgumentError(f"{argument}: expected a name, as the model has no torch.nn.Linear")
        return linear[-1]
    if name not in modules:
        raise ArgumentError(f"{argument}: expected the name of a submodule, got {name!r}")
    return modules[name]


class _Embedder:
    """Runs a model and returns what went into its head."""

    def __init__(self, model: Any, name: str | None) -> None:
        self.model = model
        self._module = _submodule(model, name, "embedding")
        self._before = name is None

    def __call__(self, batch: Any) -> Any:
        import torch

        seen: list[Any] = []
        if self._before:
            handle = self._module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        else:
            handle = self._module.register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            if isinstance(batch, Mapping):
                self.model(**{k: self._moved(v) for k, v in batch.items() if k != "labels"})
            else:
                self.model(self._moved(batch[0] if isinstance(batch, (tuple, list)) else batch))
        finally:
            handle.remove()
        if len(seen) != 1 or not isinstance(seen[0], torch.Tensor) or seen[0].ndim != 2:
            found = [tuple(getattr(s, "shape", ())) for s in seen]
            raise ShapeError(f"embedding: expected one tensor of shape (b, d) per batch, got {found}")
        return seen[0]

    def _moved(self, x: Any) -> Any:
        device = next(self.model.parameters()).device
        return x.to(device) if hasattr(x, "to") else x


def _all(embed: _Embedder, loader: Iterable[Any], name: str) -> Any:
    import torch

    rows = [embed(batch) for batch in loader]
    if not rows or not sum(map(len, rows)):
        raise DegenerateError(f"{name}: expected at least one sample, got none")
    found = torch.cat(rows).float()
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(f"{name}: expected finite embeddings, got NaN or infinity")
    return found


@dataclass(frozen=True)
class _Fit:
    """Trains a variational autoencoder on rows of embeddings."""

    latent: int
    sigmoid: bool
    epochs: int
    lr: float
    kl_weight: float
    progress: bool

    def __call__(self, rows: Any, name: str) -> tuple[Callable[[Any], Any], list[float]]:
        import torch
        from torch import nn
        from tqdm.auto import tqdm

        d = rows.shape[1]

        def stack(*widths: int) -> list[nn.Module]:
            return [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]

        encoder = nn.Sequential(*stack(d, 128, 32)).to(rows.device)
        mean, deviation = (nn.Linear(32, self.latent).to(rows.device) for _ in range(2))
        last: list[nn.Module] = [nn.Linear(128, d), *([nn.Sigmoid()] if self.sigmoid else [])]
        decode = nn.Sequential(*stack(self.latent, 32, 128), *last).to(rows.device)
        parameters = [p for m in (encoder, mean, deviation, decode) for p in m.parameters()]

        def code(e: Any) -> tuple[Any, Any, Any]:
            h = encoder(e.float())
            mu, sigma = mean(h), (0.5 * deviation(h)).exp()
            return decode(mu + sigma * torch.randn_like(sigma)), mu, sigma

        optimiser = torch.optim.Adam(parameters, lr=self.lr)
        curve = []
        bar = tqdm(
            range(self.epochs), desc=f"autoencoder, {name}", unit="epoch", disable=None if self.progress else True
        )
        for _ in bar:
            total = 0.0
            for chunk in torch.split(torch.randperm(len(rows), device=rows.device), 128):
                e = rows[chunk]
                out, mu, sigma = code(e)
                loss = (out - e).square().sum() / len(e) + self.kl_weight * kl_to_standard_normal(mu, sigma)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += _finite(loss, f"autoencoder of {name}") * len(e)
            curve.append(total / len(rows))
        for p in parameters:
            p.requires_grad_(False)
        return lambda e: code(e)[0], curve


def _finite(loss: Any, what: str) -> float:
    value = float(loss.detach())
    if not -float("inf") < value < float("inf"):
        raise NonFiniteError(f"{what}: expected a finite loss, got {value}; lower its rate")
    return value


def _unlearn(
    embed: _Embedder,
    embed_teacher: _Embedder,
    coders: Mapping[str, Callable[[Any], Any]],
    retain: Iterable[Any],
    forget: Iterable[Any],
    epochs: int,
    lr_extractor: float,
    lr_alignment: float,
    temperature: float,
    progress: bool,
) -> tuple[list[float], list[float], int]:
    import torch
    from tqdm.auto import tqdm

    parameters = [p for p in embed.model.parameters() if p.requires_grad]
    first, second = (torch.optim.Adam(parameters, lr=lr) for lr in (lr_extractor, lr_alignment))

    def step(optimiser: Any, loss: Any, what: str) -> float:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        value = _finite(loss, what)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimiser.step()
        return value

    before = [p.grad for p in parameters]
    extractor, alignment, pairs = [], [], 0
    try:
        for _ in tqdm(range(epochs), desc="label-agnostic", unit="epoch", disable=None if progress else True):
            sums, pairs = [0.0, 0.0], 0
            for gone, kept in zip(forget, retain, strict=False):
                e_kept, e_gone = embed(kept), embed(gone)
                loss = bounded_error(coders["retain"](e_kept), e_kept) - bounded_error(coders["forget"](e_gone), e_gone)
                sums[0] += step(first, loss, "extractor loss")
                with torch.no_grad():
                    t_kept, t_gone = embed_teacher(kept), embed_teacher(gone)
                loss = alignment_loss(embed(kept), t_kept, embed(gone), t_gone, temperature)
                sums[1] += step(second, loss, "alignment loss")
                pairs += 1
            extractor.append(sums[0] / pairs)
            alignment.append(sums[1] / pairs)
    finally:
        for p, g in zip(parameters, before, strict=True):
            p.grad = g
    return extractor, alignment, pairs


def _repair(model: Any, head: Any, retain: Iterable[Any], epochs: int, lr: float) -> list[float]:
    import torch

    from ..measure.outputs import labelled

    parameters = list(head.parameters())
    optimiser = torch.optim.Adam(parameters, lr=lr)
    before = [p.grad for p in parameters]
    curve = []
    try:
        for _ in range(epochs):
            values = []
            for batch in retain:
                logits, labels = labelled(model, batch)
                loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
                values.append(_finite(loss, "repair"))
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.grad = g
                optimiser.step()
            curve.append(sum(values) / len(values))
    finally:
        for p, g in zip(parameters, before, strict=True):
            p.grad = g
    return curve
