"""The statistics of a study: means with intervals, and effects as differences between runs of equal seeds.

Every interval is Student's, at 95 %, over seeds: what another seed would give, not another data set. None is adjusted
for how many of them a report shows. Values come as ``{(cell, seed): value}``, a cell being a tuple of levels, one a
factor.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

Cell = tuple[str, ...]

Values = Mapping[tuple[Cell, Hashable], float]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds. ``std`` (sample standard deviation), ``low`` and ``high`` (95 %) are None for n = 1."""

    n: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None

    def transformed(self, function: Callable[[float], float]) -> "Estimate":
        """Mean and interval through a function that never decreases; the deviation has no meaning then."""
        ends = (None if value is None else function(value) for value in (self.low, self.high))
        return Estimate(self.n, function(self.mean), None, *ends)


def estimate(values: Iterable[float]) -> Estimate:
    """Mean, sample standard deviation and 95 % t-interval.

    Raises:
        ValueError: no values.
    """
    values = [float(value) for value in values]
    n = len(values)
    if n == 0:
        raise ValueError("a mean of nothing")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return Estimate(n, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Effect:
    """An effect over seeds.

    Attributes:
        estimate: of the differences, one a seed; None where no seed has all that is needed.
        cells: the levels of the other factors that each seed's difference is a mean over.
        left_out: seeds that some of it lacks for.
    """

    estimate: Estimate | None
    cells: Sequence[Cell]
    left_out: Sequence[Hashable]


def contrast(values: Values, signs: Mapping[Cell, int], places: Sequence[int]) -> Effect:
    """A signed sum of cells that differ in the factors ``places`` alone, for each seed its mean over the other factors.

    ``contrast(values, {("batch",): 1, ("none",): -1}, [0])`` is the main effect of the first factor's level ``batch``
    instead of ``none``; four levels with signs ``+ − − +`` over two factors are their interaction.

    A seed counts only with every combination of the other factors' levels for which any seed has the whole sum: else
    its mean would be over other runs than the next seed's.

    Args:
        signs: levels of the factors ``places`` → +1 or −1.
        places: indices into a cell.
    """
    sums: dict[Cell, dict[Hashable, float]] = {}
    for others, seed in {(_without(cell, places), seed) for cell, seed in values}:
        terms = [(_with(others, places, levels), sign) for levels, sign in signs.items()]
        if all((cell, seed) in values for cell, _ in terms):
            sums.setdefault(others, {})[seed] = math.fsum(sign * values[cell, seed] for cell, sign in terms)
    cells, seeds = sorted(sums), {seed for by_seed in sums.values() for seed in by_seed}
    whole = sorted((seed for seed in seeds if all(seed in by_seed for by_seed in sums.values())), key=str)
    means = [math.fsum(sums[cell][seed] for cell in cells) / len(cells) for seed in whole]
    involved = {seed for cell, seed in values if tuple(cell[place] for place in places) in signs}
    return Effect(estimate(means) if means else None, cells, sorted(involved - set(whole), key=str))


def _without(cell: Cell, places: Sequence[int]) -> Cell:
    return tuple(level for place, level in enumerate(cell) if place not in places)


def _with(others: Cell, places: Sequence[int], levels: Cell) -> Cell:
    given, rest = dict(zip(places, levels, strict=True)), iter(others)
    return tuple(given[place] if place in given else next(rest) for place in range(len(others) + len(places)))


def main_effect(values: Values, place: int, base: str, level: str) -> Effect:
    """Of ``level`` instead of ``base`` of the factor at ``place``."""
    return contrast(values, {(level,): 1, (base,): -1}, [place])


def interaction(values: Values, places: tuple[int, int], bases: tuple[str, str], levels: tuple[str, str]) -> Effect:
    """How much larger the effect of the first factor's level is at the second one's level than at its base."""
    (one, other), (base, other_base) = levels, bases
    signs = {(one, other): 1, (base, other): -1, (one, other_base): -1, (base, other_base): 1}
    return contrast(values, signs, places)


def epochs_to(errors: Sequence[float], target: float, start: float) -> float | None:
    """Epochs until the training error falls to ``target``, linear between two epochs; None where it never does.

    Args:
        errors: one an epoch.
        start: before the first epoch; that of guessing.
    """
    before = start
    for epoch, error in enumerate(errors, start=1):
        if error <= target:
            return epoch - 1 + (before - target) / (before - error) if before > target else float(epoch - 1)
        before = error
    return None
