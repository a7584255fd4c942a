"""What the engines' processors share: which request gets which processors, and its context as a row.

An engine calls a processor with the logits of requests that joined at different times, in an order of its own. Each
request has a profile, a list of :class:`abjure.refuse.RefusalTokens` and :class:`abjure.refuse.ForbiddenPhrases`.
Nothing is kept from step to step but the engine's own lists of tokens: a row is worked out from its context alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._interop import is_torch, shape
from ..errors import ArgumentError, DTypeError, ShapeError

#: Key of a request's own arguments that names its profile.
ARGUMENT = "abjure"
Processors = Sequence[Any] | Callable[[], Sequence[Any]]


class Profiles:
    """Named lists of processors; each request gets one of the lists.

    Args:
        given: a list of processors for all requests, or names to lists. Instead of a list a function that makes it,
            called where it is first needed: an engine's front end, which only checks names, then builds no tables.
        default: name of the list that a request gets which names none; None: the only one, or the first.

    Raises:
        DTypeError: not lists, or members that cannot process rows. ArgumentError: no profile, an unknown default.
    """

    def __init__(self, given: Any, default: str | None = None) -> None:
        lists: dict[Any, Any] = dict(given) if isinstance(given, Mapping) else {"default": given}
        if not lists or not all(isinstance(name, str) for name in lists):
            raise ArgumentError(f"profiles: expected names to lists of processors, got {given!r:.80}")
        self.default = next(iter(lists)) if default is None else default
        if self.default not in lists:
            raise ArgumentError(f"default: expected one of {list(lists)}, got {default!r}")
        self._given = lists
        self._made: dict[str, list[Any]] = {}
        for name, processors in lists.items():
            if not callable(processors):
                self._made[name] = _checked(name, processors)

    def __iter__(self) -> Any:
        return iter(self._given)

    def chosen(self, arguments: Mapping[str, Any] | None) -> str:
        """Name of the profile that a request's arguments ask for.

        Raises:
            ArgumentError: there is none of that name.
        """
        name = (arguments or {}).get(ARGUMENT)
        if name is None:
            return self.default
        if not isinstance(name, str) or name not in self._given:
            raise ArgumentError(f"{ARGUMENT}: expected one of {list(self._given)}, got {name!r:.80}")
        return name

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._made:
            self._made[name] = _checked(name, self._given[name]())
        return self._made[name]

    def reach(self, names: Iterable[str | None]) -> int:
        """Tokens of context that the processors of these profiles look at."""
        return max((int(p.reach) for name in set(names) if name is not None for p in self[name]), default=0)

    def write_(self, scores: Any, rows: Sequence[Row | None]) -> Any:
        """Runs each row's processors on it, in place.

        Args:
            scores: ``(rows, vocabulary)``.
            rows: the request of each row; None leaves one as it is.

        Raises:
            ShapeError: not one entry per row, or a vocabulary that does not fit. ArgumentError: a token that is not
                known yet. Others as the processors.
        """
        names = [None if row is None else row.profile for row in rows]
        longest = max((len(row.prompt) + len(row.output) for row in rows if row is not None), default=0)
        reach = min(self.reach(names), longest)
        context = np.zeros((len(rows), reach), dtype=np.int64)
        length = np.zeros(len(rows), dtype=np.int64)
        generated = np.full(len(rows), -1, dtype=np.int64)
        for i, row in enumerate(rows):
            if row is None:
                continue
            tail = _tail(row.prompt, row.output, reach)
            context[i, reach - len(tail) :] = tail
            length[i], generated[i] = len(tail), len(row.output)
        return self.write_arrays_(scores, names, context, length, generated)

    def write_arrays_(self, scores: Any, names: Sequence[str | None], context: Any, length: Any, generated: Any) -> Any:
        """As :meth:`write_`, with the contexts as the processors take them.

        Args:
            names: profile of each row, or None.
            context, length, generated: see :meth:`abjure.refuse.ForbiddenPhrases.rows_`.
        """
        found = shape(scores, "logits")
        if len(found) != 2 or found[0] != len(names):
            raise ShapeError(f"logits: expected ({len(names)}, vocabulary), one row per request, got {found}")
        for name in dict.fromkeys(names):
            processors = [] if name is None else self[name]
            if not processors:
                continue
            rows = np.array([i for i, other in enumerate(names) if other == name])
            for part in _parts(scores, rows):
                # A slice is a view; picked rows are a copy, to be put back.
                view = scores[part]
                for processor in processors:
                    tail = context[part, max(0, context.shape[1] - int(processor.reach)) :]
                    processor.rows_(view, np.ascontiguousarray(tail), length[part], generated[part])
                if not isinstance(part, slice):
                    scores[part] = view
        return scores


@dataclass
class Row:
    """A request as a row of logits.

    Attributes:
        profile: name of its processors.
        prompt: its tokens.
        output: its response so far; the engine's own growing list, never a copy.
    """

    profile: str
    prompt: Sequence[int]
    output: Sequence[int]


def _checked(name: str, processors: Any) -> list[Any]:
    if isinstance(processors, (str, bytes, Mapping)) or not isinstance(processors, Iterable):
        raise DTypeError(f"profiles[{name!r}]: expected a list of processors, got {processors!r:.80}")
    found = list(processors)
    for processor in found:
        if not (callable(getattr(processor, "rows_", None)) and hasattr(processor, "reach")):
            kind = type(processor).__name__
            raise DTypeError(f"profiles[{name!r}]: expected RefusalTokens or ForbiddenPhrases, got {kind}")
    return found


def _tail(prompt: Sequence[int], output: Sequence[int], reach: int) -> list[int]:
    """The last ``reach`` tokens of a prompt and its response."""
    missing = reach - len(output)
    found = [int(t) for t in output[len(output) - reach :]] if missing <= 0 else [int(t) for t in output]
    if reach and missing > 0:
        found = [int(t) for t in prompt[max(0, len(prompt) - missing) :]] + found
    if any(t < 0 for t in found):
        raise ArgumentError(
            "context: a token of the response is not known on the host yet (a placeholder of asynchronous scheduling); "
            "switch asynchronous scheduling off"
        )
    return found


def _parts(scores: Any, rows: Any) -> list[Any]:
    """Rows as slices where scores are in host memory, else in one piece: every piece is a launch there."""
    if len(rows) == scores.shape[0]:
        return [slice(None)]
    if is_torch(scores) and not scores.is_cpu:
        return [rows]
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]


def engine_class(name: str, base: Any, body: dict[str, Any], module: str | None, depth: int) -> type:
    """A class under the name and module where its maker will put it, so that it travels between processes by name."""
    if not name.isidentifier():
        raise ArgumentError(f"name: expected the name that the class is assigned to, got {name!r}")
    made: type = type(name, (base,), body)
    made.__module__ = sys._getframe(depth).f_globals.get("__name__", "__main__") if module is None else module
    made.__qualname__ = name
    return made
