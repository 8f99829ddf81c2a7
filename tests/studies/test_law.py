"""The law is found where there is one, its interval covers a held-out run, and what cannot be fitted is refused."""

from __future__ import annotations

import numpy as np
import pytest

from moe_gpt.errors import InputError
from moe_gpt.studies.law import fit_law, predict

SIZES = np.geomspace(1e12, 2e14, 6)
TARGET = 2e15


def loss_of(compute: np.ndarray | float) -> np.ndarray | float:
    """Return what a made-up law says."""
    return 2.1 + 30.0 * compute**-0.08


def test_a_law_without_noise_is_found():
    """Its prediction ten times beyond the ladder is the truth."""
    law = fit_law(SIZES, loss_of(SIZES))
    assert law.b == pytest.approx(0.08, rel=1e-5)
    assert law.c == pytest.approx(2.1, rel=1e-5)
    assert law.at(TARGET) == pytest.approx(loss_of(TARGET), rel=1e-6)
    assert not law.is_open


def test_a_floor_below_zero_is_no_floor():
    """Losses that fall ever faster give c = 0."""
    law = fit_law(SIZES, loss_of(SIZES) - 4.0 * np.log(SIZES / SIZES[0]) / 40)
    assert law.c == 0.0


@pytest.mark.slow
def test_the_interval_covers_a_held_out_run():
    """In about 95 % of simulated ladders of six sizes and three seeds; the power law is further off."""
    rng, n_covered, errors, rivals = np.random.default_rng(0), 0, [], []
    compute = np.repeat(SIZES, 3)
    for number in range(80):
        found = predict(compute, loss_of(compute) + rng.normal(0, 0.01, len(compute)), TARGET, seed=number)
        run = loss_of(TARGET) + rng.normal(0, 0.01)
        assert found.interval
        n_covered += found.interval[0] <= run <= found.interval[1]
        errors.append(abs(found.loss / run - 1))
        rivals.append(abs(found.power_law / run - 1))
    assert n_covered / 80 >= 0.85
    assert np.median(errors) < 0.01 < np.median(rivals)


def test_one_seed_a_size_gives_no_interval():
    """Nothing is known of the spread then."""
    found = predict(SIZES, loss_of(SIZES), TARGET)
    assert found.interval is None
    assert found.sd is None


@pytest.mark.parametrize(
    ("compute", "losses", "target", "cause"),
    [
        ([1, 2, 3, 3], [4, 3, 2, 2], 9, "at least 4 sizes, got 3"),
        ([1, 2, 3, 4], [4, 3, 2, float("nan")], 9, "finite and positive"),
        ([1, 2, 3, 4], [4, 3, 2, 1.5], 4, "beyond the ladder, which ends at 4, got 4"),
    ],
)
def test_what_cannot_be_fitted_is_refused(compute, losses, target, cause):
    """With what would be right."""
    with pytest.raises(InputError, match=cause):
        predict(compute, losses, target)


def test_an_exponent_that_the_data_do_not_fix_is_marked():
    """Equal losses fit every exponent."""
    assert fit_law([1, 2, 3, 4], [2.0, 2.0, 2.0, 2.0]).is_open
