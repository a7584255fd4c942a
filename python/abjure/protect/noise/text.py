"""Noise from captions: a generator turns text into a perturbation, and neither image nor third party is needed for it.

After "Text-to-unlearnable example" (T2UE, arXiv 2508.03091): a generator over a text-to-image model is trained so that
contrastive image–text training finds the agreement of noise and caption and not the content. The paper's generator,
losses and data are not public; the loss here is this library's reading of it (symmetric InfoNCE, minimised over
generator and surrogate alike), and :func:`train_text_generator` makes a small generator from words alone. A real
text-to-image model is plugged in as any callable of :class:`NoiseGenerator`'s form.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ... import _interop
from ..._files import write_atomically
from ...errors import ArgumentError, NonFiniteError, ShapeError
from ..ascent import _Bar, _positive
from .onepass import _whole
from .result import Channels, Images, Noised, check_budget, check_seed, finish, images
from .surrogate import check_values, store

#: Words and pieces of words fall into so many cells.
BUCKETS = 4096
#: Numbers that vary a caption's noise from image to image.
LATENT = 8
_WORD = re.compile(r"\w+")


class NoiseGenerator(Protocol):
    """Text to noise: what :func:`text_conditioned` needs, and all it needs."""

    def __call__(self, captions: Sequence[str], shape: tuple[int, int, int], seed: int) -> Any:
        """Noise for each caption: ``(n, channels, height, width)`` real numbers of any range (a tensor or array).

        ``shape`` is what the images have; another height and width is resized, one channel is repeated. A text-to-image
        pipeline fits with a few lines: its pictures as arrays, less their mean.
        """


def token_cells(caption: str) -> list[int]:
    """The cells of a caption's words and of their three-letter pieces, lower case; the same on every machine."""
    cells = []
    for word in _WORD.findall(caption.lower()):
        marked = f"<{word}>"
        pieces = [marked, *(marked[i : i + 3] for i in range(len(marked) - 2))]
        cells += [zlib.crc32(p.encode()) % BUCKETS for p in pieces]
    return cells


def _bags(captions: Sequence[str]) -> tuple[Any, Any]:
    """Cells of all captions and where each caption's begin, for an embedding bag."""
    import torch

    cells = [token_cells(c) for c in captions]
    starts = np.cumsum([0, *(len(c) for c in cells[:-1])])
    flat = [c for part in cells for c in part]
    return torch.tensor(flat, dtype=torch.int64), torch.from_numpy(starts.astype(np.int64))


def _captions(captions: Any, n: int | None = None) -> list[str]:
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise ArgumentError("captions: expected a sequence of strings")
    found = list(captions)
    if n is not None and len(found) != n:
        raise ShapeError(f"captions: expected {n}, one per image, got {len(found)}")
    empty = [i for i, c in enumerate(found) if not _WORD.search(c)]
    if empty:
        raise ArgumentError(f"captions: expected words, got {found[empty[0]]!r} at index {empty[0]}")
    return found


def _intake(
    x: Any, captions: Any, labels: Any, box: tuple[float, float], channels: Channels
) -> tuple[Images, list[str]]:
    shape = _interop.shape(x, "x")
    found = _captions(captions, shape[0] if shape else 0)
    if labels is None:
        _, labels = np.unique(found, return_inverse=True)
    return images(x, labels, box, channels), found


