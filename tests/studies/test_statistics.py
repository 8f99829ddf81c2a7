"""Intervals, tests and power, against scipy and against simulated studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moe_gpt.studies.statistics import (
    Spread,
    compare,
    detectable,
    equivalence_p,
    holm,
    own_variance,
    pooled_spread,
)

ONE, OTHER = [3.908, 3.899, 3.895], [3.956, 3.946, 3.973]
N_STUDIES = 4000


def test_welch_is_that_of_scipy():
    """Difference, interval and p value."""
    found, wanted = compare(ONE, OTHER), stats.ttest_ind(OTHER, ONE, equal_var=False)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval()))


def test_with_the_spread_of_two_arms_it_is_students():
    """The pooled form of two arms alone is the usual t test."""
    found = compare(ONE, OTHER, pooled_spread({"one": ONE, "other": OTHER}))
    wanted = stats.ttest_ind(OTHER, ONE)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval()))


def test_the_spread_is_pooled_over_all_arms_with_two_values():
    """Squares about each arm's own mean, over the sum of degrees of freedom; single values say nothing."""
    arms = {"a": [0.0, 2.0], "b": [10.0, 10.0, 13.0], "alone": [99.0]}
    assert pooled_spread(arms) == (pytest.approx(math.sqrt((2 + 6) / 3)), 3)
    assert pooled_spread({"alone": [1.0]}) is None


@pytest.mark.slow
@pytest.mark.parametrize("pools", [True, False])
def test_intervals_cover_the_truth_as_often_as_they_say(pools):
    """Over simulated studies of five arms with three seeds each; Welch's are a little wide with so few."""
    rng, n_covered = np.random.default_rng(0), 0
    for _ in range(N_STUDIES):
        arms = {str(arm): list(rng.normal(arm, 0.01, 3)) for arm in range(5)}
        found = compare(arms["0"], arms["1"], pooled_spread(arms) if pools else None)
        assert found.interval
        n_covered += found.interval[0] <= 1.0 <= found.interval[1]
    assert 0.93 <= n_covered / N_STUDIES <= (0.97 if pools else 0.98)


@pytest.mark.slow
def test_equivalence_is_seldom_claimed_at_the_margin():
    """Where the truth is the margin, at most 5 % of studies call the arms equivalent; where it is 0, most do."""
    rng, n_claimed = np.random.default_rng(0), {0.02: 0, 0.0: 0}
    for truth in n_claimed:
        for _ in range(N_STUDIES // 2):
            found = compare(rng.normal(0, 0.01, 6), rng.normal(truth, 0.01, 6))
            n_claimed[truth] += equivalence_p(found, 0.02) < 0.05
    assert n_claimed[0.02] <= 0.06 * N_STUDIES / 2
    assert n_claimed[0.0] >= 0.8 * N_STUDIES / 2


def test_one_value_has_a_difference_and_no_interval():
    """Nor any p value."""
    found = compare([1.0], [2.0, 3.0], Spread(0.01, 20))
    assert found == (1.5, None, None, None)
    assert equivalence_p(found, 0.02) is None


def test_equal_values_are_equal_and_not_nan():
    """Also where every value of both arms is the same, and where arms without noise differ."""
    assert compare([1.0, 1.0], [1.0, 1.0])[:3] == (0.0, (0.0, 0.0), 1.0)
    assert compare([1.0, 1.0], [2.0, 2.0])[:3] == (1.0, (1.0, 1.0), 0.0)
    assert equivalence_p(compare([1.0, 1.0], [1.0, 1.0]), 0.02) == 0.0
    assert equivalence_p(compare([1.0, 1.0], [2.0, 2.0]), 0.02) == 1.0


def test_holm_by_hand():
    """The smallest is multiplied by the number of tests, later ones by less, and none falls below an earlier one."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.slow
def test_an_arm_with_its_own_variance_is_found():
    """And hardly ever one that has none."""
    rng = np.random.default_rng(0)
    found = [
        own_variance({str(arm): rng.normal(0, 0.05 if arm == noisy else 0.01, 6) for arm in range(6)})
        for noisy in (0, None)
        for _ in range(200)
    ]
    assert sum("0" in arms for arms in found[:200]) > 160
    assert sum(bool(arms) for arms in found[200:]) < 20
    assert own_variance({"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}) == set()


@pytest.mark.parametrize(("n", "wanted"), [(2, 0.057), (3, 0.031), (6, 0.018), (16, 0.010)])
def test_what_few_seeds_can_see(n, wanted):
    """The figures of a table of power, and those of simulated tests."""
    smallest = detectable(0.010, n, n)
    assert smallest == pytest.approx(wanted, abs=5e-4)
    rng = np.random.default_rng(0)
    p = stats.ttest_ind(rng.normal(0, 0.01, (n, 4000)), rng.normal(smallest, 0.01, (n, 4000))).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.03)
