"""Which stored tensors an op touches, told from ``config.json`` and the names of the tensors alone.

Files are not laid out as the modules that transformers builds from them: experts lie one by one or stacked, gpt-oss and
Llama 4 store stacked experts transposed, GPT-2's matrices are ``(in, out)``, names differ between releases. Names and
axes here are facts of the formats, derived from the table of :mod:`abjure.refuse.architectures`; no axis is ever read
off a shape (the expert matrices of gpt-oss are square). Shapes are checked against the config afterwards.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, NamedTuple, cast

from ..errors import ArgumentError, DTypeError, ShapeError
from ..forget.params import listed
from ..refuse.architectures import ARCHITECTURES, READERS, Architecture, Component, family
from .ops import Ablate, Dampen, Op, Scale

#: Element types that ops compute on, as safetensors spells them.
EDITABLE = ("F64", "F32", "F16", "BF16")

#: Multimodal wrappers whose early files do not say what their text decoder is.
_WRAPPERS = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
_WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
#: Families that tie the output head to the embedding where their config does not say.
# fmt: off
_TIED = (
    "bloom", "cohere", "cohere2", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "lfm2",
    "mpt", "opt", "smollm3", "starcoder2",
)
# fmt: on
#: Families whose 2-D writers are ``Conv1D``, stored (in, out).
_CONV1D = ("gpt2",)

#: Where the blocks are: name of the list, and what may stand before it.
_PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(["bloom", "codegen", "falcon", "gpt2", "gpt_neo", "gptj"], ("h", ("transformer.", ""))),
    "mpt": ("blocks", ("transformer.", "")),
    "gpt_neox": ("layers", ("gpt_neox.", "")),
    "opt": ("layers", ("model.decoder.", "decoder.", "")),
}
_PLACE = ("layers", ("model.", "language_model.model.", "model.language_model.", ""))
#: Where the modules of a loaded model are; the first prefix there is the one that importances are named by.
_LIVE_MULTIMODAL = "model.language_model."

#: Names that a family stores its experts under, beside those of the modules: (pattern, axis, dimensions).
_STORED_EXPERTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    **dict.fromkeys(["mixtral", "phimoe"], (("block_sparse_moe.experts.{e}.w2.weight", 0, 2),)),
    "granitemoe": (("block_sparse_moe.output_linear.weight", 1, 3),),
}
#: Names of tensors in files to names of parameters in modules, within a block.
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": ((r"^block_sparse_moe\.", "mlp."),),
    "phimoe": ((r"^block_sparse_moe\.gate\.", "mlp.router."), (r"^block_sparse_moe\.", "mlp.")),
    "granitemoe": (
        (r"^block_sparse_moe\.input_linear\.weight$", "block_sparse_moe.experts.gate_up_proj"),
        (r"^block_sparse_moe\.output_linear\.weight$", "block_sparse_moe.experts.down_proj"),
        (r"^block_sparse_moe\.router\.layer\.", "block_sparse_moe.router."),
    ),
}
#: One expert's matrix to the parameter that stacks them, and which half of its rows it is: (part, of how many).
_STACKED = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "w1": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "w3": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w2": ("down_proj", 0, 1),
}
#: Families whose files hold experts one by one, and whose modules stack them.
# fmt: off
_STACKED_FAMILIES = (
    "deepseek_v2", "deepseek_v3", "glm4_moe", "jamba", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "qwen3_next",
)
# fmt: on

#: Tensors that are several in one: (pattern of names within a block, how they are put together; see :func:`_cut`).
_FUSED: dict[str, tuple[tuple[str, str], ...]] = {
    "phi3": (("self_attn.qkv_proj.*", "qkv"), ("mlp.gate_up_proj.*", "halves")),
    **dict.fromkeys(["glm", "glm4"], (("mlp.gate_up_proj.*", "halves"),)),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3"], (("self_attn.kv_b_proj.*", "latent"),)),
    "gpt2": (("attn.c_attn.*", "qkv"),),
    "mpt": (("attn.Wqkv.*", "qkv"),),
    "gpt_neox": (("attention.query_key_value.*", "heads"),),
    "bloom": (("self_attention.query_key_value.*", "heads"),),
    "falcon": (("self_attention.query_key_value.*", "falcon"),),
    "codegen": (("attn.qkv_proj.*", "codegen"),),
    "gpt_oss": (("mlp.experts.gate_up_proj*", "interleaved"),),
    "llama4_text": (("feed_forward.experts.gate_up_proj", "halves"),),
    "granitemoe": (("block_sparse_moe.input_linear.weight", "halves"),),
}
#: What families with experts that modules stack have as well, where files hold the stacks.
_FUSED_STACK = ("*experts.gate_up_proj", "halves")
#: Families whose stacks of experts are (expert, in, out).
_STACKED_IN_OUT = ("gpt_oss", "llama4_text")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")

#: Tensors of files that are no parameters: masks and tables that modules compute by themselves.
_BUFFERS = (
    "*rotary_emb.inv_freq",
    "*attn.bias",
    "*attention.bias",
    "*.masked_bias",
    "*attn.causal_mask",
    "*.e_score_correction_bias",
    "*.act_fn.beta",
    "*.act_fn.eps",
)
#: What may stand beside the blocks and the embeddings in a decoder.
_BESIDE = (
    "norm.*",
    "final_layernorm.*",
    "final_layer_norm.*",
    "ln_f.*",
    "norm_f.*",
    "embedding_norm.*",
    "word_embeddings_layernorm.*",
    "embed_tokens.*",
    "project_in.*",
    "project_out.*",
    "rotary_emb.*",
)
_HEADS = ("lm_head.weight", "embed_out.weight", "language_model.lm_head.weight")
#: Suffixes that only quantised tensors have, and the schemes that use them.
_QUANTISED = {
    "_blocks": "MXFP4",
    "_scales": "MXFP4",
    ".weight_scale_inv": "FP8 with block scales",
    "_scale_inv": "FP8 with block scales",
    ".weight_scale": "compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes int8",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_map": "bitsandbytes 4-bit",
}


class TensorInfo(NamedTuple):
    """Shape and element type (as safetensors spells it: ``"BF16"``) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Target:
    """One stored tensor, or a part of one, that an op edits.

    Attributes:
        name: as stored.
        axis: which of its stored axes lies along the residual stream; None for ops that edit element by element.
        part: which of the tensors that were fused into this one is edited (``"q"``, ``"gate"``, …); None for all of it.
        part_axis: the axis that they were put together along.
        period: of every ``period`` steps along that axis, ``length`` from ``offset`` on belong to the part.
        offset, length: see ``period``.
        post_gain: stored tensor ``(d,)`` with the gain of a norm that the branch passes on the way to the stream; the
            edit is then by ``g ⊙ q``, see :func:`abjure.refuse.orthogonalize_`.
        gain_offset: what is added to that tensor to make the gain g (1 for Gemma).
        tied_to: the target whose values this one repeats (a stored copy of a tied head); it gets the same edit.
        keep_as: the tensor is to be stored under this name too, as it was before the edit (an untied output head).
        scale: of this edit; the factor of a :class:`Scale`.
        norm_preserving: form of this edit; biases know only ``"in"``.
        component: kind of writer; None for ops that edit element by element and for writers the user named.
        layer: index of its block; None outside of the blocks.
        importance: name of the importance of a :class:`Dampen`.
        importance_offset: where this tensor's part of that importance begins, in elements of its contiguous order.
        shape, dtype: as stored.
    """

    name: str
    axis: int | None
    part: str | None = None
    part_axis: int = 0
    period: int = 0
    offset: int = 0
    length: int = 0
    post_gain: str | None = None
    gain_offset: float = 0.0
    tied_to: str | None = None
    keep_as: str | None = None
    scale: float = 1.0
    norm_preserving: str | None = None
    component: Component | None = None
    layer: int | None = None
    importance: str | None = None
    importance_offset: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def elements(self) -> tuple[int, int, int] | None:
        """The part in elements of the contiguous order: of every so many, those from, and to before; None for all."""
        if self.part is None:
            return None
        inner = prod(self.shape[self.part_axis + 1 :])
        return self.period * inner, self.offset * inner, (self.offset + self.length) * inner

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and name and axis, in plain types."""
        plain = Target("", None)
        found = {k: v for k, v in asdict(self).items() if k in ("name", "axis") or v != getattr(plain, k)}
        return found | ({"shape": list(self.shape)} if self.shape else {})


@dataclass(frozen=True)
class Resolution:
    """What one op does to one checkpoint, before anything is read.

    Attributes:
        op: the op.
        family: ``model_type`` of the decoder; empty where it is not known and not needed.
        blocks: prefix of the block list, such as ``model.layers``.
        depth: number of blocks; 0 where not known.
        width: hidden size; 0 where not known.
        targets: in the order of the forward pass, then as stored.
        notes: what was left out, and why.
        config: changes to ``config.json`` that belong to the edit.
    """

    op: Op
    family: str
    blocks: str
    depth: int
    width: int
    targets: list[Target]
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the op, in plain types for JSON."""
        facts: dict[str, Any] = {k: getattr(self, k) for k in ("family", "blocks", "depth", "width", "notes", "config")}
        return {"op": self.op.kind, **facts, "targets": [t.to_dict() for t in self.targets]}

    def __str__(self) -> str:
        layers = len({t.layer for t in self.targets} - {None})
        kinds = Counter(t.component or "tensor" for t in self.targets)
        what = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
        where = f" in {layers} of {self.depth} blocks" if self.depth else ""
        head = f"{self.op.kind}: {len(self.targets)} tensors{where} ({what})"
        return "\n".join([head, *self.notes])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(with_part(t))}</td><td>{t.shape}</td><td>{t.dtype}</td>"
            f"<td>{'' if t.axis is None else t.axis}</td><td>{t.scale:g}</td></tr>"
            for t in self.targets
        )
        head = "<tr><th>tensor</th><th>shape</th><th>dtype</th><th>residual axis</th><th>scale</th></tr>"
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table><caption>{html.escape(str(self).splitlines()[0])}</caption>{head}{rows}</table>{notes}"


