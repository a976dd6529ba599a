"""Statistics of a study: means with confidence intervals, and effects as paired differences between equal seeds.

Every interval is a 95% Student t-interval over seeds: it covers what another seed would give, not another dataset. No
interval is adjusted for the number of intervals in a report. :func:`verdict` turns an interval into what it says about
a published claim, and the power functions say how many seeds that takes.

Values come as a pandas Series, indexed by the levels of each factor and by ``seed``.
"""

import bisect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
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


def contrast(values: pd.Series, factors: Sequence[str], signs: Mapping[Cell, float]) -> Effect:
    """Return a signed sum of configurations that differ in ``factors`` alone, averaged per seed over the other factors.

    ``contrast(values, ["norm"], {("batch",): 1, ("none",): -1})`` is the main effect of BatchNorm instead of no
    normalization. Four levels with the signs ``+ − − +`` over two factors are their interaction.

    A seed counts only if it has the whole sum for every combination of the other factors' levels for which any seed has
    it. Otherwise its mean would be over other runs than the next seed's.

    Args:
        values: indexed by every factor and ``seed``.
        signs: levels of ``factors`` → +1 or −1, or fractions of them for a mean over several levels.
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
    signs: dict[Cell, float] = {(one, other): 1, (base, other): -1, (one, other_base): -1, (base, other_base): 1}
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


# --- verdicts -------------------------------------------------------------------------------------------------------

LEVEL = 0.05
"""Level of every test: 95% intervals, and 90% intervals for the two one-sided tests of equivalence."""

POWER = 0.8
"""Probability of a verdict for which numbers of seeds are planned."""

MAX_SEEDS = 10_000
"""More seeds than this are never planned."""

CONFIRMED, REVERSED, NO_EFFECT, OPEN = "confirmed", "reversed", "no effect beyond the margin", "open"


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about a claim.

    Attributes:
        name: ``confirmed``, ``reversed``, ``no effect beyond the margin`` or ``open``.
        p: two-sided p-value of the paired t-test against zero; None for n = 1.
        p_equivalence: p-value of the two one-sided tests; None for n = 1 or without a margin.
        more_seeds: for an open claim, how many more seeds would settle it with 80% probability if the estimates of mean
            and standard deviation were exact; None if that is unknown (n = 1) or more than ``MAX_SEEDS``.
    """

    name: str
    p: float | None = None
    p_equivalence: float | None = None
    more_seeds: int | None = None


def verdict(effect: Estimate, direction: int, margin: float | None) -> Verdict:
    """Return the verdict on a claim that an effect is below (−1) or above (+1) zero.

    The 95% t-interval of the mean decides first: entirely on the published side of zero, the claim is confirmed;
    entirely on the other side, it is reversed. Otherwise two one-sided t-tests at 5% (Schuirmann 1987) decide whether
    the effect is smaller than ``margin`` either way. Everything else is open.

    Args:
        effect: paired differences, or logarithms of paired ratios.
        direction: −1 or +1, the published sign.
        margin: smallest effect that matters, in the effect's own unit; None for claims that cannot be equivalences.
    """
    if effect.low is None or effect.high is None or effect.std is None:
        return Verdict(OPEN)
    p = t_test_p(effect)
    p_equivalence = None if margin is None else tost_p(effect, margin)
    low, high = sorted((direction * effect.low, direction * effect.high))
    if low > 0:
        name = CONFIRMED
    elif high < 0:
        name = REVERSED
    elif p_equivalence is not None and p_equivalence < LEVEL:
        name = NO_EFFECT
    else:
        return Verdict(OPEN, p, p_equivalence, more_seeds(effect, margin))
    return Verdict(name, p, p_equivalence)


def t_test_p(effect: Estimate) -> float:
    """Return the two-sided p-value of the t-test that the mean is zero; ``n`` is at least 2."""
    if not effect.std:
        return float(effect.mean == 0)
    return float(2 * stats.t.sf(abs(effect.mean) * math.sqrt(effect.n) / effect.std, effect.n - 1))


def tost_p(effect: Estimate, margin: float) -> float:
    """Return the p-value of two one-sided t-tests that the mean lies within ±``margin``; ``n`` is at least 2."""
    distance = margin - abs(effect.mean)
    if not effect.std:
        return float(distance <= 0)
    return float(stats.t.sf(distance * math.sqrt(effect.n) / effect.std, effect.n - 1))


def more_seeds(effect: Estimate, margin: float | None) -> int | None:
    """Return how many more seeds would settle an open claim, or None; see :class:`Verdict`."""
    if not effect.std:
        return None
    needed = [seeds_to_detect(effect.mean, effect.std)]
    if margin is not None:
        needed.append(seeds_to_exclude(margin, effect.std, effect.mean))
    known = [n for n in needed if n is not None]
    return max(min(known) - effect.n, 1) if known else None


def power_to_detect(effect: float, std: float, n: int) -> float:
    """Return the power of the two-sided paired t-test at 5% for a true mean ``effect``, ``n`` ≥ 2 seeds.

    Args:
        std: standard deviation of the paired differences, above 0.
    """
    shift, df = abs(effect) * math.sqrt(n) / std, n - 1
    critical = stats.t.ppf(1 - LEVEL / 2, df)
    if shift > 30 + critical:  # scipy's noncentral t underflows
        return 1.0
    wrong_side = float(stats.nct.cdf(-critical, df, shift))
    # Where scipy underflows to NaN, the probability of significance on the wrong side is negligible.
    return float(stats.nct.sf(critical, df, shift)) + (0.0 if math.isnan(wrong_side) else wrong_side)


def power_to_exclude(margin: float, std: float, n: int, effect: float = 0.0) -> float:
    """Return the power of the two one-sided paired t-tests at 5% to show that the mean lies within ±``margin``.

    The sample standard deviation s is integrated out: given s, the mean has to lie within ±(margin − t·s/√n).

    Args:
        std: standard deviation of the paired differences, above 0.
        n: seeds, at least 2.
        effect: the true mean.
    """
    df, root = n - 1, math.sqrt(n)
    critical = float(stats.t.ppf(1 - LEVEL, df))
    quantiles = (np.arange(QUADRATURE_POINTS) + 0.5) / QUADRATURE_POINTS
    room = margin - critical * std * np.sqrt(stats.chi2.ppf(quantiles, df) / df) / root
    inside = stats.norm.cdf((room - effect) * root / std) - stats.norm.cdf((-room - effect) * root / std)
    return float(np.where(room > 0, inside, 0.0).mean())


QUADRATURE_POINTS = 2_000
"""Quantiles of the chi-square distribution, over which the power is averaged."""


def seeds_to_detect(effect: float, std: float) -> int | None:
    """Return the fewest seeds with which the t-test detects a true mean ``effect`` with 80% power, or None."""
    return _fewest(lambda n: power_to_detect(effect, std, n)) if effect else None


def seeds_to_exclude(margin: float, std: float, effect: float = 0.0) -> int | None:
    """Return the fewest seeds with which the two one-sided tests succeed with 80% power, or None if none suffice."""
    return _fewest(lambda n: power_to_exclude(margin, std, n, effect)) if abs(effect) < margin else None


def _fewest(power: Callable[[int], float]) -> int | None:
    """Return the smallest n in [2, MAX_SEEDS] with ``power(n)`` ≥ ``POWER``, by bisection, or None."""
    if power(MAX_SEEDS) < POWER:
        return None
    return bisect.bisect_left(range(MAX_SEEDS + 1), POWER, lo=2, key=power)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted
