"""Which tensors of a decoder write to the residual stream, on which axis, through which norm.

One entry per ``config.model_type`` of transformers. Names and axes are facts of the model's code, never guessed from
shapes: the expert matrices of gpt-oss are square at the published size, so no shape could tell the axis. Every tensor
of a block has to be known as a writer or as a reader; one that is neither is an error, so that no writer is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ArgumentError, DTypeError
from .blocks import Layers, attribute, decoder_blocks, select_modules

if TYPE_CHECKING:
    from torch import nn

Component = Literal["embedding", "attention", "mlp", "experts"]

#: Tensors of a block that read from the stream, or work inside a branch: patterns of names within the block.
READERS = (
    "*norm.weight",
    "*norm.bias",
    "ln_*",
    "norm_[0-9].*",
    "*.[qkv]_proj.*",
    "*.[qkv]_[ab]_proj*",
    "*.kv_a_proj_with_mqa.*",
    "*.kv_b_proj.*",
    "*.qkv_proj.*",
    "*.query_key_value.*",
    "*.Wqkv.*",
    "*.c_attn.*",
    "*.[qkv]_norm.*",
    "*.[qkv]_layernorm.*",
    "*.sinks",
    "*.gate_proj*",
    "*.up_proj*",
    "*.gate_up_proj*",
    "*.c_fc.*",
    "fc1.*",
    "*.fc1.*",
    "*.fc_in.*",
    "*.dense_h_to_4h.*",
    "*.w1.*",
    "*.w3.*",
    "*.act_fn.*",
    "*.gate.weight",
    "*.gate.e_score_correction_bias",
    "*.router.*",
    "*.shared_expert_gate.*",
    # linear attention, convolution and state space mixers
    "*.in_proj*",
    "*.x_proj.*",
    "*.dt_proj.*",
    "*.conv1d.*",
    "conv.conv.*",
    "*.A_log",
    "*.D",
    "*.dt_bias",
)


@dataclass(frozen=True)
class Architecture:
    """Where one family writes to the residual stream; paths are within a block, or within the decoder for embeddings.

    Attributes:
        attention: modules or tensors that end a token mixer (attention, linear attention, convolution, state space).
        mlp: the same for dense MLPs, shared experts and fused experts.
        embeddings: tables, or projections of tables, that start the stream; the first is the token embedding.
        last_axis: paths whose tensor lies along the stream with its last axis (besides ``Conv1D`` and tables).
        post_attention, post_mlp: norms that a branch passes before it is added.
        unit_offset: the gain of those norms is 1 + weight.
        embedding_norm: a norm between the embedding and the first block, which no edit of the table passes through.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embeddings: tuple[str, ...] = ("embed_tokens",)
    last_axis: tuple[str, ...] = ()
    post_attention: str | None = None
    post_mlp: str | None = None
    unit_offset: bool = False
    embedding_norm: str | None = None


_LLAMA = Architecture(("self_attn.o_proj",), ("mlp.down_proj",))
_EXPERTS = ("mlp.experts.down_proj", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj")
_MOE = replace(_LLAMA, mlp=("mlp.down_proj", *_EXPERTS))
_POST = replace(_LLAMA, post_attention="post_attention_layernorm", post_mlp="post_feedforward_layernorm")
_GPTJ = Architecture(("attn.out_proj",), ("mlp.fc_out",), ("wte",))

# fmt: off
_LIKE_LLAMA = (
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "gemma", "glm", "granite", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "nemotron", "olmo", "phi3",
    "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
)
_LIKE_MIXTRAL = (
    "deepseek_v2", "deepseek_v3", "glm4_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_moe",
)
# fmt: on

#: ``config.model_type`` to architecture, each tested against hooks on a small model of the real class.
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(_LIKE_LLAMA, _LLAMA),
    **dict.fromkeys(_LIKE_MIXTRAL, _MOE),
    **dict.fromkeys(["exaone4", "olmo2", "olmo3"], _POST),
    **dict.fromkeys(["gemma2", "gemma3_text"], replace(_POST, unit_offset=True)),
    "bloom": Architecture(
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
        ("word_embeddings",),
        embedding_norm="word_embeddings_layernorm",
    ),
    **dict.fromkeys(["codegen", "gptj"], _GPTJ),
    "falcon": Architecture(("self_attention.dense",), ("mlp.dense_4h_to_h",), ("word_embeddings",)),
    "glm4": replace(_LLAMA, post_attention="post_self_attn_layernorm", post_mlp="post_mlp_layernorm"),
    "gpt2": Architecture(("attn.c_proj",), ("mlp.c_proj",), ("wte", "wpe")),
    "gpt_neo": Architecture(("attn.attention.out_proj",), ("mlp.c_proj",), ("wte", "wpe")),
    "gpt_neox": Architecture(("attention.dense",), ("mlp.dense_4h_to_h",), ("embed_in",)),
    "gpt_oss": replace(
        _LLAMA,
        mlp=("mlp.experts.down_proj", "mlp.experts.down_proj_bias"),
        last_axis=("mlp.experts.down_proj", "mlp.experts.down_proj_bias"),
    ),
    "granitemoe": replace(_LLAMA, mlp=("block_sparse_moe.experts.down_proj",)),
    "jamba": Architecture(
        ("self_attn.o_proj", "mamba.out_proj"), ("feed_forward.down_proj", "feed_forward.experts.down_proj")
    ),
    "lfm2": Architecture(("self_attn.out_proj", "conv.out_proj"), ("feed_forward.w2",)),
    "llama4_text": replace(
        _LLAMA,
        mlp=("feed_forward.down_proj", "feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj"),
        last_axis=("feed_forward.experts.down_proj",),
    ),
    "mpt": Architecture(("attn.out_proj",), ("ffn.down_proj",), ("wte",)),
    "opt": Architecture(("self_attn.out_proj",), ("fc2",), ("embed_tokens", "embed_positions")),
    "phi": Architecture(("self_attn.dense",), ("mlp.fc2",)),
    "qwen3_next": replace(_MOE, attention=("self_attn.o_proj", "linear_attn.out_proj")),
    "starcoder2": replace(_LLAMA, mlp=("mlp.c_proj",)),
}


