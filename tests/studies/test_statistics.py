"""Statistics of studies against scipy and textbook formulas: means, intervals, paired effects, speed, verdicts."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alexnet_pl.studies.statistics import (
    Estimate,
    epochs_to,
    estimate,
    holm,
    interaction,
    main_effect,
    power_to_detect,
    power_to_exclude,
    seeds_to_detect,
    seeds_to_exclude,
    verdict,
)

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


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "direction", "margin", "name"),
    [
        ([-0.012, -0.015, -0.014, -0.011], -1, 0.003, "confirmed"),
        ([0.012, 0.015, 0.014, 0.011], -1, 0.003, "reversed"),
        ([0.012, 0.015, 0.014, 0.011], 1, 0.003, "confirmed"),
        ([0.0004, -0.0006, 0.0002, -0.0001], -1, 0.003, "no effect beyond the margin"),
        ([0.0004, -0.0006, 0.0002, -0.0001], -1, None, "open"),
        ([0.01, -0.02, 0.015, -0.012], -1, 0.003, "open"),
        ([-0.014], -1, 0.003, "open"),
        ([-0.01, -0.01], -1, 0.003, "confirmed"),
    ],
)
def test_a_verdict_follows_from_the_interval(differences, direction, margin, name):
    found = verdict(estimate(differences), direction, margin)
    assert found.name == name
    if len(set(differences)) > 1:
        assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
        if margin is not None:
            tests = (
                stats.ttest_1samp(differences, -margin, alternative="greater"),
                stats.ttest_1samp(differences, margin, alternative="less"),
            )
            assert found.p_equivalence == pytest.approx(max(test.pvalue for test in tests))
            assert (name == "no effect beyond the margin") == (found.p_equivalence < 0.05 and found.p > 0.05)


def test_an_interval_that_excludes_zero_decides_before_equivalence():
    small = estimate([-0.0010, -0.0011, -0.0009, -0.0010])
    assert verdict(small, -1, 0.003).name == "confirmed"
    assert verdict(small, -1, 0.003).p_equivalence < 0.05


def test_power_of_the_paired_t_test_matches_published_values():
    """Cohen's d = 0.2, 0.5, 0.8 at 5% two-sided and 80% power: 199, 34 and 15 pairs (Faul et al. 2007, G*Power)."""
    assert [seeds_to_detect(effect, 1) for effect in (0.2, -0.5, 0.8)] == [199, 34, 15]
    assert power_to_detect(0.5, 1, 34) == pytest.approx(0.8077775, abs=1e-6)
    assert power_to_detect(0, 1, 10) == pytest.approx(0.05)
    assert power_to_detect(1.0, 0.01, 5) == 1
    assert seeds_to_detect(0, 1) is None
    assert seeds_to_detect(1e-4, 1) is None  # more than 10,000


@pytest.mark.parametrize(("n", "margin", "effect"), [(12, 1.0, 0.1), (5, 1.5, 0.0), (3, 4.0, -1.0)])
def test_power_of_the_equivalence_test_matches_a_simulation(n, margin, effect):
    draws = np.random.default_rng(0).normal(effect, 1, (100_000, n))
    half = stats.t.ppf(0.95, n - 1) * draws.std(1, ddof=1) / math.sqrt(n)
    shown = (np.abs(draws.mean(1)) + half < margin).mean()
    assert power_to_exclude(margin, 1, n, effect) == pytest.approx(shown, abs=0.005)


def test_the_fewest_seeds_have_the_power_and_one_fewer_does_not():
    n = seeds_to_exclude(0.5, 1.0)
    assert power_to_exclude(0.5, 1.0, n) >= 0.8 > power_to_exclude(0.5, 1.0, n - 1)
    assert seeds_to_exclude(0.5, 1.0, effect=0.5) is None


def test_an_open_claim_says_how_many_more_seeds_settle_it():
    values = [-0.020, 0.004, -0.006]
    found = estimate(values)
    expected = seeds_to_detect(found.mean, found.std)
    assert verdict(found, -1, 0.003).more_seeds == expected - 3  # the mean is beyond the margin
    near = estimate([-0.002, 0.002, 0.0011])
    assert verdict(near, -1, 0.003).more_seeds == seeds_to_exclude(0.003, near.std, near.mean) - 3
    assert verdict(estimate([-0.014]), -1, 0.003).more_seeds is None


def test_holm_steps_down():
    """Worked by hand: 3 · 0.01, 2 · 0.03, and 0.04, which may not fall below the one before it."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
