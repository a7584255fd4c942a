"""Worst-case forget sets: the projection against a quadratic programme, the vectors, the loop, and its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from abjure.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import SignUnlearning, worst_case_forget_set
from abjure.forget.worst_case import project_capped_simplex, top_m

pytestmark = pytest.mark.usefixtures("one_thread")


def test_projection_vector():
    w = project_capped_simplex([0.9, -0.3, 0.4, 1.7, 0], 2)
    np.testing.assert_allclose(w, [0.75, 0, 0.25, 1, 0], rtol=0, atol=1e-15)


def test_one_step_vector():
    """w0 = (1, 0, 0, 1, 0), eta = .5, gamma = 0."""
    a = np.array([1, 0, 0, 1, 0]) - 0.5 * np.array([0.1, 2, 0.5, 0.05, 1])
    np.testing.assert_allclose(a, [0.95, -1, -0.25, 0.975, -0.5])
    w = project_capped_simplex(a, 2)
    np.testing.assert_array_equal(w, [1, 0, 0, 1, 0])
    assert top_m(w, 2).tolist() == [0, 3]


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.data())
def test_projection_satisfies_the_optimality_conditions(values, data):
    a = np.array(values)
    m = data.draw(st.one_of(st.integers(0, len(a)), st.floats(0, len(a))))
    w = project_capped_simplex(a, m)
    assert w.min() >= 0
    assert w.max() <= 1
    assert w.sum() == pytest.approx(m, abs=1e-12)
    # Nearest point: moving mass from i to j never helps, where i may give and j may take.
    gain = a - w
    give, take = w > 0, w < 1
    if give.any() and take.any():
        assert gain[take].max() <= gain[give].min() + 1e-12


def test_projection_of_many_keeps_the_sum():
    a = np.random.default_rng(0).normal(size=200_000)
    assert abs(project_capped_simplex(a, 1234).sum() - 1234) < 1e-8


def test_ties_go_to_the_lower_index():
    assert top_m([0.5, 1, 0.5, 0.5], 2).tolist() == [0, 1]


def test_the_loop_follows_the_plain_form():
    """Losses that depend on the weights, beside the steps written out with a bisection."""
    draw = np.random.default_rng(3)
    base, mix = draw.random(8), draw.random((8, 8))
    state = {}
    seen = []

    def unlearn(w):
        seen.append(w)
        state["w"] = w

    def losses():
        return torch.tensor(base + mix @ (1 - state["w"]))

    found = worst_case_forget_set(unlearn, losses, 8, 3, outer=5, w_lr=0.2, gamma=0.1, binarize_every=2, seed=4)
    w = np.zeros(8)
    w[np.random.default_rng(4).permutation(8)[:3]] = 1
    for step in range(1, 6):
        np.testing.assert_allclose(seen[step - 1], w, atol=1e-12)
        ell = base + mix @ (1 - w)
        assert found.objective[step - 1] == pytest.approx(w @ ell + 0.1 * w @ w)
        a = w - 0.2 * (ell + 0.2 * w)
        low, high = a.min() - 1, a.max()
        for _ in range(200):
            mu = (low + high) / 2
            low, high = (mu, high) if np.clip(a - mu, 0, 1).sum() > 3 else (low, mu)
        w = np.clip(a - low, 0, 1)
        assert found.steps[step - 1].tolist() == sorted(np.argsort(-w, kind="stable")[:3])
        if step % 2 == 0:
            w = np.isin(np.arange(8), np.argsort(-w, kind="stable")[:3]).astype(float)
    np.testing.assert_allclose(found.weights, w, atol=1e-12)
    assert found.indices.tolist() == found.steps[-1].tolist() == found.samples.tolist()
    assert "hardest 3 of 8 samples after 5 outer steps" in str(found)
    assert found._repr_html_().count("<tr>") == 6
    assert len(found.plot().lines[0].get_xdata()) == 5


def test_fixed_losses_give_the_smallest_or_largest_and_groups_sum():
    ell = np.array([3, 1, 2, 5, 4, 0.5])

    def run(**more):
        return worst_case_forget_set(lambda w: None, lambda: ell, 6, 2, outer=40, w_lr=0.1, **more)

    assert run().indices.tolist() == [1, 5]
    assert run(direction="easiest").indices.tolist() == [3, 4]
    grouped = run(groups=torch.tensor([0, 1, 2, 2, 1, 0]))  # sums 3.5, 5, 7
    assert grouped.indices.tolist() == [0, 1]
    assert grouped.samples.tolist() == [0, 1, 4, 5]


def test_bad_input():
    def run(n=6, m=2, losses=lambda: np.ones(6), **more):
        return worst_case_forget_set(lambda w: None, losses, n, m, **more)

    for m in (-1, 7, 2.0):
        with pytest.raises(ArgumentError, match=r"m: expected an integer in \[0, 6\]"):
            run(m=m)
    with pytest.raises(ArgumentError, match=r"m: expected an integer in \[0, 2\], got 3"):
        run(m=3, groups=[0, 0, 1, 1, 0, 0])
    with pytest.raises(ArgumentError, match="got no member of 1"):
        run(groups=[0, 0, 2, 2, 0, 0])
    with pytest.raises(ShapeError, match=r"groups: .*shape \(6,\), got \(2,\)"):
        run(groups=[0, 1])
    with pytest.raises(DTypeError, match="groups: expected integers"):
        run(groups=np.ones(6))
    with pytest.raises(ArgumentError, match="outer: expected an integer of 1 or more"):
        run(outer=0)
    with pytest.raises(ArgumentError, match="w_lr, gamma"):
        run(w_lr=float("nan"))
    with pytest.raises(ArgumentError, match="direction: expected"):
        run(direction="hard")
    with pytest.raises(ShapeError, match=r"losses: outer step 1: expected shape \(6,\), got \(5,\)"):
        run(losses=lambda: np.ones(5))
    with pytest.raises(NonFiniteError, match=r"losses: outer step 1: .*got nan for sample 4"):
        run(losses=lambda: np.array([1, 1, 1, 1, np.nan, 1]))
    with pytest.raises(ArgumentError, match=r"m: expected a number in \[0, 2\], got 3"):
        project_capped_simplex([1, 2], 3)
    with pytest.raises(NonFiniteError, match="a: expected finite"):
        project_capped_simplex([1, np.nan], 1)
    net = nn.Linear(2, 2)
    with pytest.raises(ShapeError, match="x, y: expected the same number of rows, above 0, got 0 and 0"):
        SignUnlearning(net, torch.empty(0, 2), torch.empty(0).long())
    with pytest.raises(ArgumentError, match="lr, epochs, batch_size"):
        SignUnlearning(net, torch.ones(1, 2), torch.zeros(1).long(), lr=0)
    lower = SignUnlearning(net, torch.full((1, 2), torch.nan), torch.zeros(1).long())
    with pytest.raises(NonFiniteError, match="loss: expected finite losses while unlearning"):
        lower.unlearn(np.zeros(1))
    with pytest.raises(ArgumentError, match="w: expected 1 weights in"):
        lower.unlearn(np.array([1.5]))


def test_sign_unlearning_is_the_plain_step_and_spares_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    x, y = torch.randn(10, 3), torch.randint(0, 2, (10,))
    w = np.linspace(0, 1, 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lower = SignUnlearning(model, x, y, lr=0.05, epochs=1, batch_size=10)
    for _ in range(2):  # the second call starts from the original again
        lower.unlearn(w)
    expected = {k: v.clone() for k, v in before.items()}
    twin = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    twin.load_state_dict(before)
    (torch.tensor(1 - w).float() * nn.functional.cross_entropy(twin(x), y, reduction="none")).sum().backward()
    for name, p in twin.named_parameters():
        expected[name] = p.detach() - 0.05 * p.grad.sign()
    for name, value in lower.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        assert torch.equal(model.state_dict()[name], before[name])
    assert all(m.training for m in model.modules())
    twin.load_state_dict(expected)
    with torch.no_grad():
        np.testing.assert_allclose(lower.losses(), nn.functional.cross_entropy(twin(x), y, reduction="none"), rtol=1e-5)


@pytest.mark.effect
def test_the_worst_case_of_the_digits_is_harder_to_unlearn_than_a_random_set():
    """After retraining without them, the selected samples are still classified; random and easiest ones less so."""
    from abjure.demo import digits

    with digits.one_thread():
        x, y = digits.digits()
        x, y = x[:800], y[:800]
        model = digits.train(x, y, 0, epochs=6)
        lower = SignUnlearning(model, x, y, lr=1e-3, epochs=1)

        def select(direction):
            return worst_case_forget_set(
                lower.unlearn, lower.losses, 800, 80, outer=4, w_lr=0.5, direction=direction
            ).indices

        def loss_without(chosen):
            kept = np.setdiff1d(np.arange(800), chosen)
            fresh = digits.train(x[kept], y[kept], 1, epochs=6)
            with torch.no_grad():
                return float(nn.functional.cross_entropy(fresh(x[chosen]), y[chosen]))

        hard, easy = loss_without(select("hardest")), loss_without(select("easiest"))
        random = loss_without(np.random.default_rng(0).permutation(800)[:80])
    assert hard < 0.75 * random
    assert easy > 1.5 * random
