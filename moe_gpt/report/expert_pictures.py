"""Pictures of what one run's experts got: load, load over training, pairs of experts, sources of text.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs. The
quantities are those of ``moe_gpt.measure.routing``.
"""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_gpt.measure import routing
from moe_gpt.report import pictures
from moe_gpt.report import recorded_routing as recorded
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.router_pictures import MOST_LAYERS, titles_of, which_layers
from moe_gpt.report.run_records import RunRecords
from moe_gpt.report.series import Series, spread
from moe_gpt.terminal.numbers import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAIR_COLUMNS = ("layer", "experts", "times as often as by chance", "rank within the layer")
_FEWEST_MEETINGS = 5
"""Meetings of two experts that chance must give before their ratio means anything."""
_MOST_COLUMNS = 120
"""Recorded steps drawn in a map."""
_RATIO_MAP: dict[str, Any] = {"cmap": "PuOr_r", "vmin": -2, "vmax": 2, "rasterized": True}
"""For what is relative to an even share or to chance, in doublings: 1 is white, more orange to brown, less violet."""


def draw_load(run: RunRecords) -> Picture:
    """Draw each expert's load on held-out text at the last evaluation: layers by experts."""
    arrays = recorded.last_with_counts(run)
    loads = routing.load(recorded.total_counts(arrays))
    n_layers, n_experts = loads.shape
    with pictures.drawing(height=1.2 + min(0.28 * max(n_layers, 2), 4.5)) as (figure, axes):
        mesh = axes.pcolormesh(_shades(loads), **_RATIO_MAP)
        if loads.size <= 256:
            _write_cells(axes, loads)
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_xticks(np.array(spread(n_experts, 16)) + 0.5, map(str, spread(n_experts, 16)))
        axes.set_yticks(np.array(spread(n_layers, 16)) + 0.5, map(str, spread(n_layers, 16)))
        axes.invert_yaxis()
        axes.grid(False)
        _ratio_bar(figure, mesh, axes, "load (1 = even)")
        ranges = [f"layer {i} from {row.min():.2f} to {row.max():.2f}" for i, row in enumerate(loads)]
        return pictures.finish(
            figure,
            "load",
            Table.of({"layer": range(n_layers)} | {f"expert {e}": loads[:, e] for e in range(n_experts)}),
            n_layers=n_layers,
            n_experts=n_experts,
            step=arrays.step,
            told=ranges,
        )


def _shades(ratios: np.ndarray) -> np.ndarray:
    """Return ratios on the scale of ``_RATIO_MAP``: doublings, from a quarter to four times."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log2(ratios), -2, 2)


def _ratio_bar(figure: Figure, drawn: Any, axes: Any, label: str) -> None:
    aspect = max(20, 8 * figure.get_figheight())
    bar = figure.colorbar(drawn, ax=axes, label=label, pad=0.01, extend="both", aspect=aspect)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])


def _write_cells(axes: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "#000000" if 0.4 < value < 2.5 else "#ffffff"
        text = axes.text(column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", color=colour)
        text.set_fontsize(6.5)


def draw_load_over_training(run: RunRecords) -> Picture:
    """Draw each expert's load in the recorded steps' batches, a panel for each layer."""
    series = run.routing_values("load")
    need(series.is_there, "no step has recorded expert loads")
    _, n_layers, n_experts = series.values.shape
    shown, drawn = spread(n_layers, MOST_LAYERS), series.spread(_MOST_COLUMNS)
    with pictures.panels(titles_of(shown), 2, 0.9, 1.35, sharex=True, sharey=True) as (figure, grid):
        for axes, layer in zip(grid, shown, strict=True):
            image = _shades(drawn.values[:, layer].T)
            mesh = axes.pcolormesh(_edges(drawn.tokens), np.arange(n_experts + 1) - 0.5, image, **_RATIO_MAP)
            axes.grid(False)
        pictures.label_panels(grid, 2, ["expert"] * len(shown), pictures.count_axis)
        _ratio_bar(figure, mesh, grid.tolist(), "load (1 = even)")
        first, last = (series.values[place].max(axis=-1) for place in (0, -1))
        told = [f"layer {i} {first[i]:.2f}, then {last[i]:.2f}" for i in shown]
        return pictures.finish(
            figure,
            "load-over-training",
            _table_by_expert(drawn.spread(6), shown),
            told=told,
            layers=which_layers(n_layers, shown),
        )


def _table_by_expert(loads: Series, shown: list[int]) -> Table:
    n_experts = loads.values.shape[2]
    times = [f"at {format_count(tokens)} tokens" for tokens in loads.tokens]
    rows = [(layer, expert, *loads.values[:, layer, expert]) for layer in shown for expert in range(n_experts)]
    return Table(("layer", "expert", *times), rows)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders half-way between neighbouring centres, for a map whose columns are not equally wide."""
    if len(centres) == 1:
        return np.array([0.0, 2 * centres[0] or 1.0])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]])


