"""Constructive scores by hand, and the follow-up game against enumeration and linear programmes."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog

from abjure import ArgumentError, DegenerateError, DTypeError, ShapeError
from abjure.measure import FollowUpGame, Rate, Report, UserType, constructive_scores
from abjure.measure.constructive import ANSWERS, FOLLOW_UPS

PAIRS = list(itertools.product(ANSWERS, FOLLOW_UPS))


def test_scores():
    answers = ["refuse", "comply", "constructive", "constructive", None, "comply", "refuse", "constructive"]
    risks = ["high", "high", "high", "low", "low", "low", "low", "high"]
    users = ["new", "new", "expert", "expert", "new", "new", "expert", "new"]
    found = constructive_scores(answers, risks, users)
    assert found.constructive == Rate(3, 7, 1)
    assert found.of_unfulfilled == Rate(3, 5, 1)
    assert (found.refused, found.complied) == (Rate(2, 7, 1), Rate(2, 7, 1))
    assert found.harmful_compliance == Rate(1, 4)
    assert found.harmful_constructive == Rate(2, 4)
    assert found.benign_refusal == Rate(1, 3, 1)
    assert found.cells["new", "high"] == (Rate(1, 3), Rate(1, 3), Rate(1, 3))
    assert found.cells["new", "low"] == (Rate(0, 1, 1), Rate(1, 1, 1), Rate(0, 1, 1))
    other = constructive_scores(["comply", "refuse"], [True, False])
    difference = found.against(other)
    assert difference["constructive"][0] == pytest.approx(3 / 7)
    assert difference["harmful_compliance"][0] == pytest.approx(1 / 4 - 1)
    assert difference["harmful_compliance"][1][0] < -0.5
    assert "constructive engagement" in Report("Page").add("Scores", found).to_markdown()


def drawn(rng, names, wide=3):
    pay = lambda: {k: Decimal(int(v)) / 10 for k, v in zip(PAIRS, rng.integers(-wide, wide + 1, 9), strict=True)}  # noqa: E731
    return [UserType(n, str(rng.integers(1, 5)), pay(), pay()) for n in names]


def outcome(t, answer):
    """What the one who answers gets, the user doing what is best for them and, of equals, the worst for the other."""
    best = max(t.user[answer, f] for f in FOLLOW_UPS)
    return min(t.system[answer, f] for f in FOLLOW_UPS if t.user[answer, f] == best)


def brute(types, seen=None):
    """Value of every pure policy."""
    cells = list(dict.fromkeys((seen or {}).get(t.name, t.name) for t in types))
    total = sum(Fraction(t.share) for t in types)
    found = {}
    for picks in itertools.product(ANSWERS, repeat=len(cells)):
        policy = dict(zip(cells, picks, strict=True))
        value = sum(
            Fraction(t.share) / total * Fraction(outcome(t, policy[(seen or {}).get(t.name, t.name)])) for t in types
        )
        found[picks] = value
    return cells, found


@pytest.mark.parametrize("seen", [None, {"a": "low", "b": "low"}, {"a": "all", "b": "all", "c": "all"}])
def test_the_best_policy_by_enumeration(seen):
    rng = np.random.default_rng(0)
    for _ in range(40):
        types = drawn(rng, "abc")
        game = FollowUpGame(types, seen)
        found = game.solve()
        cells, values = brute(types, seen)
        best = max(values.values())
        assert found.value == best
        played = tuple(
            next(a for n, c in found.answers.items() if (seen or {}).get(n, n) == cell for a in c) for cell in cells
        )
        assert values[played] == best
        equals = sum(v == best for v in values.values()) - 1
        assert len(found.alternatives) == min(equals, 20)
        for alternative in found.alternatives:
            assert (
                values[tuple(next(a for n, a in alternative.items() if (seen or {}).get(n, n) == c) for c in cells)]
                == best
            )


def test_under_a_limit_by_linear_programmes():
    rng = np.random.default_rng(1)
    for _ in range(30):
        types = drawn(rng, "abc", wide=9)
        events = [("a", "comply"), ("c", "comply"), ("c", "constructive")]
        total = sum(int(t.share) for t in types)
        value = [float(outcome(t, a)) * int(t.share) / total for t in types for a in ANSWERS]
        cost = [int(t.share) / total * ((t.name, a) in events) for t in types for a in ANSWERS]
        one = np.kron(np.eye(3), np.ones(3))
        limit = Decimal(int(rng.integers(0, 10))) / 10
        best = -linprog(-np.array(value), np.array([cost]), [float(limit)], one, np.ones(3)).fun
        found = FollowUpGame(types).solve(limit=limit, of=events)
        assert float(found.value) == pytest.approx(best, abs=1e-9)
        spent = sum(
            Fraction(int(t.share), total) * found.answers[t.name].get(a, 0)
            for t in types
            for a in ANSWERS
            if (t.name, a) in events
        )
        assert spent <= Fraction(limit)
        assert all(sum(c.values()) == 1 for c in found.answers.values())


def test_sensitivity_by_trying():
    rng = np.random.default_rng(2)
    step = Fraction(1, 1000)
    for _ in range(6):
        types = drawn(rng, "ab")
        game = FollowUpGame(types)
        base = {n: next(iter(c)) for n, c in game.solve().answers.items()}

        def moved(s, value, types=types):
            new = []
            for t in types:
                user, system = dict(t.user), dict(t.system)
                if t.name == s.type:
                    (user if s.side == "user" else system)[s.answer, s.follow_up] = value
                new.append(UserType(t.name, t.share, user, system))
            return {n: next(iter(c)) for n, c in FollowUpGame(new).solve().answers.items()}

        found = game.sensitivity()
        assert len(found) == 36
        for s in found:
            for limit, sign, policy in ((s.low, -1, s.below), (s.high, 1, s.above)):
                if limit is None:
                    assert moved(s, s.given + sign * 50) == base
                    continue
                assert moved(s, limit + sign * step) == policy != base
                if limit != s.given:
                    assert moved(s, limit - sign * step) == base
                    assert moved(s, (limit + s.given) / 2) == base


def test_decimals_are_exact():
    user = dict.fromkeys(PAIRS, "0")
    tenth = dict.fromkeys(PAIRS, "0.1")
    three = {k: "0.3" if k[0] == "refuse" else "0.1" for k in PAIRS}
    # 0.1 + 0.1 + 0.1 is 0.3 here, so that refusing and the rest tie.
    types = [UserType("a", 1, user, tenth), UserType("b", 1, user, tenth), UserType("c", 1, user, three)]
    found = FollowUpGame(types).solve()
    assert found.value == Fraction(5, 30)
    assert found.decimal(4) == Decimal("0.1667")
    assert len(found.alternatives) == 8
    assert len(found.ties) == 9
    assert json.loads(json.dumps(found.to_dict()))["value"] == "0.166667"
    assert "refuse" in repr(found)
    assert "<table>" in found._repr_html_()
    assert found.to_dict() == FollowUpGame(types).solve().to_dict()
    assert "Policy" in Report("Page").add("Policy", found).to_markdown()


def test_a_cycle_of_best_responses_is_told():
    """The user escalates after a refusal and retries after anything else; refusing pays against a retry alone."""
    user = dict.fromkeys(PAIRS, 0) | {("refuse", "escalate"): 1, ("comply", "retry"): 1, ("constructive", "retry"): 1}
    system = dict.fromkeys(PAIRS, 0) | {
        ("refuse", "retry"): 2,
        ("constructive", "escalate"): 1,
        ("comply", "escalate"): -1,
    }
    found = FollowUpGame([UserType("a", 1, user, system)]).solve()
    assert set(found.cycles["a"]) == {("refuse", "escalate"), ("constructive", "retry")}
    assert found.value == 0
    still = FollowUpGame([UserType("a", 1, user, dict.fromkeys(PAIRS, 0))]).solve()
    assert not still.cycles


def test_bad_input():
    pay = dict.fromkeys(PAIRS, 0)
    one = UserType("a", 1, pay, pay)
    with pytest.raises(ArgumentError, match="at least one type"):
        FollowUpGame([])
    with pytest.raises(ArgumentError, match="different names"):
        FollowUpGame([one, one])
    with pytest.raises(ArgumentError, match="types: 'a': user: expected a pay-off"):
        FollowUpGame([UserType("a", 1, {("refuse", "retry"): 0}, pay)])
    with pytest.raises(DTypeError, match="expected text or a Decimal"):
        FollowUpGame([UserType("a", 1, pay | {("refuse", "retry"): 0.1}, pay)])
    for bad in ("x", "nan", "Infinity"):
        with pytest.raises(ArgumentError, match="number"):
            FollowUpGame([UserType("a", bad, pay, pay)])
    with pytest.raises(ArgumentError, match="share of 0 or more"):
        FollowUpGame([UserType("a", "-1", pay, pay)])
    with pytest.raises(ArgumentError, match="share above 0"):
        FollowUpGame([UserType("a", 0, pay, pay)])
    with pytest.raises(ArgumentError, match="seen"):
        FollowUpGame([one], {"b": "x"})
    game = FollowUpGame([one])
    with pytest.raises(ArgumentError, match="limit, of"):
        game.solve(limit="0.1")
    with pytest.raises(ArgumentError, match="limit: expected a chance"):
        game.solve(limit="1.1", of=[("a", "comply")])
    with pytest.raises(DTypeError, match="limit"):
        game.solve(limit=0.1, of=[("a", "comply")])
    with pytest.raises(ArgumentError, match="of: expected"):
        game.solve(limit="0.1", of=[("b", "comply")])
    with pytest.raises(DegenerateError, match=r"no policy keeps 0\.5; the least is 1"):
        game.solve(limit="0.5", of=[("a", a) for a in ANSWERS])
    with pytest.raises(ArgumentError, match="name, answer"):
        game.best_response("b", "comply")
    with pytest.raises(ArgumentError, match="answers"):
        constructive_scores(["yes"], ["high"])
    with pytest.raises(ArgumentError, match="high"):
        constructive_scores(["refuse"], ["low"])
    with pytest.raises(ShapeError):
        constructive_scores(["refuse"], ["high", "low"])
    with pytest.raises(ShapeError):
        constructive_scores([], [])
