"""Statistics of studies against scipy and against the textbook formula: means, intervals, paired effects, speed."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alexnet_pl.studies.statistics import Estimate, epochs_to, estimate, interaction, main_effect

SEEDS = (1, 2, 3, 4)
NOISE = {1: 0.031, 2: -0.012, 3: 0.004, 4: 0.02}  # per seed, far larger than the effects: pairing removes it
WOBBLE = {1: 0.001, 2: -0.002, 3: 0.0005, 4: 0.0012}


def crossed(effect: float = -0.014, other: float = -0.004, both: float = 0.003) -> pd.Series:
    """Return two crossed factors of two levels with known effects; the first one's varies a little between seeds."""
    return series({
        (norm, pool, seed): 0.4 + NOISE[seed]
        + (norm == "lrn") * (effect + WOBBLE[seed]) + (pool == "overlapping") * other
        + (norm == "lrn" and pool == "overlapping") * (both + 2 * WOBBLE[seed])
        for norm in ("none", "lrn") for pool in ("plain", "overlapping") for seed in SEEDS
    }, "norm", "pool")  # fmt: skip


def series(values: dict[tuple, float], *factors: str) -> pd.Series:
    return pd.Series([*values.values()], pd.MultiIndex.from_tuples([*values], names=[*factors, "seed"]), dtype=float)


def assert_interval(found: Estimate, values: list[float]) -> None:
    """Compare with scipy's t-interval of the mean."""
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.n == len(values)
    assert (found.mean, found.low, found.high) == pytest.approx((stats.tmean(values), interval.low, interval.high))
    assert found.std == pytest.approx(stats.tstd(values))


def test_mean_deviation_and_interval_match_scipy():
    assert_interval(estimate([0.711, 0.702, 0.718]), [0.711, 0.702, 0.718])
    assert estimate([0.5]) == Estimate(1, 0.5, None, None, None)
    assert estimate([0.5, 0.5]) == Estimate(2, 0.5, 0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_intervals_match_the_textbook_formula_to_1e_12(n):
    """mean ± t(0.975, n − 1) · s / √n, on which published reports rest."""
    for values in np.random.default_rng(n).normal(0.3, 0.02, (50, n)).tolist():
        mean = math.fsum(values) / n
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        half = float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
        found = estimate(values)
        expected = (mean, std, mean - half, mean + half)
        assert (found.mean, found.std, found.low, found.high) == pytest.approx(expected, rel=0, abs=1e-12)


def test_main_effects_are_differences_between_equal_seeds():
    found = main_effect(crossed(), "norm", "none", "lrn").estimate
    # For each seed the mean over both poolings: −0.014 + 0.003 / 2 and twice the wobble.
    assert_interval(found, [-0.0125 + 2 * WOBBLE[seed] for seed in SEEDS])
    with_plain = [crossed()["none", "plain", seed] for seed in SEEDS]
    with_lrn = [crossed()["lrn", "plain", seed] for seed in SEEDS]
    assert stats.ttest_ind(with_lrn, with_plain).pvalue > 0.3  # without pairing, the differences between seeds hide it
    assert found.high < 0
    back = main_effect(crossed(), "norm", "lrn", "none").estimate
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_interactions_are_differences_of_differences():
    found = interaction(crossed(), ("norm", "pool"), ("none", "plain"), ("lrn", "overlapping")).estimate
    assert_interval(found, [0.003 + 2 * WOBBLE[seed] for seed in SEEDS])


def test_seed_that_lacks_a_run_is_left_out_entirely():
    values = crossed().drop(("lrn", "plain", 2))
    effect = main_effect(values, "norm", "none", "lrn")
    assert_interval(effect.estimate, [-0.0125 + 2 * WOBBLE[seed] for seed in (1, 3, 4)])
    assert effect.left_out == [2]
    assert interaction(values, ("norm", "pool"), ("none", "plain"), ("lrn", "overlapping")).estimate.n == 3
    apart = series({("a", 1): 0.1, ("b", 2): 0.2}, "x")
    assert main_effect(apart, "x", "a", "b").estimate is None
    assert main_effect(apart, "x", "a", "b").left_out == [1, 2]


def test_seeds_need_not_be_numbers():
    values = series({(level, seed): 0.1 * len(level) for level in ("a", "bb") for seed in (1, 2, "?")}, "x")
    effect = main_effect(values, "x", "a", "bb")
    assert (effect.estimate.n, effect.estimate.mean) == (3, pytest.approx(0.1))


def test_epochs_to_an_error_are_interpolated_linearly():
    assert epochs_to([0.5, 0.3, 0.2], 0.25, start=0.9) == pytest.approx(2.5)
    assert epochs_to([0.1], 0.25, start=0.9) == pytest.approx(0.65 / 0.8)
    assert epochs_to([0.5, 0.25], 0.25, start=0.9) == pytest.approx(2)
    assert epochs_to([0.5, 0.26], 0.25, start=0.9) is None