def draw_co_activation(run: RunRecords) -> Picture:
    """Draw which pairs of experts meet more or less often than their loads alone would give."""
    choices, n_experts = recorded.joined_choices(recorded.last_with_choices(run)), recorded.n_experts_of(run)
    need(choices.shape[-1] >= 2, "every token goes to a single expert, so there are no pairs")
    shown = spread(len(choices), MOST_LAYERS)
    lifts = [_lift(choices[layer], n_experts) for layer in shown]
    n_columns, places = min(4, len(shown)), np.arange(n_experts + 1) - 0.5
    with pictures.panels(titles_of(shown), n_columns, 0.8, 1.3, sharex=True, sharey=True) as (figure, grid):
        for axes, lift in zip(grid, lifts, strict=True):
            image = axes.pcolormesh(places, places, _shades(lift), **_RATIO_MAP)
            axes.set_facecolor("#9a9a9a")
            axes.set(xlim=(-0.5, n_experts - 0.5), ylim=(n_experts - 0.5, -0.5))
            axes.grid(False)
        pictures.label_panels(grid, n_columns, ["expert"] * len(shown), lambda axes: axes.set_xlabel("with expert"))
        _ratio_bar(figure, image, grid.tolist(), "times chance")
        pairs = [_strongest_pairs(*pair) for pair in zip(shown, lifts, strict=True)]
        told = [f"layer {rows[0][0]} experts {rows[0][1]} ({rows[0][2]:.3g} times)" for rows in pairs if rows]
        return pictures.finish(
            figure,
            "co-activation",
            Table(_PAIR_COLUMNS, list(itertools.chain(*pairs))),
            told=told,
            fewest=_FEWEST_MEETINGS,
            layers=which_layers(len(choices), shown),
        )


def _lift(choices: np.ndarray, n_experts: int) -> np.ndarray:
    observed = routing.co_activation(choices, n_experts)
    chance = routing.co_activation_by_chance(choices, n_experts)
    expected = chance * np.bincount(choices.ravel(), minlength=n_experts)[:, None]
    is_known = expected >= _FEWEST_MEETINGS  # nan, which is not, is False
    return np.divide(observed, chance, out=np.full_like(observed, np.nan), where=is_known)


def _strongest_pairs(layer: int, lift: np.ndarray) -> list[tuple[int, str, float, int]]:
    """Return the five pairs of a layer that meet most beyond chance, both directions averaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # pairs of which nothing is known
        mean = np.nanmean([lift, lift.T], axis=0)
    upper, lower = np.tril_indices(len(lift), -1)
    values = mean[upper, lower]
    order = np.argsort(-values, kind="stable")[: min(5, int(np.isfinite(values).sum()))]  # nan comes last
    pairs = zip(lower[order], upper[order], values[order].tolist(), strict=True)
    return [(layer, f"{j} and {i}", value, rank) for rank, (j, i, value) in enumerate(pairs, 1)]


def draw_domains(run: RunRecords) -> Picture:
    """Draw each source's share of every expert, grouped bars by layer."""
    sources, counts = recorded.counts_by_source(run)
    shares = 100 * routing.domain_shares(counts)  # (n_sources, L, E)
    n_sources, n_layers, n_experts = shares.shape
    is_small = n_experts * n_sources <= 64
    n_columns, n_ticks = (2, 6) if is_small else (1, 17)
    shown = spread(n_layers, MOST_LAYERS if is_small else MOST_LAYERS // 2)
    with pictures.panels(titles_of(shown), n_columns, 0.6, 1.45, sharex=True, sharey=True) as (figure, grid):
        for axes, layer in zip(grid, shown, strict=True):
            _draw_bars(axes, dict(zip(sources, shares[:, layer], strict=True)))
            axes.set_xticks(spread(n_experts, n_ticks))
            axes.grid(axis="x", visible=False)
        pictures.label_panels(grid, n_columns, ["% of the source"] * len(shown), lambda axes: axes.set_xlabel("expert"))
        pictures.legend_below(figure, grid[:1])
        told = [_largest_difference(layer, sources, shares[:, layer]) for layer in shown]
        rows = [(layer, e, *shares[:, layer, e]) for layer in shown for e in range(n_experts)]
        return pictures.finish(
            figure,
            "domains",
            Table(("layer", "expert", *(f"{source} (%)" for source in sources)), rows),
            told=told,
            even=100 / n_experts,
            layers=which_layers(n_layers, shown),
        )


def _draw_bars(axes: Axes, shares: dict[str, np.ndarray]) -> None:
    """Draw a bar for each expert and source, those of an expert side by side, and a line at the even share."""
    width = 0.84 / len(shares)
    for index, (source, values) in enumerate(shares.items()):
        places = np.arange(len(values)) + (index - (len(shares) - 1) / 2) * width
        axes.bar(places, values, width, color=pictures.COLOURS[index % len(pictures.COLOURS)], label=source)
    axes.axhline(100 / len(values), color="#888888", linestyle="--", linewidth=1)


def _largest_difference(layer: int, sources: list[str], shares: np.ndarray) -> str:
    """Say which expert the sources (n_sources, E) use most differently."""
    expert = int(np.argmax(np.ptp(shares, axis=0)))
    told = [f"{source} {share:.1f} %" for source, share in zip(sources, shares[:, expert], strict=True)]
    return f"layer {layer} expert {expert}: {', '.join(told)}"