def with_part(target: Target) -> str:
    return target.name if target.part is None else f"{target.name}:{target.part}"


def resolve(
    config: Mapping[str, Any], tensors: Mapping[str, Any], op: Op, importance: Mapping[str, Any] | None = None
) -> list[Target]:
    """The targets of :func:`resolution`."""
    return resolution(config, tensors, op, importance).targets


def resolution(
    config: Mapping[str, Any], tensors: Mapping[str, Any], op: Op, importance: Mapping[str, Any] | None = None
) -> Resolution:
    """Which stored tensors ``op`` touches, on which axis, and through which norms.

    Args:
        config: ``config.json``, read.
        tensors: stored name to shape and dtype: :class:`TensorInfo`, such a pair, or anything with both attributes.
        op: :class:`Ablate`, :class:`Scale` or :class:`Dampen`.
        importance: for :class:`Dampen`, name to shape (or to anything with one) of the importances; they may be named
            as in the files or as ``named_parameters()`` of the loaded model.

    Returns:
        A :class:`Resolution`.

    Raises:
        ArgumentError: the family is unknown; the config does not match the tensors (blocks, experts, head); a block has
            no known writer, or a tensor that is neither a known writer nor a known reader; a pattern or layer matches
            nothing.
        ShapeError: a tensor has another size than the config says.
        DTypeError: a tensor to be edited is quantised.
    """
    stored = _tensor_infos(tensors)
    if not isinstance(config, Mapping):
        raise DTypeError(f"config: expected a mapping (config.json), got {type(config).__name__}")
    if isinstance(op, Ablate):
        if isinstance(op.tensors, Mapping):
            found = _by_patterns(config, stored, op)
        else:
            found = _ablated(Decoder.of(config, stored), op)
    elif isinstance(op, Scale):
        found = _scaled(config, stored, op)
    elif isinstance(op, Dampen):
        found = _dampened(config, stored, op, importance)
    else:
        raise DTypeError(f"op: expected Ablate, Scale or Dampen, got {type(op).__name__}")
    for target in found.targets:
        _expect_editable(target, config)
    return found


