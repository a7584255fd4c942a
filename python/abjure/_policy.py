"""Who may see which records: labels in an order, and the rights of users."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, DTypeError, ShapeError

__all__ = ["Policy", "label_set", "permitted"]


def label_set(labels: Any, name: str = "labels") -> frozenset[str]:
    """One label, or a collection of them, as a set.

    Raises:
        ArgumentError: no label, or an empty one. DTypeError: a label that is no string.
    """
    given = [labels] if isinstance(labels, str) else labels
    if not isinstance(given, Iterable):
        raise DTypeError(f"{name}: expected a label or several, got {type(labels).__name__}")
    found = list(given)
    for label in found:
        if not isinstance(label, str):
            raise DTypeError(f"{name}: expected strings, got {type(label).__name__}")
        if not label.strip():
            raise ArgumentError(f"{name}: expected labels that are not empty, got {label!r}")
    if not found:
        raise ArgumentError(
            f"{name}: expected at least one label; a record that everybody may see needs one that says so"
        )
    return frozenset(found)


class Policy:
    """Labels with an order between them, and what each user may see.

    ``flows`` says where a label's data may go: with ``{"public": ["internal"], "internal": ["secret"], "secret": []}``
    who may see ``internal`` may see ``public`` too. Owners, licences and access classes are labels of one policy that
    need no order among each other. A record carries one label or several and may be seen by a user who has, for
    **every** label of it, a right to that label or to one it flows to. Sets of labels under this order are a lattice:
    the label of what is made from two records is :meth:`join`, their union less what the rest implies.

    Args:
        flows: for every label the labels it may flow to, directly; the order is their closure.
        users: for every user the labels they have a right to. A user without rights sees nothing.

    Raises:
        ArgumentError: a label or right that ``flows`` does not name, or a cycle, which would make its labels equal.
        DTypeError: a name that is no string.

    Source: Denning, A lattice model of secure information flow, 1976; sets of labels as in Myers and Liskov, 1997.
    """

    def __init__(
        self, flows: Mapping[str, Collection[str]], users: Mapping[str, Collection[str]] | None = None
    ) -> None:
        if not isinstance(flows, Mapping) or not flows:
            raise ArgumentError("flows: expected a mapping from every label to those it may flow to, got none")
        direct: dict[str, frozenset[str]] = {}
        for label, targets in flows.items():
            label_set(label, "flows")
            direct[label] = label_set(targets, f"flows: {label!r}") if targets else frozenset()
        for label, targets in direct.items():
            if unknown := sorted(targets - direct.keys()):
                raise ArgumentError(f"flows: {label!r}: expected labels of the policy, got {unknown[0]!r}")
        self._flows = direct
        self._above = _closure(direct)
        self._users: dict[str, frozenset[str]] = {}
        for user, rights in (users or {}).items():
            if not isinstance(user, str):
                raise DTypeError(f"users: expected strings, got {type(user).__name__}")
            held = label_set(rights, f"users: {user!r}") if rights else frozenset()
            if unknown := sorted(held - direct.keys()):
                raise ArgumentError(f"users: {user!r}: expected rights to labels of the policy, got {unknown[0]!r}")
            self._users[user] = held

    @property
    def labels(self) -> list[str]:
        """All labels, sorted."""
        return sorted(self._flows)

    @property
    def users(self) -> list[str]:
        """All users, sorted."""
        return sorted(self._users)

    def check(self, labels: Any, name: str = "labels") -> frozenset[str]:
        """Labels of a record as a set, all of them known.

        Raises:
            ArgumentError: a label that the policy does not have. DTypeError: as :func:`label_set`.
        """
        found = label_set(labels, name)
        if unknown := sorted(found - self._flows.keys()):
            raise ArgumentError(f"{name}: expected labels of the policy, {', '.join(self.labels)}, got {unknown[0]!r}")
        return found

    def flows(self, source: str, target: str) -> bool:
        """Whether what carries ``source`` may be seen by who has a right to ``target``; a label flows to itself.

        Raises:
            ArgumentError: an unknown label.
        """
        self.check((source, target))
        return target in self._above[source]

    def join(self, *labels: Any) -> frozenset[str]:
        """The labels of what is made from records with these: every label that no other one implies.

        Raises:
            ArgumentError: an unknown label, or none.
        """
        every = frozenset().union(*(self.check(found) for found in labels)) if labels else self.check(())
        # What flows to another label of the set may be seen by everybody who may see that one.
        return frozenset(a for a in every if not any(b != a and b in self._above[a] for b in every))

    def rights(self, user: str) -> frozenset[str]:
        """What a user was given a right to.

        Raises:
            ArgumentError: an unknown user.
        """
        if user not in self._users:
            raise ArgumentError(f"user: expected one of {', '.join(self.users) or 'no users'}, got {user!r}")
        return self._users[user]

    def may_see(self, user: str, labels: Any) -> bool:
        """Whether a user may see a record with these labels.

        Raises:
            ArgumentError: an unknown user or label.
        """
        held = self.rights(user)
        return all(self._above[label] & held for label in self.check(labels))

    def readers(self, labels: Any) -> list[str]:
        """The users who may see a record with these labels.

        Raises:
            ArgumentError: an unknown label.
        """
        found = self.check(labels)
        return [user for user in self.users if self.may_see(user, found)]

    def permitted(self, labels: Iterable[Any], user: str) -> npt.NDArray[np.bool_]:
        """Which records a user may see.

        Args:
            labels: a label, or a collection of labels, for each record.
            user: one of :attr:`users`; without rights all is False.

        Returns:
            ``(n,)`` of true or false.

        Raises:
            ArgumentError: an unknown user; an unknown label or none, with the record's index.
            DTypeError: labels that are no strings. ShapeError: not a column.
        """
        codes, sets = label_codes(labels, self)
        self.rights(user)
        allowed = np.array([self.may_see(user, s) for s in sets], dtype=bool)
        return allowed[codes] if len(sets) else np.zeros(0, dtype=bool)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` reads them."""
        return {
            "flows": {label: sorted(targets) for label, targets in sorted(self._flows.items())},
            "users": {user: sorted(rights) for user, rights in sorted(self._users.items())},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Policy:
        """What :meth:`to_dict` gave.

        Raises:
            ArgumentError: an entry is missing, or as the constructor.
        """
        if not isinstance(state, Mapping) or "flows" not in state:
            raise ArgumentError("state: expected 'flows' and 'users' of a policy")
        return cls(state["flows"], state.get("users"))

    @property
    def digest(self) -> str:
        """SHA-256 of the policy, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        edges = sum(map(len, self._flows.values()))
        return f"Policy({len(self._flows)} labels, {edges} flows, {len(self._users)} users)"


def _closure(direct: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Every label with all it flows to and itself; refuses cycles."""
    above: dict[str, frozenset[str]] = {}
    for start in sorted(direct):
        path: list[str] = []
        stack = [(start, False)]
        while stack:
            label, done = stack.pop()
            if done:
                path.pop()
                above[label] = frozenset({label}).union(*(above[t] for t in direct[label]))
                continue
            if label in path:
                cycle = " to ".join([*path[path.index(label) :], label])
                raise ArgumentError(f"flows: expected an order of labels, got a cycle: {cycle}")
            if label in above:
                continue
            path.append(label)
            stack.append((label, True))
            stack += [(t, False) for t in sorted(direct[label], reverse=True)]
    return above


def label_codes(labels: Iterable[Any], policy: Policy) -> tuple[npt.NDArray[np.int32], list[frozenset[str]]]:
    """The set of labels of each record as a number, and the sets, all known to the policy."""
    if isinstance(labels, (str, bytes, Mapping)) or not isinstance(labels, Iterable):
        raise ShapeError(f"labels: expected a label, or several, for each record, got {type(labels).__name__}")
    seen: dict[frozenset[str], int] = {}
    of: dict[Any, int] = {}
    codes = []
    for i, item in enumerate(labels):
        key = item if isinstance(item, (str, tuple, frozenset)) else None
        if key is not None and key in of:
            codes.append(of[key])
            continue
        found = policy.check(item, f"labels: record {i}")
        code = seen.setdefault(found, len(seen))
        if key is not None:
            of[key] = code
        codes.append(code)
    return np.asarray(codes, dtype=np.int32), list(seen)


def permitted(labels: Iterable[Any], user: str, policy: Policy) -> npt.NDArray[np.bool_]:
    """Which records a user may see: :meth:`Policy.permitted`."""
    return policy.permitted(labels, user)
