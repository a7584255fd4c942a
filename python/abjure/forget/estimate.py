"""The whole importance pass over a data loader."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from .adapters import merged_names, merging
from .fisher import Fisher
from .resume import Checkpoint, Data, Uninterrupted, provenance

#: Bytes of per-example gradients held at a time.
_STACK_BYTES = 256 << 20


def importance(
    model: Any,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], Any],
    per_sample: bool | Literal["loop"] = False,
    *,
    power: int | None = None,
    weights: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    size: Callable[[Any], float] | None = None,
    loss_scale: float = 1.0,
    include_frozen: bool = False,
    merged: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    notes: Any = None,
    dtype: str = "float32",
    progress: bool = True,
) -> Fisher:
    """Importance of every parameter of a torch model over a loader's batches: by default its Fisher information.

    The model is put into eval mode, so that batch normalisation uses its running statistics (that it leaves them alone
    is checked) and dropout is off; modes are restored, whatever happens. ``.grad`` is neither read nor written. Each
    gradient is added to its sum as soon as the backward pass has made it, and let go: memory is one float32 copy of
    the parameters, and less than a plain loop's for gradients. Tied parameters count once, under their first name.

    Args:
        model: a torch module. Parameters that do not require grad, or that the loss does not reach, get 0.
        loader: yields batches; any iterable. Every batch counts as one, a ragged last one too, as published.
        loss: ``loss(model, batch)``, a scalar: the mean cross-entropy with the true labels, as published, or a
            label-free one: :data:`cross_entropy`, :data:`squared_output_norm`, :data:`output_norm` or your own. Your
            own moves the batch to the model's device itself.
        per_sample: exact squares per example (unit ``"sample"``) instead of squares of each batch's gradient (unit
            ``"batch"``). Every tensor in a batch then has a leading axis of examples, and ``loss`` is called with
            batches of one under ``torch.func.vmap`` and with a stand-in for the model that is called like it.
            ``"loop"`` does the same example by example, for large models and for losses that vmap cannot trace.
        power: 2 for means of squared gradients, 1 for means of absolute ones; by default ``loss.power``, or 2.
        weights: ``weights(batch)``, one number of 0 or more for each example. With ``per_sample``, the weight of the
            example's square. Otherwise its share in the batch's mean loss: ``loss`` then returns one value for each.
        accumulate: batches whose mean gradient is taken as that of one (unit ``"batch"``): what fits into memory as
            micro-batches. Needs a further copy of the parameters.
        size: ``size(batch)``, what a micro-batch weighs in that mean; by default its examples (or their weights). For a
            loss that is a mean over tokens, the number of counted tokens.
        loss_scale: multiplies the loss before the backward pass and is taken out of the sums again: for float16 models,
            whose small gradients vanish before they can be squared. A power of two, so that it is exact.
        include_frozen: also the parameters that do not require grad.
        merged: for a model with ``peft`` adapters, the importance of the base weights with the active adapters merged
            into them, under the names that ``merge_and_unload()`` gives. Otherwise the base weights are frozen as peft
            leaves them, and the adapters' own parameters have importance.
        checkpoint: a file to continue from if it is there, and to keep the state in. It is written every ``every``
            batches (groups of ``accumulate``), at the end, and when the pass is stopped by Ctrl-C or an error. What
            comes out has the bits of a pass that was not stopped. Ctrl-C is held back until the batch in hand is
            complete; a second one is not. The loader must yield the same batches again: those already counted are
            compared and left out.
        every: see ``checkpoint``.
        notes: anything JSON can hold, for :attr:`Fisher.provenance`.
        dtype: of the sums, ``"float32"`` or ``"float64"``.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The accumulated :class:`Fisher`, with its ``provenance``.

    Raises:
        DegenerateError: the loader yields nothing.
        ArgumentError: the loss is not a scalar or does not depend on the parameters, a batch has no common leading
            axis, an index (a label, a token) is out of range, running statistics changed, or the checkpoint is another
            pass's.
        NonFiniteError: a loss (the batch is named) or a gradient (the parameter is named) is NaN or infinite.

    Source: arXiv 2308.07707, section 3; the published code divides the sum over batches by their number. Label-free:
    arXiv 2402.19308 and 2406.09173.
    """
    if not hasattr(model, "named_parameters"):
        raise DTypeError(f"model: expected a torch module, got {type(model).__name__}")
    if per_sample not in (False, True, "loop"):
        raise ArgumentError(f"per_sample: expected False, True or 'loop', got {per_sample!r}")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ArgumentError(f"accumulate: expected a whole number of 1 or more, got {accumulate!r}")
    if per_sample and accumulate > 1:
        raise ArgumentError(
            f"accumulate: expected 1 with per_sample, whose gradients are not averaged, got {accumulate}"
        )
    if not (math.isfinite(loss_scale) and loss_scale > 0 and math.frexp(loss_scale)[0] == 0.5):
        raise ArgumentError(f"loss_scale: expected a power of two, got {loss_scale}")
    from tqdm.auto import tqdm

    names = merged_names(model) if merged else {name: name for name, _ in model.named_parameters()}
    present = dict(model.named_parameters())
    parameters = {names[name]: p for name, p in present.items() if name in names}
    fisher = Fisher("sample" if per_sample else "batch", dtype, getattr(loss, "power", 2) if power is None else power)
    fisher._begin(parameters)
    everything = include_frozen or merged
    trained = {name: p for name, p in parameters.items() if p.requires_grad or (everything and p.is_floating_point())}
    if not trained:
        raise ArgumentError("model: expected a parameter that requires grad, got none")

    data, guard = Data(), Uninterrupted()
    with ExitStack() as stack:
        if merged:
            stack.enter_context(merging(model))
        stack.enter_context(_evaluating(model, trained.values()))
        facts = provenance(model, parameters, loss, notes)
        options = {"per_sample": per_sample, "accumulate": accumulate, "loss_scale": loss_scale, "merged": merged}
        kept, found = None, {}
        if checkpoint is not None:
            kinds = {"unit": fisher.unit, "power": fisher.power, "dtype": fisher.dtype, "weighted": weights is not None}
            kept = Checkpoint(checkpoint, every, {k: facts[k] for k in ("parameters", "loss")} | kinds | options)
            found = kept.read(fisher, parameters)
            stack.enter_context(guard.installed())
        skipped = int(found.get("batches", 0))
        examples = int(found.get("examples", 0))

        settings = (model, names, trained, loss, fisher, weights, size, loss_scale)
        run: _Pass = _Stacked(*settings) if per_sample is True else stack.enter_context(_Hooked(*settings).hooked())
        clean = True
        try:
            bar = stack.enter_context(tqdm(loader, desc="importance", unit="batch", disable=None if progress else True))
            for batch in bar:
                data.update(batch)
                if data.batches <= skipped:
                    if data.batches == skipped and data.hexdigest() != found["data"]:
                        raise ArgumentError(
                            f"checkpoint: expected the loader's first {skipped} batches again, got others"
                        )
                    continue
                if found.get("complete"):
                    raise ArgumentError(f"checkpoint: expected a loader of {skipped} batches as before, got more")
                with guard.step():
                    clean = accumulate > 1
                    examples += run.batch(data.batches, batch, per_sample == "loop", accumulate > 1)
                    if data.batches % accumulate == 0:
                        clean = False
                        run.flush()
                        clean = True
                        if kept is not None:
                            kept.ended(fisher, data, examples)
            if data.batches < skipped:
                raise ArgumentError(f"checkpoint: expected a loader of at least {skipped} batches, got {data.batches}")
            with guard.step():
                clean = False
                run.flush()
                clean = True
                if kept is not None and data.batches and not found.get("complete"):
                    kept.ended(fisher, data, examples, last=True)
        except BaseException:
            if kept is not None and clean:
                kept.write(fisher)
            raise
    if not fisher.count:
        raise DegenerateError("loader: expected at least one batch, got none")
    facts |= {"batches": data.batches, "examples": examples, "data": data.hexdigest()}
    facts |= {k: v for k, v in options.items() if v not in (False, 1)}
    fisher.provenance.update(facts)
    return fisher


@contextmanager
def _evaluating(model: Any, trained: Iterable[Any]) -> Iterator[None]:
    """Eval mode, gradients enabled and required inside; as it was after, running statistics included.

    Raises:
        ArgumentError: running statistics changed inside. They have been put back then.
    """
    import torch

    frozen = [p for p in trained if not p.requires_grad]
    statistics = [
        (f"{name}.{kind}", buffer, buffer.clone())
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.modules.batchnorm._NormBase)
        for kind, buffer in m.named_buffers(recurse=False)
    ]
    moved = []
    try:
        for p in frozen:
            p.requires_grad_(True)
        with evaluating(model), torch.enable_grad():  # type: ignore[no-untyped-call]
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for name, buffer, before in statistics:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
                moved.append(name)
    if moved:
        raise ArgumentError(f"loss: expected batch normalisation to stay in eval mode, but {moved[0]!r} changed")


class _Pass:
    """What every way to take gradients shares: calling the loss, and errors that name the batch."""

    def __init__(
        self,
        model: Any,
        names: dict[str, str],
        trained: dict[str, Any],
        loss: Callable[[Any, Any], Any],
        fisher: Fisher,
        weights: Callable[[Any], Any] | None,
        size: Callable[[Any], float] | None,
        loss_scale: float,
    ) -> None:
        self.model, self.names, self.trained, self.loss, self.fisher = model, names, trained, loss, fisher
        self.weights, self.size, self.loss_scale = weights, size, loss_scale
        #: What the sums are multiplied with to take the loss's scale out of them.
        self.unscale = loss_scale**-fisher.power
        self.number = 0

    def batch(self, number: int, batch: Any, single: bool, grouped: bool) -> int:
        """Adds a batch (or holds it for its group), and says how many examples it had."""
        raise NotImplementedError

    def flush(self) -> None:
        """Adds what is held."""

    def call(self, batch: Any, weights: Any = None, model: Any = None) -> Any:
        import torch

        try:
            value = self.loss(self.model if model is None else model, batch)
        except IndexError as err:
            raise ArgumentError(f"loader: batch {self.number}: expected labels and tokens in range ({err})") from err
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"loss: expected a scalar tensor, got {type(value).__name__}")
        if weights is not None:
            if tuple(value.shape) != (len(weights),):
                found = tuple(value.shape)
                raise ArgumentError(f"loss: expected a value for each of {len(weights)} weighted examples, got {found}")
            w = torch.as_tensor(weights, dtype=torch.float64).to(value.device, value.dtype)
            value = (value * w).sum() / w.sum()
        if tuple(value.shape) != ():
            raise ArgumentError(f"loss: expected a scalar tensor, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ArgumentError("loss: expected a scalar that depends on the model's parameters, got a constant")
        return value

    def expect_finite(self, value: float, example: int | None = None) -> None:
        if not math.isfinite(value):
            where = f"batch {self.number}" + ("" if example is None else f", example {example}")
            raise NonFiniteError(f"loss: {where}: expected a finite number, got {value}")

    def weights_of(self, batch: Any, n: int | None) -> list[float] | None:
        """Weights of a batch's examples, checked; None where none are given."""
        import torch

        if self.weights is None:
            return None
        found = torch.as_tensor(self.weights(batch)).detach().double().cpu()
        if found.dim() != 1 or (n is not None and len(found) != n):
            expected = "one axis" if n is None else f"shape ({n},)"
            raise ShapeError(f"weights: batch {self.number}: expected {expected}, got {tuple(found.shape)}")
        if not bool((found.isfinite() & (found >= 0)).all()):
            raise ArgumentError(f"weights: batch {self.number}: expected finite numbers of 0 or more, got {found}")
        return [float(w) for w in found]