def _tensor_infos(tensors: Mapping[str, Any]) -> dict[str, TensorInfo]:
    if not isinstance(tensors, Mapping):
        raise DTypeError(f"tensors: expected a mapping of name to shape and dtype, got {type(tensors).__name__}")
    found = {}
    for name, info in tensors.items():
        try:
            shape, dtype = (info.shape, info.dtype) if hasattr(info, "dtype") else info
            found[name] = TensorInfo(tuple(int(n) for n in shape), str(dtype))
        except (TypeError, ValueError):
            raise DTypeError(f"tensors: expected shape and dtype of {name!r}, got {info!r}") from None
    if any(".lora_" in name for name in found):
        raise ArgumentError("tensors: expected a whole model, got an adapter (LoRA); merge it first (merge_and_unload)")
    return found


def _expect_editable(target: Target, config: Mapping[str, Any]) -> None:
    if target.dtype not in EDITABLE:
        method = (config.get("quantization_config") or {}).get("quant_method")
        scheme = f" (quantised by {method})" if method else ""
        raise DTypeError(
            f"tensors: {target.name} is stored as {target.dtype}{scheme}; expected one of {', '.join(EDITABLE)}: "
            "save the model dequantised first"
        )


# The decoder of a checkpoint --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """A writer within a block: pattern of its name, residual axis, dimensions, kind, and the norm behind it."""

    pattern: re.Pattern[str]
    text: str
    path: str
    axis: int
    ndim: int
    component: Component
    branch: Literal["attention", "mlp"]
    norm: str | None


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a checkpoint: where it is, how large it is, and what its blocks hold."""

    kind: str
    known: Architecture
    config: Mapping[str, Any]
    top: Mapping[str, Any]
    stored: dict[str, TensorInfo]
    prefix: str
    blocks: dict[int, dict[str, str]]
    depth: int
    width: int
    list_name: str
    #: Blocks beyond the last one (multi-token prediction).
    extra: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, Any], *, ablate: bool = True) -> Decoder:
        """Finds the decoder and checks its blocks against the config.

        Args:
            config: ``config.json``, read.
            tensors: stored name to shape and dtype.
            ablate: also refuse configurations that put a norm where no edit of a writer passes.

        Raises:
            ArgumentError: the family is unknown, sizes are missing from the config, blocks are missing or too many.
        """
        stored = _tensor_infos(tensors)
        kind, text = decoder_config(config)
        known = family(kind, lambda name, default: text.get(name, default) if ablate else default, "config")
        width, depth = _size(text, _WIDTHS, "hidden size"), _size(text, _DEPTHS, "number of blocks")
        list_name, prefixes = _PLACES.get(kind, _PLACE)
        found = {}
        for prefix in prefixes:
            blocks = _blocks(stored, f"{prefix}{list_name}.")
            if blocks:
                found[prefix] = blocks
        if len(found) != 1:
            expected = " or ".join(f"{p}{list_name}.0.*" for p in prefixes)
            if quantised := _quantised(stored):
                expected += f" (files hold {quantised})"
            got = " and ".join(f"{p}{list_name}" for p in found) or f"names such as {listed(stored, 3)}"
            raise ArgumentError(f"tensors: expected the blocks of one {kind} decoder ({expected}), got {got}")
        prefix, blocks = found.popitem()
        missing = [i for i in range(depth) if i not in blocks]
        if missing:
            some = ", ".join(str(i) for i in missing[:5]) + (" and more" if len(missing) > 5 else "")
            raise ArgumentError(
                f"tensors: expected {depth} blocks {prefix}{list_name}.0 to .{depth - 1} as the config says, got "
                f"{len(blocks)}; no tensor of block {some}"
            )
        extra = tuple(sorted(i for i in blocks if i >= depth))
        allowed = int(text.get("num_nextn_predict_layers") or 0)
        if extra and extra[-1] >= depth + allowed:
            raise ArgumentError(
                f"tensors: expected {depth} blocks {prefix}{list_name}.0 to .{depth - 1} as the config says, got block "
                f"{extra[-1]} too"
            )
        return cls(kind, known, text, config, stored, prefix, blocks, depth, width, list_name, extra)

    @property
    def path(self) -> str:
        """Of the block list, such as ``model.layers``."""
        return self.prefix + self.list_name

    @property
    def head(self) -> str | None:
        """Stored name of the output head; None where there is none of its own."""
        return next((name for name in _HEADS if name in self.stored), None)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        for config in (self.top, self.config):
            if "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return self.kind in _TIED

    def chosen(self, layers: Iterable[int] | None) -> list[int]:
        """Indices of blocks, negative ones counted from the end.

        Raises:
            ArgumentError: there is no such block.
        """
        if layers is None:
            return list(range(self.depth))
        found = []
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise ArgumentError(f"layers: expected -{self.depth} to {self.depth - 1} ({self.path}), got {layer}")
            found.append(layer % self.depth)
        return sorted(set(found))

    @property
    def table(self) -> str:
        """Stored name of the token embedding."""
        return f"{self.prefix}{self.known.embeddings[0]}.weight"

    def embeddings(self) -> list[Target]:
        """Writers that start the stream, the token embedding first; a narrow one is left to what widens it."""
        self._expect_vocabulary()
        found = []
        for path in self.known.embeddings:
            name, axis = f"{self.prefix}{path}.weight", 1
            if name == self.table and (projection := f"{self.prefix}project_in.weight") in self.stored:
                name, axis = projection, 0
            info = self._get(name, 2)
            found.append(Target(name, axis, component="embedding", shape=info.shape, dtype=info.dtype))
            self._expect_width(found[-1])
        return found

    def writers(self, layer: int, *, strict: bool = True) -> list[Target]:
        """Writers of one block.

        Args:
            layer: its index.
            strict: refuse a block with a tensor that is neither a known writer nor a known reader.

        Raises:
            ArgumentError: a branch has none; an expert is missing; a tensor is neither writer nor reader.
            ShapeError, DTypeError: one has another size than the config says, or is quantised.
        """
        names = self.blocks[layer]
        place = f"{self.path}.{layer}"
        found: dict[str, Target] = {}
        experts: dict[str, set[int]] = {}
        branches, paths = set(), set()
        rules = _rules(self.kind)
        for inner, name in names.items():
            rule, expert = _rule_for(rules, inner)
            if rule is None:
                continue
            info = self._get(name, rule.ndim)
            gain = self._gain(place, names, rule.norm)
            offset = 1.0 if gain is not None and self.known.unit_offset else 0.0
            found[inner] = Target(
                name,
                rule.axis,
                post_gain=gain,
                gain_offset=offset,
                component=rule.component,
                layer=layer,
                shape=info.shape,
                dtype=info.dtype,
            )
            self._expect_width(found[inner])
            if rule.text.endswith("bias"):
                self._get(_weight_of(name), rule.ndim + 1)
                continue
            branches.add(rule.branch)
            paths.add(rule.path)
            if expert is not None:
                experts.setdefault(rule.text, set()).add(expert)
            elif rule.component == "experts":
                self._expect_experts(name, range(info.shape[0]))
        for pattern, indices in experts.items():
            self._expect_experts(f"{place}.{pattern}", indices)
        if strict:
            self._expect_known(layer, found)
        for branch, expected in (("attention", self.known.attention), ("mlp", self.known.mlp)):
            if branch not in branches:
                raise ArgumentError(f"tensors: {place} has no known {branch} writer ({' or '.join(expected)})")
        for path in self.known.mlp:
            owner = path.rpartition(".")[0]
            reader = next((n for n in names if n.startswith(f"{owner}.")), None)
            if reader and "expert" in owner and not path.endswith("bias") and path not in paths:
                raise ArgumentError(f"tensors: expected the writer {place}.{path} beside {reader}, got none")
        self._expect_shared(place, found)
        order = {inner: i for i, inner in enumerate(found)}
        attention = {inner for inner in found if any(_within(inner, p) for p in self.known.attention)}
        return [found[inner] for inner in sorted(found, key=lambda i: (i not in attention, order[i]))]

    def all_writers(self, *, strict: bool = True) -> list[Target]:
        """Embeddings, then the writers of every block.

        Raises:
            ArgumentError, ShapeError, DTypeError: as :meth:`writers`; a bias that some blocks have and others lack.
        """
        found = self.embeddings()
        for layer in range(self.depth):
            found += self.writers(layer, strict=strict)
        kinds: dict[str, set[str]] = {}
        for t in found:
            kinds.setdefault(re.sub(r"\.\d+", ".*", t.name), set()).add(t.name)
        for kind, names in kinds.items():
            if kind.endswith("bias"):
                lacking = kinds[_weight_of(kind)] - {_weight_of(name) for name in names}
                if lacking:
                    raise ArgumentError(
                        f"tensors: expected a bias beside {min(lacking)}, as other blocks have, got none"
                    )
        return found

    def parts(self, name: str) -> dict[str, Target]:
        """What was fused into a stored tensor, by its names in the literature: q, k and v, or gate and up.

        Returns:
            Targets of the parts; empty where the table knows of none.

        Raises:
            ShapeError: the tensor has another size than the config says.
        """
        layer = _layer_of(name, self)
        if layer is None:
            return {}
        inner, info = name.removeprefix(f"{self.path}.{layer}."), self.stored[name]
        known = _FUSED.get(self.kind, ())
        if self.kind in (*_STACKED_FAMILIES, "granitemoe"):
            known = (*known, _FUSED_STACK)
        how = next((how for pattern, how in known if fnmatchcase(inner, pattern)), None)
        if how is None:
            return {}
        ndim = len(info.shape)
        stacked = ".experts." in f".{inner}." and self.kind in _STACKED_IN_OUT
        last = inner.endswith("bias") or ndim == 1 or stacked or self.kind in _CONV1D
        axis = ndim - 1 if last else ndim - 2
        size = info.shape[axis]
        period, cuts = _cut(how, size, self.config, self.width)
        if period < 1 or size % period or max(end for _, end in cuts.values()) > period:
            raise ShapeError(f"tensors: {name}: expected parts that the config's heads allow, got shape {info.shape}")
        plain = Target(name, None, part_axis=axis, period=period, layer=layer, shape=info.shape, dtype=info.dtype)
        return {part: replace(plain, part=part, offset=a, length=b - a) for part, (a, b) in cuts.items()}

    def expect_known_names(self) -> None:
        """Raises ArgumentError for a tensor of the decoder outside of its blocks that nothing is known about."""
        known = [f"{p}.*" for p in self.known.embeddings]
        for name in self.stored:
            rest = name.removeprefix(self.prefix)
            if not name.startswith(self.prefix) or re.match(rf"{re.escape(self.list_name)}\.\d+\.", rest):
                continue
            if self.prefix == "" and name in _HEADS:
                continue
            if not any(fnmatchcase(rest, p) for p in (*known, *_BESIDE)):
                raise ArgumentError(f"tensors: {name} is neither a known writer nor a known reader of the stream")

    def outside(self) -> list[str]:
        """First parts of names outside of the decoder and its head."""
        rest = [n for n in self.stored if not n.startswith(self.prefix) and not n.endswith(_HEADS)]
        return sorted({n.removeprefix("model.").split(".")[0] for n in rest if "lm_head" not in n})

    def _get(self, name: str, ndim: int) -> TensorInfo:
        info = self.stored.get(name)
        if info is None:
            near = [n for n in self.stored if n.startswith(name.removesuffix(".weight"))]
            scheme = next((s for end, s in _QUANTISED.items() for n in near if n.endswith(end)), None)
            if scheme:
                raise DTypeError(f"tensors: {name} is quantised ({scheme}); save the model dequantised first")
            raise ArgumentError(f"tensors: expected {name} for model_type {self.kind!r}, got no such tensor")
        if scheme := next((s for end, s in _QUANTISED.items() if _beside(name, end) in self.stored), None):
            raise DTypeError(f"tensors: {name} is quantised ({scheme}); save the model dequantised first")
        if len(info.shape) != ndim:
            raise ShapeError(f"tensors: {name}: expected {ndim} axes, got shape {info.shape}")
        return info

    def _expect_width(self, target: Target) -> None:
        axis = target.axis or 0
        if target.shape[axis] != self.width:
            raise ShapeError(
                f"tensors: {target.name}: expected {self.width} (the config's hidden size) on axis {axis}, got shape "
                f"{target.shape}"
            )

    def _expect_vocabulary(self) -> None:
        rows, expected = self._get(self.table, 2).shape[0], self.config.get("vocab_size")
        if expected is not None and rows != expected:
            raise ShapeError(f"tensors: {self.table}: expected {expected} rows (the config's vocab_size), got {rows}")
        architectures = self.top.get("architectures") or []
        if not self.tied and self.head is None and any("CausalLM" in a for a in architectures):
            raise ArgumentError(
                f"tensors: expected an output head ({' or '.join(_HEADS[:2])}), since the config does not tie it to "
                "the embedding, got none"
            )

    def _expect_experts(self, place: str, indices: Iterable[int]) -> None:
        found = sorted(indices)
        expected = next((int(self.config[k]) for k in _EXPERTS if self.config.get(k) is not None), None)
        if expected is None:
            raise ArgumentError(f"config: expected the number of experts ({' or '.join(_EXPERTS)}), got none")
        if found != list(range(expected)):
            raise ArgumentError(
                f"tensors: {place}: expected experts 0 to {expected - 1} as the config says, got {len(found)}"
                + (f" (missing {sorted(set(range(expected)) - set(found))[:5]})" if len(found) < expected else "")
            )

    def _expect_shared(self, place: str, found: Mapping[str, Target]) -> None:
        wanted = self.config.get("n_shared_experts") or self.config.get("shared_expert_intermediate_size")
        has_experts = any(t.component == "experts" for t in found.values())
        paths = [p for p in self.known.mlp if "shared_expert" in p]
        if wanted and has_experts and paths and not any(".shared_expert" in f".{inner}" for inner in found):
            raise ArgumentError(f"tensors: expected a shared expert in {place} ({' or '.join(paths)}), got none")

    def _gain(self, place: str, names: Mapping[str, str], norm: str | None) -> str | None:
        if norm is None:
            return None
        if f"{norm}.weight" not in names:
            raise ArgumentError(f"tensors: expected a norm with a gain at {place}.{norm}, got none")
        if f"{norm}.bias" in names:
            raise ArgumentError(f"tensors: {place}.{norm} has a bias, which writes too; use ablating()")
        info = self._get(names[f"{norm}.weight"], 1)
        if info.shape != (self.width,):
            raise ShapeError(f"tensors: {place}.{norm}.weight: expected shape ({self.width},), got {info.shape}")
        return names[f"{norm}.weight"]

    def _expect_known(self, layer: int, found: Mapping[str, Target]) -> None:
        for inner, name in self.blocks[layer].items():
            if inner in found or any(fnmatchcase(inner, p) for p in (*READERS, *_BUFFERS)):
                continue
            if inner.startswith("block_sparse_moe.input_linear.") and self.kind == "granitemoe":
                continue
            scheme = next((s for end, s in _QUANTISED.items() if inner.endswith(end)), None)
            if scheme:
                raise DTypeError(f"tensors: {name} is quantised ({scheme}); save the model dequantised first")
            raise ArgumentError(f"tensors: {name} is neither a known writer nor a known reader of the stream")


def _cut(how: str, size: int, config: Mapping[str, Any], width: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """How an axis of ``size`` steps is shared: period, and part to its begin and end within one; (0, …) if not at all.

    ``halves``: gate, then up. ``interleaved``: gate and up by turns. ``qkv``: all of q, then k, then v. ``heads``: q, k
    and v of each head. ``falcon``: any of these, by its options. ``codegen``: q, v and k of each quarter. ``latent``:
    key and value of each head, from the latent of multi-head latent attention.
    """
    if how == "halves":
        return size if size % 2 == 0 else 0, {"gate": (0, size // 2), "up": (size // 2, size)}
    if how == "interleaved":
        return 2, {"gate": (0, 1), "up": (1, 2)}
    if how == "latent":
        k, v = int(config.get("qk_nope_head_dim") or 0), int(config.get("v_head_dim") or 0)
        return k + v if k * v else 0, {"k": (0, k), "v": (k, k + v)}
    heads = next((int(config[key]) for key in _HEAD_COUNTS if config.get(key) is not None), 0)
    if heads < 1:
        return 0, {"q": (0, 0)}
    dim = int(config.get("head_dim") or width // heads)
    shared = next((int(config[key]) for key in _KV_COUNTS if config.get(key) is not None), heads)
    q, k, period = heads, shared, size
    if how == "heads":
        q, k, period = 1, 1, 3 * dim
    elif how == "codegen":
        return size // 4, {"q": (0, size // 12), "k": (size // 6, size // 4), "v": (size // 12, size // 6)}
    elif how == "falcon":
        if config.get("new_decoder_architecture"):
            q, k = heads // max(shared, 1), 1
            period = (q + 2) * dim
        elif config.get("multi_query", True):
            q, k = heads, 1
        else:
            q, k, period = 1, 1, 3 * dim
    if (q + 2 * k) * dim != period:
        return 0, {"q": (0, 0)}
    return period, {"q": (0, q * dim), "k": (q * dim, (q + k) * dim), "v": ((q + k) * dim, period)}


def depth_of(config: Mapping[str, Any]) -> int:
    """Number of blocks that a config names; 0 if it names none."""
    text = config.get("text_config")
    for found in (text if isinstance(text, Mapping) else {}, config):
        for key in _DEPTHS:
            if isinstance(value := found.get(key), int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def decoder_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """``model_type`` and configuration of the text decoder, also inside a multimodal config.

    Raises:
        ArgumentError: neither says what the model is.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        kind = text.get("model_type") or _WRAPPERS.get(str(config.get("model_type")))
    else:
        text, kind = config, config.get("model_type")
    if not isinstance(kind, str):
        what = "an adapter's config" if "peft_type" in config else f"keys {listed(config, 3) or 'none'}"
        raise ArgumentError(f"config: expected model_type, got {what}")
    return kind, text


