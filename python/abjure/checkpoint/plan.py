"""From ops to edits of stored tensors: what will be read, changed and written, before anything is."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native
from ..errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from ..forget import Fisher
from ..refuse.weights import gained_basis
from .layout import Resolution, Target, resolution, with_part
from .ops import Ablate, Dampen, Op, Scale
from .recipe import Recipe
from .stored import Shard, Stored

_FISHER = "abjure.fisher.1"
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass
class Plan:
    """What an edit comes to.

    Attributes:
        source: the checkpoint.
        out: where the result goes; None for an edit in place.
        recipe: the ops.
        resolutions: for each op, what it does to which tensors.
        notes: what is left out or behind, and why.
        read, write: bytes; importances and every pass over a tensor are counted.
        seconds: time that reading from the page cache, computing and hashing take on this machine, on all threads; a
            slower storage device adds to it.
    """

    source: Path
    out: Path | None
    recipe: Recipe
    resolutions: list[Resolution]
    notes: list[str]
    read: int = 0
    write: int = 0
    seconds: float = 0.0
    edits: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    #: Tensors that are also stored as they were: name to new name.
    keep: dict[str, str] = field(default_factory=dict)
    #: Changes to config.json.
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> list[tuple[str, Target]]:
        """(kind of op, target), in the order of the ops."""
        return [(r.op.kind, t) for r in self.resolutions for t in r.targets]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types for JSON."""
        return {
            "source": str(self.source),
            "out": None if self.out is None else str(self.out),
            "recipe_sha256": self.recipe.sha256(),
            "ops": [r.to_dict() for r in self.resolutions],
            "tensors": len(self.edits),
            "read_bytes": self.read,
            "write_bytes": self.write,
            "seconds": self.seconds,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        where = "in place" if self.out is None else f"to {self.out}"
        lines = [f"{self.source} {where}: {len(self.edits)} tensors edited"]
        lines += [str(r) for r in self.resolutions]
        lines += [f"reads {_size(self.read)}, writes {_size(self.write)}, about {self.seconds:.1f} s", *self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(with_part(t))}</td><td>{kind}</td><td>{t.dtype} {list(t.shape)}</td>"
            f"<td>{'' if t.axis is None else t.axis}</td><td>{t.scale:g}</td></tr>"
            for kind, t in self.targets
        )
        head = "<tr><th>tensor</th><th>op</th><th>stored as</th><th>axis</th><th>scale</th></tr>"
        notes = "".join(f"<p>{html.escape(n)}</p>" for n in self.notes)
        caption = html.escape(str(self).splitlines()[0])
        return f"<table><caption>{caption}</caption>{head}{rows}</table>{notes}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def as_recipe(ops: Any) -> Recipe:
    """One op, several, a :class:`Recipe`, or the path of one.

    Raises:
        ArgumentError, DTypeError: it is none of these.
    """
    if isinstance(ops, Recipe):
        return ops
    if isinstance(ops, (str, os.PathLike)):
        return Recipe.load(ops)
    if not isinstance(ops, (Ablate, Scale, Dampen)) and not isinstance(ops, Iterable):
        raise DTypeError(f"ops: expected ops or a recipe, got {type(ops).__name__}")
    return Recipe((ops,) if isinstance(ops, (Ablate, Scale, Dampen)) else tuple(ops))


def planned(stored: Stored, out: Path | None, ops: Any, cleanup: contextlib.ExitStack) -> Plan:
    """Resolves the ops against a checkpoint and prepares the edits; nothing of the checkpoint's data is read.

    Raises:
        As :func:`abjure.checkpoint.edit`.
    """
    recipe = as_recipe(ops)
    recipe.check()
    plan = Plan(stored.path, out, recipe, [], [])
    for op in recipe.ops:
        _add(plan, stored, op, cleanup)
    for result in plan.resolutions:
        plan.notes += [n for n in result.notes if n not in plan.notes]
        plan.config.update(result.config)
    for target in (t for _, t in plan.targets):
        if target.keep_as is not None and plan.keep.setdefault(target.name, target.keep_as) != target.keep_as:
            raise ArgumentError(f"tied: {target.name} is to be kept as {target.keep_as} and {plan.keep[target.name]}")
    if out is None and plan.keep:
        raise ArgumentError("in_place: expected an edit that adds no tensor; tied='untie' adds one, so give an out")
    _estimate(plan, stored)
    return plan


def _add(plan: Plan, stored: Stored, op: Op, cleanup: contextlib.ExitStack) -> None:
    infos = stored.tensors
    if isinstance(op, Dampen):
        forget, retain = (_Importances(getattr(op, arg), arg, cleanup) for arg in ("forget", "retain"))
        forget.expect_like(retain)
        found = resolution(stored.config, infos, op, {n: p[1] for n, p in forget.tensors.items()})
        retain.expect_some(t.importance for t in found.targets)
        for t in found.targets:
            count = int(np.prod(t.shape, dtype=np.int64))
            numbers = (float(op.alpha), float(op.lam), forget.count, retain.count)
            part = (str(t.importance), t.importance_offset, count)
            edit = _native.TensorEdit.dampen(forget.file, retain.file, *part, *numbers)
            plan.edits.setdefault(t.name, []).append(edit)
    elif isinstance(op, Scale):
        found = resolution(stored.config, infos, op)
        for t in found.targets:
            plan.edits.setdefault(t.name, []).append(_native.TensorEdit.scale(float(t.scale), t.elements))
    else:
        found = resolution(stored.config, infos, op)
        _ablations(plan, stored, op, found)
    plan.resolutions.append(found)


