"""The statistics of a report: intervals for proportions, paired tests, percentiles with a guarantee, ratios of medians.

numpy and math only. Intervals are two-sided, 95 % unless said otherwise.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]
Z95 = NormalDist().inv_cdf(0.975)
EARLY_STOPPING_CONFIDENCE = 0.99
RESAMPLES = 2000


def wilson(successes: int, n: int) -> Interval:
    """Score interval of a proportion.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927. It stays within
    0..1 and keeps its coverage near the ends, where high accuracies lie.
    """
    p, z2 = successes / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # The limits are 0 and 1 there exactly; rounding would miss them.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two classifiers err equally often, from the samples that only one gets right.

    Q. McNemar, Psychometrika 1947, in its exact binomial form, which is the sign test: it serves any paired comparison.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    log_tail = np.logaddexp.reduce(_log_binomial(n, 0.5, k)) if n else 0.0
    return float(min(1.0, 2 * math.exp(log_tail)))


def paired_difference(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[float, Interval]:
    """`second` minus `first` in the share of correct answers on the same N samples, with its interval.

    R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", Statistics in Medicine 1998, method 10: Wilson's limits of each, combined with their correlation.
    """
    n = len(first)
    both, neither = int(np.sum(first & second)), int(np.sum(~first & ~second))
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (low1, high1), (low2, high2) = wilson(both + only_first, n), wilson(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(margins) if margins else 0.0
    below = _combined(p2 - low2, high1 - p1, phi)
    above = _combined(high2 - p2, p1 - low1, phi)
    return p2 - p1, (p2 - p1 - below, p2 - p1 + above)


def _combined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def mean_interval(values: Floats) -> Interval:
    """Interval of a mean [N] of any distribution: the bootstrap's percentiles (B. Efron, Annals of Statistics 1979).

    A pure function of the values: the resamples are always the same draws.
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def sign_flip_p(differences: Floats) -> float:
    """Two-sided p-value that paired differences [N] have mean 0: how often random signs give as large a mean.

    R. A. Fisher, "The Design of Experiments", 1935, section 21, with random instead of all signs; the observed signs
    count as one draw, so that it is never 0.
    """
    observed, rng = abs(float(differences.sum())), np.random.default_rng(0)
    # Without the share that rounding may take from a sum, the observed signs themselves would not count.
    limit = observed - 1e-12 * float(np.abs(differences).sum())
    sums = [abs(float(differences @ (2.0 * rng.integers(0, 2, len(differences)) - 1))) for _ in range(RESAMPLES)]
    return (1 + sum(found >= limit for found in sums)) / (1 + RESAMPLES)


def early_stopping_discards(n: int, percentile: float) -> int:
    """How many of the worst of `n` latencies may exceed a bound that still holds for `percentile` of all queries.

    The largest t with P[Binomial(n, 1 - percentile) <= t] <= 1 - 0.99; -1 when even t = 0 does not do.
    MLPerf Inference Rules, "Early Stopping", with tolerance d = 0.
    """
    tail = 1 - percentile
    log_cdf = np.logaddexp.accumulate(_log_binomial(n, tail, math.ceil(n * tail)))
    return int(np.searchsorted(log_cdf, math.log(1 - EARLY_STOPPING_CONFIDENCE), side="right")) - 1


def early_stopping_percentile(latencies: Floats, percentile: float) -> float | None:
    """A value that the percentile of the latencies does not exceed, with 99 % confidence; None when n is too small.

    Latencies of any shape and unit. MLPerf Inference Rules: with t discards, the t-th worst latency.
    """
    t = early_stopping_discards(latencies.size, percentile)
    return float(np.sort(latencies, axis=None)[-t]) if t >= 1 else None


def _log_binomial(n: int, p: float, upto: int) -> Floats:
    """Log probabilities of 0..upto successes in n trials."""
    k = np.arange(upto)
    steps: Floats = np.log((n - k) / (k + 1.0)) + math.log(p / (1 - p))
    return np.asarray(np.concatenate([[0.0], np.cumsum(steps)]) + n * math.log1p(-p))


def robust_cv(values: Floats) -> float:
    """Coefficient of variation from median and median absolute deviation: a few outliers do not move it."""
    median = np.median(values)
    return float(1.4826 * np.median(np.abs(values - median)) / median)


def trend(values: Floats) -> float:
    """Relative change from the first third of a series to its last, by their medians."""
    third = max(1, len(values) // 3)
    return float(np.median(values[-third:]) / np.median(values[:third]) - 1)


def median_interval(values: Floats) -> tuple[float, Interval]:
    """The median of a few independent values, with an interval for the median of what they were drawn from.

    The interval lies between two of the values and holds for any distribution (W. R. Thompson, Annals of Mathematical
    Statistics 1936). It takes at least 6 values: their lowest and highest enclose the median with 96.9 %.
    """
    n, ordered = len(values), np.sort(values)
    log_cdf = np.logaddexp.accumulate(_log_binomial(n, 0.5, n))
    k = int(np.searchsorted(log_cdf, math.log(0.025), side="right")) - 1
    if k < 0:
        raise ValueError(f"{n} values are too few for a 95 % interval of their median: at least 6 are needed")
    return float(np.median(ordered)), (float(ordered[k]), float(ordered[n - 1 - k]))