@dataclass(frozen=True)
class Writer:
    """One tensor that writes to the residual stream.

    Attributes:
        name: as in ``model.named_parameters()``, before ties are dropped.
        component: ``"embedding"``, ``"attention"``, ``"mlp"`` or ``"experts"`` (fused).
        layer: index of its block; None for an embedding.
        axis: which of its axes lies along the stream.
        tensor: the parameter.
        gain: gain of the norm that its branch passes, ``(d,)``; None where there is none.
        tied: it is also the output head.
    """

    name: str
    component: Component
    layer: int | None
    axis: int
    tensor: Any = field(repr=False, compare=False)
    gain: Any = field(default=None, repr=False, compare=False)
    tied: bool = False


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a multimodal one; None if there is none."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if callable(get) else config


def architecture(model: nn.Module) -> Architecture:
    """The table's entry for ``model``.

    Raises:
        DTypeError: ``model`` is not a torch module.
        ArgumentError: the family is not in the table, or its configuration puts a norm where no weight edit can pass.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise DTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    config = text_config(model)
    kind = getattr(config, "model_type", None)
    return family(kind, lambda name, default: getattr(config, name, default))


def family(kind: str | None, option: Callable[[str, Any], Any], arg: str = "model") -> Architecture:
    """The table's entry for a ``model_type``; ``option(name, default)`` reads the rest of its configuration.

    Raises:
        ArgumentError: the family is not in the table, or its configuration puts a norm where no weight edit can pass.
    """
    found = ARCHITECTURES.get(str(kind))
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ArgumentError(f"{arg}: expected a family with known writers ({known}), got model_type {kind!r}")
    obstacle = None
    if kind == "opt" and not option("do_layer_norm_before", True):
        obstacle = "do_layer_norm_before=False normalises the stream after every block"
    if kind == "bloom" and option("apply_residual_connection_post_layernorm", False):
        obstacle = "apply_residual_connection_post_layernorm=True adds normalised states to the stream"
    if obstacle:
        raise ArgumentError(f"{arg}: expected blocks that add to the residual stream; {obstacle}; use ablating()")
    return found


def branch_modules(model: nn.Module, block: nn.Module, which: str) -> list[tuple[nn.Module, Any]]:
    """Modules of a block of a known family whose output a branch (``"attn"``, ``"mlp"``) adds to the stream.

    That is the module that writes; for fused experts the module around them, whose routing weights are scalars.

    Returns:
        Each module with the gain of the norm its output passes on the way to the stream, ``(d,)`` or None.

    Raises:
        ArgumentError: the block has no such branch.
    """
    from torch import nn

    known = architecture(model)
    paths, norm = (known.attention, known.post_attention) if which == "attn" else (known.mlp, known.post_mlp)
    present = {path: found for path in paths if (found := attribute(block, path)) is not None}
    if not present:
        raise ArgumentError(f"model: {type(block).__name__} has no {which} branch at {' or '.join(paths)}")
    if not all(isinstance(found, nn.Module) for found in present.values()):
        present = {root: getattr(block, root) for path in present for root in [path.partition(".")[0]]}
    gain = gain_behind(block, norm, known.unit_offset, type(block).__name__)
    return [(module, gain) for module in present.values()]


def _tensors(owner: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Name within ``owner`` and parameter of the module or the parameter at ``path``; nothing if there is none."""
    import torch

    found = attribute(owner, path)
    if found is None:
        return
    if isinstance(found, torch.Tensor):
        yield path, found
        return
    if hasattr(found, "base_layer") or any("lora_" in name for name, _ in found.named_parameters()):
        raise ArgumentError(f"model: {path} carries an adapter, which writes too; merge it first (merge_and_unload)")
    for name, tensor in found.named_parameters(recurse=True):
        yield f"{path}.{name}", tensor