def text_conditioned(
    x: Any,
    captions: Sequence[str],
    generator: NoiseGenerator,
    *,
    epsilon: float = 8 / 255,
    labels: Any = None,
    batch_size: int = 256,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    progress: bool | Callable[[int], object] | None = None,
) -> Noised:
    """Add to every image what a generator makes of its caption: ``epsilon · tanh(G(caption, z))``, within the box.

    Args:
        x: ``(n, ...)`` images: f64, f32, f16, bf16, or uint8, whose values are read as multiples of 1/255.
        captions: n strings.
        generator: see :class:`NoiseGenerator`; from :func:`train_text_generator`, or around a text-to-image model.
        epsilon: L∞ budget of a row in units of ``x`` (of 1 = 255 for uint8); it holds for the stored values.
        labels: ``(n,)`` integers for readings and :func:`~abjure.protect.stress`; None numbers the distinct captions.
        batch_size: captions per call of the generator.
        box, channels: as in :func:`class_mean_shift`.
        seed: batch k is generated with ``seed + k``.
        progress: True or False shows or hides a bar of batches, None shows it on a terminal; or a callable.

    Raises:
        ShapeError: another number of captions, or noise of a shape that does not fit.
        ArgumentError: captions without words, an option outside its domain, or a value outside ``box``.
        NonFiniteError: the generator's output is not finite.
        DegenerateError: all captions are the same and no labels are given.
    """
    data, found = _intake(x, captions, labels, box, channels)
    epsilon, seed = check_budget(data, "linf", epsilon), check_seed(seed)
    batch_size = _whole(batch_size, "batch_size", 1)
    if not callable(generator):
        raise ArgumentError(f"generator: expected a callable, got {type(generator).__name__}")
    check_values(data)
    import torch

    planes, height, width, step = data.layout
    shape = (planes * step, height, width)
    delta = torch.empty((len(found), *shape))
    batches = range(0, len(found), batch_size)
    with _Bar(progress, len(batches), "noise from text", "batch") as report:
        for done, start in enumerate(batches):
            part = found[start : start + batch_size]
            noise = _fit(generator(part, shape, seed + done), len(part), shape)
            delta[start : start + len(part)] = epsilon * torch.tanh(noise)
            if report is not None:
                report(done + 1)
    target = data.empty(None)
    store(data, delta, data.limits("linf", epsilon), target)
    settings = {"epsilon": epsilon, "generator": type(generator).__name__, "box": data.box, "seed": seed}
    return finish(data, target, None, "text_conditioned", "linf", epsilon, settings)


def _fit(noise: Any, n: int, shape: tuple[int, int, int]) -> Any:
    """A generator's output as a float32 tensor of n images of ``shape``."""
    import torch
    from torch.nn import functional as F

    noise = noise.detach().cpu() if isinstance(noise, torch.Tensor) else torch.as_tensor(np.asarray(noise))
    noise = noise.to(torch.float32)
    if noise.ndim != 4 or noise.shape[0] != n or noise.shape[1] not in (1, shape[0]):
        raise ShapeError(f"generator: expected noise of shape {(n, *shape)}, got {tuple(noise.shape)}")
    if not bool(torch.isfinite(noise).all()):
        raise NonFiniteError("generator: non-finite noise")
    if tuple(noise.shape[2:]) != shape[1:]:
        noise = F.interpolate(noise, size=shape[1:], mode="bilinear", align_corners=False)
    return noise.expand(n, *shape)


def contrastive_loss(similarity: Any, same: Any) -> Any:
    """Symmetric InfoNCE of a batch's similarities (already over the temperature).

    ``-½ mean_i [log softmax_j(s_ij)_ii + log softmax_i(s_ij)_ii]`` where captions differ; pairs whose captions are the
    same word for word (``same``) share the target evenly instead of being each other's negatives.
    """
    target = same / same.sum(1, keepdim=True)
    rows = -(target * similarity.log_softmax(1)).sum(1).mean()
    columns = -(target * similarity.log_softmax(0)).sum(0).mean()
    return 0.5 * (rows + columns)


