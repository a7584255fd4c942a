"""Kills edits of a checkpoint at random moments, and looks at what is left.

    python examples/checkpoint/kill.py [--kills 200] [--seed 0]

Half of the kills hit a copy, half an edit in place. After each: the source (of a copy) has its bytes; the result is
absent, or right to the last bit; what can be loaded in place is the old model or the new one, never a mixture; and the
next call completes. Ends with the counts, or with an AssertionError.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from abjure import checkpoint

D, INNER, LAYERS, SHARDS = 512, 1536, 6, 3
RUN = "import sys; from abjure import cli; sys.exit(cli.main(sys.argv[1:]))"


def make(path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    weights = {"model.embed_tokens.weight": (2000, D), "lm_head.weight": (2000, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        weights |= {f"{block}self_attn.{n}_proj.weight": (D, D) for n in "qkvo"}
        weights |= {f"{block}mlp.{n}_proj.weight": (INNER, D) for n in ("gate", "up")}
        weights |= {f"{block}mlp.down_proj.weight": (D, INNER)}
        weights |= {f"{block}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    path.mkdir()
    index = {}
    for k in range(SHARDS):
        file = f"model-{k + 1:05}-of-{SHARDS:05}.safetensors"
        mine = list(weights)[k::SHARDS]
        arrays = {n: draw.standard_normal(weights[n], dtype=np.float32).astype(np.float16) for n in mine}
        save_file(arrays, path / file, {"format": "pt"})
        index |= dict.fromkeys(mine, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    facts = {"hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **facts}))


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def killed(arguments: list[str], after: float) -> bool:
    child = subprocess.Popen([sys.executable, "-c", RUN, *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def loadable(path: Path) -> dict[str, np.ndarray] | None:
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    if not all((path / f).exists() for f in index.values()):
        return None
    return {n: a for f in sorted(set(index.values())) for n, a in load_file(path / f).items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((a[n].view(np.uint16) == b[n].view(np.uint16)).all() for n in a)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draw, seen = random.Random(given.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source, out, place = work / "source", work / "out", work / "place"
        make(source, given.seed)
        vector = np.random.default_rng(1).standard_normal(D)
        from abjure.refuse import Direction

        Direction(vector).save(work / "q.safetensors")
        edit = ["--direction", str(work / "q.safetensors")]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", RUN, "ablate", str(source), str(work / "right"), *edit, "--quiet"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        took = time.perf_counter() - start
        before, old, new = contents(source), loadable(source), loadable(work / "right")
        shutil.copytree(source, place)
        for k in range(given.kills):
            after = draw.uniform(0.2 * took, 1.05 * took)  # the first fifth is Python starting
            if k % 2 == 0:
                dead = killed(["ablate", str(source), str(out), *edit], after)
                assert contents(source) == before, "the source changed"
                partial = (work / ".out.abjure-partial").exists()
                seen[
                    "copy", "killed" if dead else "finished", "out" if out.exists() else f"absent, partial {partial}"
                ] += 1
                if not out.exists() and draw.random() < 0.3:
                    report = checkpoint.edit(source, out, checkpoint.Ablate(work / "q.safetensors"), progress=False)
                    seen["copy", "taken up", f"{report.resumed} shards were there"] += 1
                if out.exists():
                    assert equal(loadable(out), new)
                    assert checkpoint.verify(out, progress=False)
                    shutil.rmtree(out)
                continue
            dead = killed(["ablate", str(place), "--in-place", *edit], after)
            found = loadable(place)
            assert found is None or equal(found, old) or equal(found, new), "a mixture can be loaded"
            ended = checkpoint.recover(place)
            seen["in place", "killed" if dead else "finished", f"journal {ended}"] += 1
            if (place / "abjure.json").exists():
                assert equal(loadable(place), new)
                assert checkpoint.verify(place, progress=False)
                checkpoint.undo(place, progress=False)
            assert contents(place) == before, "not the old bytes"
        assert os.listdir(work)
    for (how, what, left), count in sorted(seen.items()):
        print(f"{count:4}  {how}: {what}: {left}")
    print(f"{given.kills} kills, nothing wrong")


if __name__ == "__main__":
    main()