def _size(config: Mapping[str, Any], keys: tuple[str, ...], what: str) -> int:
    for key in keys:
        if (value := config.get(key)) is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"config: expected {key} of 1 or more, got {value!r}")
            return value
    raise ArgumentError(f"config: expected the {what} ({' or '.join(keys)}), got none")


def _blocks(stored: Mapping[str, TensorInfo], start: str) -> dict[int, dict[str, str]]:
    """Block index to name within the block to stored name."""
    found: dict[int, dict[str, str]] = {}
    for name in stored:
        if name.startswith(start):
            index, _, inner = name[len(start) :].partition(".")
            if index.isdecimal() and index.isascii() and inner:
                found.setdefault(int(index), {})[inner] = name
    return found


def _quantised(stored: Mapping[str, TensorInfo]) -> str | None:
    return next((s for end, s in _QUANTISED.items() if any(n.endswith(end) for n in stored)), None)


def _beside(name: str, end: str) -> str:
    if end.startswith(".weight"):
        return name.removesuffix(".weight") + end
    return name + end


def _weight_of(bias: str) -> str:
    """Name of the weight that a bias belongs to."""
    return f"{bias.removesuffix('.bias')}.weight" if bias.endswith(".bias") else bias.removesuffix("_bias")


def _within(inner: str, path: str) -> bool:
    return inner == path or inner.startswith(f"{path}.")


