"""The evaluation against each measure taken by itself, on networks trained on the digits."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from abjure.demo import digits
from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import evaluate_unlearning
from abjure.measure import cka, entropy_mia, knn_transfer, svc_mia, tug_of_war
from abjure.measure.outputs import outputs
from abjure.measure.quality import ks_test

pytestmark = pytest.mark.usefixtures("one_thread")

FORGOTTEN = 3
LAYER = "7"


@pytest.fixture(scope="module")
def trial(one_thread):
    """Class 3 is forgotten: the original, a retrained network, and one whose head alone forgot."""
    with digits.one_thread():
        x, y = digits.digits()
        train, test = (x[:700], y[:700]), (x[1200:], y[1200:])
        kept = train[1] != FORGOTTEN
        original = digits.train(*train, 0, epochs=5)
        retrained = digits.train(train[0][kept], train[1][kept], 1, epochs=5)
        broken = copy.deepcopy(original)
        with torch.no_grad():
            broken[-1].weight[FORGOTTEN] = 0
            broken[-1].bias[FORGOTTEN] = -10
        sets = {
            "forget": digits.batches(train[0][~kept], train[1][~kept]),
            "retain": digits.batches(train[0][kept], train[1][kept]),
            "test": digits.batches(*test),
        }
        yield {"unlearned": broken, "retrained": retrained, "original": original}, sets


@pytest.fixture(scope="module")
def found(trial):
    models, sets = trial
    relearn = {"target": 0.5, "lr": 0.05, "max_steps": 40, "progress": False}
    return evaluate_unlearning(
        models["unlearned"], models["retrained"], original=models["original"], **sets, layers=[LAYER], relearn=relearn
    )


def flat(models, loader, layers=()):
    return outputs(models, loader, layers=layers)


def test_each_measure_is_the_one_taken_by_itself(trial, found):
    models, sets = trial
    o = {s: flat(models, sets[s], [LAYER]) for s in sets}
    for m in models:
        for s in sets:
            x, y = (torch.cat(c) for c in zip(*sets[s], strict=True))
            assert getattr(found[f"accuracy, {s}"], m) == pytest.approx(digits.accuracy(models[m], x, y))
        p = {s: (o[s][m].probabilities, o[s][m].labels) for s in sets}
        entropy = entropy_mia(p["retain"][0], p["test"][0], p["forget"][0])
        assert getattr(found["taken for members, entropy"], m) == entropy
        svc = svc_mia(p["retain"], p["test"], p["forget"], features=["confidence"])["confidence"]
        assert getattr(found["taken for members, confidence"], m) == svc
    accuracy = {m: {s: o[s][m].accuracy for s in sets} for m in models}
    tow = found["tug-of-war"]
    assert tow.unlearned == tug_of_war(accuracy["unlearned"], accuracy["retrained"])
    assert (tow.retrained, tow.target, tow.share) == (1.0, 1.0, True)
    quality = found["forget quality, forget loss (log10 p)"]
    assert quality.unlearned == ks_test(o["forget"]["unlearned"].losses, o["forget"]["retrained"].losses).log10_p
    assert quality.original < -3
    features = {m: o["forget"][m].features[LAYER] for m in models}
    similar = found[f"CKA to retrained, {LAYER}, forget"]
    assert similar.unlearned == pytest.approx(cka(features["unlearned"], features["retrained"], debiased=True))
    assert found[f"CKA to original, {LAYER}, forget"].unlearned == pytest.approx(1.0)
    bank = np.concatenate([o[s]["retrained"].features[LAYER] for s in ("retain", "forget")])
    labels = np.concatenate([o[s]["retrained"].labels for s in ("retain", "forget")])
    hits = knn_transfer(bank, labels).predictions == labels
    assert found[f"neighbours' accuracy, {LAYER}, forget"].retrained == hits[-len(features["original"]) :].mean()


def test_losses_and_probabilities_are_torchs(trial):
    models, sets = trial
    x, y = sets["forget"][0]
    z = models["original"](x).detach().double()
    o = flat({"a": models["original"]}, [(x, y)])["a"]
    np.testing.assert_allclose(o.losses, nn.functional.cross_entropy(z, y, reduction="none"), rtol=1e-12)
    np.testing.assert_allclose(o.probabilities, z.softmax(1), rtol=1e-12)
    assert o.probabilities.argmax(1).tolist() == z.argmax(1).tolist()


@pytest.mark.effect
def test_it_tells_a_broken_head_from_forgetting(trial, found):
    """The head says nothing about the class, as after retraining; its features say that nothing else was removed."""
    assert found["accuracy, forget"].unlearned == found["accuracy, forget"].retrained == 0
    assert found["accuracy, forget"].gap == 0
    assert found["tug-of-war"].unlearned > 0.9
    assert found["tug-of-war"].unlearned > found["tug-of-war"].original + 0.5
    assert found[f"CKA to original, {LAYER}, forget"].gap > 0.02
    assert "as retrained" in found[f"CKA to original, {LAYER}, forget"].goal
    assert found["taken for members, entropy"].goal == "as retrained"
    assert found.relearning is not None
    assert found["relearn steps"].note.startswith("median of 1, at most 40; ")


def test_table_plot_and_json(found):
    text = str(found)
    assert text.startswith(", ".join(f"{n} {s}" for s, n in found.sizes.items()) + " samples.")
    for column in ("unlearned", "retrained", "original", "goal", "difference (95 %)"):
        assert column in text.splitlines()[1]
    assert len(text.splitlines()) == 2 + len(found.measures)
    assert found._repr_html_().count("<tr>") == 1 + len(found.measures)
    parsed = json.loads(found.to_json())
    assert parsed["sizes"]["forget"] == found.sizes["forget"]
    entry = next(m for m in parsed["measures"] if m["name"] == "taken for members, entropy")
    assert entry["goal"] == "as retrained"
    assert entry["gap"] == entry["unlearned"] - entry["retrained"]
    assert parsed["relearning"]["max_steps"] == 40
    names = [t.get_text() for t in found.plot().get_yticklabels()]
    assert names == [m.name for m in found.measures if m.share]
    assert "forget quality, forget loss (log10 p)" not in names


def test_without_a_retrained_model_there_are_numbers_and_no_targets(trial):
    models, sets = trial
    found = evaluate_unlearning(models["unlearned"], **sets, membership=["entropy"])
    assert [m.name for m in found.measures] == [
        "accuracy, forget", "accuracy, retain", "accuracy, test", "taken for members, entropy"
    ]  # fmt: skip
    assert all(m.target is None and m.gap is None for m in found.measures)
    assert "Without a retrained model" in str(found)
    assert "retrained  " not in str(found).splitlines()[1]


def test_values_per_example_are_tested_against_the_retrained_models(trial):
    models, sets = trial
    draw = np.random.default_rng(0)
    ratios = draw.random(40), draw.random(40) + 0.5
    found = evaluate_unlearning(
        models["unlearned"], models["retrained"], **sets, membership=(), per_example={"truth ratio": ratios}
    )
    assert found["forget quality, truth ratio (log10 p)"].unlearned == ks_test(*ratios).log10_p
    with pytest.raises(ArgumentError, match="name: expected one of accuracy, forget"):
        found["loss"]


class Modes(nn.Module):
    """Eval mode adds nothing; train mode would double the logits."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x):
        return self.inner(x) * (2 if self.training else 1)


