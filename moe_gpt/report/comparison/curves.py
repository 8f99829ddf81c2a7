"""Validation curves of several runs, over what they cost: text, compute and time."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_gpt.report.comparison.runs import ComparedRun, Group
from moe_gpt.report.pictures import Picture, Table, finish, legend_below, line_look, marks, panels
from moe_gpt.terminal.numbers import FLOPS, PARAMETERS, TIME, TOKENS, Units, format_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 7.2


class Metric(NamedTuple):
    """The score that runs are compared by."""

    key: str
    unit: str


NATS, BITS = Metric("ce_loss", "nats per token"), Metric("bits_per_byte", "bits per byte")


class Quantity(NamedTuple):
    """A size of a run, or what it cost."""

    key: str
    """In ``ComparedRun.totals``."""
    label: str
    units: Units
    picture: str = ""
    """Where curves over it are drawn: the name in picture_words.yaml."""


QUANTITIES = (
    Quantity("tokens", "Text seen", TOKENS, "compare-tokens"),
    Quantity("active", "Active", PARAMETERS),
    Quantity("total", "Total", PARAMETERS),
    Quantity("flops", "Training compute", FLOPS, "compare-flops"),
    Quantity("seconds", "Training time", TIME, "compare-time"),
)


class Curve(NamedTuple):
    """A run's scores on one source."""

    run: ComparedRun
    look: dict[str, Any]
    source: str
    costs: np.ndarray
    scores: np.ndarray


class Curves(NamedTuple):
    """All curves over one cost."""

    cost: Quantity
    metric: Metric
    curves: list[Curve]

    @property
    def runs(self) -> list[ComparedRun]:
        """The runs that have a curve."""
        return [curve.run for curve in self.curves]

    @property
    def by_source(self) -> dict[str, list[Curve]]:
        """The curves of each source."""
        return {source: list(of) for source, of in itertools.groupby(self.curves, lambda curve: curve.source)}

    @property
    def unit(self) -> tuple[float, str]:
        """Size and name of the unit that fits the largest cost."""
        return self.cost.units.fitting(max(curve.costs.max() for curve in self.curves))


def curves_over(cost: Quantity, metric: Metric, sources: Sequence[str], groups: Sequence[Group]) -> Curves:
    """Return the curves of all runs with scores and known cost; the runs of a group look the same."""
    members = [(run, line_look(index)) for index, group in enumerate(groups) for run in group.runs]
    curves = []
    for source, (run, look) in itertools.product(sources, members):
        scores = run.records.scores(source, metric.key)
        costs = run.spent(cost.key, scores.tokens)
        if scores.is_there and costs is not None:
            curves.append(Curve(run, look, source, costs, scores.values))
    return Curves(cost, metric, curves)


def draw_curves(found: Curves, groups: Sequence[Group]) -> Picture:
    """Draw a panel for each source; the runs of a group look the same, and the words give their mean."""
    cost, (size, unit), by_source = found.cost, found.unit, found.by_source
    looks = {g.label: line_look(index) for index, g in enumerate(groups) if set(g.runs) & set(found.runs)}
    units, label_x = [f"Validation loss ({found.metric.unit})"] * len(by_source), f"{cost.label} ({unit})"
    layout = (units, min(3, len(by_source)), (0.0, 2.9), operator.methodcaller("set_xlabel", label_x))
    with panels(list(by_source), *layout, width=_WIDTH) as (figure, grid):
        for axes, curves in zip(grid, by_source.values(), strict=True):
            _draw_panel(axes, curves, size)
        legend_below(figure, {label: grid[0].plot([], [], **look)[0] for label, look in looks.items()})
        ends = {source: _ends(cost, curves, groups) for source, curves in by_source.items()}
        return finish(figure, cost.picture, _table(found), metric=found.metric, label=cost.label, ends=ends)


def _draw_panel(axes: Axes, curves: Sequence[Curve], size: float) -> None:
    """Draw curves, with the axis for what comes after each one's first tenth: it would press the rest together.

    The last two points of every curve are inside, so that a short run is more than a dot.
    """
    shown: list[float] = []
    for curve in curves:
        axes.plot(curve.costs / size, curve.scores, **curve.look | marks(len(curve.scores)))
        axes.plot(curve.costs[-1:] / size, curve.scores[-1:], "o", markersize=4, color=curve.look["color"])
        start = int(np.searchsorted(curve.costs, curve.costs[-1] / 10))
        shown.extend(curve.scores[min(start, max(0, len(curve.scores) - 2)) :])
    margin = 0.05 * np.ptp(shown)
    if margin:
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _table(found: Curves) -> Table:
    size, unit = found.unit
    rows = [
        (curve.source, curve.run.label, format_digits(spent / size), format_digits(score))
        for curve in found.curves
        for spent, score in zip(curve.costs, curve.scores, strict=True)
    ]
    return Table(("Source", "Run", f"{found.cost.label} ({unit})", f"Validation loss ({found.metric.unit})"), rows)


class End(NamedTuple):
    """Where a group's runs end on the average; sorted by score."""

    score: float
    spent: str
    label: str


def _ends(cost: Quantity, curves: Sequence[Curve], groups: Sequence[Group]) -> list[End]:
    ends = []
    for group in groups:
        found = [(curve.scores[-1], curve.costs[-1]) for curve in curves if curve.run in group.runs]
        if found:
            score, spent = np.mean(found, axis=0).tolist()
            ends.append(End(score, cost.units.format(spent), group.label + " on average" * (len(group.runs) > 1)))
    return sorted(ends)
