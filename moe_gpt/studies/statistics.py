"""What a few seeds say about a difference: intervals, tests of equality and of equivalence, and the power to see it.

A value is the score of one run, in nats per token; an arm has one for each seed. Runs of different arms are compared
as unpaired: the same seed in two arms shares no noise worth pairing. All tests are two-sided at 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
_OTHER_VARIANCE = 0.05
"""An arm has a variance of its own where Levene's test says so at this level, Holm's correction included."""
_FARTHEST = 10.0
"""Standard errors beyond the critical value at which any power asked for is reached."""
Arms = Mapping[str, Sequence[float]]


class Spread(NamedTuple):
    """The standard deviation of one run about its arm's mean, and its degrees of freedom."""

    sd: float
    df: float


class Difference(NamedTuple):
    """The mean of a second arm minus that of a first one."""

    difference: float
    interval: tuple[float, float] | None
    """95 % interval; None where an arm has one value, or where nothing is known of the spread."""
    p: float | None
    """Of the test that the means are equal."""
    error: Spread | None
    """The difference's standard error, and its degrees of freedom."""


def pooled_spread(arms: Arms) -> Spread | None:
    """Return the spread of a run, taken over all arms with two values or more; None where there are none."""
    several = [np.asarray(values, dtype=float) for values in arms.values() if len(values) > 1]
    df = sum(len(values) - 1 for values in several)
    if not df:
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
    return Spread(math.sqrt(squares / df), df)


def own_variance(arms: Arms) -> set[str]:
    """Return the arms whose variance is not that of the others (Levene's test with medians, Holm's correction)."""
    several = {name: values for name, values in arms.items() if len(values) > 2}
    if len(several) < 2:
        return set()
    tests = {}
    for name, values in several.items():
        # distances to the own median, so that arms with different means can be joined
        own, others = _distances(values), np.concatenate([_distances(v) for n, v in several.items() if n != name])
        tests[name] = _p_of_equal(own, others)
    return {name for name, p in zip(tests, holm(list(tests.values())), strict=True) if p < _OTHER_VARIANCE}


def _distances(values: Sequence[float]) -> np.ndarray:
    """Return the distances to the median; of an odd number without the one that is 0 always."""
    distances = np.abs(np.asarray(values, dtype=float) - np.median(values))
    return np.sort(distances)[len(values) % 2 :]


def _p_of_equal(one: np.ndarray, other: np.ndarray) -> float:
    if np.ptp(np.concatenate([one, other])) == 0:
        return 1.0
    return float(stats.ttest_ind(one, other).pvalue)


def compare(first: Sequence[float], second: Sequence[float], spread: Spread | None = None) -> Difference:
    """Return the difference of two arms' means with its interval.

    Args:
        first: values of one arm.
        second: values of the other.
        spread: that of all arms of the study; None takes the two arms' own variances (Welch).
    """
    one, other = (np.asarray(values, dtype=float) for values in (first, second))
    difference = float(other.mean() - one.mean())
    if min(len(one), len(other)) < 2:
        return Difference(difference, None, None, None)
    error = _welch_error(one, other) if spread is None else _pooled_error(spread, len(one), len(other))
    if error.sd == 0:  # equal values in each arm: whatever the difference is, it is no chance
        return Difference(difference, (difference, difference), float(difference == 0), error)
    half = float(stats.t.ppf((1 + LEVEL) / 2, error.df)) * error.sd
    p = 2 * float(stats.t.sf(abs(difference) / error.sd, error.df))
    return Difference(difference, (difference - half, difference + half), p, error)


def _pooled_error(spread: Spread, n_first: int, n_second: int) -> Spread:
    return Spread(spread.sd * math.sqrt(1 / n_first + 1 / n_second), spread.df)


def _welch_error(one: np.ndarray, other: np.ndarray) -> Spread:
    """Return the standard error of Welch's test, with the degrees of freedom of Satterthwaite."""
    parts = [float(values.var(ddof=1)) / len(values) for values in (one, other)]
    if not sum(parts):
        return Spread(0.0, len(one) + len(other) - 2)
    squares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True))
    return Spread(math.sqrt(sum(parts)), sum(parts) ** 2 / squares)


def equivalence_p(found: Difference, margin: float) -> float | None:
    """Return the p value of two one-sided tests: small where the difference lies within ±margin (Schuirmann, 1987).

    Args:
        found: the difference.
        margin: stated before the runs; positive.
    """
    if found.error is None:
        return None
    nearest = margin - abs(found.difference)
    if found.error.sd == 0:
        return float(nearest <= 0)
    return float(stats.t.sf(nearest / found.error.sd, found.error.df))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values that are corrected for their number (Holm, 1979): all may be held against one level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def detectable(sd: float, n_first: int, n_second: int, power: float = 0.8, df: float | None = None) -> float:
    """Return the smallest difference that a test sees with a power.

    Args:
        sd: standard deviation of one run.
        n_first: seeds of one arm.
        n_second: seeds of the other.
        power: probability of a p value below 5 %.
        df: degrees of freedom of ``sd``; None for those of the two arms.
    """
    df = df or n_first + n_second - 2
    if df < 1 or not sd:
        return math.inf if df < 1 else 0.0
    critical = stats.t.ppf((1 + LEVEL) / 2, df)

    def lacking(effect: float) -> float:
        return power - float(stats.nct.sf(critical, df, effect))  # the other side's tail adds nothing at such effects

    return optimize.brentq(lacking, 0.0, critical + _FARTHEST) * sd * math.sqrt(1 / n_first + 1 / n_second)
