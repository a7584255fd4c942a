"""GGUF files as input: read, dequantised, and written as a safetensors directory under Hugging Face's names.

The container is read here, strictly; blocks of quantised numbers are taken apart by the package ``gguf`` (an optional
dependency: ``pip install abjure[gguf]``). Nothing is written in GGUF.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from ..forget.params import listed
from .layout import TensorInfo

Array = np.ndarray[Any, Any]
DType = Literal["F32", "F16", "BF16"]

#: GGUF's tensor types by number, as far as they have a name here: those that are read, then those that are refused.
_TYPES = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}
_BLOCKS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
_BLOCKS |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
#: Numbers in a block, bytes of a block.
# fmt: off
_SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}
# fmt: on
#: Types that are read; the others (IQ, TQ, MXFP4, integers) are refused by name.
SUPPORTED = tuple(_SIZES)

#: Metadata value types: struct's letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
#: GGUF architecture to model_type and class.
_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
#: Numbers dequantised at once.
_PIECE = 1 << 22


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file: shape with the slowest axis first, type, first byte, bytes of a row."""

    shape: tuple[int, ...]
    type: str
    begin: int
    row: int


@dataclass(frozen=True)
class GGUF:
    """A GGUF file of the Llama, Qwen 2 or Qwen 3 family, under Hugging Face's names.

    Attributes:
        path: of the file.
        config: ``config.json`` as its metadata gives it.
        metadata: what the file says of itself, without the tokenizer's lists.
        types: Hugging Face name to the type it is stored as.
        left_out: tensors of the file that were left out because the caller said so.
    """

    path: Path
    config: dict[str, Any]
    metadata: dict[str, Any]
    types: dict[str, str]
    left_out: tuple[str, ...] = ()
    _stored: dict[str, _Stored] = field(default_factory=dict, repr=False)
    _orders: dict[str, Array] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, skip: tuple[str, ...] = ()) -> GGUF:
        """Reads the header and checks it.

        Args:
            path: a GGUF file, version 2 or 3, little-endian.
            skip: names of tensors (as in the file) to leave out, such as ``"rope_freqs.weight"`` of Llama 3.1, which
                scales the rotary frequencies and which ``config.json`` says in another way.

        Raises:
            ArgumentError: no GGUF file, damaged, of another family, or tensors are missing or unknown.
            DTypeError: a tensor has a type that is not read.
            ShapeError: a tensor has another shape than the metadata says.
        """
        path = Path(path)
        header = _Header(path)
        architecture = header.metadata.get("general.architecture")
        if architecture not in _FAMILIES:
            expected = ", ".join(_FAMILIES)
            raise ArgumentError(f"path: expected a GGUF file of the families {expected}, got {architecture!r}")
        if absent := [name for name in skip if name not in header.tensors]:
            raise ArgumentError(f"skip: expected names of tensors in the file, got {absent[0]!r}")
        stored: dict[str, _Stored] = {}
        for name, tensor in header.tensors.items():
            if name in skip:
                continue
            new = _hugging_face(name)
            if new is None:
                hint = f'; pass skip=("{name}",) to leave it out' if name.startswith("rope_") else ""
                raise ArgumentError(f"path: {name}: expected a tensor of a dense {architecture} model, got this{hint}")
            stored[new] = tensor
        config = _config(header.metadata, architecture, stored)
        _expect_shapes(config, stored)
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        orders = {}
        if architecture == "llama":
            for name, tensor in stored.items():
                if (n := heads.get(name.split(".")[-2])) is not None:
                    orders[name] = _unpermuted(tensor.shape[0], n)
        types = {name: t.type for name, t in stored.items()}
        metadata = {k: v for k, v in header.metadata.items() if not isinstance(v, list) or len(v) < 100}
        return cls(path, config, metadata, types, tuple(skip), stored, orders)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Hugging Face name to shape, and to the dtype that :meth:`arrays` gives by default."""
        return {name: TensorInfo(t.shape, "F32") for name, t in self._stored.items()}

    def pieces(self, name: str, dtype: DType = "F32") -> Iterator[Array]:
        """Rows of one tensor in their order, a few million numbers at a time; BF16 as uint16 bits.

        Raises:
            ArgumentError: no such tensor or dtype, or the file cannot be read.
            NonFiniteError: a number does not fit float16.
        """
        if name not in self._stored:
            raise ArgumentError(f"name: expected one of {listed(self._stored)}, got {name!r}")
        if dtype not in _CONVERTED:
            raise ArgumentError(f"dtype: expected one of {tuple(_CONVERTED)}, got {dtype!r}")
        tensor = self._stored[name]
        width = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        order = self._orders.get(name)
        step = max(1, _PIECE // max(width, 1))
        with _mapped(self.path) as memory:
            raw = np.frombuffer(memory, np.uint8, rows * tensor.row, tensor.begin).reshape(rows, tensor.row)
            for start in range(0, rows, step):
                matrix = order is not None and len(tensor.shape) > 1
                part = raw[order[start : start + step]] if matrix else raw[start : start + step]  # type: ignore[index]
                numbers = _dequantised(part, tensor.type, width)
                if order is not None and not matrix:  # a bias
                    numbers = numbers[:, order]
                yield _CONVERTED[dtype](numbers, name)
            del raw

    def arrays(self, dtype: DType = "F32") -> Iterator[tuple[str, Array]]:
        """Name and array of every tensor, in the file's order; BF16 as uint16 bits.

        Raises:
            ArgumentError, NonFiniteError: as :meth:`pieces`.
        """
        for name, tensor in self._stored.items():
            yield name, np.concatenate(list(self.pieces(name, dtype))).reshape(tensor.shape)

    def save(
        self, out: str | os.PathLike[str], dtype: DType = "F32", *, max_shard: int = 4 << 30
    ) -> dict[str, TensorInfo]:
        """Writes a safetensors directory: ``config.json``, the weights, an index where there are several files.

        The directory appears complete or not at all; one tensor's piece is in memory at a time. The tokenizer is not
        converted: ``transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)`` reads it from the GGUF file.

        Args:
            out: a directory that does not exist yet.
            dtype: of the weights; float32 holds every dequantised number exactly.
            max_shard: bytes of tensors in one file, unless a single tensor is larger.

        Returns:
            What was written, by name.

        Raises:
            ArgumentError: ``out`` exists or cannot be written; the file cannot be read.
            NonFiniteError: a number does not fit float16.
        """
        out = Path(out)
        if dtype not in _CONVERTED:
            raise ArgumentError(f"dtype: expected one of {tuple(_CONVERTED)}, got {dtype!r}")
        if os.path.lexists(out):
            raise ArgumentError(f"out: expected a directory that does not exist yet, got {os.fspath(out)!r}")
        infos = {name: TensorInfo(t.shape, dtype) for name, t in self._stored.items()}
        shards = _shards(infos, max_shard)
        try:
            temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        except OSError as err:
            raise ArgumentError(f"out: expected a writable directory, got {os.fspath(out)!r} ({err.strerror})") from err
        try:
            for file, names in shards.items():
                _write_shard(temporary / file, {n: infos[n] for n in names}, lambda n: self.pieces(n, dtype))
            if len(shards) > 1:
                total = sum(_nbytes(i) for i in infos.values())
                places = {n: file for file, names in shards.items() for n in names}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
                _write_json(temporary / "model.safetensors.index.json", index)
            torch_name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
            _write_json(temporary / "config.json", {**self.config, "torch_dtype": torch_name})
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o777 & ~mask)
            os.rename(temporary, out)
        except BaseException as err:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(err, OSError):
                found = f"{os.fspath(out)!r} ({err.strerror or err})"
                raise ArgumentError(f"out: expected a writable directory, got {found}") from err
            raise
        return infos

    def to_dict(self) -> dict[str, Any]:
        """File, family, config, metadata and counts of types, in plain types for JSON."""
        return {
            "path": os.fspath(self.path),
            "config": self.config,
            "metadata": self.metadata,
            "types": dict(Counter(self.types.values())),
            "left_out": list(self.left_out),
        }

    def __str__(self) -> str:
        types = ", ".join(f"{t} {n}" for t, n in Counter(self.types.values()).items())
        size = sum(math.prod(t.shape) for t in self._stored.values())
        return (
            f"{self.path.name}: {self.config['model_type']}, {size:,} parameters in {len(self.types)} tensors ({types})"
        )


def from_gguf(
    path: str | os.PathLike[str], out: str | os.PathLike[str], dtype: DType = "F32", *, skip: tuple[str, ...] = ()
) -> GGUF:
    """Turns a GGUF file into a safetensors directory; :meth:`GGUF.open` and :meth:`GGUF.save` in one.

    Raises:
        ArgumentError, DTypeError, ShapeError, NonFiniteError: as those.
    """
    found = GGUF.open(path, skip=skip)
    found.save(out, dtype)
    return found


# The container ----------------------------------------------------------------------------------------------------


class _mapped:
    """A read-only map of a file for one block of code; arrays in it must be gone at the end."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as err:
            raise ArgumentError(f"path: expected a readable GGUF file, got {os.fspath(path)!r} ({err})") from err

    def __enter__(self) -> mmap.mmap:
        return self.memory

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BufferError):  # an array outlives the block, and keeps the map
            self.memory.close()


