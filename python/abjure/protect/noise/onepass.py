"""Noise in one pass over memory: no model, no training, the labels and a seed (or the means of the data) alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ... import _native
from ...errors import ArgumentError, DegenerateError, ShapeError
from ..bayes import Array
from .result import Channels, Images, Noised, NormName, check_budget, check_seed, finish, images

Progress = Callable[[int], object] | None
#: Features of one image's linearly separable noise above which a class's mixing matrix outgrows the caches.
MOST_FEATURES = 1024


def _whole(value: Any, arg: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ArgumentError(f"{arg}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def class_mean_shift(
    x: Any,
    y: Any,
    *,
    epsilon: float = 8 / 255,
    norm: NormName = "linf",
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    out: Any = None,
    progress: Progress = None,
) -> Noised:
    """Move every class toward the next one: ``epsilon · sign(mean of class c+1 − mean of class c)``, one vector per
    class.

    The control that every protection has to beat: two passes over the data, no model. Class order is that of the sorted
    labels, the last is followed by the first. In L2 the difference of the means is scaled to ``epsilon``.

    Args:
        x: ``(n, ...)`` clean data: f64, f32, f16, bf16, or uint8, whose values are read as multiples of 1/255.
        y: ``(n,)`` integer labels.
        epsilon: budget of a row in units of ``x`` (of 1 = 255 for uint8); it holds for the stored values.
        norm: ``"linf"`` or ``"l2"``.
        box: admissible values.
        channels: where the channels of four-dimensional ``x`` are; ``"auto"`` looks for an axis of 1 or 3.
        out: array like ``x`` to write to, for instance a memory map; not ``x`` itself.
        progress: called with the rows done every 50 ms.

    Returns:
        The published data. Deterministic: no random number is drawn.

    Raises:
        ShapeError, DTypeError, NonFiniteError, DeviceError: malformed input.
        ArgumentError: an option outside its domain, or a value outside ``box``.
        DegenerateError: one class only, or two neighbouring classes with the same mean.
    """
    data = images(x, y, box, channels)
    epsilon = check_budget(data, norm, epsilon)
    counts, sums, _ = _sums(data, progress)
    means = sums / np.asarray(counts)[:, None]
    shift = np.roll(means, -1, axis=0) - means
    length = np.sqrt((shift**2).sum(axis=1))
    if not length.all():
        at = int(np.flatnonzero(length == 0)[0])
        raise DegenerateError(f"y: classes {data.classes[at]} and {data.classes[(at + 1) % len(counts)]} have one mean")
    top = epsilon * data.scale
    patterns = np.sign(shift) * top if norm == "linf" else shift / length[:, None] * top
    target = data.empty(out)
    _native.noise_add(
        data.matrix, data.codes, patterns.reshape(-1), data.limits(norm, epsilon), target, progress=progress
    )
    settings = {"epsilon": epsilon, "norm": norm, "box": data.box}
    return finish(data, target, out, "class_mean_shift", norm, epsilon, settings)


def _sums(data: Images, progress: Progress) -> tuple[list[int], Array, Array]:
    low, high = data.box
    counts, sums, squares = _native.noise_class_sums(
        data.matrix, data.codes, len(data.classes), (low * data.scale, high * data.scale), progress=progress
    )
    return counts, sums.reshape(len(counts), -1), squares.reshape(len(counts), -1)


def linearly_separable(
    x: Any,
    y: Any,
    *,
    epsilon: float | None = None,
    norm: NormName = "l2",
    patch: int = 8,
    separation: float = 10.0,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    out: Any = None,
    progress: Progress = None,
) -> Noised:
    """Add coloured patches whose values are linearly separable by class (LSP).

    Yu, Zhang, Chen, Yin and Liu, "Availability attacks create shortcuts" (KDD 2022), algorithm 1: the features of an
    image's noise are a draw of scikit-learn's ``make_classification`` (one cluster per class at a corner of the
    hypercube of side ``2 · separation``, a random linear map of each cluster, no label noise), every feature is
    repeated over a square of ``patch`` pixels, and the image of noise is scaled to the L2 sphere. Here features come
    from this library's generator, so draws differ from scikit-learn's with the same seed.

    Args:
        epsilon: radius; None is the paper's, ``sqrt((6/255)² d)`` for d values (1.304 for 3 × 32 × 32), of which a
            single pixel may use more than 6/255. With ``norm="linf"`` the noise is ``epsilon`` times the signs of
            the features.
        norm: the budget; the paper's is ``"l2"``.
        patch: side of the squares; 8 for images of 32 × 32. Cut at the right and lower edge where it does not divide.
        separation: ``class_sep`` of ``make_classification``.
        seed: of everything random.
        x, y, box, channels, out, progress: as in :func:`class_mean_shift`.

    Raises:
        As :func:`class_mean_shift`; ArgumentError if there are more than 1 024 features (choose larger patches) or too
        few for every class to have a corner.
    """
    data = images(x, y, box, channels)
    patch, seed = _whole(patch, "patch", 1), check_seed(seed)
    count = math.prod(data.shape[1:])
    epsilon = check_budget(data, norm, 6 / 255 * math.sqrt(count) if epsilon is None else epsilon)
    if not (math.isfinite(separation) and separation > 0):
        raise ArgumentError(f"separation: expected a positive number, got {separation!r}")
    _, height, width, _ = data.layout
    features = math.ceil(height / patch) * math.ceil(width / patch) * data.channels
    if features > MOST_FEATURES:
        raise ArgumentError(f"patch: expected at most {MOST_FEATURES} features, got {features} with patch={patch}")
    classes = len(data.classes)
    if classes > 2.0**features:
        raise ArgumentError(
            f"patch: {features} features have fewer corners than {classes} classes; take smaller patches"
        )
    random = np.random.default_rng(seed)
    corners = _corners(random, classes, features)
    mixing = random.uniform(-1.0, 1.0, (classes, features, features))
    target = data.empty(out)
    _native.noise_separable(
        data.matrix,
        data.codes,
        (corners * separation).astype(np.float32).reshape(-1),
        mixing.astype(np.float32).reshape(-1),
        data.layout,
        patch,
        seed,
        data.limits(norm, epsilon),
        target,
        progress=progress,
    )
    settings = {"epsilon": epsilon, "norm": norm, "patch": patch, "separation": separation, "box": data.box}
    return finish(data, target, out, "linearly_separable", norm, epsilon, settings | {"seed": seed})


def _corners(random: Any, count: int, features: int) -> Array:
    """Distinct corners of the cube of signs, drawn uniformly."""
    if features <= 16:
        picked = random.choice(2**features, size=count, replace=False)
        bits = (picked[:, None] >> np.arange(features)) & 1
        return np.asarray(2.0 * bits - 1.0)
    found: dict[bytes, Array] = {}
    while len(found) < count:
        corner = random.choice([-1.0, 1.0], size=features)
        found.setdefault(corner.tobytes(), corner)
    return np.stack(list(found.values()))


def autoregressive_filters(
    classes: int,
    *,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),
    crop: int = 4,
    norm_limit: float = 50.0,
    response: float = 10.0,
    draws: int = 1_000_000,
    seed: int = 0,
) -> Array:
    """Find processes for :func:`autoregressive`, one per class, that stay bounded and that tell each other's noise
    apart.

    Sandoval-Segura et al. (NeurIPS 2022), section 3.2 and its code: taps are standard normal, divided by their sum in
    each channel (refused below 1e-3); a process is dropped if one of three trial patterns is longer than ``norm_limit``
    (at 3 × 32 × 32, in proportion to the root of the size elsewhere), or if the filter of an earlier process (its taps
    and −1 for the value itself, which its own noise leaves nothing of) answers to the new pattern, scaled to length 1,
    with a sum of positive parts below ``response`` (again at 3 × 32 × 32).

    Returns:
        ``(classes, channels, 8)`` float32: the 3 × 3 window line by line without its last value.

    Raises:
        DegenerateError: fewer processes than classes among ``draws``.
    """
    classes, channels = _whole(classes, "classes", 1), _whole(channels, "channels", 1)
    height, width = (_whole(s, "size", 3) for s in size)
    crop, draws = _whole(crop, "crop", 2), _whole(draws, "draws", 1)
    random = np.random.default_rng(check_seed(seed))
    ratio = math.sqrt(channels * height * width / (3 * 32 * 32))
    found: list[Array] = []
    batch = 256
    for start in range(0, draws, batch):
        taps = random.standard_normal((batch, channels, 8))
        total = taps.sum(axis=2, keepdims=True)
        ok = (np.abs(total) >= 1e-3).all(axis=(1, 2))
        taps = (taps / np.where(np.abs(total) < 1e-3, 1.0, total)).astype(np.float32)
        labels = np.repeat(np.arange(batch), 3)
        trials = _native.noise_processes(labels, taps.reshape(-1), (channels, height, width, 1), crop, seed + start)
        trials = trials.reshape(batch, 3, channels, height, width)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt((trials.astype(np.float64) ** 2).sum(axis=(2, 3, 4)))
            ok &= (lengths <= norm_limit * ratio).all(axis=1) & (lengths > 0).all(axis=1)
        for k in np.flatnonzero(ok):
            pattern = trials[k, 0] / lengths[k, 0]
            if all(_response(pattern, other) >= response * ratio for other in found):
                found.append(taps[k])
            if len(found) == classes:
                return np.stack(found)
    raise DegenerateError(f"draws: expected {classes} processes that stay bounded, got {len(found)} of {draws} draws")


def _response(pattern: Array, taps: Array) -> float:
    """Sum of the positive parts of a pattern's correlation with a process's filter."""
    window = np.lib.stride_tricks.sliding_window_view(pattern, (3, 3), axis=(1, 2))
    kernel = np.concatenate([taps, np.full((len(taps), 1), -1.0)], axis=1).reshape(-1, 3, 3)
    return float(np.maximum(np.einsum("chwij,cij->hw", window, kernel), 0.0).sum())


def autoregressive(
    x: Any,
    y: Any,
    *,
    epsilon: float = 1.0,
    norm: NormName = "l2",
    crop: int = 4,
    filters: Any = None,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    out: Any = None,
    progress: Progress = None,
) -> Noised:
    """Add a draw of the class's autoregressive process to every image (AR).

    Sandoval-Segura, Singla, Geiping, Goldblum, Goldstein and Jacobs, "Autoregressive perturbations for data poisoning"
    (NeurIPS 2022), equation 3: from two first lines and columns of standard normal values, each value is a fixed linear
    function of the eight before it in its 3 × 3 window, ``crop`` lines and columns are dropped, and the image of noise
    is scaled to ``epsilon``. A class is one such function per channel; a convolution with its coefficients and −1
    leaves nothing of its own noise.

    Args:
        epsilon: length of the noise: 1 for 3 × 32 × 32 (the paper's), 3 for 96 × 96. With ``norm="linf"``, which its
            authors call weaker, the largest value is scaled to ``epsilon``.
        filters: ``(classes, channels, 8)``; None finds them with :func:`autoregressive_filters`.
        crop: first lines and columns to drop.
        seed: of filters and starts.
        x, y, norm, box, channels, out, progress: as in :func:`class_mean_shift`.

    Raises:
        As :func:`class_mean_shift`; ShapeError for images of fewer than 3 lines or columns; DegenerateError if no
        bounded process is found or a given one diverges.
    """
    data = images(x, y, box, channels)
    epsilon, crop, seed = check_budget(data, norm, epsilon), _whole(crop, "crop", 2), check_seed(seed)
    _, height, width, _ = data.layout
    if min(height, width) < 3:
        raise ShapeError(f"x: expected images of at least 3 × 3 pixels, got {height} × {width}")
    classes = len(data.classes)
    if filters is None:
        filters = autoregressive_filters(classes, channels=data.channels, size=(height, width), crop=crop, seed=seed)
    filters = np.ascontiguousarray(filters, dtype=np.float32)
    if filters.shape != (classes, data.channels, 8):
        raise ShapeError(f"filters: expected shape {(classes, data.channels, 8)}, got {filters.shape}")
    if not np.isfinite(filters).all():
        raise ArgumentError("filters: expected finite numbers")
    target = data.empty(out)
    _native.noise_autoregressive(
        data.matrix,
        data.codes,
        filters.reshape(-1),
        data.layout,
        crop,
        seed,
        data.limits(norm, epsilon),
        target,
        progress=progress,
    )
    settings = {"epsilon": epsilon, "norm": norm, "crop": crop, "box": data.box, "seed": seed}
    return finish(data, target, out, "autoregressive", norm, epsilon, settings)


def convolutional(
    x: Any,
    y: Any,
    *,
    blur: float = 0.3,
    rounding: Literal["nearest", "truncate"] = "nearest",
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    seed: int = 0,
    out: Any = None,
    progress: Progress = None,
) -> Noised:
    """Filter every image with a random 3 × 3 kernel of its class (CUDA). **Not bounded**: no budget holds.

    Sadasivan, Soltanolkotabi and Feizi, "CUDA: convolution-based unlearnable datasets" (CVPR 2023), section 3.1:
    weights are uniform on [0, ``blur``], one of them, drawn at random, is 1; all channels share the kernel, zeros
    surround the image, which is then divided by its own largest value. An image of zeros stays as it is.

    Args:
        blur: ``p_b`` of the paper, 0.3 for CIFAR.
        rounding: of uint8 images; the paper's code truncates, which darkens them by half a level.
        box: ``(0, high)``: values are multiples of white, and must not be negative.
        seed: the key; whoever knows it can undo part of it.
        x, y, channels, out, progress: as in :func:`class_mean_shift`.

    Raises:
        As :func:`class_mean_shift`.
    """
    data = images(x, y, box, channels)
    seed = check_seed(seed)
    if not (math.isfinite(blur) and 0 <= blur <= 1):
        raise ArgumentError(f"blur: expected a number from 0 to 1, got {blur!r}")
    if rounding not in ("nearest", "truncate"):
        raise ArgumentError(f'rounding: expected "nearest" or "truncate", got {rounding!r}')
    if rounding == "truncate" and data.scale == 1.0:
        raise ArgumentError('rounding: "truncate" is for uint8 images, got floats')
    if data.box[0] != 0.0:
        raise ArgumentError(f"box: expected (0, high), got {data.box!r}")
    random = np.random.default_rng(seed)
    kernels = random.uniform(0.0, blur, (len(data.classes), 9))
    kernels[np.arange(len(kernels)), random.integers(0, 9, len(kernels))] = 1.0
    target = data.empty(out)
    _native.noise_convolve(
        data.matrix,
        data.codes,
        kernels.reshape(-1),
        data.layout,
        data.box[1] * data.scale,
        rounding == "truncate",
        target,
        progress=progress,
    )
    settings = {"blur": blur, "rounding": rounding, "box": data.box, "seed": seed}
    return finish(data, target, out, "convolutional", "none", math.inf, settings)


def one_pixel(
    x: Any,
    y: Any,
    *,
    sparsity: int = 1,
    box: tuple[float, float] = (0.0, 1.0),
    channels: Channels = "auto",
    out: Any = None,
    progress: Progress = None,
) -> Noised:
    """Set one pixel of every image to a colour that no image of its class has there (OPS).

    Wu, Chen, Xie and Huang, "One-pixel shortcut" (ICLR 2023), algorithm 1: of all pixels and all corners of the colour
    cube, the pair with the largest mean over the class of the distance to it, in units of its standard deviation (over
    images and channels), that no earlier class has taken. All scores follow from one pass over the data, from the sums
    of values and squares by class; the paper's code makes a pass for each pair.

    Args:
        sparsity: pixels per class; the budget is their number (L0).
        box: black and white.
        x, y, channels, out, progress: as in :func:`class_mean_shift`.

    Returns:
        The published data. Deterministic: ties go to the first pixel, then to the darkest colour.

    Raises:
        As :func:`class_mean_shift`; ArgumentError where there are fewer pairs than ``sparsity`` times the classes.
    """
    data = images(x, y, box, channels)
    sparsity = _whole(sparsity, "sparsity", 1)
    planes, height, width, step = data.layout
    pixels, depth = height * width, data.channels
    if depth > 8:
        raise ShapeError(f"channels: expected at most 8, got {depth}")
    if sparsity * len(data.classes) > pixels * 2**depth or sparsity > pixels:
        found = f"{sparsity} for {len(data.classes)} classes and {pixels} pixels"
        raise ArgumentError(f"sparsity: expected no more than there are pixels and colours, got {found}")
    counts, sums, squares = _sums(data, progress)

    def by_pixel(a: Array) -> Array:
        shaped = a.reshape(-1, planes, pixels, step)
        return np.moveaxis(shaped, 2, 1).reshape(len(counts), pixels, depth)

    low, high = (b * data.scale for b in data.box)
    total, square = by_pixel(sums), by_pixel(squares)
    corners = (np.arange(2**depth)[:, None] >> np.arange(depth)) & 1
    taken = np.zeros((pixels, len(corners)), dtype=bool)
    places: list[int] = []
    colours: list[Array] = []
    for c, n in enumerate(counts):
        score = _scores(total[c], square[c], n, corners, low, high)
        score[taken] = -math.inf
        free = np.ones(pixels, dtype=bool)
        for _ in range(sparsity):
            # A pixel has one colour per class.
            at = int(np.where(free[:, None], score, -math.inf).argmax())
            pixel, corner = divmod(at, len(corners))
            taken[pixel, corner] = True
            free[pixel] = False
            places.append(pixel)
            colours.append(np.where(corners[corner] == 1, high, low))
    target = data.empty(out)
    _native.noise_set_pixels(
        data.matrix,
        data.codes,
        places,
        np.concatenate(colours).astype(np.float64),
        sparsity,
        data.layout,
        target,
        progress=progress,
    )
    settings = {"sparsity": sparsity, "box": data.box}
    return finish(data, target, out, "one_pixel", "l0", float(sparsity), settings)


def _scores(total: Array, square: Array, n: int, corners: Array, low: float, high: float) -> Array:
    """Mean over standard deviation of ``|colour − value|`` over images and channels, pixels × corners.

    Without any spread the score is infinite, and where the colour is what is there already, minus infinity.
    """
    # Of value minus black, and of white minus value.
    dark = total - n * low
    light = n * high - total
    dark2 = square - 2 * low * total + n * low * low
    light2 = square - 2 * high * total + n * high * high
    pick = corners[None, :, :] == 1
    count = n * corners.shape[1]
    mean = np.where(pick, light[:, None, :], dark[:, None, :]).sum(axis=2) / count
    second = np.where(pick, light2[:, None, :], dark2[:, None, :]).sum(axis=2) / count
    # What cancels leaves a rounding error of the second moment.
    variance = np.where(second - mean**2 > 1e-12 * second, second - mean**2, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        score = mean / np.sqrt(variance)
    return np.where(variance > 0, score, np.where(mean > 0, math.inf, -math.inf))
