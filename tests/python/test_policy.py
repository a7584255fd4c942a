"""The lattice of labels, against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from abjure import ArgumentError, DTypeError, ShapeError
from abjure.forget import Policy, permitted

FLOWS = {
    "public": ["internal"], "internal": ["secret", "legal"], "secret": [], "legal": [], "owner:ann": [],
    "owner:bob": [],
}  # fmt: skip
USERS = {
    "ann": ["owner:ann", "secret"],
    "bob": ["owner:bob", "public"],
    "clerk": ["internal"],
    "judge": ["legal", "owner:ann", "owner:bob"],
    "nobody": [],
}


@pytest.fixture
def policy():
    return Policy(FLOWS, USERS)


def reachable(a, b):
    return a == b or any(reachable(t, b) for t in FLOWS[a])


def test_the_order_is_the_closure_of_the_flows(policy):
    for a, b in itertools.product(FLOWS, FLOWS):
        assert policy.flows(a, b) == reachable(a, b)


def test_who_sees_what_is_every_label_covered(policy):
    sets = [s for k in (1, 2, 3) for s in itertools.combinations(FLOWS, k)]
    for user, rights in USERS.items():
        expected = [all(any(reachable(label, r) for r in rights) for label in s) for s in sets]
        assert permitted(sets, user, policy).tolist() == expected
        assert [policy.may_see(user, s) for s in sets] == expected
    assert not permitted(sets, "nobody", policy).any()
    assert policy.readers(("internal", "owner:ann")) == ["ann", "judge"]


def test_the_join_is_seen_by_those_who_see_both(policy):
    sets = [s for k in (1, 2) for s in itertools.combinations(FLOWS, k)]
    for a, b in itertools.product(sets, sets):
        joined = policy.join(a, b)
        assert policy.readers(joined) == [u for u in policy.readers(a) if u in policy.readers(b)]
        assert policy.join(b, a) == joined
        assert policy.join(joined, a) == joined
    assert policy.join("public", "secret") == {"secret"}
    assert policy.join("secret", "legal") == {"secret", "legal"}


def test_round_trip(policy):
    again = Policy.from_dict(policy.to_dict())
    assert again == policy
    assert again.digest == policy.digest
    assert hash(again) == hash(policy)
    assert again != Policy(FLOWS)
    assert repr(policy) == "Policy(6 labels, 3 flows, 5 users)"
    mixed = permitted(["public", ("public",), frozenset({"owner:ann", "public"}), ["secret"]], "ann", policy)
    assert mixed.dtype == np.bool_
    assert mixed.tolist() == [True, True, True, True]
    assert permitted([], "ann", policy).shape == (0,)


def test_bad_input(policy):
    with pytest.raises(ArgumentError, match="cycle: a to b to c to a"):
        Policy({"a": ["b"], "b": ["c"], "c": ["a"], "d": []})
    with pytest.raises(ArgumentError, match="cycle: a to a"):
        Policy({"a": ["a"]})
    with pytest.raises(ArgumentError, match=r"flows: 'a': .* got 'b'"):
        Policy({"a": ["b"]})
    with pytest.raises(ArgumentError, match=r"users: 'u': .* got 'b'"):
        Policy({"a": []}, {"u": ["b"]})
    with pytest.raises(ArgumentError, match="flows"):
        Policy({})
    for labels in (["public", "unknown"], ["public", ()], ["public", ""]):
        with pytest.raises(ArgumentError, match="labels: record 1"):
            permitted(labels, "ann", policy)
    with pytest.raises(DTypeError, match="record 0"):
        permitted([3], "ann", policy)
    with pytest.raises(ShapeError, match="labels"):
        permitted("public", "ann", policy)
    with pytest.raises(ArgumentError, match="user: expected one of ann, bob"):
        permitted(["public"], "eve", policy)
    with pytest.raises(DTypeError, match="users"):
        Policy({"a": []}, {1: ["a"]})
    with pytest.raises(ArgumentError, match="at least one label"):
        policy.join()
    with pytest.raises(ArgumentError, match="state"):
        Policy.from_dict({})
