"""Evolutionary search for harmless prompts that a model refuses all the same (EvoRefuse, arXiv 2505.23473)."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ...errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError
from ._text import row_rng

T = TypeVar("T")
Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class OverRefusalSearch(Generic[T]):
    """What a search found; pass it as ``resume`` to go on.

    Attributes:
        population: the individuals of the last generation, by slot.
        fitness: theirs.
        generation: number of generations done.
        found: every individual that was evaluated, with its fitness, best first (equal ones in order of discovery).
        best_by_generation: best fitness so far, the first population included.
        proposed, inadmissible, accepted: numbers of proposals, of those the filter turned away, of those taken.
        seed: of the search.
    """

    population: list[T]
    fitness: list[float]
    generation: int
    found: list[tuple[T, float]]
    best_by_generation: list[float]
    proposed: int
    inadmissible: int
    accepted: int
    seed: int

    @property
    def best(self) -> tuple[T, float]:
        """The fittest individual and its fitness."""
        return self.found[0]

    def __repr__(self) -> str:
        return (
            f"OverRefusalSearch(best {self.best[1]:.4g} after {self.generation} generations; {self.proposed} proposed, "
            f"{self.inadmissible} inadmissible, {self.accepted} accepted)"
        )

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><td>{v:.4g}</td><td>{html.escape(str(x))}</td></tr>" for x, v in self.found[:10])
        return (
            f"<table><caption>{html.escape(repr(self))}</caption><tr><th>fitness</th><th>prompt</th></tr>{body}</table>"
        )

    def plot(self, ax: Any = None) -> Any:
        """Best fitness by generation, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3), layout="constrained").subplots()
        ax.step(range(len(self.best_by_generation)), self.best_by_generation, where="post")
        ax.set(xlabel="generation", ylabel="best fitness")
        return ax


def search_over_refusals(
    population: Sequence[T] | None = None,
    *,
    mutate: Callable[[T, Rng], T],
    recombine: Callable[[T, T, Rng], T],
    fitness: Callable[[T], float],
    admissible: Callable[[T], bool],
    generations: int = 20,
    crossover: float = 0.5,
    temperature: float = 0.1,
    cooling: float = 0.005,
    final_temperature: float = 0.01,
    seed: int = 0,
    resume: OverRefusalSearch[T] | None = None,
    map: Callable[..., Iterable[Any]] = map,
    progress: bool = True,
) -> OverRefusalSearch[T]:
    """Simulated annealing on a population, over harmless prompts only: finds where a model refuses too much.

    Each slot of a generation proposes one child from the generation before: its own individual, recombined with another
    slot's with probability ``crossover``, then mutated. A child that is not admissible is dropped before it is
    evaluated. Others replace their slot's individual with probability ``min(1, exp(Δ / T))``,
    ``T = max(final_temperature, temperature − cooling · generation)``. All draws come from a generator for (seed,
    generation, slot), so results depend on neither the order of evaluation nor interruptions.

    Args:
        population: first individuals, at least two, all admissible; not needed with ``resume``.
        mutate: ``(x, rng)`` to a changed x.
        recombine: ``(a, b, rng)`` to a mixture.
        fitness: to maximise; e.g. the model's mean log-probability of refusing. Called once per different individual.
        admissible: the hard filter: True only for prompts that are harmless, by a judge of yours.
        generations: to do (further ones, with ``resume``).
        crossover: probability of recombining.
        temperature, cooling, final_temperature: of the annealing, in units of fitness.
        seed: of all draws; with ``resume`` the seed of that search is kept.
        resume: an earlier result.
        map: what evaluates: ``map(f, items)`` in order, e.g. of an executor.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        ArgumentError: fewer than two individuals, an option out of range.
        DTypeError: an individual that cannot be hashed.
        DegenerateError: an individual of the first population is not admissible.
        NonFiniteError: a fitness that is NaN or +∞ (−∞ is allowed and never the better).

    Source: EvoRefuse, arXiv 2505.23473, in its form for testing; the operators and the judge are the caller's.
    """
    from tqdm.auto import tqdm

    if not 0 <= crossover <= 1 or generations < 0 or seed < 0:
        raise ArgumentError("crossover, generations, seed: expected a probability, and counts of 0 or more")
    if not (0 < final_temperature <= temperature < math.inf and cooling >= 0):
        raise ArgumentError("temperature: expected 0 < final_temperature <= temperature, and cooling of 0 or more")
    known: dict[T, float] = {}

    def evaluate(items: list[T]) -> None:
        try:
            new = [x for x in dict.fromkeys(items) if x not in known]
        except TypeError:
            raise DTypeError("population: expected individuals that can be hashed, such as strings") from None
        for x, value in zip(new, map(fitness, new), strict=True):
            number = float(value)
            if math.isnan(number) or number == math.inf:
                raise NonFiniteError(f"fitness: expected a number below infinity, got {number} for {x!r}")
            known[x] = number

    if resume is not None:
        slots, values, start, seed = list(resume.population), list(resume.fitness), resume.generation, resume.seed
        known.update(resume.found)
        trace = list(resume.best_by_generation)
        proposed, refused, accepted = resume.proposed, resume.inadmissible, resume.accepted
    else:
        slots, start, proposed, refused, accepted = list(population or ()), 0, 0, 0, 0
        if len(slots) < 2:
            raise ArgumentError(f"population: expected at least two individuals, got {len(slots)}")
        if bad := [i for i, x in enumerate(slots) if not admissible(x)]:
            raise DegenerateError(f"population: individual {bad[0]} is not admissible")
        evaluate(slots)
        values = [known[x] for x in slots]
        trace = [max(values)]
    for generation in tqdm(
        range(start, start + generations), desc="generations", unit="generation", disable=None if progress else True
    ):
        heat = max(final_temperature, temperature - cooling * generation)
        children: list[T | None] = []
        dice: list[float] = []
        for slot, own in enumerate(slots):
            rng = row_rng(seed, generation, slot)
            # Drawn first, so that however much the operators draw, the verdict is the same.
            dice.append(float(rng.random()))
            child = own
            if rng.random() < crossover:
                other = int(rng.integers(len(slots) - 1))
                child = recombine(child, slots[other + (other >= slot)], rng)
            child = mutate(child, rng)
            children.append(child if admissible(child) else None)
        proposed += len(slots)
        refused += sum(c is None for c in children)
        evaluate([c for c in children if c is not None])
        for slot, child_ in enumerate(children):
            if child_ is None:
                continue
            gain = known[child_] - values[slot] if known[child_] != values[slot] else 0.0
            if gain >= 0 or dice[slot] < math.exp(gain / heat):
                slots[slot], values[slot] = child_, known[child_]
                accepted += 1
        trace.append(max(known.values()))
    found = sorted(known.items(), key=lambda item: -item[1])
    return OverRefusalSearch(slots, values, start + generations, found, trace, proposed, refused, accepted, seed)
