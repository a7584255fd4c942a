"""Unlearning with transformers' Trainer: forget and retain data side by side, losses by name, no second model.

A loop of one's own needs no trainer, only :func:`reference_logprobs` before it and the losses of :mod:`abjure.forget`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import ArgumentError, DegenerateError, ShapeError
from ..forget import losses
from ..forget.losses import SequenceLogprobs

__all__ = [
    "LOSSES",
    "PaddingCollator",
    "RetainLossStop",
    "UnlearnBatch",
    "UnlearnDataset",
    "UnlearnTrainer",
    "reference_logprobs",
]

_PARTS = ("forget", "retain", "alternative")


@dataclass
class PaddingCollator:
    """Pads ``input_ids``, ``attention_mask`` and ``labels`` on the right; other entries become tensors.

    Examples are mappings with ``input_ids``; ``attention_mask`` defaults to ones, ``labels`` to the ids. An example
    whose values are such mappings (``forget``, ``retain``, ``alternative``) gives a batch of batches.

    Args:
        pad_token_id: id that fills ``input_ids``; attention and labels leave it out, so any valid id will do.
        pad_to_multiple_of: width is rounded up to this.

    Raises:
        ShapeError: an example whose lengths differ.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "input_ids" in examples[0]:
            return self._flat(examples)
        return {
            key: self([e[key] for e in examples])
            if isinstance(examples[0][key], Mapping)
            else torch.tensor([e[key] for e in examples])
            for key in examples[0]
        }

    def _flat(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        step = max(self.pad_to_multiple_of, 1)
        width = -(-max(len(e["input_ids"]) for e in examples) // step) * step
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": -100}
        batch = {k: torch.full((len(examples), width), v) for k, v in fill.items()}
        for i, example in enumerate(examples):
            ids = torch.as_tensor(example["input_ids"])
            for key, out in batch.items():
                default = torch.ones_like(ids) if key == "attention_mask" else ids
                values = torch.as_tensor(example[key]) if example.get(key) is not None else default
                if values.shape != ids.shape or ids.ndim != 1:
                    raise ShapeError(
                        f"{key}: expected shape {tuple(ids.shape)} as input_ids, got {tuple(values.shape)}"
                    )
                out[i, : len(ids)] = values
        return batch


class UnlearnDataset(Dataset[Any]):
    """One item per forget example: itself, its alternative, and a retain example that changes with every epoch.

    Args:
        forget: map-style data set of examples (``input_ids``, ``labels``, …).
        retain: the same, or None. Example i goes with ``retain[p[i mod len(retain)]]``, p a permutation per epoch.
        alternative: answers to prefer to the forget answers (refusals, templates), one per forget example, or None.
        seed: of the permutations.

    Raises:
        ArgumentError: an empty data set.
        ShapeError: not one alternative per forget example.
    """

    def __init__(self, forget: Any, retain: Any = None, alternative: Any = None, seed: int = 0) -> None:
        for name, data in (("forget_dataset", forget), ("retain_dataset", retain)):
            if data is not None and len(data) == 0:
                raise ArgumentError(f"{name}: expected at least one example, got none")
        if alternative is not None and len(alternative) != len(forget):
            raise ShapeError(
                f"alternative_dataset: expected {len(forget)} examples, one per forget example, got {len(alternative)}"
            )
        self.forget, self.retain, self.alternative, self.seed = forget, retain, alternative, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the retain examples of an epoch; the trainer calls it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self._order = [] if self.retain is None else torch.randperm(len(self.retain), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": int(i), "forget": self.forget[i]}
        if self.retain is not None:
            item["retain"] = self.retain[self._order[i % len(self._order)]]
        if self.alternative is not None:
            item["alternative"] = self.alternative[i]
        return item


@dataclass
class UnlearnBatch:
    """What a loss gets.

    Attributes:
        forget: scores of the forget examples under the model.
        retain: of the retain examples, or None.
        alternative: of the alternatives, or None.
        reference: ``(B,)`` sums of the forget examples under the reference; None where no loss asked for it.
        alternative_reference: the same for the alternatives.
        options: ``loss_options`` of the trainer.
    """

    forget: SequenceLogprobs
    retain: SequenceLogprobs | None
    alternative: SequenceLogprobs | None
    reference: Tensor | None
    alternative_reference: Tensor | None
    options: dict[str, Any]


@dataclass(frozen=True)
class _Loss:
    value: Callable[[UnlearnBatch], Tensor]
    #: Parts it cannot do without.
    needs: tuple[str, ...] = ()
    reference: bool = False
    #: Whether the retain data are in the loss already.
    whole: bool = False


#: Names of the losses that :class:`UnlearnTrainer` knows. The loss on the retain data is added to each but ``idk``.
LOSSES: dict[str, _Loss] = {
    "ga": _Loss(lambda b: losses.ga(b.forget, **b.options)),
    "grad_diff": _Loss(lambda b: losses.ga(b.forget, **b.options), ("retain",)),
    "npo": _Loss(lambda b: losses.npo(b.forget, b.reference, **b.options), reference=True),
    "simnpo": _Loss(lambda b: losses.simnpo(b.forget, **b.options)),
    "dpo": _Loss(
        lambda b: losses.dpo(b.alternative, b.forget, b.alternative_reference, b.reference, **b.options),
        ("alternative",),
        reference=True,
    ),
    "idk": _Loss(lambda b: losses.idk(b.alternative, b.retain, **b.options), ("alternative", "retain"), whole=True),
    "flat": _Loss(lambda b: losses.flat(b.alternative, b.forget, **b.options), ("alternative",)),
    "redi": _Loss(lambda b: losses.redi(b.alternative, b.forget, **b.options), ("alternative",)),
}
LOSSES["idk_dpo"] = LOSSES["dpo"]


class RetainLossStop(TrainerCallback):
    """Stops training when the loss on the retain data says that the model collapses.

    Args:
        limit: nats per token; the mean over the batches of a step is compared.
        patience: steps in a row above the limit.

    Raises:
        ArgumentError: a limit that is not positive, a patience below 1.
    """

    def __init__(self, limit: float, patience: int = 1) -> None:
        if not (limit > 0 and math.isfinite(limit)):
            raise ArgumentError(f"limit: expected a positive number of nats per token, got {limit}")
        if patience < 1:
            raise ArgumentError(f"patience: expected at least 1, got {patience}")
        self.limit, self.patience, self.above = limit, patience, 0
        #: Step after which training was stopped, or None.
        self.stopped_at: int | None = None

    def after_step(self, retain_loss: float, step: int) -> bool:
        """Whether to stop after a step with this loss; NaN counts as above the limit."""
        self.above = 0 if retain_loss <= self.limit else self.above + 1
        if self.above >= self.patience:
            self.stopped_at = step
        return self.stopped_at is not None


class _Epoch(TrainerCallback):
    """Tells the data set the epoch, gathers the losses of a step and asks the stop rules."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._data.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        found = [x for x in trainer._step_retain if x is not None]
        trainer._step_retain.clear()
        if not found:
            return
        mean = torch.stack(found).mean()
        if trainer.args.world_size > 1:  # every process has to come to the same decision
            mean = trainer.accelerator.reduce(mean.to(trainer.args.device), reduction="mean")
        for stop in trainer._stops:
            if stop.after_step(mean.item(), state.global_step):
                control.should_training_stop = True


def _base(model: Any) -> Any:
    """The module under wrappers of data parallelism."""
    while isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


@contextmanager
def _reference_mode(model: Any) -> Iterator[None]:
    """Evaluation mode, without gradients, with a PEFT adapter disabled."""
    modes = {name: m.training for name, m in model.named_modules()}
    plain = _base(model)
    has_adapter = hasattr(plain, "peft_config") and hasattr(plain, "disable_adapter")
    model.eval()
    try:
        with torch.no_grad(), plain.disable_adapter() if has_adapter else nullcontext():
            yield
    finally:
        for name, m in model.named_modules():
            m.training = modes.get(name, m.training)


def _model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}


def reference_logprobs(
    model: Any, dataset: Any, *, batch_size: int = 8, collator: Callable[..., Any] | None = None, progress: bool = True
) -> Tensor:
    """Summed log-probability of every example under the frozen reference, once, so that no second model is needed.

    The model is in evaluation mode (and put back). The adapter of a PEFT model is disabled: the reference is the model
    under it.

    Args:
        model: causal language model with ``.logits`` in its output.
        dataset: examples (``input_ids``, ``labels``, …), or batches of them (any iterable without ``len`` and indexing
            is not accepted; a ``DataLoader`` is, and keeps its order).
        batch_size: examples per forward pass, where ``dataset`` is not a loader.
        collator: makes a batch; :class:`PaddingCollator` by default.
        progress: tqdm bar where the terminal shows one.

    Returns:
        ``(N,)`` f64 on the CPU, in the order of the data set.

    Raises:
        DegenerateError: an example without a counted token.
    """
    from tqdm import tqdm

    loader = dataset if isinstance(dataset, DataLoader) else None
    if loader is None:
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator or PaddingCollator())
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with _reference_mode(model):
        for batch in tqdm(loader, desc="reference", disable=None if progress else True):
            batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            scores = losses.sequence_logprobs(model(**_model_inputs(batch)).logits, batch["labels"])
            if not bool((scores.count > 0).all()):
                i = sum(len(f) for f in found) + int((scores.count == 0).nonzero()[0])
                raise DegenerateError(f"dataset: expected a counted label after the first token, example {i} has none")
            found.append(scores.sum.double().cpu())
    return torch.cat(found)


class UnlearnTrainer(Trainer):
    """transformers' ``Trainer`` that forgets: forget loss plus ``retain_weight`` times the loss on the retain data.

    What a loss needs of the original model is one number per example, computed once before the first step
    (:func:`reference_logprobs`); with LoRA it is the model with its adapter disabled. Everything else (accelerate,
    gradient accumulation, mixed precision, schedules, checkpoints, logging) is ``Trainer``'s own. Training mode is on
    during steps, as in every trainer: with dropout the first NPO step is not exactly that of gradient ascent.

    Args:
        model: causal language model, or a PEFT model around one.
        args: ``TrainingArguments``; ``remove_unused_columns`` is taken as False. An epoch is one pass over the forget
            set.
        forget_dataset: examples to forget (``input_ids``, ``labels`` with −100 where a token does not count, …).
        retain_dataset: examples to keep, or None.
        alternative_dataset: answers to prefer (``dpo``, ``idk``, ``idk_dpo``, ``flat``, ``redi``), one per forget
            example.
        loss: a key of :data:`LOSSES`, or a callable from :class:`UnlearnBatch` to a scalar.
        loss_options: keywords of the loss (``beta``, ``preset``, ``divergence``, …).
        retain_loss: ``"nll"``, or ``"kl"``: divergence to the reference's predictions, which needs its logits at every
            step, so a PEFT model or ``reference_model``.
        retain_weight: coefficient of the retain loss; 0 only watches it.
        reference: ``(N,)`` sums of the forget examples, if known already; computed where the loss asks for it.
        reference_model: frozen model for ``retain_loss="kl"`` without PEFT.
        max_retain_loss: nats per token at which training stops; for patience pass :class:`RetainLossStop` among
            ``callbacks``.
        data_collator: for lists of :class:`UnlearnDataset` items; :class:`PaddingCollator` with the processing class's
            pad token by default.
        **kwargs: of ``Trainer`` (``processing_class``, ``eval_dataset``, ``callbacks``, ``optimizers``, …). An
            ``eval_dataset`` of plain examples is scored by its negative log-likelihood.

    Raises:
        ArgumentError: unknown loss, or data it needs are missing.
        ShapeError: data sets or reference of lengths that do not fit.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        forget_dataset: Any,
        retain_dataset: Any = None,
        alternative_dataset: Any = None,
        loss: str | Callable[[UnlearnBatch], Tensor] = "npo",
        loss_options: Mapping[str, Any] | None = None,
        retain_loss: str = "nll",
        retain_weight: float = 1.0,
        reference: Tensor | None = None,
        reference_model: Any = None,
        max_retain_loss: float | None = None,
        data_collator: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise ArgumentError(f"loss: expected one of {', '.join(LOSSES)} or a callable, got {loss!r}")
        self._loss = LOSSES[loss] if isinstance(loss, str) else _Loss(loss, reference=reference is not None)
        given = {"retain": retain_dataset, "alternative": alternative_dataset}
        for name in self._loss.needs:
            if given[name] is None:
                raise ArgumentError(f"{name}_dataset: loss {loss!r} needs it, got None")
        if retain_loss not in ("nll", "kl"):
            raise ArgumentError(f"retain_loss: expected 'nll' or 'kl', got {retain_loss!r}")
        if retain_loss == "kl" and reference_model is None and not hasattr(model, "peft_config"):
            raise ArgumentError("reference_model: retain_loss 'kl' needs it, or a PEFT model, got None")
        if not (retain_weight >= 0 and math.isfinite(retain_weight)):
            raise ArgumentError(f"retain_weight: expected a number of at least 0, got {retain_weight}")
        if max_retain_loss is not None and retain_dataset is None:
            raise ArgumentError("retain_dataset: max_retain_loss needs it, got None")
        if reference is not None and tuple(reference.shape) != (len(forget_dataset),):
            raise ShapeError(f"reference: expected shape ({len(forget_dataset)},), got {tuple(reference.shape)}")
        args = copy.copy(args) if args is not None else TrainingArguments()
        args.remove_unused_columns = False
        tokenizer = kwargs.get("processing_class")
        pad = getattr(tokenizer, "pad_token_id", None)
        collator = data_collator or PaddingCollator(pad if pad is not None else 0)
        self._data = data = UnlearnDataset(forget_dataset, retain_dataset, alternative_dataset, seed=args.seed)
        self.loss_options, self.retain_loss_name, self.retain_weight = (
            dict(loss_options or {}),
            retain_loss,
            retain_weight,
        )
        self.reference = reference.double().cpu() if reference is not None else None
        self.alternative_reference: Tensor | None = None
        self.reference_model = reference_model
        if reference_model is not None:
            reference_model.eval().requires_grad_(False)
        self._step_retain: list[Tensor | None] = []
        self._logged: dict[str, list[Tensor]] = {"forget_loss": [], "retain_loss": []}
        super().__init__(model=model, args=args, data_collator=collator, train_dataset=data, **kwargs)
        # The loss is a mean over sequences: Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._stops = [c for c in self.callback_handler.callbacks if isinstance(c, RetainLossStop)]
        if max_retain_loss is not None:
            self._stops.append(RetainLossStop(max_retain_loss))
        self.add_callback(_Epoch(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, after the reference was scored."""
        self.prepare_reference()
        return super().train(*args, **kwargs)

    def prepare_reference(self) -> None:
        """Scores the reference now, if the loss needs it and it is not known; :meth:`train` calls it."""
        if not self._loss.reference:
            return
        model = self.model if self.reference_model is None else self.reference_model

        def scored(data: Any) -> Tensor:
            return reference_logprobs(
                model,
                data,
                batch_size=self.args.per_device_train_batch_size,
                collator=self.data_collator,
                progress=not self.args.disable_tqdm,
            )

        if self.reference is None:
            self.reference = scored(self._data.forget)
        if self.alternative_reference is None and self._data.alternative is not None:
            self.alternative_reference = scored(self._data.alternative)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Forget loss plus weighted retain loss of a nested batch; the negative log-likelihood of a plain one."""
        if "forget" not in inputs:
            out = model(**_model_inputs(inputs))
            loss = losses.nll((out.logits, inputs["labels"]))
            return (loss, out) if return_outputs else loss
        logits, scores = {}, {}
        for part in _PARTS:
            if part in inputs:
                # A part that is only watched needs no graph.
                watched = part == "retain" and self.retain_weight == 0 and not self._loss.whole
                with torch.no_grad() if watched else nullcontext():
                    logits[part] = model(**_model_inputs(inputs[part])).logits
                    scores[part] = losses.sequence_logprobs(logits[part], inputs[part]["labels"])
        rows = inputs["index"].cpu()
        total = self._loss.value(
            UnlearnBatch(
                scores["forget"],
                scores.get("retain"),
                scores.get("alternative"),
                None if self.reference is None else self.reference[rows],
                None if self.alternative_reference is None else self.alternative_reference[rows],
                self.loss_options,
            )
        )
        self._logged["forget_loss"].append(total.detach())
        if "retain" in scores:
            nll = losses.nll(scores["retain"])
            self._step_retain.append(nll.detach())
            self._logged["retain_loss"].append(nll.detach())
            if self.retain_weight > 0 and not self._loss.whole:
                kept = self._divergence(model, inputs["retain"], logits["retain"]) if self._uses_kl else nll
                total = total + self.retain_weight * kept
        return (total, {"logits": logits["forget"]}) if return_outputs else total

    @property
    def _uses_kl(self) -> bool:
        return self.retain_loss_name == "kl"

    def _divergence(self, model: Any, batch: Any, logits: Tensor) -> Tensor:
        reference = self.reference_model if self.reference_model is not None else model
        with _reference_mode(reference):
            frozen = reference(**_model_inputs(batch)).logits
        return losses.kl_retain(logits, frozen.to(logits), batch["labels"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the two terms since the last report."""
        if "loss" in logs:
            for name, values in self._logged.items():
                if values:
                    logs[name] = torch.stack(values).mean().item()
                    values.clear()
        super().log(logs, *args, **kwargs)
