"""One user's texts: fine-tuned on, retrieved, or not used at all; and whether other users' texts can be told.

    python examples/audit/personal.py [--out DIR] [--users N]   # SmolLM2-135M-Instruct, CPU
    python examples/audit/personal.py --quick                   # a tiny random model, seconds

The texts are messages of a public chat corpus (``pip install chitchat-dataset``, MIT licence). For each of the users
with most messages, messages are cut by time: the first part is theirs to use, the last is held out. A language model
reads the held-out messages after what the partner said,

- as it is (zero-shot),
- with the user's three nearest earlier messages in front, found by :class:`abjure.forget.PermittedIndex`, whose policy
  lets each user see their own messages alone,
- with its upper layers fine-tuned on the user's earlier messages.

What counts is the loss in nats per token of the message, paired by message. Then every other user's messages are
replaced by noise, and the retrieved messages, their scores and the losses must be the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abjure import forget, measure

sys.path.insert(0, str(Path(__file__).parents[1] / "forget"))
from facts import Encoded, Learner, train


def messages(users: int, own: int, held: int) -> dict[str, list[tuple[str, str]]]:
    """(what the partner said, message) of the users with most turns, in order of time."""
    import chitchat_dataset

    found: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    path = Path(chitchat_dataset.__file__).with_name("dataset.json")
    for conversation in json.loads(path.read_text(encoding="utf-8")).values():
        turns = conversation["messages"]
        for before, turn in pairwise(turns):
            text = " ".join(m["text"] for m in turn).strip()
            said = " ".join(m["text"] for m in before).strip()
            if 6 <= len(text.split()) <= 25 and 3 <= len(said.split()) <= 25:
                found[turn[0]["sender"]].append((turn[0]["timestamp"], said, text))
    most = sorted(found, key=lambda u: (-len(found[u]), u))[:users]
    out = {}
    for i, u in enumerate(most):
        rows = sorted(found[u])
        step = max(1, len(rows) // (own + held))
        out[f"user {i + 1}"] = [(said, text) for _, said, text in rows[::step][: own + held]]
    return out


class Reader(Learner):
    """Losses of messages after a context; the upper layers can be trained."""

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        return self.encoded(pairs, batch=16)

    @torch.no_grad()
    def losses(self, model: Any, pairs: Sequence[tuple[str, str]]) -> Any:
        data = self.prepare(pairs)
        rows = torch.arange(len(pairs)).split(32)
        return torch.cat([-Learner.scores(model, data[r]).mean for r in rows]).double().numpy()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Any:
        """Mean hidden state below the trained layers, each text by itself, so that no text touches another's bits."""
        found = []
        for text in texts:
            ids = torch.tensor([self.encode(text)])
            state = self.base.model(input_ids=ids, output_hidden_states=True).hidden_states[self.depth // 2 + 1]
            found.append(state[0].mean(dim=0).float())
        return torch.stack(found).numpy()


def context(said: str, shown: Sequence[str] = ()) -> str:
    before = "".join(f"Earlier I wrote: {s}\n" for s in shown)
    return f"{before}They: {said}\nI:"


def index_of(reader: Reader, own: dict[str, list[str]]) -> forget.PermittedIndex:
    texts = [t for mine in own.values() for t in mine]
    owners = [u for u, mine in own.items() for _ in mine]
    policy = forget.Policy({u: [] for u in own}, {u: [u] for u in own})
    return forget.PermittedIndex(reader.embed(texts), owners, policy, ids=list(range(len(texts))), metric="cosine")


def retrieved(
    reader: Reader, index: forget.PermittedIndex, texts: Sequence[str], user: str, asked: Sequence[str]
) -> Any:
    found = index.search(reader.embed(asked), user, k=3)
    return [[texts[i] for i in row] for row in found.ids], found


def run(options: argparse.Namespace) -> dict[str, Any]:
    own_n, held_n = (12, 6) if options.quick else (options.own, options.held)
    users = 3 if options.quick else options.users
    people = messages(users, own_n, held_n)
    model, encode = tiny() if options.quick else smollm()
    reader = Reader(model, encode, 2 if options.quick else 4)
    base = reader.fresh()
    own = {u: [t for _, t in rows[:own_n]] for u, rows in people.items()}
    texts = [t for mine in own.values() for t in mine]
    index = index_of(reader, own)
    path = Path(options.out) / "personal.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not options.quick else {}
    for user, rows in people.items():
        if user in done:
            continue
        begun = time.monotonic()
        held = rows[own_n:]
        zero = reader.losses(base, [(context(s), f" {t}") for s, t in held])
        near, hits = retrieved(reader, index, texts, user, [s for s, _ in held])
        with_near = [(context(s, shown), f" {t}") for (s, t), shown in zip(held, near, strict=True)]
        found = reader.losses(base, with_near)
        tuned = reader.fresh()
        torch.manual_seed(0)
        data = reader.prepare([(context(s), f" {t}") for s, t in rows[:own_n]])
        train(tuned, data, options.rate, options.epochs, 16, 0, 0.0, user)
        learnt = reader.losses(tuned, [(context(s), f" {t}") for s, t in held])
        # Every other user's messages become noise: nothing that this user sees may change.
        other = {u: mine if u == user else ["zz qq vv"] * len(mine) for u, mine in own.items()}
        noise = index_of(reader, other)
        again, same = retrieved(reader, noise, [t for mine in other.values() for t in mine], user, [s for s, _ in held])
        untouched = (
            again == near
            and bool((same.rows == hits.rows).all())
            and bool((same.scores.view(np.int64) == hits.scores.view(np.int64)).all())
        )
        done[user] = {
            "zero_shot": zero.tolist(), "retrieval": found.tolist(), "fine_tuned": learnt.tolist(),
            "non_interference": untouched, "seconds": round(time.monotonic() - begun),
        }  # fmt: skip
        path.write_text(json.dumps(done, indent=1))
        print(f"{user}: zero-shot {zero.mean():.3f}, retrieval {found.mean():.3f}, fine-tuned {learnt.mean():.3f}, "
              f"other users' texts told: {'no' if untouched else 'YES'}", flush=True)  # fmt: skip
    return done


def report_of(done: dict[str, Any]) -> measure.Report:
    page = measure.Report("One user's texts", {"users": len(done)})
    rows = {u: {k: float(np.mean(r[k])) for k in ("zero_shot", "retrieval", "fine_tuned")} for u, r in done.items()}
    for u, r in rows.items():
        page.add(u, r, "mean loss of held-out messages, nats per token")
    owner = [u for u, r in done.items() for _ in r["zero_shot"]]
    for name in ("retrieval", "fine_tuned"):
        a, b = (np.concatenate([done[u][k] for u in done]) for k in (name, "zero_shot"))
        if len(done) > 1:
            found = measure.bootstrap_mean(a - b, strata=owner)
            page.add(f"{name} less zero_shot", {"difference": found.value, "low": found.low, "high": found.high})
    page.add("non-interference", {u: r["non_interference"] for u, r in done.items()})
    return page


def smollm() -> tuple[Any, Callable[[str], list[int]]]:
    from abjure.demo.smollm import Chat, model_file

    chat = Chat(model_file())
    return chat.model, lambda text: chat.tokenizer.encode(text, add_special_tokens=False)


def tiny() -> tuple[Any, Callable[[str], list[int]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    words: dict[str, int] = {}
    return LlamaForCausalLM(config), lambda text: [words.setdefault(w, len(words) % 510 + 1) for w in text.split()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="personal-out", metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--users", type=int, default=5)
    parser.add_argument("--own", type=int, default=80, help="messages of each user to use")
    parser.add_argument("--held", type=int, default=40, help="messages of each user held out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-4)
    options = parser.parse_args(argv)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    done = run(options)
    page = report_of(done)
    page.save(Path(options.out) / "personal.md")
    print(page.to_markdown())
    return 0 if all(r["non_interference"] for r in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
