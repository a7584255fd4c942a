"""The Python half of the array intake: which arrays go to a kernel as they are, and what happens to the others.

A kernel takes CPU memory whose last axis is contiguous and whose rows do not overlap, and never copies it. Arrays of
any other layout (a transposed view, negative steps, a broadcast) are copied into a contiguous temporary here, and
copied back where the kernel wrote in place. Tensors on another device are never moved: :func:`device_path` finds the
torch form that computes where they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np

from .errors import DeviceError, DTypeError, LayoutError

ArrayT = TypeVar("ArrayT")


def is_torch(x: object) -> bool:
    """Whether ``x`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def device_path(x: object, kernel: str) -> Callable[..., Any] | None:
    """The torch form of ``kernel`` if ``x`` is a tensor on another device than the CPU, else None.

    Raises:
        DeviceError: the tensor has no memory (``meta``), or no torch form of the kernel exists.
    """
    if not is_torch(x) or x.is_cpu:  # type: ignore[attr-defined]
        return None
    device = x.device.type  # type: ignore[attr-defined]
    if device == "meta":
        raise DeviceError(f"{kernel}: expected a tensor with memory, got device 'meta'")
    paths = importlib.import_module("abjure.integrations.torch").DEVICE_PATHS
    if kernel not in paths:
        raise DeviceError(f"{kernel}: expected a CPU tensor, got device {device!r}; move it with .cpu() first")
    return paths[kernel]  # type: ignore[no-any-return]


def shape(x: Any, arg: str) -> tuple[int, ...]:
    """The shape of an array or tensor.

    Raises:
        DTypeError: ``x`` is neither.
    """
    found = getattr(x, "shape", None)
    if found is None:
        raise DTypeError(f"{arg}: expected an array or tensor, got {type(x).__name__}")
    return tuple(int(n) for n in found)


def _strides(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(x, np.ndarray):
        size = max(x.itemsize, 1)
        return x.shape, tuple(s // size if s % size == 0 else -1 for s in x.strides)
    return tuple(x.shape), tuple(x.stride())


def _is_row_strided(x: Any) -> bool:
    shape, strides = _strides(x)
    if 0 in shape or not shape:
        return True
    if shape[-1] > 1 and strides[-1] != 1:
        return False
    need = shape[-1]
    for stride, n in sorted((s, n) for n, s in zip(shape[:-1], strides[:-1], strict=True) if n > 1):
        if stride < need:
            return False
        need += (n - 1) * stride
    return True


def _overlaps_itself(x: Any) -> bool:
    shape, strides = _strides(x)
    if 0 in shape:
        return False
    need = 1
    for stride, n in sorted((abs(s), n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride < need:
            return True
        need += (n - 1) * stride
    return False


def _is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor that needs nothing done: a short way, since a generation loop finds caches cold."""
    return is_torch(x) and x.is_cpu and x.is_contiguous() and not (x.requires_grad or x.is_conj() or x.is_neg())


def source(x: Any, arg: str) -> Any:
    """``x`` in a form a kernel can read: ``x`` itself wherever possible, else a contiguous copy.

    Lists and scalars become float64 arrays; a tensor that requires grad is read through ``detach()``.

    Raises:
        DTypeError: ``x`` is not numeric.
        DeviceError: ``x`` is a tensor on another device.
    """
    if _is_plain(x):
        return x
    if is_torch(x):
        if x.device.type != "cpu":
            raise DeviceError(f"{arg}: expected a CPU tensor, got device {str(x.device)!r}")
        x = x.detach().resolve_conj().resolve_neg()
        return x if _is_row_strided(x) else x.contiguous()
    if isinstance(x, (list, tuple, int, float)):
        try:
            x = np.asarray(x, dtype=np.float64)
        except (TypeError, ValueError) as err:
            raise DTypeError(f"{arg}: expected numbers, got {x!r:.80}") from err
    if isinstance(x, np.ndarray):
        aligned = x.flags.aligned and x.dtype.isnative
        return x if aligned and _is_row_strided(x) else np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
    return x


def target(x: Any, arg: str) -> AbstractContextManager[Any]:
    """``x`` in a form a kernel can write: ``x`` itself wherever possible, else a temporary copied back on success.

    Raises:
        LayoutError: ``x`` is read-only, requires grad outside ``torch.no_grad()``, or its elements overlap.
        DTypeError: ``x`` is not an array.
    """
    return nullcontext(x) if _is_plain(x) else _target(x, arg)


@contextmanager
def _target(x: Any, arg: str) -> Iterator[Any]:
    if is_torch(x):
        torch = sys.modules["torch"]
        if x.requires_grad and torch.is_grad_enabled():
            raise LayoutError(f"{arg}: the tensor requires grad; write under torch.no_grad() or pass tensor.detach()")
        plain = x.detach()
        if plain.is_conj() or plain.is_neg() or _overlaps_itself(plain):
            raise LayoutError(f"{arg}: elements overlap in memory; pass a contiguous copy")
        if _is_row_strided(plain):
            yield plain
        else:
            copy = plain.contiguous()
            yield copy
            plain.copy_(copy)
        return
    if isinstance(x, np.ndarray):
        if not x.flags.writeable:
            raise LayoutError(f"{arg}: the array is read-only")
        if _overlaps_itself(x):
            raise LayoutError(f"{arg}: elements overlap in memory; pass a contiguous copy")
        if x.flags.aligned and x.dtype.isnative and _is_row_strided(x):
            yield x
        else:
            fixed = source(x, arg)
            fixed = fixed.copy() if fixed is x else fixed
            yield fixed
            x[...] = fixed
        return
    if not hasattr(x, "__dlpack__"):
        raise DTypeError(
            f"{arg}: expected a NumPy array, torch tensor or other array with __dlpack__, got {type(x).__name__}"
        )
    yield x


def empty_like(x: Any) -> Any:
    """A new C-contiguous array of the kind, shape and dtype of ``x``, for a kernel to fill.

    Other DLPack arrays yield a NumPy array; see :func:`like`.
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = np.asarray(x) if isinstance(x, (list, tuple, int, float)) else x
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, dtype=x.dtype.newbyteorder("="))
    return np.empty(tuple(x.shape), dtype=np.from_dlpack(x).dtype)


def like(result: Any, x: Any) -> Any:
    """``result`` (an array a kernel filled) as the kind of array ``x`` is."""
    if is_torch(x) or isinstance(x, (np.ndarray, list, tuple, int, float)):
        return result
    namespace = importlib.import_module(type(x).__module__.split(".")[0])
    convert = getattr(namespace, "from_dlpack", None) or getattr(getattr(namespace, "numpy", None), "from_dlpack", None)
    return convert(result) if convert is not None else result


def integers(x: Any, arg: str, dtype: Any = np.int64) -> np.ndarray[Any, Any]:
    """``x`` (labels, token ids) as a C-contiguous integer array; no copy where it is one already.

    Raises:
        DTypeError: ``x`` holds anything but whole numbers.
    """
    if is_torch(x):
        if x.device.type != "cpu":
            raise DeviceError(f"{arg}: expected a CPU tensor, got device {str(x.device)!r}")
        x = x.detach().numpy() if not x.is_floating_point() else x.detach().double().numpy()
    values = np.asarray(x)
    if values.size == 0:
        return np.asarray(values, dtype=dtype, order="C")
    if values.dtype.kind not in "iub" and not (values.dtype.kind == "f" and bool(np.all(values == np.rint(values)))):
        raise DTypeError(f"{arg}: expected whole numbers, got dtype {values.dtype}")
    info = np.iinfo(dtype)
    if values.dtype.kind != "b" and (values.max() > info.max or values.min() < info.min):
        raise DTypeError(f"{arg}: expected numbers that fit {np.dtype(dtype)}")
    return np.asarray(values, dtype=dtype, order="C")
