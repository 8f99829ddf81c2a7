"""A scaling law that predicts: L(C) = a·C^(-b) + c of the loss over the compute, from a ladder of small runs.

The form is that of the GPT-4 report (arXiv 2303.08774, section 3). For a given exponent b it is linear in a and c, so
the fit tries exponents and solves the rest (variable projection; arXiv 2603.22339): there are no starting points, and
nothing that fails to converge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from moe_gpt.errors import InputError
from moe_gpt.studies.statistics import LEVEL, pooled_spread

LEAST_SIZES = 4
"""A law of three numbers through three points says nothing about its error."""
_EXPONENTS = np.geomspace(0.005, 2.0, 150)
_N_DRAWS = 1000


class Law(NamedTuple):
    """a·C^(-b) + c, with C in units of ``unit``."""

    a: float
    b: float
    c: float
    unit: float
    is_open: bool
    """Whether the data leave b open: it is the smallest or the largest that was tried, or nothing falls."""

    def at(self, compute: float) -> float:
        """Return the loss after so much compute."""
        return self.a * (compute / self.unit) ** -self.b + self.c


class Prediction(NamedTuple):
    """What a ladder says of a larger run."""

    loss: float
    interval: tuple[float, float] | None
    """95 % interval of the loss of one such run; None where no size has two seeds."""
    law: Law
    power_law: float
    """The loss by a·C^(-b), the rival without c."""
    sd: float | None
    """Standard deviation of one run about its size's mean."""


def fit_law(compute: Sequence[float], losses: Sequence[float], has_floor: bool = True) -> Law:
    """Return the law with the least sum of squares, where a and c are not negative.

    Args:
        compute: of each run, in any unit, such as FLOPs.
        losses: of each run.
        has_floor: whether there is a c; without, it is a power law.

    Raises:
        InputError: for fewer than ``LEAST_SIZES`` different computes, or numbers that are not finite and positive.
    """
    c, y = _checked(compute, losses)
    unit = float(np.exp(np.log(c).mean()))
    x, place = c / unit, int(_fit(c / unit, y[None], has_floor)[0])
    low, high = _EXPONENTS[max(0, place - 1)], _EXPONENTS[min(place + 1, len(_EXPONENTS) - 1)]
    best = optimize.minimize_scalar(
        lambda b: _solve(x, y[None], b, has_floor)[2][0], bounds=(low, high), options={"xatol": 1e-10}
    )
    b = float(best.x)
    a, floor, _ = (float(part[0]) for part in _solve(x, y[None], b, has_floor))
    return Law(a, b, floor, unit, place in (0, len(_EXPONENTS) - 1) or bool(np.ptp(y) == 0))


def _checked(compute: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    c, y = (np.asarray(values, dtype=float) for values in (compute, losses))
    if not (np.isfinite([c, y]).all() and (c > 0).all() and (y > 0).all()):
        raise InputError("a law needs computes and losses that are finite and positive")
    if len(np.unique(c)) < LEAST_SIZES:
        raise InputError(f"a law needs at least {LEAST_SIZES} sizes, got {len(np.unique(c))}; add arms to the ladder")
    return c, y


def _solve(x: np.ndarray, y: np.ndarray, exponent: float, has_floor: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best a and c, neither below 0, and the sum of squares, (draws,) each, for computes (runs,)."""
    power = x**-exponent
    a, c = (y @ power) / (power @ power), np.zeros(len(y))
    if has_floor:
        centred = power - power.mean()
        with_floor = (y @ centred) / (centred @ centred)
        floor = y.mean(1) - with_floor * power.mean()
        is_allowed = (floor >= 0) & (with_floor >= 0)
        a, c = np.where(is_allowed, with_floor, a), np.where(is_allowed, floor, c)
    return a, c, ((y - a[:, None] * power - c[:, None]) ** 2).sum(1)


def _fit(x: np.ndarray, y: np.ndarray, has_floor: bool) -> np.ndarray:
    """Return the place of the best exponent in the grid, for losses (draws, runs)."""
    return np.argmin([_solve(x, y, exponent, has_floor)[2] for exponent in _EXPONENTS], axis=0)


def predict(compute: Sequence[float], losses: Sequence[float], target: float, seed: int = 0) -> Prediction:
    """Return what the runs of a ladder say of a run of more compute.

    The interval is of a parametric bootstrap: ladders are drawn from the law with the runs' own spread, fitted again,
    and the larger run has the same spread.

    Args:
        compute: of each run of the ladder; runs of one size have the same.
        losses: of each run.
        target: compute of the run to predict.
        seed: of the bootstrap.

    Raises:
        InputError: as ``fit_law``, and where the ladder has the target's compute or more.
    """
    law, power_law = fit_law(compute, losses), fit_law(compute, losses, has_floor=False)
    if target <= max(compute):
        raise InputError(f"a law predicts runs beyond the ladder, which ends at {max(compute):.3g}, got {target:.3g}")
    c, y = np.asarray(compute, dtype=float), np.asarray(losses, dtype=float)
    spread = pooled_spread({str(size): y[c == size].tolist() for size in np.unique(c)})
    interval = None
    if spread:
        rng = np.random.default_rng(seed)
        centre = np.array([law.at(each) for each in c])
        draws = centre + rng.normal(0, spread.sd, (_N_DRAWS, len(c)))
        found = _extrapolate(c / law.unit, draws, target / law.unit) + rng.normal(0, spread.sd, _N_DRAWS)
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
    return Prediction(law.at(target), interval, law, power_law.at(target), spread.sd if spread else None)


def _extrapolate(x: np.ndarray, y: np.ndarray, target: float) -> np.ndarray:
    """Return the loss at the target by a fit of each draw (draws,)."""
    places, found = _fit(x, y, has_floor=True), np.empty(len(y))
    for place in np.unique(places):
        a, c, _ = _solve(x, y[places == place], _EXPONENTS[place], has_floor=True)
        found[places == place] = a * target ** -_EXPONENTS[place] + c
    return found