class _Hooked(_Pass):
    """Backward passes whose gradients are added by hooks, one parameter at a time, and never exist together."""

    _held: dict[str, Any]
    _weight = 1.0
    _grouped = False
    _total = 0.0

    @contextmanager
    def hooked(self) -> Iterator[_Hooked]:
        self._held = {}
        handles = [p.register_hook(self._hook(name)) for name, p in self.trained.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[Any], Any]:
        def add(gradient: Any) -> Any:
            dense = gradient.detach()
            dense = dense.to_dense() if dense.is_sparse else dense
            if self._grouped:
                self._hold(name, dense)
            else:
                self.fisher._add(name, dense, self._weight)
            # A gradient of the same shape without memory of its own: the engine lets go of the real one.
            return None if gradient.is_sparse else dense.new_zeros(()).expand(dense.shape)

        return add

    def _hold(self, name: str, gradient: Any) -> None:
        import torch

        if not bool(gradient.isfinite().all()):
            raise NonFiniteError(f"{name!r}: grad: batch {self.number}: non-finite value")
        if name not in self._held:
            dtype = torch.float64 if "float64" in (self.fisher.dtype, str(gradient.dtype)[6:]) else torch.float32
            self._held[name] = torch.zeros(gradient.shape, dtype=dtype, device=gradient.device)
        self._held[name].add_(gradient, alpha=self._weight)

    def _backward(self, value: Any) -> None:
        import torch

        torch.autograd.grad(value * self.loss_scale, list(self.trained.values()), allow_unused=True)

    def batch(self, number: int, batch: Any, single: bool, grouped: bool) -> int:
        self.number, self._grouped = number, grouped
        if single:
            return self._each(batch)
        weights = self.weights_of(batch, None)
        if weights is not None and not any(weights):
            raise ArgumentError(f"weights: batch {number}: expected a number above 0 among them, got none")
        value = self.call(batch, weights)
        self.expect_finite(float(value.detach()))
        n = _count(batch) if weights is None else len(weights)
        if grouped:
            self._weight = self._size_of(batch, n, weights)
            self._total += self._weight
        else:
            self._weight = self.unscale
        self._backward(value)
        if not grouped:
            self.fisher._count += 1.0
        return n or 0

    def _size_of(self, batch: Any, n: int | None, weights: list[float] | None) -> float:
        if self.size is None:
            if n is None:
                raise ArgumentError(
                    f"size: batch {self.number} has no common leading axis; say what it weighs by size="
                )
            return float(n) if weights is None else sum(weights)
        found = float(self.size(batch))
        if not (math.isfinite(found) and found > 0):
            raise ArgumentError(f"size: batch {self.number}: expected a finite number above 0, got {found}")
        return found

    def _each(self, batch: Any) -> int:
        n, tensors, rebuild = _examples(batch)
        weights = self.weights_of(batch, n) or [1.0] * n
        for i, weight in enumerate(weights):
            if weight == 0.0:
                continue
            value = self.call(rebuild([t[i : i + 1] for t in tensors]))
            self.expect_finite(float(value.detach()), i)
            self._weight = weight * self.unscale
            self._backward(value)
            self.fisher._count += weight
        return n

    def flush(self) -> None:
        if not self._total:
            return
        for name, held in self._held.items():
            self.fisher._add(name, held.div_(self._total), self.unscale)
            held.zero_()
        self.fisher._count += 1.0
        self._total = 0.0