def _rules(kind: str) -> list[_Rule]:
    known = family(kind, lambda _, default: default)
    found = []
    for branch, paths, norm in (
        ("attention", known.attention, known.post_attention),
        ("mlp", known.mlp, known.post_mlp),
    ):
        for path in paths:
            for text, axis, ndim, component in _stored_forms(kind, known, path, branch):
                pattern = re.compile(re.escape(text).replace(r"\{e\}", r"(\d+)"))
                found.append(_Rule(pattern, text, path, axis, ndim, component, branch, norm))  # type: ignore[arg-type]
    return found


def _stored_forms(kind: str, known: Architecture, path: str, branch: str) -> Iterator[tuple[str, int, int, Component]]:
    """Every name that a writer may be stored under, with its axis and number of dimensions."""
    component: Component = branch  # type: ignore[assignment]
    last = path in known.last_axis
    if ".experts." not in f".{path}.":
        yield f"{path}.weight", 1 if last or kind in _CONV1D else 0, 2, component
        yield f"{path}.bias", 0, 1, component
    elif path.endswith("bias"):
        yield path, 1, 2, "experts"
    else:
        yield path, 2 if last else 1, 3, "experts"
        root, _, leaf = path.partition("experts.")
        if not last:
            yield f"{root}experts.{{e}}.{leaf}.weight", 0, 2, "experts"
            yield f"{root}experts.{{e}}.{leaf}.bias", 0, 1, "experts"
        for text, axis, ndim in _STORED_EXPERTS.get(kind, ()):
            yield text, axis, ndim, "experts"


