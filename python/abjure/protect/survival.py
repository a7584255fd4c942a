"""Does it survive? Fresh models, trained on protected data after what a learner might do to them."""

from __future__ import annotations

import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import write_atomically
from ..errors import ArgumentError, DegenerateError, ShapeError
from .ascent import _Bar, _positive
from .noise.onepass import _whole
from .noise.result import Channels, Images, check_seed, images

if TYPE_CHECKING:
    from torch import Tensor

#: What :func:`stress` does unless told; ``grey`` is left out for images of one channel.
TREATMENTS = (
    "none",
    "jpeg:50",
    "jpeg:10",
    "grey",
    "median:3",
    "augment",
    "class_mean",
    "adversarial",
    "mix:0.2",
    "mix:0.5",
    "mix:0.8",
)
#: Clean labelled rows per class that the learner of ``class_mean`` is granted.
KNOWN_PER_CLASS = 20
ATTACK_STEPS = 3


@dataclass(frozen=True)
class Outcome:
    """Test accuracy of one fresh model after one treatment; every figure is on clean test images."""

    treatment: str
    model: str
    seed: int
    #: Trained on the protected data.
    protected: float
    #: Trained on the clean originals of the same rows, treated alike: what the treatment leaves by itself.
    clean: float
    #: For ``mix``: trained on the clean part of the mix and nothing else.
    clean_part: float | None = None

    @property
    def lost(self) -> float:
        """What the protection takes from the learner."""
        return self.clean - self.protected

    @property
    def benefit(self) -> float | None:
        """For ``mix``: what the protected part adds to the clean part. Unprotected, it would add ``clean -
        clean_part``."""
        return None if self.clean_part is None else self.protected - self.clean_part


