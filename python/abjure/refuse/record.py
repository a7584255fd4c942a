"""Activations of a set of prompts: streamed into class moments, or written to shards that are read by memory map."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import reading, write_atomically
from .._interop import integers
from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from .blocks import Layers, select_modules
from .contrast import Contrast
from .directions import Direction, Site, Vector
from .hooks import _attached, _on_input, _on_output, check_site
from .prompts import PositionKey, Prompts
from .reservoir import Reservoir

if TYPE_CHECKING:
    from torch import nn

Key = tuple[int, PositionKey]
_INDEX = "abjure.activations.json"
_FORMAT = "abjure.activations.1"
_CONTRASTS = "abjure.contrasts"
#: Rows a shard holds before it is written.
_SHARD_BYTES = 256 << 20


class Contrasts(Mapping[Key, Contrast]):
    """A :class:`Contrast` for every (layer, position) that was recorded.

    Attributes:
        layers, positions: what was recorded, in order; positions are negative integers, ``"last_instruction"`` or
            ``"all"``.
        token_names: what stands at each position in the first prompt.
    """

    def __init__(self, contrasts: Mapping[Key, Contrast], token_names: Mapping[PositionKey, str] | None = None) -> None:
        self._contrasts = dict(contrasts)
        self.layers = list(dict.fromkeys(layer for layer, _ in self._contrasts))
        self.positions = list(dict.fromkeys(position for _, position in self._contrasts))
        self.token_names = dict(token_names or {})

    def __getitem__(self, key: Key) -> Contrast:
        try:
            return self._contrasts[key]
        except KeyError:
            raise ArgumentError(
                f"layer, position: expected one of layers {self.layers} and positions {self.positions}, got {key}"
            ) from None

    def __iter__(self) -> Iterator[Key]:
        return iter(self._contrasts)

    def __len__(self) -> int:
        return len(self._contrasts)

    def merge(self, other: Contrasts) -> Contrasts:
        """Adds what ``other`` recorded at the same layers and positions. Returns ``self``.

        Raises:
            ArgumentError, ShapeError: other layers, positions, widths or settings; nothing has been added then.
        """
        if set(self) != set(other):
            raise ArgumentError(f"other: expected layers {self.layers} and positions {self.positions}")
        merged = {key: _copied(contrast).merge(other[key]) for key, contrast in self._contrasts.items()}
        self._contrasts = merged
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes every contrast to one safetensors file, as :meth:`Contrast.save` does.

        Raises:
            ArgumentError: ``path`` cannot be written.
        """
        from safetensors.numpy import save

        arrays: dict[str, Any] = {}
        facts: list[Any] = []
        for i, contrast in enumerate(self._contrasts.values()):
            found, settings = contrast._state(f"{i}.")
            arrays |= found
            facts.append(settings)
        names = list(self.token_names.items())
        metadata = json.dumps({"version": 1, "keys": list(self), "contrasts": facts, "token_names": names})
        write_atomically(path, save(arrays, {_CONTRASTS: metadata}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Contrasts:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not a set of contrasts.
        """
        with reading(path, "Contrasts") as file:
            metadata = json.loads((file.metadata() or {})[_CONTRASTS])
            parts: list[dict[str, Any]] = [{} for _ in metadata["keys"]]
            for name in file.keys():  # noqa: SIM118
                index, _, rest = name.partition(".")
                parts[int(index)][rest] = file.get_tensor(name)
            found = {
                (layer, position): Contrast._from_state(part, facts)
                for (layer, position), part, facts in zip(metadata["keys"], parts, metadata["contrasts"], strict=True)
            }
            return cls(found, dict(metadata["token_names"]))

    def directions(self, method: str = "difference_in_means", **options: Any) -> dict[Key, Direction]:
        """The direction of every layer and position; those with equal class means are left out.

        Args:
            method: ``"difference_in_means"``, ``"pca"`` or ``"lda"``.
            options: of that method of :class:`Contrast`.
        """
        if method not in ("difference_in_means", "pca", "lda"):
            raise ArgumentError(f"method: expected 'difference_in_means', 'pca' or 'lda', got {method!r}")
        found = {}
        for key, contrast in self._contrasts.items():
            if 0 in contrast.counts:
                raise DegenerateError(f"label: expected prompts of both classes, got counts {contrast.counts}")
            try:
                found[key] = getattr(contrast, method)(**options)
            except DegenerateError:
                continue
        return found

    def cosines(self, position: PositionKey, other: Contrasts, other_position: PositionKey) -> dict[int, float]:
        """Cosine by layer of two concepts' differences in means.

        For instance harmfulness, read at ``"last_instruction"``, and refusal, read at -1, with classes of their own
        (arXiv 2507.11878, section 3). Layers where either has equal means are left out.
        """
        found = {}
        for layer in self.layers:
            try:
                a = self[layer, position].difference_in_means().unit
                b = other[layer, other_position].difference_in_means().unit
            except DegenerateError:
                continue
            found[layer] = float(a @ b)
        return found

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{layer}</td><td>{html.escape(str(position))}</td>"
            f"<td>{html.escape(self.token_names.get(position, ''))}</td><td>{contrast.counts}</td></tr>"
            for (layer, position), contrast in self._contrasts.items()
        )
        header = "<tr><th>layer</th><th>position</th><th>token</th><th>rows of class 0, 1</th></tr>"
        return f"<table><caption>Contrasts</caption>{header}{rows}</table>"


def _copied(contrast: Contrast) -> Contrast:
    new = Contrast(
        contrast.covariance,
        nonfinite=contrast.nonfinite,
        winsorize=contrast.winsorize,
        layer=contrast.layer,
        site=contrast.site,
        position=contrast.position,
    )
    if contrast._reservoir is not None:
        new._reservoir = Reservoir(contrast._reservoir.size, contrast._reservoir.seed)
    return new.merge(contrast)


@dataclass(frozen=True)
class Rows:
    """What one batch gives at one layer and position: ``(n, d)`` on the CPU, and each row's prompt."""

    layer: int
    position: PositionKey
    values: Any
    prompts: list[int]


def record_prompts(
    model: nn.Module,
    prompts: Prompts,
    labels: Any,
    layers: Layers = None,
    positions: Any = "post_instruction",
    *,
    site: Site = "pre",
    covariance: bool | Sequence[int] = False,
    winsorize: float | None = None,
    reservoir: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    blocks: str | None = None,
    progress: bool = True,
) -> Contrasts:
    """Streams the residual stream of labelled prompts into a :class:`Contrast` per layer and position.

    Memory is that of the moments and of one batch; it does not grow with the number of prompts. Padding, its side
    and the batch size change nothing but rounding.

    Args:
        model: a Hugging Face decoder; its inner decoder is run, without the output head where it has one.
        prompts: a :class:`Prompts`.
        labels: 0 or 1 per prompt; 1 is what the directions point to.
        layers: indices of blocks, None for all.
        positions: any of ``"last"``, ``"last:k"``, ``"last_instruction"``, ``"post_instruction"``, ``"all"`` (every
            token counts as a row) and negative integers.
        site: input (``"pre"``) or output (``"post"``) of the block.
        covariance: keep second moments, for all layers or those named (d × d float64 twice per layer and position).
        winsorize: as in :class:`Contrast`.
        reservoir, seed: keep up to ``reservoir`` rows of each class too, as in :class:`Contrast`: the same prompts at
            every layer, and at every position but ``"all"``.
        batch_size: prompts per forward pass.
        blocks: dotted name of the list of blocks, for models the table does not know.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        ArgumentError, ShapeError, DTypeError: an argument does not fit the model or the prompts.
        NonFiniteError: an activation is NaN or infinite; the layer and the prompt are named.
    """
    values = binary_labels(labels, len(prompts))
    keys = prompts.position_keys(positions)
    contrasts: dict[Key, Contrast] = {}
    chosen = None if isinstance(covariance, bool) else {int(layer) for layer in covariance}
    modules = _blocks(model, layers, blocks)
    if chosen is not None and not chosen <= set(modules):
        raise ArgumentError(f"covariance: expected layers among {sorted(modules)}, got {sorted(chosen)}")
    for layer in modules:
        for key in keys:
            moments = layer in chosen if chosen is not None else bool(covariance)
            contrasts[layer, key] = Contrast(
                moments, winsorize=winsorize, layer=layer, site=site, position=key, reservoir=reservoir, seed=seed
            )

    def take(rows: Rows) -> None:
        contrasts[rows.layer, rows.position].update(rows.values, values[rows.prompts])

    run_recording(model, prompts, layers, keys, site, batch_size, progress, take, blocks)
    return Contrasts(contrasts, prompts.token_names(keys))


def binary_labels(labels: Any, n: int, arg: str = "labels") -> Any:
    """One 0 or 1 per prompt, as integers.

    Raises:
        ShapeError: not one per prompt. ArgumentError: another value.
    """
    values = integers(np.asarray(labels), arg)
    if values.shape != (n,):
        raise ShapeError(f"{arg}: expected one per prompt ({n},), got {values.shape}")
    if not np.isin(values, (0, 1)).all():
        raise ArgumentError(f"{arg}: expected 0 or 1, got {np.setdiff1d(values, (0, 1))[0]}")
    return values


def _blocks(model: nn.Module, layers: Layers, blocks: str | None) -> dict[int, nn.Module]:
    found = select_modules(model, layers, blocks)
    if names := [name for name in found if isinstance(name, str)]:
        raise ArgumentError(f"layers: expected indices of blocks, got {names[0]!r}")
    return {int(layer): module for layer, module in found.items()}


def _inner(model: nn.Module) -> nn.Module:
    """The decoder without the output head, whose logits nobody reads here."""
    get = getattr(model, "get_decoder", None)
    inner = get() if callable(get) and not hasattr(model, "peft_config") else None
    return model if inner is None else inner


def run_device(model: nn.Module) -> Any:
    """Where inputs go: the device of the first parameter."""
    return next((p.device for p in model.parameters()), None)


def run_recording(
    model: nn.Module,
    prompts: Prompts,
    layers: Layers,
    keys: Sequence[PositionKey],
    site: Site,
    batch_size: int,
    progress: bool,
    take: Callable[[Rows], None],
    blocks: str | None = None,
) -> None:
    """Runs the prompts and hands every batch's rows to ``take``, layer by layer and position by position."""
    import torch

    check_site(site)
    modules = _blocks(model, layers, blocks)
    attach = _on_input if site == "pre" else _on_output
    batch: dict[str, Any] = {}

    def begin(chosen: list[int], mask: Any) -> None:
        batch["chosen"] = chosen
        batch["at"] = {key: _index(prompts, chosen, key, mask) for key in keys}

    def watch(layer: int) -> Callable[[Any], None]:
        def change(hidden: Any) -> None:
            for key in keys:
                row, column = batch["at"][key]
                found = hidden.detach()[row.to(hidden.device), column.to(hidden.device)].cpu()
                owners = [batch["chosen"][r] for r in row.tolist()]
                if not bool(torch.isfinite(found).all()):
                    bad = owners[int((~torch.isfinite(found).all(-1)).nonzero()[0])]
                    text = prompts[bad].text
                    raise NonFiniteError(f"layer {layer}: non-finite activation at prompt {bad} ({text[:60]!r})")
                take(Rows(layer, key, found, owners))

        return change

    hooks = [lambda m=m, k=k: attach(m, watch(k)) for k, m in modules.items()]
    run_hooked(model, prompts, hooks, begin, batch_size, progress)


def run_hooked(
    model: nn.Module,
    prompts: Prompts,
    hooks: Sequence[Callable[[], Any]],
    begin: Callable[[list[int], Any], None],
    batch_size: int,
    progress: bool,
) -> None:
    """Runs the prompts batch by batch with hooks attached, without gradients and in eval mode.

    Args:
        hooks: each registers one hook and returns its handle.
        begin: called before every batch with the indices of its prompts and their mask ``(batch, tokens)``.
    """
    import torch
    from tqdm.auto import tqdm

    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ArgumentError(f"batch_size: expected 1 or more, got {batch_size!r}")
    device = run_device(model)
    inner = _inner(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_attached(hooks))
        bar = stack.enter_context(
            tqdm(total=len(prompts), desc="recording", unit="prompt", disable=None if progress else True)
        )
        for chosen, ids, mask in prompts.batches(int(batch_size)):
            begin(chosen, mask)
            inner(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            bar.update(len(chosen))


def _index(prompts: Prompts, chosen: Sequence[int], key: PositionKey, mask: Any) -> tuple[Any, Any]:
    import torch

    if key == "all":
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    return torch.arange(len(chosen)), torch.tensor([prompts[i].index(key) for i in chosen])


def record_to_disk(
    model: nn.Module,
    prompts: Prompts,
    labels: Any,
    folder: str | os.PathLike[str],
    layers: Layers = None,
    positions: Any = "post_instruction",
    *,
    site: Site = "pre",
    dtype: str = "float32",
    batch_size: int = 8,
    blocks: str | None = None,
    progress: bool = True,
) -> Activations:
    """Writes the residual stream of labelled prompts to safetensors shards, for probes and similarity measures.

    Arguments as in :func:`record_prompts`. Shards hold about 256 MB; the index is written last, so a folder with an
    index is complete.

    Args:
        folder: where the shards go; made if it does not exist. It must not hold activations already.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of the file.

    Returns:
        The :class:`Activations` just written.

    Raises:
        As :func:`record_prompts`; ArgumentError also where the folder cannot be written or holds activations.
    """
    import torch
    from safetensors.torch import save

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ArgumentError(f"dtype: expected 'float32', 'float16' or 'bfloat16', got {dtype!r}")
    values = binary_labels(labels, len(prompts))
    keys = prompts.position_keys(positions)
    modules = _blocks(model, layers, blocks)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArgumentError(f"folder: expected a folder that can be made, got {os.fspath(folder)!r}") from err
    if (folder / _INDEX).exists():
        raise ArgumentError(f"folder: expected no activations in it, got {os.fspath(folder / _INDEX)!r}")
    kind = getattr(torch, dtype)
    held: dict[str, list[Any]] = {}
    shards: list[str] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if not held:
            return
        name = f"activations-{len(shards):05d}.safetensors"
        write_atomically(folder / name, save({k: torch.cat(v) for k, v in held.items()}))
        shards.append(name)
        held.clear()
        size = 0

    def take(rows: Rows) -> None:
        nonlocal size
        name = _tensor_name(rows.layer, rows.position)
        stored = rows.values.to(kind)
        held.setdefault(name, []).append(stored)
        held.setdefault(f"{name}/prompt", []).append(torch.tensor(rows.prompts))
        size += stored.numel() * stored.element_size()
        # Only between batches of all layers: shards then hold the same rows of every layer.
        if size >= _SHARD_BYTES and rows.layer == last[0] and rows.position == last[1]:
            flush()

    last = (list(modules)[-1], keys[-1])
    run_recording(model, prompts, layers, keys, site, batch_size, progress, take, blocks)
    flush()
    index = {
        "format": _FORMAT,
        "shards": shards,
        "layers": list(modules),
        "positions": keys,
        "site": site,
        "dtype": dtype,
        "labels": values.tolist(),
    }
    write_atomically(folder / _INDEX, json.dumps(index).encode())
    return Activations(folder)


def _tensor_name(layer: int, position: PositionKey) -> str:
    return f"layer.{layer}/{position}"


class Activations:
    """Recorded activations on disk, read by memory map and only where asked for.

    Args:
        folder: what :func:`record_to_disk` wrote.

    Raises:
        ArgumentError: the folder holds no complete recording.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / _INDEX).read_text())
            if index["format"] != _FORMAT:
                raise KeyError("format")
            self.layers: list[int] = index["layers"]
            self.positions: list[PositionKey] = index["positions"]
            self.site: Site = index["site"]
            self.dtype: str = index["dtype"]
            self._shards: list[str] = index["shards"]
            self._labels = np.asarray(index["labels"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ArgumentError(f"folder: expected recorded activations, got {os.fspath(folder)!r}") from err

    def chunks(self, layer: int, position: PositionKey) -> Iterator[tuple[Any, Any, Any]]:
        """Rows ``(n, d)`` as a tensor, their labels and their prompts' indices, a shard at a time.

        Raises:
            ArgumentError: no such layer or position was recorded, or a shard is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        if layer not in self.layers or position not in self.positions:
            raise ArgumentError(
                f"layer, position: expected one of layers {self.layers} and positions {self.positions}, "
                f"got {(layer, position)}"
            )
        name = _tensor_name(layer, position)
        for shard in self._shards:
            try:
                with safe_open(os.fspath(self.folder / shard), "pt") as file:
                    rows, owners = file.get_tensor(name), file.get_tensor(f"{name}/prompt").numpy()
            except (OSError, SafetensorError) as err:
                raise ArgumentError(f"folder: {shard} cannot be read ({err})") from err
            yield rows, self._labels[owners], owners

    def array(self, layer: int, position: PositionKey) -> tuple[Any, Vector, Any]:
        """All rows of one layer and position in the order of the prompts: tensor ``(n, d)``, labels, prompts' indices.

        Raises:
            As :meth:`chunks`.
        """
        import torch

        parts = list(self.chunks(layer, position))
        rows = torch.cat([p[0] for p in parts])
        owners = np.concatenate([p[2] for p in parts])
        order = np.argsort(owners, kind="stable")
        return rows[torch.from_numpy(order)], self._labels[owners[order]], owners[order]

    def contrast(self, layer: int, position: PositionKey, covariance: bool = False) -> Contrast:
        """The :class:`Contrast` of one layer and position, a shard in memory at a time.

        Raises:
            As :meth:`chunks`.
        """
        found = Contrast(covariance, layer=layer, site=self.site, position=position)
        for rows, labels, _ in self.chunks(layer, position):
            found.update(rows, labels)
        return found

    def __repr__(self) -> str:
        where = f"layers={self.layers}, positions={self.positions}, site={self.site!r}, dtype={self.dtype}"
        return f"Activations({os.fspath(self.folder)!r}, prompts={len(self._labels)}, {where})"
