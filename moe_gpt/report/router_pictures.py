"""Pictures of what one run's routers did over training, a line for each layer: balance, certainty, settling.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs. The
quantities are those of ``moe_gpt.measure.routing``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_gpt.measure import routing
from moe_gpt.report import pictures
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.recorded import EvaluationArrays, RunRecords
from moe_gpt.report.series import Series, spread
from moe_gpt.report.words import words


class _Panel(NamedTuple):
    """Lines by layer over tokens."""

    title: str
    unit: str
    series: Series
    """Its values are (n_records, L)."""

    @property
    def name(self) -> str:
        """The title, or the unit of a panel that stands alone."""
        return self.title or self.unit


def draw_violation(run: RunRecords) -> Picture:
    """Draw how far the busiest expert is above the mean: in training batches and on held-out text."""
    tokens, arrays = run.over_training(lambda arrays: arrays.tokens_per_expert)
    held_out = Series(tokens, np.array([routing.max_violation(found.total_counts()) for found in arrays]))
    found = {"in training batches": run.record_values("routing", "max_violation"), "on held-out text": held_out}
    drawn = [_Panel(title, "largest load - 1", series) for title, series in found.items() if series.is_there]
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
    return _lines_by_layer(
        name, [_Panel(title, unit, run.record_values("routing", key)) for title, unit, key in panels]
    )


def draw_gradients(run: RunRecords) -> Picture:
    """Draw the router's gradient from cross entropy alone, relative to the experts'."""
    tokens, arrays = run.over_training(lambda arrays: arrays.gradients)
    need(arrays, "no evaluation has recorded gradients")
    routers, experts = np.array([found.gradients for found in arrays], dtype=float).transpose(1, 0, 2)
    ratio = np.divide(routers, experts, out=np.full_like(routers, np.nan), where=experts > 0)
    panel = _Panel("", "router / experts", Series(tokens, ratio))
    return _lines_by_layer("router-gradient", [panel], log_scale=bool((np.nan_to_num(ratio) > 0).any()))


def draw_dropped(run: RunRecords) -> list[Picture]:
    """Draw the share of assignments that found their expert full; nothing where none did."""
    tokens, fractions = run.record_values("routing", "dropped_fraction")
    has_dropped = any(line.get("dropped_fraction") for line in run.steps)
    panel = _Panel("", "% of assignments", Series(tokens, 100 * fractions))
    return [_lines_by_layer("dropped", [panel])] if has_dropped else []


def draw_saturation(run: RunRecords) -> Picture:
    """Draw how much of the final routing each evaluation already has."""
    times, arrays = run.over_training(EvaluationArrays.n_choices)
    need(len(arrays) >= 2, f"it takes two evaluations with kept routing, there is {'one' if arrays else 'none'}")
    final, is_same = arrays[-1].choices(), np.array([found.has_same_text(arrays[-1]) for found in arrays])
    shares = [routing.saturation(arrays[place].choices(), final) for place in np.flatnonzero(is_same)]
    panel = _Panel("", "share of the final experts", Series(times[is_same], np.array(shares)))
    return _lines_by_layer("saturation", [panel], chance=final.shape[-1] / run.n_experts)


def _lines_by_layer(name: str, drawn: list[_Panel], chance: float | None = None, log_scale: bool = False) -> Picture:
    """Draw panels of values over tokens, with a line for each layer."""
    lacking = ", ".join(panel.name for panel in drawn if not panel.series.is_there)
    need(not lacking, f"not recorded: {lacking}")
    n_layers, n_columns = drawn[0].series.values.shape[1], min(2, len(drawn))
    shown = spread(n_layers, pictures.MOST_LAYERS)
    with pictures.panels([panel.title for panel in drawn], n_columns, (0.6, 1.75), sharex=True) as (figure, grid):
        for axes, (_, _, series) in zip(grid, drawn, strict=True):
            lines = [Series(series.tokens, series.values[:, layer]) for layer in shown]
            pictures.draw_lines(axes, dict(zip(pictures.titles_of(shown), lines, strict=True)))
            if chance is not None:
                axes.axhline(chance, color="#888888", linestyle="--", linewidth=1, label="chance")
            if log_scale:
                pictures.log_axis(axes)
        pictures.label_panels(grid, n_columns, [panel.unit for panel in drawn], pictures.count_axis)
        pictures.legend_below(figure, grid[:1])
        facts = {"panels": drawn, "chance": chance, "shown": shown, "n_layers": n_layers}
        return pictures.finish(figure, name, _table_by_layer(drawn, shown), **facts)


def _table_by_layer(drawn: list[_Panel], shown: list[int]) -> Table:
    kept = [(panel.name, panel.series.spread(12)) for panel in drawn]
    rows = [(name, tokens, *values[shown]) for name, series in kept for tokens, values in zip(*series, strict=True)]
    return Table(("quantity", "tokens seen", *pictures.titles_of(shown)), rows)