@dataclass(frozen=True)
class StressReport:
    """Outcomes by treatment, model and seed."""

    outcomes: tuple[Outcome, ...]
    rows: int
    test_rows: int
    epochs: int
    #: Accuracy of always answering the commonest class of the test labels.
    chance: float
    notes: tuple[str, ...] = field(default=())

    def mean(self, treatment: str, model: str) -> Outcome:
        """The mean over seeds, with ``seed=-1``.

        Raises:
            ArgumentError: there is no such outcome.
        """
        chosen = [o for o in self.outcomes if (o.treatment, o.model) == (treatment, model)]
        if not chosen:
            raise ArgumentError(f"treatment, model: expected one of the report, got {treatment!r}, {model!r}")
        parts = [o.clean_part for o in chosen if o.clean_part is not None]
        return Outcome(
            treatment,
            model,
            -1,
            float(np.mean([o.protected for o in chosen])),
            float(np.mean([o.clean for o in chosen])),
            float(np.mean(parts)) if parts else None,
        )

    @property
    def treatments(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(o.treatment for o in self.outcomes))

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(o.model for o in self.outcomes))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["treatment", "model", "protected", "clean", "lost", "clean part", "benefit"]
        body = []
        known = {(o.treatment, o.model) for o in self.outcomes}
        for treatment in self.treatments:
            for model in self.models:
                if (treatment, model) in known:
                    m = self.mean(treatment, model)
                    part = ["", ""] if m.clean_part is None else [f"{m.clean_part:.3f}", f"{m.benefit:+.3f}"]
                    body.append([treatment, model, f"{m.protected:.3f}", f"{m.clean:.3f}", f"{m.lost:+.3f}", *part])
        return head, body

    def _caption(self) -> str:
        seeds = len({o.seed for o in self.outcomes})
        return (
            f"Accuracy on {self.test_rows} clean test rows of fresh models trained on {self.rows} rows, "
            f"{self.epochs} epochs, "
            f"mean of {seeds} seed{'s' if seeds != 1 else ''}; chance {self.chance:.3f}."
        )

    def __repr__(self) -> str:
        head, body = self._cells()
        widths = [max(len(r[k]) for r in [head, *body]) for k in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, *body]]
        return "\n".join([self._caption(), *lines, *self.notes])

    def _repr_html_(self) -> str:
        head, body = self._cells()
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in body)
        top = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        notes = "".join(f"<p>{html.escape(n)}</p>" for n in self.notes)
        return f"<table><caption>{html.escape(self._caption())}</caption><tr>{top}</tr>{rows}</table>{notes}"

    def plot(self) -> Any:
        """Accuracy by treatment, protected beside clean, a panel for each model; a matplotlib figure."""
        from matplotlib.figure import Figure

        models, treatments = self.models, self.treatments
        figure = Figure(figsize=(1.5 + 0.7 * len(treatments), 2.6 * len(models)), layout="constrained")
        axes = figure.subplots(len(models), 1, squeeze=False, sharex=True)
        known = {(o.treatment, o.model) for o in self.outcomes}
        for axis, model in zip(axes[:, 0], models, strict=True):
            at = [k for k, t in enumerate(treatments) if (t, model) in known]
            means = [self.mean(treatments[k], model) for k in at]
            axis.bar([k - 0.2 for k in at], [m.clean for m in means], 0.4, color="0.75", label="clean")
            axis.bar([k + 0.2 for k in at], [m.protected for m in means], 0.4, color="#2a7f9e", label="protected")
            part = [(k, m.clean_part) for k, m in zip(at, means, strict=True) if m.clean_part is not None]
            if part:
                axis.plot(*zip(*part, strict=True), "k_", markersize=14, label="clean part alone")
            axis.axhline(self.chance, color="0.4", linestyle=":")
            axis.set(ylim=(0, 1), ylabel=model)
            axis.set_xticks(range(len(treatments)), treatments, rotation=40, ha="right")
        axes[0, 0].legend(loc="upper right", fontsize="small")
        return figure

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> StressReport:
        """The reverse of :meth:`to_json`.

        Raises:
            ArgumentError: no report.
        """
        try:
            found = json.loads(text)
            outcomes = tuple(Outcome(**o) for o in found.pop("outcomes"))
            return cls(outcomes=outcomes, **(found | {"notes": tuple(found["notes"])}))
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise ArgumentError(f"text: expected a stress report as JSON ({err})") from err

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_json` to a file that is complete or not there."""
        write_atomically(path, self.to_json().encode())


@dataclass(frozen=True)
class _Recipe:
    """A parsed treatment."""

    name: str
    kind: str
    value: float


_KINDS: dict[str, tuple[float, float, float] | None] = {
    "none": None,
    "grey": None,
    "augment": None,
    "class_mean": None,
    # Default, least and most of the number behind the colon.
    "jpeg": (50, 1, 100),
    "median": (3, 3, 15),
    "adversarial": (0, 0, math.inf),
    "mix": (0.5, 0, 1),
}


def _parse(name: str, epsilon: float) -> _Recipe:
    kind, _, given = name.partition(":")
    if kind not in _KINDS:
        raise ArgumentError(f"treatments: expected {', '.join(_KINDS)} or a key of extra, got {name!r}")
    bounds = _KINDS[kind]
    if bounds is None:
        if given:
            raise ArgumentError(f"treatments: {kind} takes no number, got {name!r}")
        return _Recipe(name, kind, 0.0)
    default, least, most = bounds
    try:
        over, _, under = given.partition("/")
        value = default if not given else float(over) / (float(under) if under else 1.0)
    except (ValueError, ZeroDivisionError) as err:
        raise ArgumentError(f"treatments: expected a number behind the colon, got {name!r}") from err
    if kind == "adversarial" and value == 0:
        value = epsilon
    fits = least <= value <= most and math.isfinite(value)
    if kind in ("mix", "adversarial"):
        fits = fits and least < value < most
    if kind in ("jpeg", "median"):
        fits = fits and value == int(value) and (kind == "jpeg" or value % 2 == 1)
    if not fits:
        raise ArgumentError(f"treatments: {name!r} is outside the numbers that {kind} takes")
    return _Recipe(name, kind, value)


def jpeg(x: Tensor, quality: int, box: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Images ``(n, 1 or 3, h, w)`` written as JPEG of a quality and read again, by Pillow.

    Raises:
        ArgumentError: Pillow is not there, or there are neither 1 nor 3 channels.
    """
    import torch

    try:
        from PIL import Image
    except ImportError as err:
        raise ArgumentError("treatments: jpeg needs Pillow (pip install pillow)") from err
    if x.shape[1] not in (1, 3):
        raise ShapeError(f"treatments: jpeg takes images of 1 or 3 channels, got {x.shape[1]}")
    low, high = box
    levels = ((x - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    out = np.empty_like(levels)
    for i, image in enumerate(levels):
        with io.BytesIO() as file:
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
            out[i] = np.asarray(Image.open(file)).reshape(image.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(torch.float32).contiguous() * ((high - low) / 255) + low


def grey(x: Tensor) -> Tensor:
    """Three channels replaced by their luma (ITU-R BT.601).

    Raises:
        ShapeError: not three channels.
    """
    import torch

    if x.shape[1] != 3:
        raise ShapeError(f"treatments: grey takes images of 3 channels, got {x.shape[1]}")
    weights = torch.tensor([0.299, 0.587, 0.114])
    return (x * weights[:, None, None]).sum(1, keepdim=True).expand_as(x).contiguous()


def median(x: Tensor, size: int = 3) -> Tensor:
    """The median of the ``size × size`` window around every value, edges repeated."""
    import torch
    from torch.nn import functional as F

    pad = size // 2
    if pad >= min(x.shape[2:]):
        raise ShapeError(f"treatments: expected images larger than {pad} pixels, got {tuple(x.shape[2:])}")
    wide = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    parts = []
    for part in torch.split(wide, 256):
        window = part.unfold(2, size, 1).unfold(3, size, 1)
        parts.append(window.flatten(4).median(dim=4).values)
    return torch.cat(parts)


def subtract_class_means(x: Tensor, y: Tensor, known_x: Tensor, known_y: Tensor, box: tuple[float, float]) -> Tensor:
    """Take from every class what its mean differs by from the mean of the clean samples one knows of it."""
    out = x.clone()
    for c in range(int(y.max()) + 1):
        if not bool((y == c).any()):
            continue
        out[y == c] -= x[y == c].mean(0) - known_x[known_y == c].mean(0)
    return out.clamp(*box)


def learn(
    factory: Callable[[tuple[int, int, int], int], Any],
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    classes: int,
    *,
    seed: int,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    augment: bool = False,
    flip: bool = True,
    adversarial: float = 0.0,
    box: tuple[float, float] = (0.0, 1.0),
    step: Callable[[], object] | None = None,
) -> float:
    """Test accuracy of one fresh model.

    What the factory makes is a torch module, trained by :func:`~abjure.protect.networks.train`, or anything with
    ``fit`` and ``predict`` (scikit-learn), which gets rows; an estimator with ``random_state`` gets the seed, and
    training sets that ``augment`` or ``adversarial`` change batch by batch are none of its business (ArgumentError).
    """
    import torch

    from . import networks

    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory(shape, classes)
    if not isinstance(model, torch.nn.Module):
        if not (hasattr(model, "fit") and hasattr(model, "predict")):
            raise ArgumentError(f"models: expected torch modules or estimators, got {type(model).__name__}")
        if augment or adversarial:
            raise ArgumentError("treatments: augment and adversarial need torch modules")
        if hasattr(model, "set_params") and "random_state" in model.get_params():
            model.set_params(random_state=seed)
        model.fit(x.flatten(1).numpy(), y.numpy())
        return float(np.mean(model.predict(test_x.flatten(1).numpy()) == test_y.numpy()))
    networks.train(
        model,
        x,
        y,
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        learning_rate=learning_rate,
        augment=(lambda b, g: networks.crop_and_flip(b, g, flip=flip)) if augment else None,
        harden=(lambda m, a, b: networks.attack(m, a, b, adversarial, ATTACK_STEPS, box)) if adversarial else None,
        step=step,
    )
    return networks.accuracy(model, test_x, test_y)


def _default_models() -> dict[str, Any]:
    from . import networks

    return {"cnn": networks.cnn, "mlp": networks.mlp}


def stress(
    protected: Any,
    test: tuple[Any, Any],
    *,
    treatments: Iterable[str] = TREATMENTS,
    models: Mapping[str, Callable[[tuple[int, int, int], int], Any]] | None = None,
    extra: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    known: tuple[Any, Any] | None = None,
    seeds: Sequence[int] = (0,),
    epochs: int = 5,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    epsilon: float | None = None,
    flip: bool = True,
    channels: Channels = "auto",
    progress: bool | Callable[[int], object] | None = None,
) -> StressReport:
    """Train fresh models on protected data after what a learner might do, and report what remains of the protection.

    Every figure stands beside that of the same model on the clean originals treated alike, so that what a treatment
    costs by itself (JPEG, adversarial training) is not booked to the protection.

    Args:
        protected: result of :func:`maximize_bayes_error` or of :mod:`abjure.protect.noise`, or anything with ``x``,
            ``clean`` and ``labels``.
        test: clean test data ``(x, y)`` of the same form as ``protected.x``.
        treatments: of

            - ``"none"``;
            - ``"jpeg:Q"``, ``"grey"``, ``"median:K"``: training and test images go through JPEG of quality Q (Pillow),
              to luma, through a K × K median (what a learner does to images, they do to those they judge too);
            - ``"augment"``: random crops and flips in training;
            - ``"class_mean"``: the learner knows some clean samples (``known``) and takes from every class the
              difference of means, on the training data alone;
            - ``"adversarial:E"``: trained on examples within L∞ E, three projected steps each (default E: ``epsilon``);
            - ``"mix:P"``: a share P of the training rows, drawn with the seed within each class, is protected, the
              others are clean; reported beside a model trained on the clean part alone.
        models: named factories ``(channels, height, width), classes -> model``; a torch module, or an estimator with
            ``fit`` and ``predict`` (for which ``augment`` and ``adversarial`` are left out). None: a small CNN and an
            MLP.
        extra: further treatments, by name: functions of ``(n, channels, h, w)`` float tensors, on training and test
            images.
        known: ``(x, y)`` for ``class_mean``; None grants the clean originals of 20 rows per class.
        seeds: of weights, batches, augmentation and mixes.
        epochs, batch_size, learning_rate: of the torch models (Adam, rate falling to zero).
        epsilon: None takes the one of ``protected``, else 8/255.
        flip: whether ``augment`` mirrors images, which digits do not survive.
        channels: as in :func:`abjure.protect.noise.class_mean_shift`.
        progress: True or False shows or hides a bar of trainings, None shows it on a terminal; or a callable.

    Returns:
        A report that prints as a table, plots, and saves as JSON. The same seeds give the same figures on one machine
        with one number of torch threads.

    Raises:
        ArgumentError: an unknown treatment or a number outside its domain; values outside the box.
        ShapeError, DTypeError, DegenerateError: test data of another form, or labels that training does not know.
    """
    clean, published, test_set = _data(protected, test, channels)
    epochs, batch_size = _whole(epochs, "epochs", 1), _whole(batch_size, "batch_size", 2)
    learning_rate = _positive(learning_rate, "learning_rate")
    numbers = [check_seed(s) for s in seeds]
    if not numbers:
        raise ArgumentError("seeds: expected at least one")
    settings = getattr(protected, "settings", {})
    size = epsilon if epsilon is not None else settings.get("epsilon", 8 / 255)
    size = _positive(size, "epsilon") if math.isfinite(size) and settings.get("norm", "linf") == "linf" else 8 / 255
    extra = dict(extra or {})
    factories = dict(models) if models is not None else _default_models()
    if not factories:
        raise ArgumentError("models: expected at least one")
    names = list(dict.fromkeys([*treatments, *extra]))
    if treatments is TREATMENTS and clean.channels != 3:
        names.remove("grey")
    recipes = [_Recipe(n, "extra", 0.0) if n in extra else _parse(n, size) for n in names]
    runs = _Runs(clean, published, test_set, extra, known, epochs, batch_size, learning_rate, flip, channels)
    for recipe in recipes:
        runs.check(recipe)
    outcomes, notes = [], []
    total = len(recipes) * len(factories) * len(numbers)
    with _Bar(progress, total, "stress", "run") as report:
        done = 0
        for recipe in recipes:
            for name, factory in factories.items():
                for seed in numbers:
                    found = runs.outcome(recipe, name, factory, seed)
                    if found is None:
                        note = f"{recipe.name} is left out for {name}, which is no torch module."
                        notes += [note] if note not in notes else []
                    else:
                        outcomes.append(found)
                    done += 1
                    if report is not None:
                        report(done)
    _, counts = np.unique(test_set.codes, return_counts=True)
    chance = float(counts.max() / counts.sum())
    return StressReport(tuple(outcomes), len(clean.codes), len(test_set.codes), epochs, chance, tuple(notes))


def _data(protected: Any, test: tuple[Any, Any], channels: Channels) -> tuple[Images, Images, Images]:
    for part in ("x", "clean", "labels"):
        if not hasattr(protected, part):
            found = type(protected).__name__
            raise ArgumentError(f"protected: expected a result with x, clean and labels, got {found}")
    box = tuple(getattr(protected, "settings", {}).get("box", (0.0, 1.0)))
    low_high = (float(box[0]), float(box[1]))
    # Bytes are read in units of 1/255, whatever box the settings name.
    published = images(protected.x, protected.labels, low_high, channels)
    clean_x = protected.clean
    clean = images(clean_x, protected.labels, low_high, channels)
    if clean.shape != published.shape:
        raise ShapeError(f"protected: expected clean data of shape {published.shape}, got {clean.shape}")
    try:
        test_x, test_y = test
    except (TypeError, ValueError) as err:
        raise ArgumentError("test: expected a pair of test images and labels") from err
    tests = images(test_x, test_y, low_high, channels)
    if tests.shape[1:] != clean.shape[1:]:
        raise ShapeError(f"test: expected images of shape {clean.shape[1:]}, got {tests.shape[1:]}")
    unknown = np.setdiff1d(tests.classes, clean.classes)
    if len(unknown):
        raise ArgumentError(f"test: expected labels that occur in training, got {unknown[0]}")
    return clean, published, tests


class _Runs:
    """Trains what :func:`stress` asks for, and never the same model on the same data twice."""

    def __init__(
        self,
        clean: Images,
        published: Images,
        test: Images,
        extra: Mapping[str, Callable[[Tensor], Tensor]],
        known: tuple[Any, Any] | None,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        flip: bool,
        channels: Channels,
    ) -> None:
        import torch

        self.box = clean.box
        self.classes = len(clean.classes)
        self.y = torch.from_numpy(clean.codes)
        self.test_y = torch.from_numpy(np.searchsorted(clean.classes, test.classes[test.codes]))
        self.plain: dict[str, Tensor] = {
            "clean": clean.planar(),
            "protected": published.planar(),
            "test": test.planar(),
        }
        for name, x in self.plain.items():
            least, most = float(x.min()), float(x.max())
            if not (self.box[0] - 1e-6 <= least and most <= self.box[1] + 1e-6 and bool(torch.isfinite(x).all())):
                raise ArgumentError(f"{name}: expected values in the box {self.box}, got {least:g} to {most:g}")
        self.extra, self.known, self.channels = extra, known, channels
        self.options: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "flip": flip,
            "box": self.box,
        }
        self.treated: dict[tuple[str, str], Tensor] = {}
        self.found: dict[tuple[Any, ...], float] = {}
        self.class_names = clean.classes

    def check(self, recipe: _Recipe) -> None:
        """Tries a treatment on two images, and finds the known samples, before anything is trained."""
        if recipe.kind in ("jpeg", "grey", "median", "extra"):
            image = self.plain["clean"][:2]
            if self._treat(recipe, image).shape != image.shape:
                raise ShapeError(f"extra: {recipe.name} must return images of the shape it is given")
        if recipe.kind == "class_mean":
            self._known_samples(0)

    def _treat(self, recipe: _Recipe, x: Tensor) -> Tensor:
        if recipe.kind == "jpeg":
            return jpeg(x, int(recipe.value), self.box)
        if recipe.kind == "grey":
            return grey(x)
        if recipe.kind == "median":
            return median(x, int(recipe.value))
        return self.extra[recipe.name](x) if recipe.kind == "extra" else x

    def _images(self, recipe: _Recipe, which: str) -> Tensor:
        if recipe.kind not in ("jpeg", "grey", "median", "extra"):
            return self.plain[which]
        key = recipe.name, which
        if key not in self.treated:
            self.treated[key] = self._treat(recipe, self.plain[which])
        return self.treated[key]

    def _known_samples(self, seed: int) -> tuple[Tensor, Tensor]:
        import torch

        if self.known is None:
            random = np.random.default_rng(seed)
            codes = self.y.numpy()
            pick = np.concatenate(
                [random.permutation(np.flatnonzero(codes == c))[:KNOWN_PER_CLASS] for c in range(self.classes)]
            )
            rows = torch.from_numpy(pick)
            return self.plain["clean"][rows], self.y[rows]
        given = images(*self.known, self.box, self.channels)
        shown = given.planar()
        if shown.shape[1:] != self.plain["clean"].shape[1:]:
            raise ShapeError(f"known: expected images like the training data, got shape {given.shape}")
        if not np.array_equal(given.classes, self.class_names):
            raise DegenerateError("known: expected samples of every class, and of no other")
        return shown, torch.from_numpy(given.codes)

    def outcome(self, recipe: _Recipe, name: str, factory: Any, seed: int) -> Outcome | None:
        batchwise = recipe.kind in ("augment", "adversarial")
        if batchwise and not self._is_torch(factory):
            return None
        test = self._images(recipe, "test")

        def run(kind: str, x: Tensor, y: Tensor) -> float:
            # Only what is named here makes a difference to the result.
            key = (recipe.name if kind != "plain clean" else "none", kind, name, seed)
            if key not in self.found:
                self.found[key] = learn(
                    factory,
                    x,
                    y,
                    test,
                    self.test_y,
                    self.classes,
                    seed=seed,
                    augment=recipe.kind == "augment",
                    adversarial=recipe.value if recipe.kind == "adversarial" else 0.0,
                    **self.options,
                )
            return self.found[key]

        if recipe.kind == "mix":
            protected, clean_rows = self._mix(recipe.value, seed)
            both = self.plain["clean"].clone()
            both[protected] = self.plain["protected"][protected]
            return Outcome(
                recipe.name,
                name,
                seed,
                run("mixed", both, self.y),
                run("plain clean", self.plain["clean"], self.y),
                run("clean part", self.plain["clean"][clean_rows], self.y[clean_rows]),
            )
        published = self._images(recipe, "protected")
        if recipe.kind == "class_mean":
            published = subtract_class_means(published, self.y, *self._known_samples(seed), self.box)
        plain = recipe.kind in ("none", "class_mean")
        return Outcome(
            recipe.name,
            name,
            seed,
            run("protected", published, self.y),
            run("plain clean" if plain else "clean", self._images(recipe, "clean"), self.y),
        )

    def _is_torch(self, factory: Any) -> bool:
        import torch

        shape = tuple(int(n) for n in self.plain["clean"].shape[1:])
        with torch.random.fork_rng(devices=[]):
            return isinstance(factory(shape, self.classes), torch.nn.Module)

    def _mix(self, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Rows that are protected and rows that are clean, at least one of each in every class with two."""
        import torch

        random = np.random.default_rng(seed)
        codes = self.y.numpy()
        picked = []
        for c in range(self.classes):
            rows = random.permutation(np.flatnonzero(codes == c))
            count = min(max(round(share * len(rows)), 1), max(len(rows) - 1, 0))
            picked.append(rows[:count])
        chosen = np.sort(np.concatenate(picked))
        others = np.setdiff1d(np.arange(len(codes)), chosen)
        return torch.from_numpy(chosen), torch.from_numpy(others)


__all__ = ["TREATMENTS", "Outcome", "StressReport", "learn", "stress"]