def _axis(owner: Any, path: str, name: str, tensor: Any, last: bool) -> int:
    module = attribute(owner, path)
    if tensor.ndim == 1 or last or name.endswith("bias") or type(module).__name__ in ("Conv1D", "Embedding"):
        return int(tensor.ndim) - 1
    return int(tensor.ndim) - 2  # nn.Linear (out, in); fused experts (experts, out, in)


def residual_writers(model: nn.Module, layers: Layers = None, *, blocks: str | None = None) -> list[Writer]:
    """Every tensor of a Hugging Face decoder that writes to the residual stream, embeddings first.

    Args:
        model: a decoder of a family in :data:`ARCHITECTURES`, or a multimodal wrapper around one.
        layers: indices of blocks; None for every block and the embeddings.
        blocks: dotted name of the list of blocks, where it is not found by itself.

    Returns:
        :class:`Writer` objects in the order of the forward pass.

    Raises:
        DTypeError: ``model`` is not a torch module, or a writer is quantised.
        ArgumentError: the family is unknown, a block lacks a token mixer or an MLP writer, a tensor of a block is
            neither a known writer nor a known reader, an adapter is attached, or a layer does not exist.
    """
    known = architecture(model)
    path, _ = decoder_blocks(model, blocks)
    found = _embedding_writers(model, known, path) if layers is None else []
    for index, block in select_modules(model, layers, blocks).items():
        if isinstance(index, str):
            raise ArgumentError(f"layers: expected indices of blocks, got {index!r}")
        found += _block_writers(known, f"{path}.{index}", block, index)
    for writer in found:
        if not writer.tensor.is_floating_point() or writer.tensor.element_size() < 2:
            raise DTypeError(
                f"model: {writer.name} is stored as {writer.tensor.dtype}; expected float64, float32, float16 or "
                "bfloat16: load the model dequantised"
            )
    return found


def _embedding_writers(model: nn.Module, known: Architecture, path: str) -> list[Writer]:
    root = path.rpartition(".")[0]
    decoder = attribute(model, root) if root else model
    prefix = f"{root}." if root else ""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    output = getattr(head, "weight", None)
    # A narrow table (OPT-350M) is widened by a projection, and then that is what writes; positions are wide already.
    paths = [
        "project_in" if p == "embed_tokens" and getattr(decoder, "project_in", None) is not None else p
        for p in known.embeddings
    ]
    found = []
    for p in paths:
        tensors = list(_tensors(decoder, p))
        if not tensors:
            raise ArgumentError(f"model: expected an embedding at {prefix}{p}, got none in {type(decoder).__name__}")
        for name, tensor in tensors:
            axis = 0 if p == "project_in" else tensor.ndim - 1
            tied = output is not None and output is tensor
            found.append(Writer(prefix + name, "embedding", None, axis, tensor, tied=tied))
    return found


def _block_writers(known: Architecture, prefix: str, block: nn.Module, layer: int) -> list[Writer]:
    found: list[Writer] = []
    for branch, paths, norm in (
        ("attention", known.attention, known.post_attention),
        ("mlp", known.mlp, known.post_mlp),
    ):
        gain = gain_behind(block, norm, known.unit_offset, prefix)
        written = []
        for path in paths:
            for name, tensor in _tensors(block, path):
                component: Component = "experts" if ".experts." in f".{path}." else branch  # type: ignore[assignment]
                axis = _axis(block, path, name, tensor, path in known.last_axis)
                written.append(Writer(f"{prefix}.{name}", component, layer, axis, tensor, gain))
        if not written:
            raise ArgumentError(
                f"model: {prefix} has no known {branch} writer ({' or '.join(paths)}); nothing is edited"
            )
        found += written
    known_names = {w.name for w in found}
    for name, _ in block.named_parameters():
        if f"{prefix}.{name}" not in known_names and not any(fnmatchcase(name, p) for p in READERS):
            raise ArgumentError(f"model: {prefix}.{name} is neither a known writer nor a known reader of the stream")
    return found


def gain_behind(block: nn.Module, norm: str | None, unit_offset: bool, prefix: str) -> Any:
    if norm is None:
        return None
    module = getattr(block, norm, None)
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ArgumentError(f"model: expected a norm with a gain at {prefix}.{norm}, got none")
    if getattr(module, "bias", None) is not None:
        raise ArgumentError(f"model: {prefix}.{norm} has a bias, which writes too; use ablating()")
    gain = weight.detach()
    return gain.double() + 1 if unit_offset else gain.double()
