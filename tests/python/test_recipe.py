"""Scores, calibration for three decoders, recipes and trade-off curves, against definitions and reference vectors."""

from __future__ import annotations

import json
import math
import time
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import _native, refuse
from abjure.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.measure import rate
from abjure.refuse import CategoryScores, Recipe, RefusalTokens, calibrate
from abjure.refuse.bounds import share_thresholds

NAMES = ("a", "b", "c")
GROUPS = {"a": [3], "b": [7, 11], "c": [20]}


def logits(seed: int, n: int, vocab: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, vocab)).astype(np.float32) * 3


def made(seed: int = 0, n: int = 400, temperature: float = 1.0) -> tuple[np.ndarray, RefusalTokens, CategoryScores]:
    """Logits in which the prompts of a category raise it by 5, and their scores."""
    z = logits(seed, n)
    wanted = np.random.default_rng(seed + 1).integers(-1, 3, n)
    for k, ids in enumerate(GROUPS.values()):
        z[np.ix_(wanted == k, ids)] += 5
    tokens = RefusalTokens(GROUPS, temperature=temperature)
    return z, tokens, CategoryScores.from_logits(z, tokens, wanted)


def served(recipe: Recipe, z: np.ndarray, tokens: RefusalTokens, seed: int = 1) -> np.ndarray:
    """Category of each prompt's first token when the recipe's processor has written into its logits."""
    written = z.astype(np.float64)
    processor = recipe.processor(tokens, prompt_length=2)
    processor(np.zeros((len(z), 2), dtype=np.int64), written)
    owner = {i: k for k, ids in enumerate(GROUPS.values()) for i in ids}
    if recipe.decoder == "gate":
        return processor.verdicts
    if recipe.decoder == "greedy":
        return np.array([owner.get(int(i), -1) for i in written.argmax(axis=1)])
    p = np.exp(written / recipe.temperature - (written / recipe.temperature).max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.stack([p[:, ids].sum(axis=1) for ids in GROUPS.values()], axis=1)


# ---- scores


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_scores_equal_their_definitions(temperature):
    z, tokens, scores = made(3, 50, temperature)
    wide = z.astype(np.float64)
    p = np.exp(wide / temperature)
    p /= p.sum(axis=1, keepdims=True)
    inside = [i for ids in GROUPS.values() for i in ids]
    rest = np.delete(wide, inside, axis=1)
    own = np.stack([p[:, ids].sum(axis=1) for ids in GROUPS.values()], axis=1)
    np.testing.assert_allclose(scores.margins, np.log(own / (1 - own)), rtol=1e-10)
    np.testing.assert_allclose(np.exp(scores.log_p[1:].T), own, rtol=1e-10)
    np.testing.assert_allclose(np.exp(scores.log_p[0]), 1 - own.sum(axis=1), rtol=1e-9)
    q = own.sum(axis=1)
    np.testing.assert_allclose(scores.mass, np.log(q / (1 - q)), rtol=1e-10, atol=1e-12)
    leads = np.stack([wide[:, ids].max(axis=1) for ids in GROUPS.values()], axis=1) - rest.max(axis=1)[:, None]
    np.testing.assert_allclose(scores.leads, leads, rtol=1e-13, atol=1e-13)
    assert np.array_equal(scores.margins, np.asarray(tokens.margins(z)))
    other = CategoryScores.from_margins(scores.margins, NAMES, scores.wanted, temperature=temperature)
    np.testing.assert_allclose(other.mass, scores.mass, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(other.log_p, scores.log_p, rtol=1e-8, atol=1e-10)


def test_scores_without_refusal_or_without_anything_else():
    z = np.zeros((2, 4))
    z[0, :2] = -math.inf
    z[1, 2:] = -math.inf
    scores = CategoryScores.from_logits(z, RefusalTokens({"a": 0, "b": 1}))
    assert scores.mass.tolist() == [-math.inf, math.inf]
    np.testing.assert_allclose(np.exp(scores.log_p[1:].T), [[0, 0], [0.5, 0.5]])
    assert scores.leads.tolist() == [[-math.inf] * 2, [math.inf] * 2]
    np.testing.assert_allclose(scores.tilted([2.0, 2.0]), [[0, 0], [0.5, 0.5]], rtol=1e-15)


def test_bad_scores():
    tokens = RefusalTokens({"a": 0, "b": 1})
    z = np.zeros((3, 4))
    for args, error in (
        ((z[0],), ShapeError),
        ((z, ["a"]), ShapeError),
        ((z, ["a", "x", None]), ArgumentError),
        ((z, [0, 2, -1]), ArgumentError),
        ((z, np.array([0, 1, 5])), ArgumentError),
        ((np.full((1, 4), -math.inf),), DegenerateError),
        ((np.full((1, 4), math.nan),), NonFiniteError),
        ((np.zeros((1, 1)),), ArgumentError),
    ):
        with pytest.raises(error):
            CategoryScores.from_logits(args[0], tokens, *args[1:])
    with pytest.raises(ShapeError, match="clusters"):
        CategoryScores.from_logits(z, tokens, clusters=[1])
    for m, error in (([[3.0, 3.0]], DegenerateError), ([math.nan], NonFiniteError), ([], ShapeError)):
        with pytest.raises(error):
            CategoryScores.from_margins(m)
    scores = CategoryScores.from_margins([0.0, 1.0])
    with pytest.raises(ArgumentError, match="leads"):
        calibrate(scores, decoder="greedy", target_rate=0.5)
    with pytest.raises(ShapeError):
        scores.select(np.array([False, False]))


# ---- decisions equal what is served


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("decoder", ["gate", "greedy", "sampling"])
@pytest.mark.parametrize("asked", [0.1, {"a": 0.05, "b": 0.2, "c": 0.1}])
@pytest.mark.parametrize("kind", ["target_rate", "max_over_refusal"])
def test_a_loaded_recipe_decides_as_the_processor_serves(tmp_path, decoder, asked, kind, temperature):
    if decoder == "greedy" and temperature != 1:
        pytest.skip("greedy decoding knows no temperature")
    _, tokens, scores = made(5, 600, temperature)
    recipe = calibrate(scores, tokens, decoder=decoder, **{kind: asked})
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded == recipe
    fresh, _, held_out = made(6, 300, temperature)
    got = served(loaded, fresh, tokens)
    if decoder == "sampling":
        np.testing.assert_allclose(got, held_out.tilted(recipe.values / temperature), rtol=1e-9, atol=1e-15)
        achieved = np.stack([(held_out.decide(recipe, seed=s) == 0).mean() for s in range(40)])
        assert abs(achieved.mean() - got[:, 0].mean()) < 0.01
    else:
        assert np.array_equal(got, held_out.decide(loaded))
    # On the calibration set the asked target is met to one prompt per category.
    if kind == "target_rate":
        wanted = list(asked.values()) if isinstance(asked, dict) else [asked]
        shares = list(recipe.calibration["achieved"].values())
        shares = [sum(shares)] if len(wanted) == 1 else shares
        assert shares == pytest.approx(wanted, abs=1e-8 if decoder == "sampling" else 1.01 / 600)


def test_mass_rule_serves_and_reaches_its_target():
    z, tokens, scores = made(7)
    recipe = calibrate(scores, tokens, target_rate=0.3, rule="mass")
    assert np.array_equal(served(recipe, z, tokens), scores.decide(recipe))
    assert scores.rates(recipe).all.rate == pytest.approx(0.3, abs=1 / 400)
    with pytest.raises(ArgumentError):
        calibrate(scores, decoder="greedy", target_rate=0.3, rule="mass")
    with pytest.raises(ArgumentError):
        calibrate(scores, target_rate=0.3, rule="mass", shifts=[1, 0, 0])


def test_statistics_of_the_decoders_are_not_interchangeable():
    """Vector C: the token is the largest with a probability of .1986."""
    z = np.array([[2, 1.9, 1.8, 1.7, 1.75, 2.05]])
    scores = CategoryScores.from_logits(z, RefusalTokens({"r": 5}))
    assert scores.statistic("greedy")[0] == pytest.approx(0.05, abs=1e-12)
    assert scores.statistic("gate")[0] == pytest.approx(-1.3953146790504234, rel=1e-14)
    gate = Recipe("gate", ("r",), ("0",))
    greedy = Recipe("greedy", ("r",), ("0",))
    assert scores.decide(gate).tolist() == [-1]
    assert scores.decide(greedy).tolist() == [0]
    assert scores.tilted([0.0])[0, 0] == pytest.approx(0.19856065389843847, rel=1e-14)


def test_vector_b_tilts_two_categories():
    z = np.array([[1.5, 0.5, -0.25, 0.75, -1.0, 0.0]])
    scores = CategoryScores.from_logits(z, RefusalTokens({"a": 2, "b": 5}))
    assert scores.mass[0] == pytest.approx(-1.5775990884003144, rel=1e-14)
    assert scores.tilted([0.8, -0.4])[0] == pytest.approx([0.15729871942872173, 0.060833867739946285], rel=1e-14)
    recipe = calibrate(scores, decoder="sampling", target_rate={"a": 0.2, "b": 0.1})
    assert recipe.values == pytest.approx([1.1507755397837902, 0.20762835922384482], rel=1e-12)


def test_vector_f_value_rates_and_joint_bias():
    p = np.array([(0.30, 0.10), (0.05, 0.40), (0.02, 0.01), (0.10, 0.10), (0.50, 0.20), (0.01, 0.03)])
    scores = CategoryScores.from_margins(np.log(p / (1 - p)), ["a", "b"])
    recipe = calibrate(scores, decoder="sampling", target_rate={"b": 0.15, "a": 0.25})
    b = recipe.values
    assert b == pytest.approx([0.830518733296842, 0.34966745692686707], rel=1e-12)
    value, rates, _ = _native.tilted(scores.log_p.reshape(-1), 6, b, 1.0)
    assert value - b @ [0.25, 0.15] == pytest.approx(-0.03871020804815964, rel=1e-12)
    assert rates == pytest.approx([0.25, 0.15], rel=1e-12)


def test_vector_h_union_ladder():
    m = [(-1.2, -3), (0.1, -2.2), (-2, 0.4), (-3.1, -1), (1.4, -0.2)]
    scores = CategoryScores(("a", "b"), np.array(m), np.zeros(5), np.zeros((3, 5)), None, np.full(5, -1))
    s = scores.statistic("gate", [0.5, -0.5])
    assert s == pytest.approx([-1.7, -0.4, 0.9, -0.5, 0.9])
    recipe = Recipe("gate", ("a", "b"), ("-2.5", "-3.5"))
    assert scores.decide(recipe).tolist() == [0, 0, 1, 1, 0]


# ---- bounds


@pytest.mark.parametrize("decoder", ["gate", "greedy", "sampling"])
@pytest.mark.parametrize("delta", [None, 0.1])
def test_bounds_hold_in_simulation(decoder, delta):
    """Conformal: at the next prompt on average; PAC: in all but delta of the data sets."""
    rng = np.random.default_rng(0)
    n, alpha, fresh = 100, 0.1, 4000
    over, broken = [], 0
    for i in range(120):
        odds = rng.normal(-4, 2, size=(n + fresh, 2))
        scores = CategoryScores.from_margins(odds - np.log1p(np.exp(odds[:, ::-1])), ["a", "b"], leads=odds)
        recipe = calibrate(
            scores.select(np.arange(n)), decoder=decoder, max_over_refusal=alpha, delta=delta, shifts=[0.5, 0], seed=i
        )
        over.append(scores.select(np.arange(n, n + fresh)).rates(recipe, seed=1000 + i).over_refusal.rate)
        broken += over[-1] > alpha
    if delta is None:
        # Between alpha - 1/(n+1) and alpha; the standard error of the mean of 120 is .003.
        assert alpha - 1 / (n + 1) - 0.01 < np.mean(over) < alpha + 0.01
    else:
        # Exact chance at n = 100: e* = 5, BinomCDF = .0576.
        assert broken / 120 < 0.13
        assert np.mean(over) > 0.03


def test_bonferroni_bounds_each_category():
    _, tokens, scores = made(11, 3000)
    recipe = calibrate(scores, tokens, max_over_refusal={"a": 0.02, "b": 0.05, "c": 0.1}, delta=0.06)
    for k, t in enumerate(recipe.claim["thresholds"]):
        alone = refuse.calibrate_threshold(scores.benign(scores.margins[:, k]), t["alpha"], 0.02)
        assert (t["decimal"], t["rank"]) == (alone.decimal, alone.rank)
    assert [t["alpha"] for t in recipe.claim["thresholds"]] == [0.02, 0.05, 0.1]


def test_too_few_prompts_never_refuse_and_say_how_many_are_needed():
    scores = CategoryScores.from_margins(np.linspace(-5, 5, 30), leads=np.linspace(-5, 5, 30))
    for decoder, decimal in (("gate", "inf"), ("greedy", "-inf"), ("sampling", "-inf")):
        recipe = calibrate(scores, decoder=decoder, max_over_refusal=0.05, delta=0.05)
        assert recipe.decimals == (decimal,)
        assert "59 prompts are needed" in repr(recipe)
        assert scores.rates(recipe).all.k == 0
        z = np.zeros((2, 5))
        recipe.processor(RefusalTokens({"category 0": 2}), prompt_length=1)(np.zeros((2, 1), dtype=np.int64), z)
        assert z[0, 2] == (0 if decoder == "gate" else -math.inf)
    assert refuse.prompts_needed(0.05, 0.05) == 59
    assert [refuse.prompts_needed(a) for a in (0.05, 0.04)] == [19, 24]
    assert refuse.prompts_needed(0.05, 0.05, categories=3) == 80
    with pytest.raises(ArgumentError):
        refuse.prompts_needed(0.05, categories=0)


def test_a_bound_and_a_catch_rate_together_or_both_thresholds():
    benign, harmful = np.arange(-100.0, 0), np.arange(-2.0, 98)
    wanted = np.repeat([-1, 0], 100)
    scores = CategoryScores.from_margins(np.concatenate([benign, harmful]), ["r"], wanted)
    recipe = calibrate(scores, max_over_refusal=0.05, min_catch_rate=0.9, delta=0.1)
    found = scores.rates(recipe)
    assert found.over_refusal.rate <= 0.05
    assert found.caught["r"].rate >= 0.9
    with pytest.raises(DegenerateError, match="no threshold meets both") as err:
        calibrate(scores, max_over_refusal=0.01, min_catch_rate=0.995)
    assert "the gap is" in str(err.value)
    with pytest.raises(ArgumentError):
        calibrate(scores, target_rate=0.05, min_catch_rate=0.9)


def test_clusters_count_once_by_their_largest_score():
    m = np.array([-9.0, -1.0, -8.0, -2.0, -7.0, -3.0])
    scores = CategoryScores.from_margins(m, ["r"], clusters=["x", "x", "y", "y", "z", "z"])
    assert scores.benign(scores.mass).tolist() == [-1, -2, -3]
    recipe = calibrate(scores, max_over_refusal=0.5)
    assert recipe.claim["thresholds"][0]["n"] == 3
    assert recipe.calibration["compared"] == 3


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(8, 120), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_joint_shares_are_reached_up_to_ties(seed, k, n, strict, tied):
    rng = np.random.default_rng(seed)
    s = rng.normal(scale=3, size=(n, k)) + rng.normal(scale=2, size=k)
    if tied:
        s = np.round(s * 2) / 2
    rates = rng.dirichlet(np.ones(k + 1))[:k] * 0.9 + 0.01
    texts, shares = share_thresholds(s, rates, strict)
    t = np.array([float(x) for x in texts])
    excess = s - t
    top = excess.argmax(axis=1)
    fires = excess.max(axis=1) > 0 if strict else excess.max(axis=1) >= 0
    assert shares == pytest.approx([(fires & (top == j)).mean() for j in range(k)])
    if not tied:
        assert np.abs(shares * n - np.rint(rates * n)).max() <= 1


def test_options_that_do_not_go_together():
    _, tokens, scores = made(1, 50)
    for options in (
        {},
        {"target_rate": 0.1, "max_over_refusal": 0.1},
        {"target_rate": 0.0},
        {"target_rate": 1.5},
        {"max_over_refusal": math.nan},
        {"max_over_refusal": 0.1, "delta": 1.0},
        {"target_rate": {"a": 0.1}},
        {"target_rate": {"a": 0.5, "b": 0.3, "c": 0.2}},
        {"target_rate": 0.1, "decoder": "beam"},
        {"target_rate": 0.1, "rule": "argmax_then_threshold"},
        {"target_rate": 0.1, "shifts": [0.0]},
        {"target_rate": 0.1, "shifts": [0.0, math.nan, 0.0]},
        {"target_rate": {"a": 0.1, "b": 0.1, "c": 0.1}, "shifts": [0.0, 0.0, 0.0]},
        {"target_rate": 0.1, "on_no_fire": "respond"},
        {"max_over_refusal": 0.1, "decoder": "sampling", "seed": -1},
    ):
        with pytest.raises(ArgumentError):
            calibrate(scores, tokens, **options)
    with pytest.raises(ArgumentError, match="temperature"):
        calibrate(scores, RefusalTokens(GROUPS, temperature=2.0), target_rate=0.1)
    with pytest.raises(DegenerateError, match="to be answered"):
        calibrate(scores.select("a"), tokens, max_over_refusal=0.1)


# ---- recipes


def test_decimals_are_kept_as_written(tmp_path):
    path = tmp_path / "recipe.json"
    recipe = Recipe("gate", ("a", "b"), ("-3.410", "0.1000000000000000055511151231"), ids=((1,), (2,)))
    recipe.save(path)
    assert Recipe.load(path).decimals == recipe.decimals
    # Unquoted numbers keep their digits too.
    path.write_text(path.read_text().replace('"-3.410"', "-3.410"))
    assert Recipe.load(path).decimals == recipe.decimals
    assert Recipe.load(path).values.tolist() == [-3.41, 0.1]
    content = json.loads(path.read_text())
    for change in (
        {"format": "other"},
        {"decoder": "beam"},
        {"temperature": "0"},
        {"rule": "mass"},
        {"categories": []},
        {"categories": [{"name": "a"}]},
        {"categories": [{"name": "a", "threshold": "nan"}]},
        {"categories": [{"name": "a", "threshold": "1e-40"}]},
        {"categories": [{"name": "a", "threshold": "0,5"}]},
        {"on_no_fire": "stop"},
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises((ArgumentError, ShapeError)):
            Recipe.load(path)
    path.write_text("{")
    with pytest.raises(ArgumentError, match="not a saved recipe"):
        Recipe.load(path)
    with pytest.raises(ArgumentError, match="readable"):
        Recipe.load(tmp_path / "none.json")
    with pytest.raises(ArgumentError):
        Recipe("greedy", ("a",), ("inf",))


@given(st.floats(-200, 200), st.floats(0, 5))
@settings(max_examples=100, deadline=None)
def test_native_decimals(low, width):
    high = low + width
    if not low < high:
        return
    text = _native.shortest_margin(low, high)
    if text is None:
        assert abs(high) < 1e-10
    else:
        assert low < float(text) <= high
        assert _native.margin_value(text) == float(text)
        digits = [len(Decimal(t).normalize().as_tuple().digits) for t in (text, repr(high))]
        assert digits[0] <= digits[1]


def test_a_recipe_is_for_its_categories_and_temperature():
    _, tokens, scores = made(2, 100)
    _, hot, hot_scores = made(2, 100, 2.0)
    recipe = calibrate(scores, tokens, target_rate=0.2)
    with pytest.raises(ArgumentError, match="temperature"):
        hot_scores.decide(recipe)
    with pytest.raises(ArgumentError, match="categories"):
        CategoryScores.from_margins([0.0]).decide(recipe)
    with pytest.raises(ArgumentError, match="categories"):
        recipe.processor(RefusalTokens({"x": 1}))
    with pytest.raises(ArgumentError, match="ids"):
        calibrate(scores, target_rate=0.2).processor()
    assert calibrate(hot_scores, hot, target_rate=0.2).processor().temperature == 2.0
    sampled = calibrate(hot_scores, hot, decoder="sampling", target_rate=0.2).generation()
    assert {k: sampled[k] for k in ("do_sample", "temperature", "top_k", "top_p")} == {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    assert calibrate(scores, tokens, decoder="greedy", target_rate=0.2).generation()["do_sample"] is False
    assert "table" in recipe._repr_html_() + scores.rates(recipe)._repr_html_()
    assert "over-refusal" in repr(scores.rates(recipe))
    assert "400 prompts" not in repr(scores)


def test_drift_is_seen_and_equal_traffic_passes():
    _, tokens, scores = made(21, 2000)
    recipe = calibrate(scores, tokens, max_over_refusal=0.1)
    distance, chance = recipe.drift(made(22, 2000)[2])
    assert distance < chance < 0.2
    z, _, _ = made(23, 2000)
    z[:, 3] += 4
    moved, _ = recipe.drift(CategoryScores.from_logits(z, tokens))
    assert moved > chance
    assert recipe.drift(scores)[0] <= 1 / 500
    with pytest.raises(ArgumentError, match="quantiles"):
        Recipe("gate", NAMES, ("0",) * 3).drift(scores)


def test_a_million_scored_prompts_take_a_second():
    """The target is one second; this leaves room for a busy machine. `abjure bench` has the measured time."""
    m = np.random.default_rng(0).normal(-4, 2, size=1_000_000)
    scores = CategoryScores.from_margins(m)
    start = time.process_time()
    recipe = calibrate(scores, max_over_refusal=0.05, delta=0.05)
    assert time.process_time() - start < 5
    assert recipe.claim["thresholds"][0]["rank"] == 950_359


# ---- trade-off


@pytest.mark.parametrize("decoder", ["gate", "greedy", "sampling"])
def test_trade_off_equals_recipes_at_its_points(decoder):
    _, _, scores = made(31, 500)
    shifts = [0.5, 0.0, -0.25]
    curve = scores.trade_off(decoder, shifts=shifts, points=21)
    assert (np.diff(curve.thresholds) > 0).all()
    assert (np.diff(curve.over_refusal) <= 0).all()
    assert curve.catch_rate[-1] == 0 or decoder == "sampling"
    for i in (0, 5, 15, len(curve.thresholds) - 2):
        each = curve.thresholds[i] + np.array(shifts)
        # Just below the threshold, so that rounding of t + shift does not decide.
        recipe = Recipe(
            decoder, NAMES, tuple(repr(float(x)) for x in (each - 1e-9 if decoder == "gate" else 1e-9 - each))
        )
        rows = scores.rates(recipe)
        if decoder == "sampling":
            tilted = scores.tilted(-each)
            assert curve.over_refusal[i] == pytest.approx(tilted[scores.wanted == -1].sum(axis=1).mean(), rel=1e-9)
            assert curve.named[i, 1] == pytest.approx(tilted[scores.wanted == 1, 1].mean(), rel=1e-9)
        else:
            assert curve.over_refusal[i] == pytest.approx(rows.over_refusal.rate)
            assert curve.catch_rate[i] == pytest.approx((rows.refused[scores.wanted >= 0] >= 0).mean())
            assert curve.named[i].tolist() == pytest.approx([r.rate for r in rows.named.values()])
    low, high = curve.intervals[0].T
    assert (low <= curve.over_refusal).all()
    assert (curve.over_refusal <= high).all()
    if decoder == "gate":
        k = round(curve.over_refusal[5] * curve.answered)
        exact = rate([1] * k + [0] * (curve.answered - k)).ci("clopper-pearson")
        assert tuple(curve.intervals[0][5]) == exact
    assert curve.over_refusal[curve.at(0.1)] <= 0.1 < curve.over_refusal[curve.at(0.1) - 1]
    assert curve.band[0] == pytest.approx(math.sqrt(math.log(40) / 2 / curve.answered))


def test_trade_off_plots_and_marks_a_recipe():
    pytest.importorskip("matplotlib")
    _, tokens, scores = made(33, 300)
    for decoder in ("gate", "greedy", "sampling"):
        curve = scores.trade_off(decoder)
        recipe = calibrate(scores, tokens, decoder=decoder, max_over_refusal=0.1)
        ax = curve.plot(recipe=recipe)
        x = float(ax.lines[-1].get_xdata()[0])
        if decoder != "sampling":
            assert x == pytest.approx(scores.rates(recipe).over_refusal.rate, abs=0.02)
        assert ax.get_xlabel() == "over-refusal"
    with pytest.raises(ArgumentError):
        curve.plot(recipe=calibrate(scores, tokens, max_over_refusal=0.1))
    with pytest.raises(ArgumentError):
        scores.select(scores.wanted == -1).trade_off().plot()
    assert "thresholds" in repr(curve)
    assert "<table>" in curve._repr_html_()
    mass = scores.trade_off("gate", rule="mass")
    assert mass.over_refusal[3] == pytest.approx((scores.mass[scores.wanted == -1] >= mass.thresholds[3]).mean())
