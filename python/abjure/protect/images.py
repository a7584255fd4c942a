"""Folders of images, and one image at a time: the pixels of published pictures made hard to learn from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import _interop
from .._files import replacing, write_atomically
from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from .ascent import Protected, Trace, maximize_bayes_error
from .certificate import Certificate

Array = np.ndarray[Any, Any]

SUFFIXES = (".png", ".jpg", ".jpeg")
#: What a run leaves beside the images, and keeps until it is complete.
CERTIFICATE, MANIFEST, PANELS, STATE = "certificate.json", "protect.json", "panels.png", ".abjure-protect"
#: Pixel formats taken as they are, or as the RGB they stand for.
GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "CMYK", "YCbCr")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as err:
        raise ArgumentError("images need Pillow: pip install 'abjure[images]'") from err
    return Image


@dataclass(frozen=True)
class ImageFolder:
    """Images of one size, in the order of their paths, and their classes: the names of the first sub-folders."""

    root: Path
    #: Relative to ``root``.
    paths: list[Path] = field(repr=False)
    labels: Array = field(repr=False)
    classes: list[str]
    #: ``(n, height, width, 1 or 3)`` uint8.
    pixels: Array = field(repr=False)
    #: Files that could not be read, with the reason.
    broken: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of names, shape and pixels."""
        names = "\n".join(p.as_posix() for p in self.paths)
        h = hashlib.sha256(f"{names}\0{self.pixels.shape}\0".encode())
        h.update(np.ascontiguousarray(self.pixels).data)
        return h.hexdigest()