class _Header:
    """Metadata and tensors of a GGUF file, every length checked against the file before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        with _mapped(path) as memory:
            self.memory = memory
            self.size = len(memory)
            self._read()
            del self.memory

    def _read(self) -> None:
        magic = self.take(4)
        if magic != b"GGUF":
            raise self.error(f"expected a GGUF file, it begins with {magic!r}")
        version = self.scalar("I")
        if version not in (2, 3):
            swapped = struct.unpack(">I", struct.pack("<I", version))[0] in (2, 3)
            raise self.error("big-endian GGUF is not read" if swapped else f"expected version 2 or 3, got {version}")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        # The shortest pair takes 13 bytes, the shortest tensor 24: counts that cannot be true are refused at once.
        if pair_count * 13 + tensor_count * 24 > self.size:
            raise self.error(f"{tensor_count} tensors and {pair_count} entries do not fit {self.size} bytes")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in self.metadata:
                raise self.error(f"two entries {key!r}")
            self.metadata[key] = self.value(self.scalar("I"))
        infos = [self.info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"expected an alignment that is a power of two, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        self.tensors: dict[str, _Stored] = {}
        spans = []
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise self.error(f"two tensors {name!r}")
            block, size = _SIZES[kind]
            if shape[-1] % block:
                raise self.error(f"{name}: rows of {shape[-1]} are no whole blocks of {block} ({kind})")
            row = shape[-1] // block * size
            length = math.prod(shape[:-1]) * row
            if offset % alignment or start + offset + length > self.size:
                raise self.error(f"{name}: bytes {offset} to {offset + length} of the data are misaligned or beyond it")
            self.tensors[name] = _Stored(shape, kind, start + offset, row)
            spans.append((start + offset, start + offset + length, name))
        spans.sort()
        for (_, end, name), (begin, _, other) in pairwise(spans):
            if begin < end:
                raise self.error(f"{name} and {other} overlap")

    def error(self, what: str) -> ArgumentError:
        return ArgumentError(f"path: {os.fspath(self.path)!r}: {what}")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.error(f"ends at byte {self.size}, {count} more are needed at byte {self.at}")
        found = self.memory[self.at : self.at + count]
        self.at += count
        return found

    def scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"expected UTF-8 text at byte {self.at - len(raw)}") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            # Tokens may be parts of characters.
            return self.take(self.scalar("Q")).decode("utf-8", "replace")
        if kind != _ARRAY or depth > 4:
            raise self.error(f"unknown type {kind} of an entry")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            letter = _SCALARS[inner]
            raw = self.take(count * struct.calcsize(f"<{letter}"))
            return [v for (v,) in struct.iter_unpack(f"<{letter}", raw)]
        if count * 8 > self.size - self.at:
            raise self.error(f"a list of {count} entries does not fit")
        return [self.value(inner, depth + 1) for _ in range(count)]

    def info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self.string()
        count = self.scalar("I")
        if not 1 <= count <= 4:
            raise self.error(f"{name}: expected 1 to 4 axes, got {count}")
        shape = tuple(self.scalar("Q") for _ in range(count))[::-1]
        if math.prod(shape) > 8 * self.size or 0 in shape:
            raise self.error(f"{name}: shape {shape} does not fit the file")
        number = self.scalar("I")
        kind = _TYPES.get(number) or _BLOCKS.get(number)
        if kind is None:
            raise DTypeError(f"path: {name} is of GGUF type {_type_name(number)}; expected {', '.join(SUPPORTED)}")
        return name, shape, kind, self.scalar("Q")


def _type_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(number).name)
    except (ImportError, ValueError):
        return str(number)


# Numbers ----------------------------------------------------------------------------------------------------------


def _dequantised(raw: Array, kind: str, width: int) -> Array:
    """Rows of bytes as float32 (float64 for F64) ``(rows, width)``."""
    if kind == "BF16":
        return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind in ("F32", "F16", "F64"):
        letter = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind]
        numbers = np.ascontiguousarray(raw).view(letter)
        return numbers if kind == "F64" else numbers.astype(np.float32)
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as err:
        raise ArgumentError(f"path: tensors of type {kind} need the package gguf (pip install abjure[gguf])") from err
    found = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[kind])
    return np.asarray(found, dtype=np.float32).reshape(len(raw), width)


def _to_f32(x: Array, name: str) -> Array:
    return np.asarray(x, dtype="<f4")


def _to_f16(x: Array, name: str) -> Array:
    with np.errstate(over="ignore"):
        half = x.astype("<f2")
    if not np.array_equal(np.isfinite(half), np.isfinite(x)):
        raise NonFiniteError(f"dtype: {name} holds numbers that float16 cannot; take F32 or BF16")
    return half


def _to_bf16(x: Array, name: str) -> Array:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")


_CONVERTED: dict[str, Callable[[Array, str], Array]] = {"F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16}


def _unpermuted(rows: int, heads: int) -> Array:
    """Which row of the file each row of ``q_proj`` or ``k_proj`` is.

    llama.cpp rotates neighbouring pairs of a head's rows, Hugging Face a row and the one half a head further on: the
    file interleaves the halves of every head.
    """
    half = rows // heads // 2
    order: Array = np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)
    return order


# Names, config, shapes --------------------------------------------------------------------------------------------


def _hugging_face(name: str) -> str | None:
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{leaf}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _INNER:
        return f"model.layers.{int(parts[1])}.{_INNER[parts[2]]}.{leaf}"
    return None


def _config(metadata: Mapping[str, Any], architecture: str, stored: Mapping[str, _Stored]) -> dict[str, Any]:
    kind, class_name = _FAMILIES[architecture]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ArgumentError(f"path: expected the metadata {architecture}.{key}, got none")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
            raise ArgumentError(f"path: {architecture}.{key}: expected a number above 0, got {value!r:.40}")
        # Stored as float32: the shortest decimal that means the same.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if get_experts := metadata.get(f"{architecture}.expert_count"):
        raise ArgumentError(f"path: expected a dense model, got {get_experts} experts")
    heads, width = get("attention.head_count"), get("embedding_length")
    if "model.embed_tokens.weight" not in stored:
        raise ArgumentError("path: expected the tensor token_embd.weight, got none")
    head_dim = get("attention.key_length", get("rope.dimension_count", max(width // heads, 1)))
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": kind,
        "vocab_size": stored["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in stored,
    }
    if get("attention.value_length", head_dim) != head_dim:
        raise ArgumentError("path: expected keys and values of one length")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ArgumentError("path: expected rotary embeddings of whole heads")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise ArgumentError(f"path: expected rope scaling none, linear or yarn, got {scaling!r}")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": get("rope.scaling.factor")}
        if (original := metadata.get(f"{architecture}.rope.scaling.original_context_length")) is not None:
            config["rope_scaling"]["original_max_position_embeddings"] = original
    for name in ("bos", "eos", "padding"):
        if isinstance(token := metadata.get(f"tokenizer.ggml.{name}_token_id"), int):
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    first = "model.layers.0."
    if kind == "llama":
        config["attention_bias"] = f"{first}self_attn.q_proj.bias" in stored
        config["mlp_bias"] = f"{first}mlp.down_proj.bias" in stored
    if kind == "qwen3":
        config["attention_bias"] = f"{first}self_attn.q_proj.bias" in stored
    return config


def _expect_shapes(config: Mapping[str, Any], stored: Mapping[str, _Stored]) -> None:
    """Holds the tensors to what a model of this config has: the same names, the same shapes."""
    kind, width, head = config["model_type"], config["hidden_size"], config["head_dim"]
    inner = config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    if head % 2:
        raise ShapeError(f"path: expected heads of an even length, got {head}")
    matrices = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    block: dict[str, tuple[int, ...]] = {f"{n}.weight": s for n, s in matrices.items()}
    block |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    if kind == "qwen3":
        block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    for name, (rows, _) in matrices.items():
        attention, output = name.startswith("self_attn."), name == "self_attn.o_proj"
        biased = config.get("attention_bias", not output) if attention else config.get("mlp_bias", False)
        if biased:
            block[f"{name}.bias"] = (rows,)
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    expected["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], width)
    layers = config["num_hidden_layers"]
    if layers > len(stored):
        raise ArgumentError(f"path: expected {layers} blocks as the metadata says, got {len(stored)} tensors in all")
    expected |= {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in block.items()}
    if missing := expected.keys() - stored.keys():
        raise ArgumentError(f"path: expected a tensor for each of {listed(missing)}, got none")
    if more := stored.keys() - expected.keys():
        raise ArgumentError(f"path: expected a {kind} model of {layers} blocks, got {listed(more)} too")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ShapeError(f"path: {name}: expected shape {shape} as the metadata says, got {stored[name].shape}")


# Writing ----------------------------------------------------------------------------------------------------------


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * (4 if info.dtype == "F32" else 2)


def _shards(infos: Mapping[str, TensorInfo], most: int) -> dict[str, list[str]]:
    if most < 1:
        raise ArgumentError(f"max_shard: expected 1 byte or more, got {most}")
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + _nbytes(info) > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(info)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, 1)}


def _write_shard(path: Path, infos: Mapping[str, TensorInfo], pieces: Callable[[str], Iterator[Array]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in infos.items():
        size = _nbytes(info)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in infos:
            for piece in pieces(name):
                file.write(np.ascontiguousarray(piece).data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