def _rule_for(rules: list[_Rule], inner: str) -> tuple[_Rule | None, int | None]:
    for rule in rules:
        if match := rule.pattern.fullmatch(inner):
            return rule, int(match[1]) if match.groups() else None
    return None, None


# Ablation ---------------------------------------------------------------------------------------------------------


def _ablated(decoder: Decoder, op: Ablate) -> Resolution:
    layers = decoder.chosen(cast("list[int] | None", op.layers))
    # Also of the blocks left alone: a checkpoint that is not understood is refused.
    every = [t for t in decoder.all_writers() if op.layers is None or t.layer in layers]
    decoder.expect_known_names()
    result = Resolution(op, decoder.kind, decoder.path, decoder.depth, decoder.width, [])
    wanted = _matching(op.tensors, [t.name for t in every], "a known writer")
    for target in every:
        scale = op.scale_of(str(target.component))
        if scale == 0.0 or (wanted is not None and target.name not in wanted):
            continue
        form = op.norm_preserving if not target.name.endswith("bias") or op.norm_preserving == "in" else None
        target = replace(target, scale=scale, norm_preserving=form)
        if target.component == "embedding":
            result.targets.extend(_embedding(decoder, op, target, result))
        else:
            result.targets.append(target)
    if decoder.extra:
        names = ", ".join(f"{decoder.path}.{i}" for i in decoder.extra)
        result.notes.append(f"{names}: left as it is (predicts further tokens, writes nothing back)")
    if outside := decoder.outside():
        result.notes.append(f"{', '.join(outside)}: outside of the decoder, left as it is")
    if not result.targets:
        raise ArgumentError(f"op: nothing is left to edit; {'; '.join(result.notes) or 'every scale is 0'}")
    return result


def _embedding(decoder: Decoder, op: Ablate, target: Target, result: Resolution) -> list[Target]:
    """The targets that editing an embedding comes to; why it is left alone goes into the notes."""
    if norm := decoder.known.embedding_norm:
        if op.tied == "edit":
            raise ArgumentError(f"tied: {target.name} passes {norm}, so no edit of it removes q")
        result.notes.append(f"{target.name}: left as it is, {norm} follows it; the first block still reads q")
        return []
    if target.name != decoder.table or not decoder.tied:
        return [target]
    head = decoder.head
    if op.tied in (None, "skip"):
        result.notes.append(
            f"{target.name}: left as it is, since the output head is tied to it (tied='skip'); the first block still "
            "reads q"
        )
        return []
    if op.tied == "untie":
        result.notes.append(f"{target.name}: untied from the output head")
        result.config["tie_word_embeddings"] = False
        if decoder.config is not decoder.top:
            result.config["text_config.tie_word_embeddings"] = False
        return [target if head else replace(target, keep_as=_head_name(decoder))]
    result.notes.append(f"{target.name}: edited, and the output head with it")
    if head is None:
        return [target]
    info = decoder._get(head, 2)
    if info != TensorInfo(target.shape, target.dtype):
        raise ShapeError(f"tensors: {head}: expected {target.shape} {target.dtype} as {target.name}, got {info}")
    return [target, replace(target, name=head, tied_to=target.name)]


def _head_name(decoder: Decoder) -> str:
    if decoder.kind == "gpt_neox":
        return "embed_out.weight"
    return ("language_model." if decoder.prefix.startswith("language_model.") else "") + "lm_head.weight"


