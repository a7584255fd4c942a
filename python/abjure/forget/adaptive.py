"""Alpha from the data: the percentile rule of Adaptive Selective Synaptic Dampening (arXiv 2402.10098)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import _native
from .._interop import device_path
from ..errors import AbjureError, ArgumentError, DegenerateError
from .fisher import Fisher
from .pairs import Importance, by_name, check_alike, pair, readable
from .params import chosen


@dataclass(frozen=True)
class AdaptiveAlpha:
    """An alpha that was read off the ratios of importances; usable wherever an alpha is expected."""

    value: float
    #: The percentile of the pooled ratios that ``value`` is.
    percentile: float
    #: The share of the data to forget that the percentile came from; None where the percentile was given.
    share: float | None
    #: Ratios ``I_f / I_d`` that counted.
    finite: int
    #: ``I_d = 0 < I_f``: left out of the percentile, selected by every alpha, and erased.
    infinite: int
    #: ``I_f = I_d = 0``: left out, never selected.
    undefined: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        text = f"alpha = {self.value:.6g}, percentile {self.percentile:.6g} of {self.finite:,} ratios"
        return text + f" ({self.infinite:,} infinite and {self.undefined:,} undefined left out)"


def share_percentile(share: float) -> float:
    """``100 - ln(1 + 100 share)``: the percentile of the adaptive rule for a share of the data to forget.

    Raises:
        ArgumentError: ``share`` is not above 0, or so large that the percentile would be negative.
    """
    try:
        share = float(share)
    except (TypeError, ValueError):
        raise ArgumentError(f"share: expected a number, got {share!r}") from None
    if not (math.isfinite(share) and share > 0):
        raise ArgumentError(f"share: expected a finite number above 0, got {share}")
    percentile = 100.0 - math.log1p(100.0 * share)
    if percentile < 0:
        raise ArgumentError(f"share: expected at most (e**100 - 1) / 100, got {share}")
    return percentile


def adaptive_alpha(
    forget: Fisher | Mapping[str, Any],
    retain: Fisher | Mapping[str, Any],
    forget_size: float | None = None,
    total_size: float | None = None,
    *,
    share: float | None = None,
    percentile: float | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> AdaptiveAlpha:
    """Alpha as the exact percentile of the ratios ``I_f / I_d`` of all parameters pooled.

    The percentile is ``100 - ln(1 + 100 |F| / |D|)``: 99.8 for 100 of 50,000 samples, 97.6 for a tenth. Ratios are
    divided in the dtype of the importances, 0/0 and x/0 are left out, and the value is interpolated linearly in
    float64, as ``numpy.percentile`` does, but found without a sort and without an array of ratios: memory is a few
    megabytes, and the result does not depend on the number of threads.

    Args:
        forget: importance for the forget set: a :class:`Fisher`, or a mapping of name to float32 or float64 array.
        retain: importance for the retained data (as in the published notebook), of the same kind.
        forget_size: number of samples to forget.
        total_size: number of samples in all, forget set included.
        share: in place of the two sizes, ``|F| / |D|`` or the share that a search tries.
        percentile: in place of those, the percentile itself, 0 to 100.
        include: patterns with shell wildcards; only parameters that match one are pooled.
        exclude: patterns of parameters to leave out.

    Returns:
        The alpha, its percentile, and how many ratios there were of each kind.

    Raises:
        ArgumentError: not exactly one of sizes, ``share`` and ``percentile`` given, or out of range.
        DegenerateError: no ratio is finite.
        ArgumentError, NonFiniteError, ShapeError, DTypeError, DeviceError: importances that do not fit.

    Source: arXiv 2402.10098 and its notebook.
    """
    share, percentile = _resolve(forget_size, total_size, share, percentile)
    f, d = pair(forget, retain)
    names = chosen(f.arrays, include, exclude)
    check_alike(f, d, names)
    return pooled_alpha(f, d, names, share, percentile)


def pooled_alpha(
    f: Importance, d: Importance, names: list[str], share: float | None, percentile: float
) -> AdaptiveAlpha:
    """The rule itself, for importances that were checked."""
    ours, theirs = [f.arrays[n] for n in names], [d.arrays[n] for n in names]
    call = device_path(ours[0], "ratio_percentile") if ours else None
    if call is None:
        ours, theirs, call = readable(ours, "forget"), readable(theirs, "retain"), _native.ratio_percentile
    try:
        value, finite, infinite, undefined = call(ours, theirs, percentile, f.count, d.count)
    except AbjureError as err:
        raise by_name(err, names) from None
    if not finite:
        raise DegenerateError(
            f"forget, retain: expected a finite ratio to take a percentile of, got {infinite:,} infinite and "
            f"{undefined:,} undefined ones"
        )
    return AdaptiveAlpha(value, percentile, share, finite, infinite, undefined)


def resolve_share(forget_size: float | None, total_size: float | None) -> float:
    """``|F| / |D|``.

    Raises:
        ArgumentError: a size is missing, or not ``0 < forget_size <= total_size``.
    """
    if forget_size is None or total_size is None:
        raise ArgumentError("forget_size, total_size: expected both numbers of samples, got None")
    if not (0 < forget_size <= total_size < math.inf):
        raise ArgumentError(
            f"forget_size, total_size: expected 0 < forget_size <= total_size, got {forget_size} and {total_size}"
        )
    return float(forget_size) / float(total_size)


def _resolve(
    forget_size: float | None, total_size: float | None, share: float | None, percentile: float | None
) -> tuple[float | None, float]:
    sizes = forget_size is not None or total_size is not None
    if sum((sizes, share is not None, percentile is not None)) != 1:
        raise ArgumentError(
            "forget_size and total_size, share, percentile: expected exactly one of the three, got "
            f"{forget_size} and {total_size}, {share}, {percentile}"
        )
    if percentile is not None:
        if not 0 <= percentile <= 100:
            raise ArgumentError(f"percentile: expected a number from 0 to 100, got {percentile}")
        return None, float(percentile)
    if share is None:
        share = resolve_share(forget_size, total_size)
    return float(share), share_percentile(share)
