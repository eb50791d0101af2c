from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from edgekd import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_limits(successes, n, low, high):
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_in_0_1():
    assert stats.wilson(10, 10)[1] == 1.0
    assert stats.wilson(0, 10)[0] == 0.0


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (10, 2), (2, 10), (5, 5), (40, 70), (300, 380)])
def test_mcnemar_equals_exact_fractions(b, c):
    n = b + c
    tail = Fraction(sum(math.comb(n, k) for k in range(min(b, c) + 1)), 2**n)
    assert stats.mcnemar_p(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_paired_difference_of_equal_answers_is_zero():
    answers = np.arange(100) % 7 == 0
    value, (low, high) = stats.paired_difference(answers, answers)
    assert value == 0
    assert low == pytest.approx(-high)
    one_alone = stats.wilson(int(answers.sum()), 100)
    assert 0 <= high < (one_alone[1] - one_alone[0]) / 4  # that they agree on every sample is worth something


def test_paired_difference_changes_sign_with_the_order():
    rng = np.random.default_rng(0)
    first, second = rng.random(400) < 0.9, rng.random(400) < 0.8
    value, (low, high) = stats.paired_difference(first, second)
    assert value == pytest.approx(second.mean() - first.mean())
    back, (back_low, back_high) = stats.paired_difference(second, first)
    assert (back, back_low, back_high) == pytest.approx((-value, -high, -low))


def test_paired_difference_covers_the_truth():
    rng = np.random.default_rng(1)
    # Right together 85 %, only the first 7 %, only the second 3 %: the true difference is -0.04.
    outcomes = rng.choice(4, p=[0.85, 0.07, 0.03, 0.05], size=(1000, 200))
    covered = 0
    for row in outcomes:
        _, (low, high) = stats.paired_difference(row <= 1, (row == 0) | (row == 2))
        covered += low <= -0.04 <= high
    assert 0.93 <= covered / 1000 <= 0.985


@pytest.mark.parametrize(
    ("percentile", "needed"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.97, 219), (0.99, 662), (0.999, 6636)]
)
def test_early_stopping_needs_as_many_queries_as_loadgen(percentile, needed):
    rng = np.random.default_rng(0)
    assert stats.early_stopping_percentile(rng.random(needed - 1), percentile) is None
    latencies = rng.random(needed)
    assert stats.early_stopping_percentile(latencies, percentile) == latencies.max()


@pytest.mark.parametrize(("n", "percentile", "loadgen"), [(20_001, 0.9, 1900), (88_463, 0.9, 8637), (12_193, 0.99, 95)])
def test_early_stopping_discards_as_many_as_loadgen(n, percentile, loadgen):
    # LoadGen prints how many are thrown away before the one it reports: t - 1.
    assert stats.early_stopping_discards(n, percentile) - 1 == loadgen
    ordered = np.arange(1.0, n + 1)
    assert stats.early_stopping_percentile(ordered, percentile) == n - loadgen


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (30, 10), (50, 18)])
def test_median_interval_takes_the_tabulated_ranks(n, rank):
    values = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    median, interval = stats.median_interval(values)
    assert median == (n + 1) / 2
    assert interval == (rank, n + 1 - rank)


def test_median_interval_of_five_values_is_refused():
    with pytest.raises(ValueError, match=r"5 values are too few .* at least 6 are needed"):
        stats.median_interval(np.arange(5.0))


def test_robust_cv_ignores_outliers():
    values = np.random.default_rng(0).normal(10, 0.2, 10_000)
    assert stats.robust_cv(values) == pytest.approx(0.02, rel=0.05)
    values[:500] = 1000
    assert stats.robust_cv(values) == pytest.approx(0.02, rel=0.15)


def test_trend_compares_the_first_third_with_the_last():
    assert stats.trend(np.array([1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.1, 1.1, 1.1])) == pytest.approx(0.1)
    assert stats.trend(np.ones(2)) == 0