def _matching(patterns: Any, names: Iterable[str], what: str) -> set[str] | None:
    if patterns is None:
        return None
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matches = [n for n in names if fnmatchcase(n, pattern)]
        if not matches:
            expected = f"a pattern that matches {what} ({listed(names, 3)})"
            raise ArgumentError(f"tensors: expected {expected}, got {pattern!r}")
        found.update(matches)
    return found


def _part_or_none(pattern: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Pattern and part, where a pattern ends in ``:part`` and no name does."""
    name, _, part = pattern.rpartition(":")
    if not name or any(fnmatchcase(n, pattern) for n in names):
        return None
    return name, part


def _parts_matching(
    pattern: str, part: str, stored: Mapping[str, TensorInfo], decoder: Decoder | None
) -> dict[str, Target]:
    """Name to the part of that name of every stored tensor that matches."""
    if decoder is None:
        raise ArgumentError(
            f"tensors: parts of tensors ({pattern}:{part}) are known of families in the table, and this is none of them"
        )
    found = {}
    for name in sorted(_matching([pattern], stored, "a stored tensor") or ()):
        known = decoder.parts(name)
        if part not in known:
            have = f"its parts {', '.join(known)}" if known else "no part of it (it is not known to be fused)"
            raise ArgumentError(f"tensors: {name}: expected {have}, got :{part}")
        found[name] = known[part]
    return found


def _by_patterns(config: Mapping[str, Any], stored: dict[str, TensorInfo], op: Ablate) -> Resolution:
    """Writers that the user named, each with its axis; gains come from the table where it knows the tensor."""
    assert isinstance(op.tensors, Mapping)
    if isinstance(op.scale, Mapping):
        raise ArgumentError("scale: expected one number where tensors gives the writers, got one for each component")
    axes: dict[str, int] = {}
    parts: dict[str, Target] = {}
    decoder = _decoder_or_none(config, stored, ablate=True)
    for pattern, axis in op.tensors.items():
        if split := _part_or_none(pattern, stored):
            names = _parts_matching(*split, stored, decoder)
            if twice := next((n for n in names if n in axes), None):
                raise ArgumentError(f"tensors: {twice}: expected all of it or one part, got more")
            parts |= names
        for name in names if split else sorted(_matching([pattern], stored, "a stored tensor") or ()):
            ndim = len(stored[name].shape)
            if not -ndim <= axis < ndim or (ndim == 3 and axis % 3 == 0) or not 1 <= ndim <= 3:
                raise ArgumentError(f"tensors.{pattern!r}: {name} has shape {stored[name].shape}, no axis {axis}")
            if axes.setdefault(name, axis % ndim) != axis % ndim:
                raise ArgumentError(f"tensors: {name} matches two patterns with different axes")
            if name in parts and not split:
                raise ArgumentError(f"tensors: {name}: expected all of it or one part, got more")
            if split and (axis % ndim != ndim - 1 or parts[name].part_axis == ndim - 1):
                raise ArgumentError(
                    f"tensors: {name}: a part is ablated along the last axis, of tensors that are cut along another; "
                    f"got axis {axis % ndim} of a tensor that is cut along {parts[name].part_axis}"
                )
    known = {}
    if decoder is not None:
        known = {t.name: t for t in decoder.all_writers(strict=False)}
    wanted = _wanted_layers(op.layers, decoder)
    targets = []
    for name, axis in axes.items():
        layer = _layer_of(name, decoder)
        if wanted is not None and layer not in wanted:
            continue
        info = stored[name]
        target = known.get(name) or Target(name, axis, layer=layer, shape=info.shape, dtype=info.dtype)
        if name in parts:
            target = replace(parts[name], axis=axis)
        if target.axis != axis:
            raise ArgumentError(f"tensors: {name}: expected axis {target.axis}, a fact of this family, got {axis}")
        bias = len(info.shape) == 1 or name.endswith("bias")
        form = None if bias and op.norm_preserving != "in" else op.norm_preserving
        targets.append(replace(target, scale=op.scale_of(""), norm_preserving=form))
    if not targets:
        raise ArgumentError(f"layers: no tensor that matches lies in blocks {op.layers}")
    widths = {t.shape[t.axis or 0]: t.name for t in targets}
    if len(widths) > 1:
        (a, first), (b, second) = list(widths.items())[:2]
        raise ShapeError(f"tensors: expected one width along the stream, got {a} ({first}) and {b} ({second})")
    result = replace(_elementwise(config, op, decoder, targets), width=next(iter(widths)))
    if decoder is None:
        result.notes.append(f"model_type {config.get('model_type')!r} is not in the table: writers are those named")
    elif decoder.tied and decoder.table in axes and decoder.head not in (None, *axes):
        raise ArgumentError(f"tensors: {decoder.table} and {decoder.head} are tied; expected both, or neither")
    elif decoder.tied and decoder.table in axes:
        result.notes.append(f"{decoder.table}: edited, and the output head with it")
    return result


def _decoder_or_none(
    config: Mapping[str, Any], stored: dict[str, TensorInfo], *, ablate: bool = False
) -> Decoder | None:
    """The decoder where the table knows its family; None where it does not, or where nothing names it."""
    try:
        kind, _ = decoder_config(config)
    except ArgumentError:
        return None
    return Decoder.of(config, stored, ablate=ablate) if kind in ARCHITECTURES else None


def _wanted_layers(layers: Any, decoder: Decoder | None) -> list[int] | None:
    if layers is None:
        return None
    if decoder is not None:
        return decoder.chosen(layers)
    if any(layer < 0 for layer in layers):
        raise ArgumentError("layers: expected indices of 0 or more for a family that is not in the table")
    return list(layers)


def _layer_of(name: str, decoder: Decoder | None) -> int | None:
    """Index of the block a name lies in: after the block list of a known decoder, else the first number in it."""
    if decoder is not None:
        match = re.match(rf"{re.escape(decoder.path)}\.(\d+)\.", name)
    else:
        match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


# Scaling ----------------------------------------------------------------------------------------------------------


def _scaled(config: Mapping[str, Any], stored: dict[str, TensorInfo], op: Scale) -> Resolution:
    decoder = _decoder_or_none(config, stored)
    wanted = _wanted_layers(op.layers, decoder)
    names: set[str] = set()
    parts: dict[str, dict[str, Target]] = {}
    for pattern in op.tensors:
        if split := _part_or_none(pattern, stored):
            for name, part in _parts_matching(*split, stored, decoder).items():
                parts.setdefault(name, {})[split[1]] = part
        else:
            names |= _matching([pattern], stored, "a stored tensor") or set()
    if twice := min(names & parts.keys(), default=None):
        raise ArgumentError(f"tensors: {twice}: expected all of it or parts of it, got both")
    targets = []
    for name, info in stored.items():
        layer = _layer_of(name, decoder)
        if wanted is None or layer in wanted:
            found = [Target(name, None, layer=layer, shape=info.shape, dtype=info.dtype)] if name in names else []
            found += parts.get(name, {}).values()
            targets += [replace(t, scale=float(op.factor)) for t in found]
    if not targets:
        raise ArgumentError(f"layers: no tensor that matches lies in blocks {op.layers}")
    result = _elementwise(config, op, decoder, targets)
    if decoder is not None:
        table, head = decoder.table, decoder.head
        if decoder.tied and table in names:
            if head is None:
                result.notes.append(f"{table}: the output head is tied to it, so it is scaled too")
            elif head not in names:
                raise ArgumentError(f"tensors: {table} and {head} are tied; expected both, or neither")
    return result


def _elementwise(
    config: Mapping[str, Any], op: Op, decoder: Decoder | None, targets: list[Target], notes: Iterable[str] = ()
) -> Resolution:
    if decoder is None:
        return Resolution(op, str(config.get("model_type", "")), "", 0, 0, targets, list(notes))
    return Resolution(op, decoder.kind, decoder.path, decoder.depth, decoder.width, targets, list(notes))


# Dampening --------------------------------------------------------------------------------------------------------


def _dampened(
    config: Mapping[str, Any], stored: dict[str, TensorInfo], op: Dampen, importance: Mapping[str, Any] | None
) -> Resolution:
    if importance is None:
        raise ArgumentError("importance: expected names and shapes of the importances for a Dampen, got none")
    shapes = {n: tuple(int(k) for k in getattr(s, "shape", s)) for n, s in importance.items()}
    decoder = _decoder_or_none(config, stored)
    names = _matching(op.include, stored, "a stored tensor")
    left_out = _matching(op.exclude, stored, "a stored tensor") or set()
    targets, notes, used = [], [], set()
    for name, info in stored.items():
        if (names is not None and name not in names) or name in left_out:
            continue
        layer = _layer_of(name, decoder)
        beyond = decoder is not None and layer in decoder.extra
        buffer = beyond or any(fnmatchcase(name, p) for p in _BUFFERS)
        found = _importance_of(decoder, name, info, shapes)
        if found is None:
            if buffer:
                notes.append(f"{name}: left as it is, no parameter of the model")
                continue
            raise ArgumentError(
                f"importance: expected one for every tensor, got none for {name!r} (of {listed(shapes, 3)}); leave "
                "tensors out by exclude"
            )
        key, offset = found
        used.add(key)
        where = {"importance": key, "importance_offset": offset, "layer": layer}
        targets.append(Target(name, None, **where, shape=info.shape, dtype=info.dtype))  # type: ignore[arg-type]
    if not targets:
        raise ArgumentError("op: nothing is left to dampen")
    if names is None and not left_out and (unused := shapes.keys() - used):
        raise ArgumentError(f"importance: expected names of stored tensors, got unknown {listed(unused)}")
    return _elementwise(config, op, decoder, targets, notes)


def _importance_of(
    decoder: Decoder | None, name: str, info: TensorInfo, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, int] | None:
    """Name of a tensor's importance and where its part begins there; None if there is none.

    Raises:
        ShapeError: it has another shape than the tensor.
    """
    for key, expert, part, parts in _live_names(decoder, name):
        if key not in shapes:
            continue
        shape = shapes[key]
        if expert is None:
            if shape != info.shape:
                raise ShapeError(f"importance: {key!r}: expected shape {info.shape} as {name}, got {shape}")
            return key, 0
        if len(shape) != 3 or len(info.shape) != 2 or shape[1:] != (parts * info.shape[0], info.shape[1]):
            rows = parts * info.shape[0]
            raise ShapeError(f"importance: {key!r}: expected experts of ({rows}, {info.shape[-1]}), got shape {shape}")
        if expert >= shape[0]:
            raise ShapeError(f"importance: {key!r}: expected {expert + 1} experts or more, got {shape[0]}")
        return key, (expert * parts + part) * info.shape[0] * info.shape[1]
    return None


def _live_names(decoder: Decoder | None, name: str) -> Iterator[tuple[str, int | None, int, int]]:
    """Names that a stored tensor may have in ``named_parameters()``; for stacked experts with expert, part, parts."""
    yield name, None, 0, 1
    if decoder is None:
        return
    if name == decoder.head:
        for key in ("lm_head.weight", *_HEADS):
            yield key, None, 0, 1
        if decoder.tied:
            yield from _live_names(decoder, decoder.table)
        return
    if not name.startswith(decoder.prefix):
        # Wrappers: files of Gemma 3 and others begin with vision_tower. and the like, modules with model.
        yield f"model.{name}", None, 0, 1
        return
    _, prefixes = _PLACES.get(decoder.kind, _PLACE)
    live = _LIVE_MULTIMODAL if "language_model" in decoder.prefix else prefixes[0]
    rest = name.removeprefix(decoder.prefix)
    match = re.match(rf"{re.escape(decoder.list_name)}\.\d+\.", rest)
    for prefix in dict.fromkeys([live, decoder.prefix]):
        if match is None:
            yield prefix + rest, None, 0, 1
            continue
        block, inner = prefix + match[0], rest[match.end() :]
        for pattern, new in _RENAMED.get(decoder.kind, ()):
            inner = re.sub(pattern, new, inner)
        yield block + inner, None, 0, 1
        stacked = re.fullmatch(r"(.*\.)?experts\.(\d+)\.(\w+)\.weight", inner)
        if stacked and stacked[3] in _STACKED and decoder.kind in _STACKED_FAMILIES:
            leaf, part, parts = _STACKED[stacked[3]]
            yield f"{block}{stacked[1] or ''}experts.{leaf}", int(stacked[2]), part, parts
