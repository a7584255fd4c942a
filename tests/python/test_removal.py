"""Removal or suppression: models whose state is known by construction."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from abjure import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import linear_probe, quantized_, removal_report

N_FORGET = 160


@pytest.fixture(scope="module")
def world():
    """Two classes to forget (0 and 1) of five Gaussian ones, an original, a retrained and two unlearned models."""
    torch.manual_seed(0)
    centres = 2.2 * torch.randn(5, 12)

    def draw(classes, n):
        y = torch.as_tensor(classes)[torch.randint(len(classes), (n,))]
        return centres[y] + torch.randn(n, 12), y

    def taught(classes, seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5))
        x, y = draw(classes, 800)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(120):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.eval()

    original, retrained, other = taught(range(5), 1), taught(range(2, 5), 2), taught(range(2, 5), 3)
    hidden = copy.deepcopy(original)
    with torch.no_grad():
        hidden[2].bias[:2] -= 60  # the classes are never answered, and all that tells them apart is still there
    x, y = draw([0, 1], N_FORGET)
    batches = [(x[:16], y[:16]), *zip(x[16:].split(48), y[16:].split(48), strict=True)]
    return original, retrained, other, hidden, batches


def prepared(world, model, **options):
    original, retrained, _, _, batches = world
    options = {"original": original, "lr": 0.1, "relearn_steps": 4, "layers": ["0", "1"], "resamples": 300} | options
    return removal_report(model, retrained, forget=batches, **options)


def test_suppression_is_told(world):
    hidden = world[3]
    before = {n: p.detach().clone() for n, p in hidden.named_parameters()}
    # The output layer alone is retrained, so that the bias has to come back.
    found = prepared(world, hidden, optimizer=lambda p: torch.optim.SGD(list(p)[2:], lr=3.0))
    assert found["as it is"].verdict == "not returned"
    assert found["as it is"].unlearned == 0
    assert found["as it is"].original > 0.9
    assert found.verdict in ("suppressed", "undecided", "no trace found")
    assert found["relearning, 4 steps"].n == N_FORGET - 16
    assert all((p == before[n]).all() for n, p in hidden.named_parameters())
    assert hidden[0].training is False


def test_what_a_small_offset_hides_comes_back(world):
    original, retrained, _, _, batches = world
    hidden = copy.deepcopy(original)
    with torch.no_grad():
        hidden[2].bias[:2] -= 24
    found = removal_report(
        hidden,
        retrained,
        forget=batches,
        original=original,
        lr=0.02,
        relearn_steps=(4, 40),
        layers=["1"],
        resamples=300,
    )
    assert found["as it is"].unlearned < 0.1
    check = found["relearning, 4 steps"]
    assert check.verdict == "returned"
    assert check.unlearned > check.retrained + 0.2
    # After many steps a model that never knew has learnt them too.
    assert found["relearning, 40 steps"].verdict == "not returned"
    assert [c.kind for c in found.checks].count("relearning") == 2
    assert found.verdict == "suppressed"
    assert "came back by: relearning, 4 steps" in found.statement
    assert set(found.curves) == {"unlearned", "retrained"}
    assert found.relearning is not None
    assert found.samples == 16


def test_a_retrained_model_shows_no_trace(world):
    found = prepared(world, world[2], lr=0.01, relearn_steps=3, margin=0.3)
    assert [c.kind for c in found.checks] == [
        "as it is",
        "relearning",
        "probe",
        "probe",
        "quantisation",
        "quantisation",
    ]
    assert found.verdict in ("no trace found", "undecided")
    assert all(c.verdict != "returned" for c in found.checks)
    known = prepared(world, world[0], relearn_steps=1)
    assert known.verdict == "not forgotten"
    assert known["8 bits"].verdict == "returned"
    for text in (str(known), known._repr_html_(), known.statement):
        assert "Not forgotten" in text
    assert repr(known).startswith("RemovalReport(not forgotten: ")
    assert json.loads(known.to_json())["verdict"] == "not forgotten"
    assert len(known.table()) == len(known.checks) == len(known.plot().get_yticks())


class Scores(torch.nn.Module):
    """Logits from one weight matrix."""

    def __init__(self, rows):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(rows))

    def forward(self, x):
        return x @ self.weight.T


def test_quantisation_undoes_a_small_edit():
    """An edit below half a step of four bits: 0.52 and 0.56 become 4/7 and 4/7 · 0.9."""
    unlearned, retrained = Scores([[0.52, 1.0], [0.56, 0.9]]), Scores([[0.10, 1.0], [0.80, 0.9]])
    x, y = torch.tensor([[1.0, 0.0]]).repeat(60, 1), torch.zeros(60, dtype=torch.long)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    found = removal_report(unlearned, retrained, forget=batches, lr=1e-6, relearn_steps=1)
    assert [found[n].unlearned for n in ("as it is", "8 bits", "4 bits")] == [0, 0, 1]
    assert [found[n].verdict for n in ("as it is", "8 bits", "4 bits")] == ["not returned", "not returned", "returned"]
    assert found.verdict == "suppressed"


def test_prompts_and_own_scores():
    """A model that answers only where a prefix (the third feature) is given."""
    unlearned, retrained = Scores([[0.0, 1.0, 5.0], [1.0, 1.0, 0.0]]), Scores([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    x, y = torch.tensor([[1.0, 0.0, 0.0]]).repeat(80, 1), torch.zeros(80, dtype=torch.long)
    asked = [{"x": x[:20], "y": y[:20]}, {"x": x[20:], "y": y[20:]}]
    prefix = [{"x": x + torch.tensor([0.0, 0.0, 1.0]), "y": y}]
    same = [{"x": x + torch.tensor([0.0, 1.0, 0.0]), "y": y}]

    def knows(model, batch):
        return model(batch["x"]).softmax(-1).gather(1, batch["y"][:, None])[:, 0]

    found = removal_report(
        unlearned, retrained, forget=asked, knows=knows, bits=(), prompts={"prefix": prefix, "paraphrase": same},
        loss=lambda model, b: -knows(model, b).log().mean(), lr=1e-6, relearn_steps=1,
    )  # fmt: skip
    assert found["prefix"].verdict == "returned"
    assert found["paraphrase"].verdict == "not returned"
    assert found["prefix"].unlearned == pytest.approx(1 / (1 + np.exp(-4)), rel=1e-5)


def test_few_examples_are_undecided():
    model = Scores([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([0, 1, 0, 1])
    found = removal_report(model, Scores([[1.0, 0.0], [2.0, 0.5]]), forget=[(x, y), (x, y)], lr=1e-6, relearn_steps=1)
    assert found["as it is"].verdict in ("undecided", "returned")
    wide = removal_report(model, model, forget=[(x, y), (x, y)], lr=1e-6, relearn_steps=1, bits=())
    assert wide["as it is"].difference == 0


def test_quantisation_rounds_to_the_grid():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.LayerNorm(7))
    before = copy.deepcopy(model)
    assert quantized_(model, 4) is model
    w, old = model[0].weight.detach().double(), before[0].weight.detach().double()
    scale = old.abs().amax(dim=1, keepdim=True) / 7
    np.testing.assert_allclose((w / scale).numpy(), (old / scale).round().numpy(), atol=1e-5)
    assert (model[0].bias == before[0].bias).all()
    assert (model[1].weight == before[1].weight).all()
    grouped = quantized_(copy.deepcopy(before), 4, group=3)
    part = old[:, 3:6]
    scale = part.abs().amax(dim=1, keepdim=True) / 7
    np.testing.assert_allclose(grouped[0].weight.detach().double()[:, 3:6], (part / scale).round() * scale, atol=1e-6)
    bad = copy.deepcopy(before)
    with torch.no_grad():
        bad[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        quantized_(bad, 4)
    for bits in (1, 17, 4.5, True):
        with pytest.raises(ArgumentError, match="bits"):
            quantized_(model, bits)
    with pytest.raises(ArgumentError, match="group"):
        quantized_(model, 4, group=0)


def test_the_probe_reads_what_is_linear_and_nothing_else():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = rng.standard_normal((300, 8))
    assert abs(linear_probe(x, y).mean() - 1 / 3) < 0.1
    x[:, 2] += 4 * (y == 1)
    x[:, 5] += 4 * (y == 2)
    assert linear_probe(x, y).mean() > 0.9
    wide = np.concatenate([x, rng.standard_normal((300, 500))], axis=1)
    assert linear_probe(wide, y, ridge=100.0).mean() > 0.6
    with pytest.raises(DegenerateError, match="two classes"):
        linear_probe(x, np.zeros(300, dtype=int))
    with pytest.raises(NonFiniteError):
        linear_probe(np.where(x > 3, np.nan, x), y)
    for options in ({"folds": 1}, {"ridge": 0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            linear_probe(x, y, **options)
    with pytest.raises(ShapeError):
        linear_probe(x[:, 0], y)


def test_bad_input(world):
    original, retrained, _, _, batches = world
    call = lambda **options: removal_report(original, retrained, **({"forget": batches} | options))  # noqa: E731
    with pytest.raises(DegenerateError, match="at least one batch"):
        call(forget=[])
    with pytest.raises(DegenerateError, match="another one"):
        call(forget=batches[:1])
    for options in ({"margin": -1}, {"relearn_steps": 0}, {"bits": (1,)}, {"layers": ["none"]}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            call(**options)
    with pytest.raises(DTypeError, match="retrained"):
        removal_report(original, None, forget=batches)
    with pytest.raises(DegenerateError, match="prompts: 'prefix'"):
        call(prompts={"prefix": []}, relearn_steps=1)
    with pytest.raises(ShapeError, match="knows"):
        call(knows=lambda m, b: torch.ones(2, 2))
    with pytest.raises(NonFiniteError, match="knows"):
        call(knows=lambda m, b: torch.full((len(b[1]),), float("nan")))
    with pytest.raises(ArgumentError, match="knows"):
        call(knows=lambda m, b: torch.full((len(b[1]),), 2.0))
    with pytest.raises(NonFiniteError, match="loss"):
        call(loss=lambda m, b: m(b[0]).sum() * float("nan"))
    with pytest.raises(ArgumentError, match="name"):
        call(relearn_steps=1, bits=())["other"]