class ContrastivePair:
    """An image encoder and a text encoder with a learned temperature: surrogate here, and judge of what was learnt."""

    def __init__(self, shape: tuple[int, int, int], *, size: int = 64, seed: int = 0) -> None:
        import torch
        from torch import nn

        from .. import networks

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image = networks.cnn(shape, size, norm=True)
            self.words = nn.EmbeddingBag(BUCKETS, size, mode="mean")
            self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def parameters(self) -> list[Any]:
        return [*self.image.parameters(), *self.words.parameters(), self.scale]

    def similarity(self, x: Any, captions: Sequence[str]) -> Any:
        """Cosines of all images with all captions, over the temperature."""
        from torch.nn import functional as F

        text = F.normalize(self.words(*_bags(captions)), dim=1)
        return F.normalize(self.image(x), dim=1) @ text.T * self.scale.clamp(max=float(np.log(100))).exp()

    def step(self, optimiser: Any, x: Any, captions: Sequence[str]) -> float:
        """One step on a batch; its loss."""
        self.image.train()
        optimiser.zero_grad()
        loss = contrastive_loss(self.similarity(x, captions), _same(captions))
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    def fit(
        self,
        x: Any,
        captions: Sequence[str],
        *,
        epochs: int = 5,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> ContrastivePair:
        """Contrastive training on ``(n, channels, h, w)`` float images and their captions."""
        import torch

        from .. import networks

        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(self.parameters(), lr=learning_rate)
        for _ in range(epochs):
            for rows in networks.shuffled(len(x), batch_size, generator):
                self.step(optimiser, x[rows], [captions[i] for i in rows.tolist()])
        self.image.eval()
        return self

    def retrieval(self, x: Any, captions: Sequence[str]) -> float:
        """Share of images whose most similar caption, among the distinct ones, is their own."""
        import torch

        self.image.eval()
        distinct = sorted(set(captions))
        place = torch.tensor([distinct.index(c) for c in captions])
        with torch.no_grad():
            return float((self.similarity(x, distinct).argmax(1) == place).float().mean())


def _same(captions: Sequence[str]) -> Any:
    import torch

    _, codes = np.unique(captions, return_inverse=True)
    place = torch.from_numpy(codes.reshape(-1))
    return (place[:, None] == place[None, :]).float()


def _network(channels: int, side: int, width: int) -> Any:
    from torch import nn

    layers: list[nn.Module] = [nn.Linear(width + LATENT, 4 * width), nn.ReLU(), nn.Linear(4 * width, 2 * width * 16)]
    layers += [nn.ReLU(), nn.Unflatten(1, (2 * width, 4, 4))]
    at, inside = 4, 2 * width
    while at < side:
        outside = max(inside // 2, 16)
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()]
        at, inside = 2 * at, outside
    return nn.Sequential(*layers, nn.Conv2d(inside, channels, 3, padding=1))


class TextGenerator:
    """A small :class:`NoiseGenerator` from hashed words; made by :func:`train_text_generator`, saved and loaded as one
    safetensors file."""

    def __init__(self, channels: int = 1, side: int = 32, *, width: int = 64, seed: int = 0) -> None:
        import torch
        from torch import nn

        self.channels, self.side, self.width = channels, side, width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.EmbeddingBag(BUCKETS, width, mode="mean")
            self.network = _network(channels, side, width)

    def parameters(self) -> list[Any]:
        return [*self.words.parameters(), *self.network.parameters()]

    def noise(self, captions: Sequence[str], shape: tuple[int, int, int], random: Any) -> Any:
        """Noise with its gradient, latent numbers drawn from a torch generator."""
        import torch
        from torch.nn import functional as F

        latent = torch.randn((len(captions), LATENT), generator=random)
        raw = self.network(torch.cat([self.words(*_bags(captions)), 0.1 * latent], dim=1))
        if tuple(raw.shape[2:]) != tuple(shape[1:]):
            raw = F.interpolate(raw, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
        return raw

    def __call__(self, captions: Sequence[str], shape: tuple[int, int, int], seed: int) -> Any:
        import torch

        with torch.no_grad():
            return self.noise(_captions(captions), shape, torch.Generator().manual_seed(seed))

    def _tensors(self) -> dict[str, Any]:
        parts = (("words", self.words), ("network", self.network))
        return {f"{name}.{k}": v for name, part in parts for k, v in part.state_dict().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the generator to a safetensors file that is complete or not there."""
        from safetensors.torch import save

        about = {"kind": "abjure.TextGenerator", "channels": self.channels, "side": self.side, "width": self.width}
        write_atomically(path, save(self._tensors(), {k: str(v) for k, v in about.items()}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextGenerator:
        """The reverse of :meth:`save`.

        Raises:
            ArgumentError: no such file, or no saved generator.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "pt") as file:
                about = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            if about.get("kind") != "abjure.TextGenerator":
                raise ArgumentError(f"path: expected a saved TextGenerator, got {os.fspath(path)!r}")
            made = cls(int(about["channels"]), int(about["side"]), width=int(about["width"]))
            for name, part in (("words", made.words), ("network", made.network)):
                own = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
                part.load_state_dict(own)
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as err:
            if isinstance(err, ArgumentError):
                raise
            raise ArgumentError(f"path: expected a saved TextGenerator, got {os.fspath(path)!r} ({err})") from err
        return made


def train_text_generator(
    x: Any,
    captions: Sequence[str],
    *,
    epsilon: float = 8 / 255,
    rounds: int = 200,
    train_batches: int = 1,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    width: int = 64,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    progress: bool | Callable[[int], object] | None = None,
) -> TextGenerator:
    """Train a small text-to-noise generator on images and captions, offline.

    Rounds of ``train_batches`` steps of a contrastive pair of encoders on protected images, then one step of the
    generator *down* the same loss (min–min, as in error-minimising noise): noise that already says the caption leaves
    the encoders nothing to learn from the image.

    Args:
        x: ``(n, ...)`` images to train on, as in :func:`text_conditioned`.
        captions: n strings.
        epsilon: L∞ budget that the generator learns for.
        rounds: steps of the generator.
        train_batches: steps of the encoders per round.
        batch_size, learning_rate: of both (Adam).
        width: numbers per word.
        box, channels: as in :func:`class_mean_shift`.
        seed: of weights, batches and latent numbers.
        progress: True or False shows or hides a bar of rounds, None shows it on a terminal; or a callable.

    Raises:
        As :func:`text_conditioned`.
    """
    data, found = _intake(x, captions, None, box, channels)
    epsilon, seed = check_budget(data, "linf", epsilon), check_seed(seed)
    rounds, train_batches = _whole(rounds, "rounds", 1), _whole(train_batches, "train_batches", 1)
    batch_size, width = _whole(batch_size, "batch_size", 2), _whole(width, "width", 8)
    learning_rate = _positive(learning_rate, "learning_rate")
    check_values(data)
    import torch

    from .. import networks

    clean = data.planar()
    shape = (int(clean.shape[1]), int(clean.shape[2]), int(clean.shape[3]))
    made = TextGenerator(shape[0], min(max(shape[1:]), 64), width=width, seed=seed)
    pair = ContrastivePair(shape, seed=seed + 1)
    own = torch.optim.Adam(made.parameters(), lr=learning_rate)
    theirs = torch.optim.Adam(pair.parameters(), lr=learning_rate)
    random = torch.Generator().manual_seed(seed)
    low, high = data.box

    def endless() -> Any:
        while True:
            yield from networks.shuffled(len(clean), batch_size, random)

    batches = endless()

    def protected(rows: Any) -> tuple[Any, list[str]]:
        words = [found[i] for i in rows.tolist()]
        return (clean[rows] + epsilon * torch.tanh(made.noise(words, shape, random))).clamp(low, high), words

    with _Bar(progress, rounds, "text generator", "round") as report:
        for done in range(1, rounds + 1):
            for _ in range(train_batches):
                with torch.no_grad():
                    shown, words = protected(next(batches))
                pair.step(theirs, shown, words)
            pair.image.eval()
            shown, words = protected(next(batches))
            loss = contrastive_loss(pair.similarity(shown, words), _same(words))
            own.zero_grad()
            loss.backward()
            own.step()
            if report is not None:
                report(done)
    return made


__all__ = ["ContrastivePair", "NoiseGenerator", "TextGenerator", "text_conditioned", "train_text_generator"]