class _Stacked(_Pass):
    """Per-example gradients by ``torch.func.vmap``."""

    def batch(self, number: int, batch: Any, single: bool, grouped: bool) -> int:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.number = number
        n, tensors, rebuild = _examples(batch)
        weights = self.weights_of(batch, n)
        actual = {name: p.detach() for name, p in self.model.named_parameters() if self.names.get(name) in self.trained}

        def one(values: dict[str, Any], *example: Any) -> Any:
            value = self.call(rebuild([t.unsqueeze(0) for t in example]), model=_StandIn(self.model, values))
            return value * self.loss_scale

        gradient = torch.func.vmap(
            torch.func.grad_and_value(one), in_dims=(None, *(0 for _ in tensors)), randomness="different"
        )
        bytes_each = sum(p.numel() * p.element_size() for p in actual.values())
        step = max(1, _STACK_BYTES // max(bytes_each, 1))
        for start in range(0, n, step):
            part = [1.0] * n if weights is None else weights
            part = part[start : start + step]
            if not any(part):
                continue
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the only attention that vmap runs in one piece
                    gradients, values = gradient(actual, *(t[start : start + step] for t in tensors))
            except (IndexError, RuntimeError) as err:
                if isinstance(err, IndexError) or "out of bounds" in str(err):
                    raise ArgumentError(f"loader: batch {number}: expected labels and tokens in range ({err})") from err
                raise
            for i, value in enumerate(values.detach().double().tolist()):
                self.expect_finite(value, start + i)
            given = dict.fromkeys(self.fisher.names) | {self.names[name]: g for name, g in gradients.items()}
            before = self.fisher.count
            self.fisher.update(given, [w * self.unscale for w in part], stacked=True)
            self.fisher._count = before + sum(part)
        return n


def _leaves(batch: Any) -> tuple[list[Any], Any]:
    from torch.utils._pytree import tree_flatten

    # Mappings that torch does not know, as transformers' BatchEncoding, become dicts.
    return tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)


def _count(batch: Any) -> int | None:
    """Number of examples of a batch; None where its tensors do not agree on one."""
    import torch

    leaves, _ = _leaves(batch)
    lengths = {tuple(leaf.shape[:1]) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return next(iter(lengths))[0] if len(lengths) == 1 and () not in lengths else None


def _examples(batch: Any) -> tuple[int, list[Any], Callable[[list[Any]], Any]]:
    """Number of examples, the tensors of a batch, and what puts tensors back in their places."""
    import torch
    from torch.utils._pytree import tree_unflatten

    leaves, spec = _leaves(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    lengths = {tuple(leaves[i].shape[:1]) for i in places}
    if len(lengths) != 1 or () in lengths:
        raise ArgumentError(f"loader: expected tensors with one leading axis of examples, got {sorted(lengths)}")

    def rebuild(tensors: list[Any]) -> Any:
        new = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            new[i] = tensor
        return tree_unflatten(new, spec)

    return next(iter(lengths))[0], [leaves[i] for i in places], rebuild


class _StandIn:
    """The model with other tensors in the places of its parameters."""

    is_traced = True

    def __init__(self, model: Any, tensors: dict[str, Any]) -> None:
        self._model, self._tensors = model, tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        return torch.func.functional_call(self._model, self._tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