def read_folder(root: str | os.PathLike[str], *, broken: Literal["error", "skip"] = "error") -> ImageFolder:
    """Reads the PNG and JPEG files of a folder whose sub-folders are classes.

    Pictures are kept as they are stored (no rotation by EXIF). If all are grey there is one channel, else three.

    Args:
        root: the folder.
        broken: a file that is no complete image is an ``"error"`` that names it, or ``"skip"``\\ ped and named in the
            result.

    Raises:
        ArgumentError: no folder, no sub-folder with images, a broken file, or more than 8 bits per channel.
        ShapeError: images of different sizes.
        DegenerateError: fewer than two classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise ArgumentError(f"source: expected a folder, got {os.fspath(root)!r}")
    if broken not in ("error", "skip"):
        raise ArgumentError(f'broken: expected "error" or "skip", got {broken!r}')
    found = sorted(
        p.relative_to(root)
        for p in root.rglob("*")
        if p.suffix.lower() in SUFFIXES and p.is_file() and not any(part.startswith(".") for part in p.parts)
    )
    paths = [p for p in found if len(p.parts) > 1]
    if not paths:
        what = "images in sub-folders named as their classes"
        raise ArgumentError(f"source: expected {what}, got {len(found)} images in {os.fspath(root)!r} itself")
    images: list[Array] = []
    kept: list[Path] = []
    bad: dict[str, str] = {}
    for path in paths:
        try:
            image = _read(root / path)
        except ArgumentError:
            raise
        except Exception as err:  # Pillow raises many kinds for files that are damaged.
            bad[path.as_posix()] = str(err) or type(err).__name__
            continue
        if images and image.shape[:2] != images[0].shape[:2]:
            first, here = (f"{v.shape[1]}×{v.shape[0]}" for v in (images[0], image))
            raise ShapeError(
                f"source: expected images of one size, got {first} in {kept[0].as_posix()!r} and {here} in "
                f"{path.as_posix()!r}; resize them first"
            )
        images.append(image)
        kept.append(path)
    if bad and broken == "error":
        name, reason = next(iter(bad.items()))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ArgumentError(
            f"source: {name!r} is no complete image ({reason}){more}; broken='skip' leaves such files out"
        )
    classes = sorted({p.parts[0] for p in kept})
    if len(classes) < 2:
        raise DegenerateError(f"source: expected images of at least two classes, got {classes}")
    width = max(i.shape[2] for i in images)
    pixels = np.stack([np.broadcast_to(i, (*i.shape[:2], width)) for i in images])
    labels = np.array([classes.index(p.parts[0]) for p in kept])
    return ImageFolder(root, kept, labels, classes, pixels, bad)


def _read(path: Path) -> Array:
    """Colour or grey as uint8, without transparency.

    Raises:
        ArgumentError: pixels that are no bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _pillow().open(path) as image:
            image.load()
            mode = image.mode
            if mode not in (*GREY, *COLOUR):
                raise ArgumentError(f"source: expected 8 bits per channel, got mode {mode!r} in {os.fspath(path)!r}")
            array = np.asarray(image.convert("L" if mode in GREY else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def _encode(pixels: Array, original: Path, suffix: str, quality: int) -> Callable[[str], None]:
    """A function that writes ``pixels`` to a path with what ``original`` carries beside its own."""
    from PIL import PngImagePlugin

    library = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with library.open(original) as old:
            old.load()
            info = dict(old.info)
            transparent = old.mode in ("LA", "RGBA") or (old.mode == "P" and "transparency" in info)
            alpha = old.convert("RGBA").getchannel("A") if transparent else None
            text = dict(getattr(old, "text", {}) or {})
    image = library.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options: dict[str, Any] = {n: info[n] for n in ("exif", "icc_profile", "dpi") if info.get(n)}
    if suffix == ".png":
        if alpha is not None:
            image.putalpha(alpha)
        chunks = PngImagePlugin.PngInfo()
        for name, value in text.items():
            if isinstance(value, PngImagePlugin.iTXt):
                chunks.add_itxt(name, str(value), value.lang or "", value.tkey or "")
            else:
                chunks.add_text(name, str(value))
        if isinstance(info.get("comment"), bytes):
            chunks.add_text("Comment", info["comment"].decode("utf-8", "replace"))
        if isinstance(info.get("gamma"), float):
            chunks.add(b"gAMA", round(info["gamma"] * 100000).to_bytes(4, "big"))
        options |= {"format": "PNG", "pnginfo": chunks}
    else:
        if info.get("comment"):
            options["comment"] = info["comment"]
        options |= {"format": "JPEG", "quality": quality, "subsampling": 0}
    return lambda path: image.save(path, **options)


@dataclass(frozen=True)
class ProtectedFolder:
    """What a run on a folder left."""

    out: Path
    protected: Protected = field(repr=False)
    images: int
    #: Images written by this run; the others were there and are as they should be.
    written: int
    skipped: dict[str, str]
    #: Largest change of a pixel between the files, in levels of 255. Lossy files may exceed the budget.
    largest_level: int
    lossy: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "out": os.fspath(self.out),
            "images": self.images,
            "written": self.written,
            "skipped": self.skipped,
            "largest_level": self.largest_level,
            "lossy": self.lossy,
            "holds": self.protected.certificate.holds,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.images} images in {os.fspath(self.out)}, {self.written} written now",
            f"largest change of a pixel: {self.largest_level} of 255 levels",
        ]
        if self.lossy:
            lines.append("JPEG has rounded the change; the certificate is of the pixels before that")
        lines += [f"left out: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, str(self.protected.certificate)])


def protect_images(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    epsilon: float = 8 / 255,
    format: Literal["png", "jpeg", "same"] = "png",
    quality: int = 95,
    broken: Literal["error", "skip"] = "error",
    resume: bool = False,
    panels: int = 3,
    progress: bool | None = None,
    **options: Any,
) -> ProtectedFolder:
    """Writes the images of a folder, perturbed by :func:`maximize_bayes_error`, to another folder of the same shape.

    Names, EXIF, ICC profiles, text chunks, resolution and transparency are kept. Every file is complete or not there.
    The ascent's result is kept in ``out`` until all images are written, so that ``resume`` goes on after an
    interruption and gives the very same files. Beside the images: ``certificate.json``, ``protect.json`` (which file is
    which, hashes, what was skipped) and ``panels.png`` (before, after, the difference scaled to the budget).

    Args:
        source: folder of PNG and JPEG files; the first sub-folders are classes (see :func:`read_folder`). All are held
            in memory, once as bytes and once as f32.
        out: a new or empty folder, or that of an earlier run with ``resume``.
        epsilon: budget of a pixel, as a part of 255.
        format: ``"png"`` (lossless), ``"jpeg"``, or the ``"same"`` as each file; with JPEG the encoder may undo the
            change, which is said in a warning.
        quality: of JPEG, 1 to 100.
        broken: see :func:`read_folder`.
        resume: go on with the run that was begun in ``out`` with the same images and options.
        panels: examples per class in ``panels.png``; 0 for none.
        progress: bars; None shows them on a terminal.
        **options: of :func:`maximize_bayes_error` (``steps``, ``per``, ``against``, ``features``, ``protect``, …). With
            a ``checkpoint``, a file outside ``out``, an interrupted ascent goes on too; else it begins again.

    Raises:
        ArgumentError: ``out`` inside ``source`` or not empty, a run that is not the one begun, a full disk (what has
            been written is valid, and ``resume`` goes on from there), or as :func:`read_folder`.
        ShapeError, DegenerateError: as :func:`read_folder`, :func:`maximize_bayes_error`.
    """
    source, out = Path(source), Path(out)
    if format not in ("png", "jpeg", "same"):
        raise ArgumentError(f'format: expected "png", "jpeg" or "same", got {format!r}')
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ArgumentError(f"quality: expected a whole number from 1 to 100, got {quality!r}")
    if isinstance(panels, bool) or not isinstance(panels, int) or panels < 0:
        raise ArgumentError(f"panels: expected a whole number of 0 or more, got {panels!r}")
    here, there = out.resolve(), source.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise ArgumentError(f"out: expected a folder apart from the source, got {os.fspath(out)!r}")
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out: expected a folder, got the file {os.fspath(out)!r}")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise ArgumentError(f"out: expected a new or empty folder, got {os.fspath(out)!r}; resume goes on with a run")
    folder = read_folder(source, broken=broken)
    names = _names(folder.paths, format)
    settings = {"epsilon": epsilon, "format": format, "quality": quality, **options}
    run = {"source_sha256": folder.digest, "settings": {k: _told(v) for k, v in sorted(settings.items())}}
    if resume:
        _same_run(out, run)
    protected = _ascend(folder, out, run, epsilon, options, progress)
    pixels = np.asarray(protected.x).reshape(folder.pixels.shape)
    lossy = any(n.suffix != ".png" for n in names)
    if lossy:
        warnings.warn(
            "format: JPEG rounds away much of a small change, and with it the protection; PNG keeps it", stacklevel=2
        )
    written, largest = _write(folder, out, names, pixels, quality, progress)
    certificate = protected.certificate
    certificate.save(out / CERTIFICATE)
    if panels:
        _write_panels(folder, pixels, out / PANELS, panels, epsilon)
    manifest = {
        **run,
        "complete": True,
        "classes": folder.classes,
        "files": {n.as_posix(): p.as_posix() for n, p in zip(names, folder.paths, strict=True)},
        "skipped": folder.broken,
        "published_sha256": certificate.published_sha256,
        "certificate": CERTIFICATE,
        "largest_level": largest,
    }
    write_atomically(out / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    shutil.rmtree(out / STATE, ignore_errors=True)
    return ProtectedFolder(out, protected, len(names), written, folder.broken, largest, lossy)


def _told(value: Any) -> str:
    """An option as text that is the same in another process."""
    if hasattr(value, "__array__") or isinstance(value, (list, tuple)):
        return repr(np.asarray(value).tolist())
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def _names(paths: list[Path], format: str) -> list[Path]:
    """Where each image goes; ``a.jpg`` becomes ``a.png``, or ``a.jpg.png`` where there is an ``a.png`` too."""
    if format == "same":
        return paths
    suffixes = (".png",) if format == "png" else (".jpg", ".jpeg")
    names = [p if p.suffix.lower() in suffixes else p.with_suffix(suffixes[0]) for p in paths]
    # Names that differ by case alone are one file on some systems.
    counts: dict[str, int] = {}
    for n in names:
        counts[n.as_posix().lower()] = counts.get(n.as_posix().lower(), 0) + 1
    return [
        p.with_name(p.name + suffixes[0]) if n != p and counts[n.as_posix().lower()] > 1 else n
        for n, p in zip(names, paths, strict=True)
    ]


def _same_run(out: Path, run: Mapping[str, Any]) -> None:
    for path in (out / STATE / MANIFEST, out / MANIFEST):
        if path.is_file():
            try:
                begun = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as err:
                raise ArgumentError(f"out: {os.fspath(path)!r} is not the record of a run ({err})") from err
            for key, what in (("source_sha256", "images"), ("settings", "options")):
                if begun.get(key) != run[key]:
                    raise ArgumentError(f"resume: expected the {what} that {os.fspath(out)!r} was begun with")
            return
    if out.is_dir() and any(p for p in out.iterdir() if p.name != STATE):
        raise ArgumentError(f"resume: expected a folder that a run was begun in, got {os.fspath(out)!r}")


def _ascend(
    folder: ImageFolder, out: Path, run: dict[str, Any], epsilon: float, options: dict[str, Any], progress: bool | None
) -> Protected:
    """The perturbed pixels; those an interrupted run had found where they are there."""
    state = out / STATE
    kept = state / "published.npz"
    if kept.is_file():
        # Written by this very run, whose record has just been compared.
        try:
            with np.load(kept, allow_pickle=False) as file:
                parts = {name: file[name] for name in file.files}
            found = Protected(
                x=parts["x"],
                clean=folder.pixels,
                labels=folder.labels,
                trace=Trace(parts["steps"], parts["checks"], int(parts["best"]), float(parts["error_bound"])),
                certificate=Certificate.load(state / CERTIFICATE),
                bandwidth=tuple(parts["bandwidth"].tolist()),
                settings=json.loads(str(parts["settings"])),
            )
            if found.certificate.verify(found.x, found.clean):
                return found
        except (KeyError, OSError, ValueError):
            pass  # Damaged: found again.
    found = maximize_bayes_error(folder.pixels, folder.labels, epsilon=epsilon, progress=progress, **options)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArgumentError(
            f"out: expected a folder that can be made, got {os.fspath(out)!r} ({err.strerror})"
        ) from err
    write_atomically(state / MANIFEST, json.dumps(run).encode())
    found.certificate.save(state / CERTIFICATE)
    with replacing(kept) as temporary, open(temporary, "wb") as stream:
        np.savez(
            stream,
            x=np.asarray(found.x),
            steps=found.trace.steps,
            checks=found.trace.checks,
            best=found.trace.best,
            error_bound=found.trace.error_bound,
            bandwidth=np.array(found.bandwidth),
            settings=json.dumps(found.settings, default=str),
        )
    return found


def _write(
    folder: ImageFolder, out: Path, names: list[Path], pixels: Array, quality: int, progress: bool | None
) -> tuple[int, int]:
    """Images written, and the largest change of a pixel as the files have it."""
    from tqdm.auto import tqdm

    written, largest = 0, 0
    items = zip(names, folder.paths, pixels, folder.pixels, strict=True)
    for done, (name, path, after, before) in enumerate(
        tqdm(items, total=len(names), desc="images", disable=None if progress is None else not progress)
    ):
        target = out / name
        lossless = name.suffix.lower() == ".png"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stored = _stored(target)
            # A lossy file of an earlier run cannot be compared; it was complete when it got its name.
            there = stored is not None and (not lossless or np.array_equal(_widened(stored, after), after))
            if not there:
                save = _encode(after, folder.root / path, ".png" if lossless else ".jpg", quality)
                with replacing(target) as temporary:
                    save(temporary)
                written += 1
        except (ArgumentError, OSError) as err:
            raise ArgumentError(
                f"out: {done} of {len(names)} images are written and valid, the next could not be ({err}); "
                "make room and go on with resume"
            ) from err
        seen = after if lossless else _widened(_read(target), after)
        largest = max(largest, int(np.abs(seen.astype(np.int16) - before.astype(np.int16)).max()))
    return written, largest


def _stored(path: Path) -> Array | None:
    try:
        return _read(path) if path.is_file() else None
    except Exception:  # A file that is no image is written again.
        return None


def _widened(image: Array, like: Array) -> Array:
    """A grey image that was stored as one, in the channels of the others."""
    return np.broadcast_to(image, like.shape) if image.shape[:2] == like.shape[:2] else image


def _write_panels(folder: ImageFolder, pixels: Array, path: Path, per_class: int, epsilon: float) -> None:
    """Rows of examples: before, after, and the difference around grey, black and white at the budget."""
    pick = [i for c in range(len(folder.classes)) for i in np.flatnonzero(folder.labels == c)[:per_class]][:60]
    before, after = folder.pixels[pick].astype(np.float64), pixels[pick].astype(np.float64)
    difference = 127.5 + (after - before) / max(255 * epsilon, 1) * 127.5
    rows = [before, after, np.clip(difference, 0, 255)]
    gap = 2
    n, h, w, channels = before.shape
    sheet = np.full((3 * h + 2 * gap, n * (w + gap) - gap, channels), 255, dtype=np.uint8)
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            sheet[r * (h + gap) : r * (h + gap) + h, c * (w + gap) : c * (w + gap) + w] = np.rint(image)
    panel = _pillow().fromarray(sheet[..., 0] if channels == 1 else sheet)
    if max(h, w) < 64:
        scale = math.ceil(64 / max(h, w))
        panel = panel.resize((panel.width * scale, panel.height * scale), 0)
    with replacing(path) as temporary:
        panel.save(temporary, format="PNG")


class ClassPerturbation:
    """One perturbation per class, for images as they come: a transform of torchvision, of `datasets`, or of arrays.

    Args:
        delta: ``(C, height, width, channels)`` whole levels of 255, within the budget.
        classes: ``(C,)`` labels.
    """

    def __init__(self, delta: Any, classes: Any) -> None:
        values = np.asarray(delta)
        if values.ndim != 4 or values.shape[3] not in (1, 3):
            raise ShapeError(f"delta: expected shape (C, height, width, 1 or 3), got {values.shape}")
        if values.dtype.kind not in "iu" or np.abs(values.astype(np.int64)).max(initial=0) > 255:
            raise DTypeError(f"delta: expected whole levels from -255 to 255, got dtype {values.dtype}")
        self.delta = values.astype(np.int16)
        self.classes = _interop.integers(classes, "classes")
        if self.classes.shape != (len(values),):
            raise ShapeError(f"classes: expected shape ({len(values)},), got {self.classes.shape}")

    @classmethod
    def of(cls, protected: Protected) -> ClassPerturbation:
        """What a class-wise run on uint8 images ``(n, h, w)`` or ``(n, h, w, 1 or 3)`` added to each class.

        Raises:
            ArgumentError: perturbations that differ between images of a class by more than the edges of the range.
        """
        delta = np.asarray(protected.delta)
        if delta.dtype != np.int16:
            raise DTypeError(f"protected: expected a run on uint8 images, got a change of dtype {delta.dtype}")
        delta = delta[..., None] if delta.ndim == 3 else delta
        clean = np.asarray(protected.clean).reshape(delta.shape).astype(np.int16)
        classes = np.unique(protected.labels)
        found = []
        for c in classes:
            own = protected.labels == c
            # At the edge of the range a part of the change is cut off; the largest of the class is the change.
            low, high = delta[own].min(axis=0), delta[own].max(axis=0)
            shared = np.where(-low > high, low, high)
            if not np.array_equal(np.clip(clean[own] + shared, 0, 255) - clean[own], delta[own]):
                raise ArgumentError(f'protected: expected one perturbation per class (per="class"), got several in {c}')
            found.append(shared)
        return cls(np.stack(found), classes)

    def _of(self, label: Any) -> Array:
        at = np.flatnonzero(self.classes == int(label))
        if len(at) == 0:
            raise ArgumentError(f"label: expected one of {self.classes.tolist()}, got {label!r}")
        return np.asarray(self.delta[at[0]])

    def __call__(self, image: Any, label: Any) -> Any:
        """The image of a class, perturbed: a Pillow image, a uint8 array ``(h, w)`` or ``(h, w, c)``, or a tensor
        ``(c, h, w)`` of uint8 or of floats from 0 to 1; returned as it came.

        Raises:
            ShapeError: an image of another size. ArgumentError: an unknown class. DTypeError: another kind of image.
        """
        delta = self._of(label)
        if _interop.is_torch(image):
            import torch

            shift = torch.from_numpy(np.ascontiguousarray(np.moveaxis(delta, 2, 0))).to(image.device)
            if tuple(image.shape) not in (tuple(shift.shape), (3, *shift.shape[1:])):
                raise ShapeError(f"image: expected shape {tuple(shift.shape)}, got {tuple(image.shape)}")
            if image.dtype == torch.uint8:
                return (image.to(torch.int16) + shift).clamp(0, 255).to(torch.uint8)
            if not image.is_floating_point():
                raise DTypeError(f"image: expected uint8 or floats, got dtype {image.dtype}")
            return (image + shift.to(image.dtype) / 255).clamp(0, 1)
        if hasattr(image, "getbands"):
            array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
            return _pillow().fromarray(self._add(array, delta))
        return self._add(np.asarray(image), delta)

    @staticmethod
    def _add(image: Array, delta: Array) -> Array:
        if image.dtype != np.uint8:
            raise DTypeError(f"image: expected uint8, got dtype {image.dtype}")
        shift = delta[..., 0] if image.ndim == 2 and delta.shape[2] == 1 else delta
        if image.shape not in (shift.shape, (*shift.shape[:2], 3)) or image.ndim != shift.ndim:
            raise ShapeError(f"image: expected shape {shift.shape}, got {image.shape}")
        return np.clip(image.astype(np.int16) + shift, 0, 255).astype(np.uint8)

    def transforms(self, image: Any, target: Any) -> tuple[Any, Any]:
        """For torchvision's data sets: ``ImageFolder(root, transforms=perturbation.transforms)``."""
        return self(image, target), target

    def on_examples(self, image: str = "image", label: str = "label") -> Callable[[dict[str, Any]], dict[str, Any]]:
        """For `datasets`: ``dataset.map(perturbation.on_examples())``, batched or not, or ``with_transform``."""

        def change(examples: dict[str, Any]) -> dict[str, Any]:
            images, labels = examples[image], examples[label]
            if isinstance(images, (list, tuple)):
                return {**examples, image: [self(i, c) for i, c in zip(images, labels, strict=True)]}
            return {**examples, image: self(images, labels)}

        return change

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the perturbation as safetensors, completely or not at all."""
        from safetensors.numpy import save

        write_atomically(path, save({"delta": self.delta, "classes": self.classes}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassPerturbation:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: no such file, or not a saved perturbation.
        """
        from .._files import reading

        with reading(path, "ClassPerturbation") as file:
            return cls(file.get_tensor("delta"), file.get_tensor("classes"))
