"""Recipes: ops in a TOML file, with decimals kept as they were written and a hash that names the result.

.. code-block:: toml

    format = "abjure.recipe.1"

    [[op]]
    kind = "ablate"
    direction = "refusal.safetensors"   # beside the recipe
    scale = 0.85
    layers = [10, 11, 12]

    [[op]]
    kind = "dampen"
    forget = "forget.safetensors"
    retain = "retain.safetensors"
    alpha = 12.5

The keys of an op are the fields of its class. A file may be pinned: ``direction_sha256``, ``forget_sha256`` and
``retain_sha256`` are the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_atomically
from ..errors import AbjureError, ArgumentError, DTypeError
from ..forget import Fisher
from ..refuse import Direction
from ..refuse.directions import _vectors
from .ops import OPS, Ablate, Dampen, Op, options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = "abjure.recipe.1"
#: Larger files are no recipes.
_LARGEST = 256 * 1024
_TEXTS = ("title", "note")
_PATHS = {"ablate": ("direction",), "scale": (), "dampen": ("forget", "retain")}


class Written(Decimal):
    """A decimal number that remembers how it was written: ``1.50`` stays ``1.50``, ``1e-3`` stays ``1e-3``."""

    text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type[Written], tuple[str]]:
        return Written, (self.text,)


@dataclass(frozen=True, eq=False)
class Recipe:
    """Ops in their order, and the text they were read from.

    Attributes:
        ops: what is done, first to last.
        title: a short name, part of :attr:`name`.
        note: anything the author wants to say.
        pinned: for each op, field to the SHA-256 that its file has to have.
        text: the TOML text; made from the ops where there was none.

    Raises:
        ArgumentError, DTypeError: no ops, or something that is not an op.
    """

    ops: tuple[Op, ...]
    title: str = ""
    note: str = ""
    pinned: tuple[Mapping[str, str], ...] = ()
    text: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        ops = (self.ops,) if isinstance(self.ops, tuple(OPS.values())) else tuple(self.ops)
        if not ops:
            raise ArgumentError("ops: expected one op or more, got none")
        for op in ops:
            if not isinstance(op, tuple(OPS.values())):
                raise DTypeError(f"ops: expected {', '.join(o.__name__ for o in OPS.values())}, got {op!r:.80}")
        pinned = tuple(self.pinned) or ({},) * len(ops)
        if len(pinned) != len(ops):
            raise ArgumentError(f"pinned: expected one mapping for each of {len(ops)} ops, got {len(pinned)}")
        object.__setattr__(self, "ops", ops)
        object.__setattr__(self, "pinned", pinned)

    @classmethod
    def loads(cls, text: str, folder: str | os.PathLike[str] = ".", where: str = "recipe") -> Recipe:
        """Reads TOML text; paths in it count from ``folder``.

        Raises:
            ArgumentError, DTypeError: it is not TOML, or not a recipe; the message names line, op and key.
        """
        try:
            data = tomllib.loads(text, parse_float=Written)
        except tomllib.TOMLDecodeError as err:
            found = re.search(r"\s*\(at line (\d+), column (\d+)\)$", str(err))
            place = f"{where}:{found[1]}:{found[2]}" if found else where
            what = str(err)[: found.start()] if found else str(err)
            raise ArgumentError(f"{place}: expected TOML: {what[:1].lower()}{what[1:]}") from None
        except (InvalidOperation, ValueError, RecursionError) as err:
            raise ArgumentError(f"{where}: expected TOML ({err})") from None
        return _Reader(text, Path(folder), where).recipe(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a TOML file; paths in it count from its folder.

        Raises:
            ArgumentError, DTypeError: as :meth:`loads`, or the file cannot be read.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(_LARGEST + 1)
        except OSError as err:
            raise ArgumentError(f"path: expected a readable recipe, got {os.fspath(path)!r} ({err.strerror})") from err
        if len(content) > _LARGEST:
            raise ArgumentError(f"path: expected a recipe of at most {_LARGEST} bytes, {os.fspath(path)!r} is larger")
        try:
            # Line ends as TOML has them: \r\n is one, and stays in the text for save().
            text = content.decode("utf-8")
        except UnicodeDecodeError as err:
            line = content[: err.start].count(b"\n") + 1
            raise ArgumentError(f"{os.fspath(path)}:{line}: expected UTF-8 text ({err.reason})") from None
        return cls.loads(text, Path(path).parent, os.fspath(path))

    def to_toml(self) -> str:
        """The text it was read from, byte for byte; else one made from the ops.

        Raises:
            DTypeError: an op holds an array or an importance that is in no file.
        """
        if self.text:
            return self.text
        lines = [f"format = {_toml(FORMAT, 'format')}"]
        lines += [f"{key} = {_toml(value, key)}" for key in _TEXTS if (value := getattr(self, key))]
        for op, pinned in zip(self.ops, self.pinned, strict=True):
            lines += ["", "[[op]]", f"kind = {_toml(op.kind, 'kind')}"]
            for name, value in options(op).items():
                lines.append(f"{name} = {_toml(value, name)}")
                if name in pinned:
                    lines.append(f"{name}_sha256 = {_toml(pinned[name], name)}")
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_toml`; the file appears complete or not at all.

        Raises:
            ArgumentError: the path cannot be written.
            DTypeError: as :meth:`to_toml`.
        """
        write_atomically(path, self.to_toml().encode())

    def pin(self) -> Recipe:
        """The same recipe with the SHA-256 of every file as it is now.

        Raises:
            ArgumentError: a file cannot be read.
        """
        pinned = tuple(
            {name: file_sha256(getattr(op, name)) for name in _PATHS[op.kind] if _is_path(getattr(op, name))}
            for op in self.ops
        )
        return replace(self, pinned=pinned, text="")

    def check(self) -> None:
        """Reads the files that are pinned.

        Raises:
            ArgumentError: one cannot be read, or has another SHA-256 than the recipe says.
        """
        for number, (op, pinned) in enumerate(zip(self.ops, self.pinned, strict=True), 1):
            for name, expected in pinned.items():
                found = file_sha256(getattr(op, name))
                if found != expected.lower():
                    raise ArgumentError(f"op {number}: {name}_sha256: expected {expected}, the file has {found}")

    def canonical(self) -> str:
        """One line of JSON that says what is done and nothing else.

        Keys are sorted and defaults filled in; numbers stand by their value (``1.50`` as ``15e-1``), a direction and
        an importance by the SHA-256 of their numbers. So it depends neither on the order of keys, comments and file
        names, nor on whether an op got a file or the object that the file holds.

        Raises:
            ArgumentError: a file cannot be read, or is not what it should be.
        """
        ops = [_canonical_op(op) for op in self.ops]
        return json.dumps({"format": FORMAT, "ops": ops}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    def sha256(self) -> str:
        """SHA-256 of :meth:`canonical`, in hexadecimal digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @property
    def name(self) -> str:
        """A name for the result: the title in lower case and dashes, and 12 digits of :meth:`sha256`."""
        title = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{title or 'recipe'}-{self.sha256()[:12]}"

    def __str__(self) -> str:
        return self.to_toml()

    def __repr__(self) -> str:
        return f"Recipe({', '.join(op.kind for op in self.ops)})"

    def _repr_html_(self) -> str:
        try:
            text = self.to_toml()
        except AbjureError:
            text = repr(self)
        return f"<pre>{html.escape(text)}</pre>"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, read piece by piece.

    Raises:
        ArgumentError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as err:
        raise ArgumentError(f"path: expected a readable file, got {os.fspath(path)!r} ({err.strerror})") from err
    return digest.hexdigest()


class _Reader:
    """Turns parsed TOML into ops, and finds the line of what is wrong."""

    def __init__(self, text: str, folder: Path, where: str) -> None:
        self.text, self.folder, self.where = text, folder, where

    def recipe(self, data: Mapping[str, Any]) -> Recipe:
        if data.get("format") != FORMAT:
            raise self.error(("format",), f'format: expected "{FORMAT}", got {data.get("format")!r}')
        for key in data:
            if key not in ("format", "op", *_TEXTS):
                raise self.error((key,), f"expected the keys format, {', '.join(_TEXTS)} and [[op]], got {key!r}")
        for key in _TEXTS:
            if not isinstance(data.get(key, ""), str):
                raise self.error((key,), f"{key}: expected text, got {data[key]!r}", DTypeError)
        given = data.get("op", [])
        if not isinstance(given, list) or not all(isinstance(op, Mapping) for op in given):
            raise self.error(("op",), "op: expected tables ([[op]])", DTypeError)
        if not given:
            raise ArgumentError(f"{self.where}: expected one [[op]] or more, got none")
        read = [self.op(i, dict(op)) for i, op in enumerate(given)]
        ops, pinned = tuple(op for op, _ in read), tuple(pins for _, pins in read)
        return Recipe(ops, data.get("title", ""), data.get("note", ""), pinned, self.text)

    def op(self, index: int, given: dict[str, Any]) -> tuple[Op, dict[str, str]]:
        kind = given.get("kind")
        if not isinstance(kind, str) or kind not in OPS:
            at = ("op", index, "kind") if "kind" in given else ("op", index)
            raise self.error(at, f"op {index + 1}: expected kind {' or '.join(map(repr, OPS))}, got {kind!r}")
        label = f"op {index + 1} ({kind})"
        known = fields(OPS[kind])
        names = [f.name for f in known]
        pins = {f"{name}_sha256": name for name in _PATHS[kind]}
        for key in given:
            if key not in ("kind", *names, *pins):
                expected = ", ".join([*names, *pins])
                raise self.error(("op", index, key), f"{label}: expected the keys {expected}, got {key!r}")
        for f in known:
            if f.default is MISSING and f.name not in given:
                raise self.error(("op", index), f"{label}: expected the key {f.name}, got none")
        values = {key: value for key, value in given.items() if key in names}
        for name in _PATHS[kind]:
            path = values[name]
            if not isinstance(path, str) or not path:
                raise self.error(("op", index, name), f"{label}: {name}: expected a path, got {path!r}", DTypeError)
            values[name] = self.folder / path
        pinned = {}
        for key, name in pins.items():
            if key in given:
                if not isinstance(given[key], str) or not re.fullmatch(r"[0-9a-fA-F]{64}", given[key]):
                    at = ("op", index, key)
                    raise self.error(at, f"{label}: {key}: expected 64 hexadecimal digits, got {given[key]!r}")
                pinned[name] = given[key]
        try:
            return OPS[kind](**values), pinned
        except AbjureError as err:
            # The message begins with the name of the option, which is the key.
            key = re.split(r"[.:]", str(err), maxsplit=1)[0]
            at = ("op", index, key) if key in given else ("op", index)
            raise self.error(at, f"{label}: {err}", type(err)) from None

    def error(self, at: tuple[str | int, ...], message: str, kind: type[AbjureError] = ArgumentError) -> AbjureError:
        line = self.line(at)
        return kind(f"{self.where}{f':{line}' if line else ''}: {message}")

    def line(self, at: tuple[str | int, ...]) -> int | None:
        """Where a key first stands: the text is parsed again, one line more each time, until the key is there."""
        lines = self.text.replace("\r\n", "\n").split("\n")
        start = 1
        for n in range(1, len(lines) + 1):
            try:
                data = tomllib.loads("\n".join(lines[:n]))
            except (tomllib.TOMLDecodeError, ValueError, RecursionError):
                continue  # inside a value of several lines
            if _contains(data, at):
                return start
            start = n + 1
        return None


def _contains(data: Any, at: tuple[str | int, ...]) -> bool:
    for key in at:
        if isinstance(key, int):
            if not isinstance(data, list) or key >= len(data):
                return False
        elif not isinstance(data, Mapping) or key not in data:
            return False
        data = data[key]
    return True


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _toml(value: Any, key: str) -> str:
    """A value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Written):
        return value.text
    if isinstance(value, Decimal):
        # TOML floats need a point or an exponent; Decimal("3") is a whole number, and stays one.
        return str(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        return _toml_string(os.fspath(value))
    if isinstance(value, Mapping):
        entries = ", ".join(f"{_toml_key(str(k))} = {_toml(v, key)}" for k, v in value.items())
        return f"{{ {entries} }}"
    if isinstance(value, Iterable) and not hasattr(value, "__array__") and not isinstance(value, Fisher):
        return f"[{', '.join(_toml(v, key) for v in value)}]"
    raise DTypeError(f"{key}: expected a path, so that a file can name it, got {type(value).__name__}; save it first")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"path: expected a name that UTF-8 can hold, got {text!r}") from None
    # JSON's escapes are TOML's, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _canonical_op(op: Op) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": op.kind}
    for f in fields(op):
        value = getattr(op, f.name)
        if isinstance(op, Ablate) and f.name == "direction":
            value = {"sha256": _direction_sha256(value)}
        elif isinstance(op, Dampen) and f.name in ("forget", "retain"):
            value = {"sha256": _importance_sha256(value, f.name)}
        elif isinstance(op, Ablate) and f.name == "tied":
            value = value or "skip"
        elif isinstance(op, Ablate) and f.name == "layers" and value is not None:
            value = sorted(set(value))
        else:
            value = _plain(value)
        found[f.name] = value
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (int, float, Decimal)):
        # As a string: JSON numbers are read as binary fractions by most readers, and 0.1 is none.
        number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
        sign, digits, exponent = number.as_tuple()
        whole = "".join(map(str, digits)).lstrip("0")
        short = whole.rstrip("0")
        return f"{'-' * sign}{short}e{int(exponent) + len(whole) - len(short)}" if short else "0"
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [v if isinstance(v, str) else _plain(v) for v in value]
    return value


def _direction_sha256(direction: Any) -> str:
    vectors = np.ascontiguousarray(_vectors(Direction.load(direction) if _is_path(direction) else direction, "q"))
    return hashlib.sha256(f"{vectors.shape}".encode() + vectors.astype("<f8").tobytes()).hexdigest()


def _importance_sha256(given: Any, arg: str) -> str:
    """Of names, shapes, numbers and what they count: the same for a Fisher and for the file that holds it."""
    fisher = Fisher.load(given) if _is_path(given) else given
    digest = hashlib.sha256()
    if isinstance(fisher, Fisher):
        arrays = {name: fisher.sum(name) for name in fisher}
        digest.update(json.dumps([fisher.unit, fisher.power, repr(fisher.count)]).encode())
    elif isinstance(fisher, Mapping):
        arrays = dict(fisher)
    else:
        raise DTypeError(f"{arg}: expected a path, a Fisher or a mapping, got {type(given).__name__}")
    for name in sorted(arrays):
        array = arrays[name]
        array = np.ascontiguousarray(array.detach().cpu().numpy() if hasattr(array, "detach") else array)
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()
