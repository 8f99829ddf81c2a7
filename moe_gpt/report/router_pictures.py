"""Pictures of what one run's routers did over training, a line for each layer: balance, certainty, settling.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs. The
quantities are those of ``moe_gpt.measure.routing``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_gpt.measure import routing
from moe_gpt.report import pictures
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Panel, Picture
from moe_gpt.report.recorded import EvaluationArrays, RunRecords
from moe_gpt.report.series import Series, spread
from moe_gpt.report.words import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_violation(run: RunRecords) -> Picture:
    """Draw how far the busiest expert is above the mean: in training batches and on held-out text."""
    tokens, arrays = run.over_training(lambda arrays: arrays.tokens_per_expert)
    held_out = Series(tokens, np.array([routing.max_violation(found.total_counts()) for found in arrays]))
    found = {"in training batches": run.record_values("routing", "max_violation"), "on held-out text": held_out}
    drawn = [(title, "largest load - 1", series) for title, series in found.items() if series.is_there]
    need(drawn, "neither a step nor an evaluation has recorded the balance of experts")
    return _lines_by_layer("violation", drawn)


def draw_entropies(run: RunRecords) -> Picture:
    """Draw how sure the router is of single tokens, and how even its probabilities are over all of them."""
    return _recorded_values(run, "entropies")


def draw_router(run: RunRecords) -> Picture:
    """Draw first choice's weight, margin, largest logit and z loss."""
    return _recorded_values(run, "router")


def _recorded_values(run: RunRecords, name: str) -> Picture:
    panels = words()["pictures"][name]["panels"]
    return _lines_by_layer(name, [(title, unit, run.record_values("routing", key)) for title, unit, key in panels])


def draw_gradients(run: RunRecords) -> Picture:
    """Draw the router's gradient from cross entropy alone, relative to the experts'."""
    tokens, arrays = run.over_training(lambda arrays: arrays.gradients)
    need(arrays, "no evaluation has recorded gradients")
    routers, experts = np.array([found.gradients for found in arrays], dtype=float).transpose(1, 0, 2)
    ratio = np.divide(routers, experts, out=np.full_like(routers, np.nan), where=experts > 0)
    can_be_logarithmic = (np.nan_to_num(ratio) > 0).any()
    adjust = pictures.log_axis if can_be_logarithmic else lambda axes: None
    return _lines_by_layer("router-gradient", [("", "router / experts", Series(tokens, ratio))], adjust)


def draw_dropped(run: RunRecords) -> list[Picture]:
    """Draw the share of assignments that found their expert full; nothing where none did."""
    tokens, fractions = run.record_values("routing", "dropped_fraction")
    has_dropped = any(line.get("dropped_fraction") for line in run.steps)
    drawn = [("", "% of assignments", Series(tokens, 100 * fractions))]
    return [_lines_by_layer("dropped", drawn)] if has_dropped else []


def draw_saturation(run: RunRecords) -> Picture:
    """Draw how much of the final routing each evaluation already has."""
    times, arrays = run.over_training(EvaluationArrays.n_choices)
    found = "one" if arrays else "none"
    need(len(arrays) >= 2, f"the picture needs two evaluations that recorded routings, but there is {found}")
    final, is_same = arrays[-1].choices(), np.array([found.has_same_text(arrays[-1]) for found in arrays])
    shares = [routing.saturation(arrays[place].choices(), final) for place in np.flatnonzero(is_same)]
    drawn, chance = Series(times[is_same], np.array(shares)), final.shape[-1] / run.n_experts
    look = {"color": "#888888", "linestyle": "--", "linewidth": 1, "label": "chance"}
    adjust = operator.methodcaller("axhline", chance, **look)
    return _lines_by_layer("saturation", [("", "share of the final experts", drawn)], adjust, chance=chance)


def _lines_by_layer(
    name: str, found: list[tuple[str, str, Series]], adjust: Callable[[Axes], Any] = lambda axes: None, **facts: Any
) -> Picture:
    """Draw panels with a line for each layer: their titles, their units, and values (n_records, L)."""
    lacking = ", ".join(title or unit for title, unit, series in found if not series.is_there)
    need(not lacking, f"not recorded: {lacking}")
    n_layers = found[0][2].values.shape[1]
    facts |= {"shown": (shown := spread(n_layers, pictures.MOST_LAYERS)), "n_layers": n_layers}
    drawn = [Panel(title, unit, _by_layer(series, shown)) for title, unit, series in found]
    return pictures.draw_panels(name, drawn, min(2, len(drawn)), (0.6, 1.75), adjust, **facts)


def _by_layer(series: Series, layers: list[int]) -> dict[str, Series]:
    lines = [Series(series.tokens, series.values[:, layer]) for layer in layers]
    return dict(zip(pictures.titles_of(layers), lines, strict=True))
