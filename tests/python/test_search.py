"""The search over alpha and lambda, and Potion's search of a share: points, restoration, choice, refusals."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import abjure
from abjure import forget as forgetting
from abjure.forget import Fisher, adaptive_alpha, dampen_, potion_, search_dampening


def tensors(seed=0, n=5000):
    rng = np.random.default_rng(seed)
    w = {k: rng.normal(size=(n // 50, 50)).astype(np.float32) for k in ("a", "b")}
    f, d = ({k: rng.random(v.shape).astype(np.float32) for k, v in w.items()} for _ in range(2))
    return w, f, d


def bits(w):
    return {k: v.tobytes() for k, v in w.items()}


def norms(w):
    """Something to score: falls on one side as more is dampened, and on the other too."""
    return float(np.abs(w["a"]).mean()), float(np.abs(w["b"]).mean())


def test_every_point_is_that_pair_applied_to_the_original():
    w, f, d = tensors()
    before = bits(w)
    calls = []

    def evaluate(w):
        calls.append(bits(w))
        a, b = norms(w)
        return {"forget": a, "retain": b, "sum": a + b}

    alphas, lams = (8.0, 0.5, 2.0, 1e9), (0.5, 1.5)
    found = search_dampening(w, f, d, evaluate, alphas, lams, progress=False)
    assert bits(w) == before
    assert calls[0] == before
    assert (found.before.forget, found.before.retain) == norms(w)
    assert [(p.alpha, p.lam) for p in found.points] == [(a, v) for a in alphas for v in lams]
    for p in found.points:
        fresh = {k: v.copy() for k, v in w.items()}
        report = dampen_(fresh, f, d, p.alpha, p.lam)
        assert (p.selected, p.changed, p.zeroed) == report.total
        assert (p.forget, p.retain) == norms(fresh)
        assert p.extra == {"sum": p.forget + p.retain}
        assert p.ratio == p.lam / p.alpha
    # The original once, and every distinct model once: alpha = 1e9 selects nothing.
    assert len(calls) == 1 + 6
    assert len({str(c) for c in calls}) == 7


def test_ratios_stand_for_lambda_over_alpha_and_patterns_hold():
    w, f, d = tensors(1)
    found = search_dampening(w, f, d, norms, (1.0, 4.0), ratios=(0.1, 1.0), include="a", progress=False)
    assert [(p.alpha, p.lam) for p in found.points] == [(1, 0.1), (1, 1), (4, 0.4), (4, 4)]
    assert {p.retain for p in found.points} == {found.before.retain}
    assert all(p.forget < found.before.forget for p in found.points)


def test_equal_selections_are_evaluated_once():
    w, f, d = tensors(2)
    calls = []

    def evaluate(w):
        calls.append(1)
        return norms(w)

    # No ratio lies between the two, so they select the same weights.
    ratios = np.sort((f["a"] / d["a"]).ravel())
    low, high = 0.75 * ratios[-2] + 0.25 * ratios[-1], 0.25 * ratios[-2] + 0.75 * ratios[-1]
    found = search_dampening(w, f, d, evaluate, (float(low), float(high)), include="a", progress=False)
    assert len(calls) == 2
    assert found.points[0].forget == found.points[1].forget
    assert found.points[0].selected == found.points[1].selected == 1
    assert found.points[1].alpha == float(high)


def test_curve_best_and_what_is_shown():
    import matplotlib

    matplotlib.use("Agg")
    w, f, d = tensors(3)
    scores = iter([(1.0, 0.9), (0.1, 0.5), (0.2, 0.8), (0.3, 0.7), (0.9, 0.89)])
    found = search_dampening(w, f, d, lambda _: next(scores), (1, 2, 4, 8), progress=False)
    assert [p.alpha for p in found.curve] == [8, 2, 1]
    assert found.best().alpha == 2
    assert found.best(retain_at_least=0.85).alpha == 8
    assert found.best(forget_at_most=0.15).alpha == 1
    assert found.best(lambda p: -p.forget).alpha == 1
    with pytest.raises(abjure.ArgumentError, match="forget_at_most"):
        found.best(forget_at_most=0.05)
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert lines[1].endswith("before")
    assert lines[3].endswith("best")
    assert [line.endswith("curve") for line in lines] == [False, False, True, False, False, True]
    assert found._repr_html_().count("<tr>") == 6
    assert found.plot().get_xlabel() == "score on the forget set"


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_error_in_the_middle_restores_the_model(error):
    w, f, d = tensors(4)
    before = bits(w)
    calls = []

    def evaluate(w):
        calls.append(bits(w))
        if len(calls) == 3:
            raise error
        return norms(w)

    with pytest.raises(error):
        search_dampening(w, f, d, evaluate, (1.0, 2.0, 4.0), progress=False)
    assert calls[2] != before
    assert bits(w) == before
    calls.clear()
    with pytest.raises(error):
        potion_(w, f, d, lambda w: evaluate(w)[0], 0.0, start=1e-3, progress=False)
    assert bits(w) == before


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"alphas": []}, abjure.ArgumentError, "alphas"),
        ({"alphas": [-1.0]}, abjure.ArgumentError, "alphas"),
        ({"lams": [np.inf]}, abjure.ArgumentError, "lams"),
        ({"lams": [1.0], "ratios": [1.0]}, abjure.ArgumentError, "lams, ratios"),
        ({"include": "c*"}, abjure.ArgumentError, "include"),
        ({"retain": None}, abjure.ArgumentError, "retain, full"),
        ({"evaluate": lambda w: 3.0}, abjure.DTypeError, "evaluate"),
        ({"evaluate": lambda w: {"forget": 1.0}}, abjure.ArgumentError, "'retain'"),
        ({"evaluate": lambda w: (1.0, float("nan"))}, abjure.NonFiniteError, "evaluate"),
    ],
)
def test_bad_input(change, error, match):
    w, f, d = tensors(5)
    before = bits(w)
    arguments = {"model": w, "forget": f, "retain": d, "evaluate": norms, "progress": False} | change
    with pytest.raises(error, match=match):
        search_dampening(**arguments)
    assert bits(w) == before


# Potion


def test_the_share_grows_until_the_flagged_samples_are_forgotten():
    w, f, d = tensors(6)
    original = {k: v.copy() for k, v in w.items()}
    before = bits(w)

    def accuracy(w):
        return float(np.abs(w["a"]).sum())

    goal = 0.9
    found = potion_(w, f, d, accuracy, goal, forget_size=50, total_size=1000, progress=False)
    assert found.reached
    shares = [s.share for s in found.steps]
    assert shares[0] == pytest.approx(0.05 / 25)
    assert np.allclose(np.diff(np.log(shares)), np.log(1.1))
    for s in found.steps:
        alpha = adaptive_alpha(f, d, share=s.share)
        assert (s.alpha, s.percentile) == (alpha.value, alpha.percentile)
        fresh = {k: v.copy() for k, v in original.items()}
        assert dampen_(fresh, f, d, alpha).total.count == s.selected
        assert accuracy(fresh) == s.accuracy
    # It stopped at the first share that is enough, and that one is in the model.
    assert [s.accuracy <= goal * found.before for s in found.steps] == [False] * (len(shares) - 1) + [True]
    assert bits(w) == bits(fresh)
    assert "reached after" in str(found)
    assert found._repr_html_().count("<tr>") == len(shares) + 1
    found.undo(w)
    assert bits(w) == before
    kept = potion_(w, f, d, accuracy, goal, forget_size=50, total_size=1000, undo=False, progress=False)
    assert kept.report.patch is None
    assert bits(w) == bits(fresh)


def test_no_share_is_enough():
    w, f, d = tensors(7)
    before = bits(w)
    with pytest.warns(UserWarning, match="as it was"):
        found = potion_(w, f, d, lambda _: 1.0, 0.5, start=0.01, tries=4, progress=False)
    assert not found.reached
    assert len(found.steps) == 4
    assert "not reached" in str(found)
    found.undo(w)
    assert bits(w) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rho": 1.5}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"growth": 1.0}, "growth"),
        ({"tries": 0}, "tries"),
        ({"start": None}, "forget_size"),
        ({"start": -1.0}, "start"),
        ({"forget_size": 3}, "start"),
        ({"lam": -1.0}, "lam"),
        ({"retain": {k: np.zeros((100, 50), np.float32) for k in "ab"}}, "0 everywhere"),
    ],
)
def test_potion_refuses(change, match):
    w, f, d = tensors(8)
    before = bits(w)
    arguments = {
        "model": w, "forget": f, "retain": d, "accuracy": lambda _: 1.0, "rho": 0.5, "start": 0.01, "progress": False
    } | change  # fmt: skip
    with pytest.raises(abjure.ArgumentError, match=match):
        potion_(**arguments)
    assert bits(w) == before


@pytest.mark.effect
def test_potion_unlearns_a_trigger_of_which_a_part_is_known():
    """Two Gaussian classes; a poisoned input feature forces class 0. A third of the poisoned samples is flagged."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        g = torch.Generator().manual_seed(0)
        y = torch.randint(0, 2, (900,), generator=g)
        x = torch.randn(900, 12, generator=g) + 1.5 * torch.where(y == 0, -1.0, 1.0)[:, None] * (torch.arange(12) < 6)
        x[:, 11] = 0.0
        x[:90, 11], y[:90] = 4.0, 0
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        for _ in range(300):
            loss = functional.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, grad in zip(model.parameters(), gradients, strict=True):
                    p -= 0.3 * grad

        def measured(rows):
            fisher = Fisher("sample", power=1)
            for i in rows:
                norm = model(x[i]).norm()
                gradients = torch.autograd.grad(norm, list(model.parameters()))
                fisher.update(dict(zip(dict(model.named_parameters()), gradients, strict=True)))
            return fisher

        def triggered(model):
            """Share of class 1 that the trigger still turns into class 0."""
            with torch.no_grad():
                clean = x[90:][y[90:] == 1].clone()
                right = float((model(clean).argmax(1) == 1).float().mean())
                clean[:, 11] = 4.0
                return float((model(clean).argmax(1) == 0).float().mean()), right

        before = triggered(model)
        assert min(before) > 0.8

        def accuracy(model):
            with torch.no_grad():
                return float((model(x[:30]).argmax(1) == y[:30]).float().mean())

        found = potion_(
            model, measured(range(30)), measured(range(30, 400)), accuracy, 0.6,
            forget_size=30, total_size=900, progress=False,
        )  # fmt: skip
        assert found.reached
        after = triggered(model)
        assert after[0] < before[0] - 0.3
        assert after[1] > 0.8
    finally:
        torch.set_num_threads(threads)


def test_names_are_public():
    for name in ("search_dampening", "potion_", "jit_", "adaptive_alpha", "DampenPatch"):
        assert name in forgetting.__all__