def _ablations(plan: Plan, stored: Stored, op: Ablate, found: Resolution) -> None:
    bases: dict[Any, Any] = {}
    edits: dict[Any, Any] = {}
    plain = op.basis(found.width or None)
    for t in found.targets:
        assert t.axis is not None
        axis = t.axis % len(t.shape)
        gain = (t.post_gain, t.gain_offset)
        if gain not in bases:
            values = None
            if t.post_gain is not None:
                values = stored.shard_of(t.post_gain).read(t.post_gain) + t.gain_offset
            bases[gain] = gained_basis(plain, values, t.shape[axis])
        if bases[gain].shape[1] != t.shape[axis]:
            raise ShapeError(f"op: {t.name}: expected {bases[gain].shape[1]} along axis {axis}, got {t.shape}")
        key = (gain, axis == len(t.shape) - 1, t.scale, t.norm_preserving, t.elements)
        if key not in edits:
            edits[key] = _native.TensorEdit.ablate(key[1], bases[gain], float(t.scale), t.norm_preserving, t.elements)
        if key[1] and t.norm_preserving in ("row", "row_pre"):
            raise ArgumentError(
                f"norm_preserving: {t.name} lies along the stream with its last axis, where {t.norm_preserving!r} "
                "would need its transpose in memory; use 'in' or leave it out"
            )
        plan.edits.setdefault(t.name, []).append(edits[key])


class _Importances:
    """A file of importances; a Fisher in memory is written to one first."""

    def __init__(self, given: Any, arg: str, cleanup: contextlib.ExitStack) -> None:
        self.arg = arg
        if isinstance(given, Fisher):
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="abjure-"))
            self.path = os.path.join(folder, f"{arg}.safetensors")
            given.save(self.path)
        elif isinstance(given, (str, os.PathLike)):
            self.path = os.fspath(given)
        else:
            raise DTypeError(f"{arg}: expected a path or a Fisher, got {type(given).__name__}")
        self.file = _native.ImportanceFile(self.path)
        self.tensors = {n: (d, tuple(s), b, e) for n, d, s, b, e in self.file.tensors}
        self.metadata = dict(_native.checkpoint_header(self.path)[4])
        self.count = 1.0
        if self.metadata.get("format") == _FISHER:
            try:
                self.count = float(self.metadata["count"])
            except (KeyError, ValueError) as err:
                raise ArgumentError(f"{arg}: expected a count in the metadata of {self.path!r}") from err
            if not self.count > 0:
                raise ArgumentError(f"{arg}: expected a Fisher that has seen gradients, got a count of {self.count:g}")

    def expect_like(self, other: _Importances) -> None:
        for key in ("format", "unit", "power"):
            ours, theirs = self.metadata.get(key), other.metadata.get(key)
            if ours != theirs:
                raise ArgumentError(f"{other.arg}: expected {key} {ours!r} as {self.arg} has, got {theirs!r}")
        if self.tensors.keys() != other.tensors.keys():
            name = min(self.tensors.keys() ^ other.tensors.keys())
            raise ArgumentError(f"{other.arg}: expected the names of {self.arg}, got a difference in {name!r}")
        for name, (dtype, shape, *_) in self.tensors.items():
            found = other.tensors[name][:2]
            if found != (dtype, shape):
                raise ShapeError(f"{other.arg}: {name!r}: expected {dtype} {shape}, got {found[0]} {found[1]}")

    def expect_some(self, names: Iterable[str | None]) -> None:
        """Raises if every importance is 0, which would erase all that the forget set uses."""
        with open(self.path, "rb") as file:
            for name in names:
                _, _, at, end = self.tensors[str(name)]
                file.seek(at)
                while at < end:
                    block = file.read(min(1 << 20, end - at))
                    if any(block):
                        return
                    if not block:
                        raise CheckpointError(f"{self.path}: truncated")
                    at += len(block)
        raise ArgumentError(f"{self.arg}: expected an importance above 0 somewhere, got 0 everywhere")


def _estimate(plan: Plan, stored: Stored) -> None:
    plan.read = plan.write = stored.size
    if plan.out is None:
        plan.write = 0
    work = float(plan.read)
    for kind, t in plan.targets:
        size = int(np.prod(t.shape, dtype=np.int64)) * _ITEMSIZE[t.dtype]
        passes = {"ablate": 1 + (t.norm_preserving == "in"), "scale": 0, "dampen": 0}[kind]
        if kind == "ablate" and t.axis is not None and t.axis % len(t.shape) == len(t.shape) - 1:
            passes = 0
        plan.read += passes * size
        work += (2.5 + passes) * size
        if kind == "dampen" and t.importance is not None:
            plan.read += 2 * int(np.prod(t.shape, dtype=np.int64)) * 4
        if plan.out is None:
            plan.write += 2 * size
    probe = bytes(8 << 20)
    start = time.perf_counter()
    hashlib.sha256(probe).digest()
    rate = len(probe) / (time.perf_counter() - start)
    plan.seconds = work / (0.6 * rate * _native.get_num_threads())


def digest(plan: Plan, stored: Stored, hashes: str) -> str:
    """What has to be the same for a run to take up another one's work."""
    facts = [plan.recipe.canonical(), [s.identity() for s in stored.shards], str(stored.path.resolve()), hashes]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def shard_edits(plan: Plan, shard: Shard) -> tuple[dict[str, list[Any]], list[tuple[str, str]]]:
    """The edits of the tensors of one shard, and (new name, name) of those kept."""
    edits = {n: e for n, e in plan.edits.items() if n in shard.tensors}
    return edits, [(new, old) for old, new in plan.keep.items() if old in shard.tensors]