def test_loaders_may_shuffle_and_be_generators_and_batches_mappings(trial):
    """All models see the same rows: a model beside itself differs in nothing, and modes are restored."""
    _, sets = trial
    data = torch.utils.data.TensorDataset(*(torch.cat(c) for c in zip(*sets["retain"], strict=True)))
    shuffled = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True)
    model = Modes().train()
    model.inner.eval()
    o = outputs({"a": model, "b": model}, (b for b in shuffled), layers=["inner"])
    assert (o["a"].losses == o["b"].losses).all()
    assert (o["a"].features["inner"] == o["b"].features["inner"]).all()
    assert model.training
    assert not model.inner.training
    x, y = sets["forget"][0]
    mapped = outputs({"a": model}, [{"x": x, "labels": y}])["a"]
    paired = outputs({"a": model}, [(x, y, "more")], forward=lambda m, b: (m(b[0]), b[1]))["a"]
    assert (mapped.losses == paired.losses).all()


def test_bad_input(trial):
    models, sets = trial
    m, r = models["unlearned"], models["retrained"]

    def run(**more):
        return evaluate_unlearning(m, r, **{**sets, "membership": (), **more})

    x, y = sets["test"][0]
    with pytest.raises(DegenerateError, match="forget: expected at least one batch, got none"):
        run(forget=[])
    with pytest.raises(DegenerateError, match="test: expected at least one sample, got none"):
        run(test=[(x[:0], y[:0])])
    with pytest.raises(ArgumentError, match=r"retain: batch 0: unlearned: labels: .* below 10, got 10 to 10"):
        run(retain=[(x[:1], torch.tensor([10]))])
    with pytest.raises(ShapeError, match="test: batch 0: unlearned: labels: expected one label per row"):
        run(test=[(x, y[:2])])
    with pytest.raises(NonFiniteError, match="test: batch 1: unlearned: expected finite logits"):
        run(test=[(x, y), (x * torch.nan, y)])
    with pytest.raises(DTypeError, match="test: batch 0: unlearned: expected batches"):
        run(test=[x])
    with pytest.raises(ArgumentError, match="layers: expected submodules of unlearned, got 'head'"):
        run(layers=["head"])
    with pytest.raises(ArgumentError, match=r"membership: expected of .* got \['loss'\]"):
        run(membership=["loss"])
    with pytest.raises(ArgumentError, match="relearn: expected original=, or a target"):
        run(relearn={})
    with pytest.raises(ArgumentError, match=r"per_example: 'r': expected \(unlearned, retrained\)"):
        run(per_example={"r": (np.ones(3),)})
    with pytest.raises(NonFiniteError, match="per_example: 'r': retrained: expected finite"):
        run(per_example={"r": (np.ones(3), np.full(3, np.nan))})
    with pytest.raises(DTypeError, match="retrained: expected a torch module"):
        evaluate_unlearning(m, 1, **sets)
    assert not any(layer._forward_hooks for layer in m.modules())
