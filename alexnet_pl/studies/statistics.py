"""Statistics of a study: means with confidence intervals, and effects as paired differences between equal seeds.

Every interval is a 95% Student t-interval over seeds: it covers what another seed would give, not another dataset. No
interval is adjusted for the number of intervals in a report.

Values come as a pandas Series, indexed by the levels of each factor and by ``seed``.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import pandas as pd
from scipy import stats

Cell = tuple[str, ...]
"""A configuration: one level per factor."""

SEED = "seed"


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds.

    Attributes:
        std: sample standard deviation; None for n = 1.
        low, high: the ends of the 95% interval of the mean; None for n = 1.
    """

    n: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None

    def transformed(self, function: Callable[[float], float]) -> "Estimate":
        """Map mean and interval through an increasing function; the standard deviation is dropped."""
        low, high = (None if value is None else function(value) for value in (self.low, self.high))
        return Estimate(self.n, function(self.mean), None, low, high)


def estimate(values: Iterable[float]) -> Estimate:
    """Return the mean, the sample standard deviation and the 95% t-interval of the mean.

    Raises:
        ValueError: no values.
    """
    values = [float(value) for value in values]
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values is undefined")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    if min(values) == max(values):  # scipy divides by the standard error
        return Estimate(n, mean, 0.0, mean, mean)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return Estimate(n, mean, float(stats.tstd(values)), float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Effect:
    """An effect over seeds.

    Attributes:
        estimate: of the differences, one per seed; None if no seed has every run.
        cells: levels of the other factors over which each seed's difference is averaged.
        left_out: seeds that lack a run.
    """

    estimate: Estimate | None
    cells: Sequence[Cell]
    left_out: Sequence[Hashable]


def contrast(values: pd.Series, factors: Sequence[str], signs: Mapping[Cell, int]) -> Effect:
    """Return a signed sum of configurations that differ in ``factors`` alone, averaged per seed over the other factors.

    ``contrast(values, ["norm"], {("batch",): 1, ("none",): -1})`` is the main effect of BatchNorm instead of no
    normalization. Four levels with the signs ``+ − − +`` over two factors are their interaction.

    A seed counts only if it has the whole sum for every combination of the other factors' levels for which any seed has
    it. Otherwise its mean would be over other runs than the next seed's.

    Args:
        values: indexed by every factor and ``seed``.
        signs: levels of ``factors`` → +1 or −1.
    """
    others = [name for name in values.index.names if name not in (*factors, SEED)]
    # One column per combination of levels of `factors`, one row per seed and combination of the others.
    table = values.unstack(list(factors))
    columns = [levels[0] if len(factors) == 1 else levels for levels in signs]
    table = table.reindex(columns=columns)
    sums = reduce(add, (sign * table[column] for column, sign in zip(columns, signs.values(), strict=True))).dropna()
    involved = set(table.dropna(how="all").index.get_level_values(SEED))
    # One row per seed, one column per combination of the other factors.
    by_seed = sums.unstack(others) if others else sums.to_frame()
    whole = by_seed.dropna().mean(axis=1)
    cells = [column if isinstance(column, tuple) else (column,) for column in by_seed.columns] if others else [()]
    return Effect(
        estimate(whole) if len(whole) else None,
        cells if len(sums) else [],
        sorted(involved - set(whole.index), key=str),
    )


def main_effect(values: pd.Series, factor: str, base: str, level: str) -> Effect:
    """Return the effect of ``level`` instead of ``base`` of a factor."""
    return contrast(values, [factor], {(level,): 1, (base,): -1})


def interaction(values: pd.Series, factors: tuple[str, str], bases: tuple[str, str], levels: tuple[str, str]) -> Effect:
    """Return how much larger the effect of the first factor's level is at the second's level than at its base."""
    (one, other), (base, other_base) = levels, bases
    signs: dict[Cell, int] = {(one, other): 1, (base, other): -1, (one, other_base): -1, (base, other_base): 1}
    return contrast(values, factors, signs)


def epochs_to(errors: Sequence[float], target: float, start: float) -> float | None:
    """Return the epochs until the training error falls to ``target``, interpolated linearly, or None if it never does.

    Args:
        errors: one per epoch, in [0, 1].
        start: the error before the first epoch, which is that of guessing.
    """
    before = start
    for epoch, error in enumerate(errors, start=1):
        if error <= target:
            return epoch - 1 + (before - target) / (before - error) if before > target else float(epoch - 1)
        before = error
    return None
