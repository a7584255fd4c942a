"""The dampening family by name: which importance, which alpha and lambda, which data, as published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ArgumentError
from .criteria import Criterion, cross_entropy, output_norm, squared_output_norm
from .dampen import DampenReport, dampen_
from .estimate import importance
from .fisher import Fisher
from .search import PotionReport, potion_


@dataclass(frozen=True)
class DampenPreset:
    """One method of the family with its published constants."""

    name: str
    #: What the importance differentiates, and with which power: cross-entropy or a label-free loss.
    criterion: Criterion
    #: A number; ``"adaptive"`` for the percentile rule; ``"search"`` for Potion's search of a share.
    alpha: float | Literal["adaptive", "search"]
    lam: float
    #: Whether the second importance is that of all the data, or of the retained data.
    second: Literal["full", "retain"]
    source: str

    def importance(self, model: Any, loader: Iterable[Any], loss: Any = None, **options: Any) -> Fisher:
        """:func:`abjure.forget.importance` with this method's loss and power.

        Args:
            model: a torch module.
            loader: batches, of the size (64) that the constants were found with.
            loss: in place of the preset's, for models that are called in another way; summed with the preset's power.
            options: of :func:`abjure.forget.importance`.
        """
        return importance(model, loader, loss or self.criterion, power=self.criterion.power, **options)

    def dampen_(
        self,
        model: Any,
        forget: Fisher | Mapping[str, Any],
        second: Fisher | Mapping[str, Any],
        *,
        forget_size: float | None = None,
        total_size: float | None = None,
        accuracy: Callable[[Any], float] | None = None,
        rho: float = 0.0,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        undo: bool = True,
    ) -> DampenReport | PotionReport:
        """Dampens by importances that :meth:`importance` measured.

        Args:
            model: a torch module, or a mapping of name to array.
            forget: importance for the forget set.
            second: importance for all the data or for the retained data, as :attr:`second` says.
            forget_size: samples to forget; needed by ``assd`` and ``potion``.
            total_size: samples in all, likewise.
            accuracy: ``accuracy(model)`` on the flagged set; needed by ``potion``.
            rho: for ``potion``, the share of the original accuracy to fall to.
            include: patterns with shell wildcards; only parameters that match one are dampened.
            exclude: patterns of parameters to leave alone.
            undo: keep what the report's ``undo`` needs.

        Raises:
            ArgumentError: a power other than the method's, or something that the method needs is missing.
            Anything that :func:`abjure.forget.dampen_` raises.
        """
        for arg, fisher in (("forget", forget), ("second", second)):
            if isinstance(fisher, Fisher) and fisher.power != self.criterion.power:
                expected = f"power {self.criterion.power}, as {self.name} takes it"
                raise ArgumentError(f"{arg}: expected importances of {expected}, got power {fisher.power}")
        sizes: dict[str, Any] = {"forget_size": forget_size, "total_size": total_size}
        shared: dict[str, Any] = {"include": include, "exclude": exclude, "undo": undo}
        if self.alpha == "search":
            if accuracy is None:
                raise ArgumentError("accuracy: expected a function of the model, which potion's search asks, got None")
            return potion_(model, forget, second, accuracy, rho, lam=self.lam, **sizes, **shared)
        chosen: dict[str, Any] = {"full": second} if self.second == "full" else {"retain": second}
        return dampen_(model, forget, alpha=self.alpha, lam=self.lam, **chosen, **sizes, **shared)


#: The methods by name. Constants are those of the published code; where that has none, the comment says so.
DAMPENING_PRESETS: dict[str, DampenPreset] = {
    p.name: p
    for p in (
        # ResNet-18 on CIFAR: whole classes, subclasses, 100 random samples; ViT: 100 random samples.
        DampenPreset("ssd", cross_entropy, 10.0, 1.0, "full", "arXiv 2308.07707"),
        DampenPreset("ssd_vit_class", cross_entropy, 5.0, 1.0, "full", "arXiv 2308.07707"),
        DampenPreset("ssd_vit_subclass", cross_entropy, 25.0, 1.0, "full", "arXiv 2308.07707"),
        DampenPreset("ssd_faces", cross_entropy, 50.0, 0.1, "full", "arXiv 2308.07707"),
        DampenPreset("assd", cross_entropy, "adaptive", 1.0, "retain", "arXiv 2402.10098"),
        # The published snippet replaces SSD's loss and power and says nothing of alpha: SSD's stays.
        DampenPreset("lfssd", squared_output_norm, 10.0, 1.0, "full", "arXiv 2402.19308"),
        DampenPreset("potion", output_norm, "search", 1.0, "retain", "arXiv 2406.09173"),
    )
}


def dampening_preset(name: str) -> DampenPreset:
    """A method of :data:`DAMPENING_PRESETS` by name.

    Raises:
        ArgumentError: no such method.
    """
    if name not in DAMPENING_PRESETS:
        raise ArgumentError(f"method: expected one of {', '.join(DAMPENING_PRESETS)}, got {name!r}")
    return DAMPENING_PRESETS[name]


def unlearn_(
    model: Any,
    forget_loader: Iterable[Any],
    second_loader: Iterable[Any],
    method: str | DampenPreset = "ssd",
    *,
    loss: Any = None,
    forget_size: float | None = None,
    total_size: float | None = None,
    accuracy: Callable[[Any], float] | None = None,
    rho: float = 0.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    undo: bool = True,
    progress: bool = True,
) -> DampenReport | PotionReport:
    """Unlearns by a method of the family: both importance passes and the dampening.

    Args:
        model: a torch module; its parameters are modified at the very end.
        forget_loader: batches of the samples to forget.
        second_loader: batches of all the data for ``ssd`` and ``lfssd``, of the retained data for ``assd`` and
            ``potion`` (``DAMPENING_PRESETS[method].second``), of the same batch size.
        method: a name in :data:`DAMPENING_PRESETS`, or a :class:`DampenPreset` of your own.
        loss: in place of the preset's, for models that are called in another way.
        forget_size: number of samples to forget; by default that of the loader's ``dataset``, where it has one.
        total_size: number of samples in all, likewise.
        accuracy: ``accuracy(model)`` on the flagged samples, for ``potion``.
        rho: for ``potion``, the share of the original accuracy to fall to.
        include: patterns with shell wildcards; only parameters that match one are dampened.
        exclude: patterns of parameters to leave alone.
        undo: keep what the report's ``undo`` needs.
        progress: show progress bars where standard error is a terminal.

    Raises:
        ArgumentError: an unknown method, or something that it needs is missing.
        Anything that :func:`abjure.forget.importance` and :func:`abjure.forget.dampen_` raise; the model is as it was.
    """
    chosen = dampening_preset(method) if isinstance(method, str) else method
    if isinstance(chosen.alpha, str):
        forget_size = _samples(forget_loader) if forget_size is None else forget_size
        if total_size is None:
            other = _samples(second_loader)
            if other is not None and forget_size is not None:
                total_size = other if chosen.second == "full" else other + forget_size
        if forget_size is None or total_size is None:
            raise ArgumentError(
                f"forget_size, total_size: expected numbers of samples, which {chosen.name} needs, got None"
            )
        if chosen.alpha == "search" and accuracy is None:
            raise ArgumentError("accuracy: expected a function of the model, which potion's search asks, got None")
    forget = chosen.importance(model, forget_loader, loss, progress=progress)
    second = chosen.importance(model, second_loader, loss, progress=progress)
    return chosen.dampen_(
        model,
        forget,
        second,
        forget_size=forget_size,
        total_size=total_size,
        accuracy=accuracy,
        rho=rho,
        include=include,
        exclude=exclude,
        undo=undo,
    )


def _samples(loader: Any) -> int | None:
    """Samples that a loader yields in one pass, if it says so."""
    sampler = getattr(loader, "sampler", None)
    try:
        return len(sampler) if sampler is not None else len(loader.dataset)
    except (AttributeError, TypeError):
        return None
