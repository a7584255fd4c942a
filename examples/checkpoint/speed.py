"""Edits a checkpoint made here (random weights, a real architecture) and compares time and memory.

    python examples/checkpoint/speed.py [--gigabytes 2] [--folder /tmp] [--rounds 5] [--skip-transformers]

Rows: `cp -r` of the directory; `cp -r` and `sync`, which is what an edit promises (it returns when the copy is on the
storage device); `abjure ablate` of all writers; the same with hashes of the edited alone; load, edit and save with
transformers, in bfloat16 (one round). Every row is a process of its own, its imports included, with compiled modules as
an installed package has; the rows take turns, from a warm page cache. Memory is the highest resident set of the
process, Python included. Prints the best and the median of the rounds, and the throughput against `cp`: the quotient of
the medians, and of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

D, INNER, VOCAB = 2048, 5632, 32000
BLOCK_BYTES = 2 * (4 * D * D + 3 * D * INNER)

#: Leaves the highest resident set of its own address space (rusage would count the parent's from before exec).
PEAK = """
import atexit, re, sys
def peak(path=sys.argv.pop(1)):
    status = open("/proc/self/status").read()
    open(path, "w").write(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
atexit.register(peak)
"""
TRANSFORMERS = (
    PEAK
    + """
import torch
from transformers import AutoModelForCausalLM
from abjure import refuse
source, out, direction = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
refuse.orthogonalize_model_(model, refuse.Direction.load(direction), undo=False)
model.save_pretrained(out, max_shard_size="1GB")
"""
)
ABJURE = PEAK + "from abjure import cli; sys.exit(cli.main(sys.argv[1:]))"


def save(path: Path, shard: dict[str, tuple[int, ...]], new: Callable[..., np.ndarray]) -> None:
    """A safetensors file of bfloat16, which NumPy does not know."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shard.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shard.values():
            file.write(new(*shape).tobytes())


def make(path: Path, gigabytes: float) -> None:
    """A Llama of bfloat16 weights in shards of about half a gigabyte."""
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * D) / BLOCK_BYTES))
    draw = np.random.default_rng(0)

    def new(*shape: int) -> np.ndarray:
        bits = (draw.standard_normal(shape, dtype=np.float32) * 0.02).view(np.uint32)
        return (bits >> 16).astype(np.uint16)

    path.mkdir()
    tensors = {"model.embed_tokens.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(layers):
        block = f"model.layers.{i}."
        tensors |= {f"{block}self_attn.{n}_proj.weight": (D, D) for n in "qkvo"}
        tensors |= {f"{block}mlp.{n}_proj.weight": (INNER, D) for n in ("gate", "up")}
        tensors |= {f"{block}mlp.down_proj.weight": (D, INNER)}
        tensors |= {f"{block}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        if size > 5e8:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * int(np.prod(shape))
    index = {}
    for k, shard in enumerate(shards):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        save(path / file, shard, new)
        index |= dict.fromkeys(shard, file)
    total = sum(2 * int(np.prod(s)) for s in tensors.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    facts = {"hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16}
    facts |= {"vocab_size": VOCAB, "num_key_value_heads": 16, "max_position_embeddings": 2048}
    architecture = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps({**architecture, "tie_word_embeddings": False, **facts}))


def timed(command: list[str], out: Path, modules: Path, sync: bool = False) -> tuple[float, float | None]:
    """Seconds, and the highest resident set in MiB where the process tells it; compiled modules lie in ``modules``."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    told = out.with_suffix(".peak")
    told.unlink(missing_ok=True)
    python = command[0] == sys.executable
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(
        command[:3] + [str(told)] * python + command[3:],
        stdout=subprocess.DEVNULL,
        check=True,
        env={**kept, "PYTHONPYCACHEPREFIX": str(modules)},
    )
    if sync:
        os.sync()
    took = time.perf_counter() - start
    return took, int(told.read_text()) / 1024 if python else None


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--folder", default=None)
    options.add_argument("--made", default=None, help="use a checkpoint that --make left there")
    options.add_argument("--make", default=None, help="make the checkpoint there and stop")
    options.add_argument("--skip-transformers", action="store_true")
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    if given.make:
        make(Path(given.make), given.gigabytes)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, out = Path(given.made or Path(folder) / "source"), Path(folder) / "out"
        if not given.made:
            make(source, given.gigabytes)
        direction = Path(folder) / "q.safetensors"
        from abjure.refuse import Direction

        Direction(np.random.default_rng(1).standard_normal(D)).save(direction)
        size = sum(p.stat().st_size for p in source.iterdir())
        for path in source.iterdir():  # warm
            with open(path, "rb") as file:
                while file.read(1 << 20):
                    pass
        ablate = [
            sys.executable,
            "-c",
            ABJURE,
            "ablate",
            str(source),
            str(out),
            "--direction",
            str(direction),
            "--quiet",
        ]
        rows = {
            "cp -r": (["cp", "-r", str(source), str(out)], False),
            "cp -r; sync": (["cp", "-r", str(source), str(out)], True),
            "abjure ablate": (ablate, False),
            "abjure ablate --hashes edited": ([*ablate, "--hashes", "edited"], False),
        }
        if not given.skip_transformers:
            edit = [sys.executable, "-c", TRANSFORMERS, str(source), str(out), str(direction)]
            rows["transformers: load, edit, save"] = (edit, False)
        modules = Path(folder) / "modules"
        subprocess.run(
            [sys.executable, "-c", "import abjure.checkpoint, tqdm.auto"],
            check=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
            | {"PYTHONPYCACHEPREFIX": str(modules)},
        )
        found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in rows}
        for k in range(given.rounds):
            order = list(rows.items())
            for name, (command, sync) in order[k % len(order) :] + order[: k % len(order)]:
                if k == 0 or not name.startswith("transformers"):
                    found[name].append(timed(command, out, modules, sync))
        shutil.rmtree(out, ignore_errors=True)
        best = {name: min(t for t, _ in runs) for name, runs in found.items()}
        median = {name: statistics.median(t for t, _ in runs) for name, runs in found.items()}
        print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, warm page cache, {given.rounds} rounds")
        print("| row | median s | best s | throughput against cp (medians) | (best) | memory MiB |")
        print("|---|---|---|---|---|---|")
        for name, runs in found.items():
            peak = "" if runs[0][1] is None else f"{max(m for _, m in runs if m is not None):.0f}"
            against = " | ".join(f"{t['cp -r'] / t[name]:.2f}" for t in (median, best))
            print(f"| {name} | {median[name]:.2f} | {best[name]:.2f} | {against} | {peak} |")


if __name__ == "__main__":
    main()
