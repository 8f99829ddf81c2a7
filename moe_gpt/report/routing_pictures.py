"""Pictures of what one run's routers did: load, balance, certainty, settling, pairs of experts, sources.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs. The
quantities are those of ``moe_gpt.measure.routing``.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_gpt.measure import routing
from moe_gpt.report.pictures import COLOURS, Picture, Table, count_axis, drawing, finish, line_look, log_axis
from moe_gpt.report.recorded_routing import (
    NotRecorded,
    counts_by_source,
    has_same_text,
    joined_choices,
    last_with_choices,
    last_with_counts,
    n_choices,
    n_experts_of,
    tokens_at_evaluations,
    total_counts,
)
from moe_gpt.report.run_pictures import WIDTH, legend_below, shorten, spread
from moe_gpt.report.run_records import RunRecords
from moe_gpt.terminal.numbers import format_count, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEWEST_MEETINGS = 5
"""Meetings of two experts that chance must give before their ratio means anything."""
_MOST_LAYERS = 8
"""Layers drawn as lines or panels; of more, so many are shown, evenly spread."""
_MOST_COLUMNS = 120
"""Recorded steps drawn in a map."""
_RATIO_MAP: dict[str, Any] = {"cmap": "PuOr_r", "vmin": -2, "vmax": 2, "rasterized": True}
"""For what is relative to an even share or to chance, in doublings: 1 is white, orange more, violet less."""


def draw_load(run: RunRecords) -> Picture:
    """Draw each expert's load on held-out text at the last evaluation: layers by experts."""
    arrays = last_with_counts(run)
    loads = routing.load(total_counts(arrays))
    n_layers, n_experts = loads.shape
    with drawing(width=WIDTH, height=1.2 + min(0.28 * max(n_layers, 2), 4.5)) as (figure, axes):
        mesh = axes.pcolormesh(_shades(loads), **_RATIO_MAP)
        if loads.size <= 256:
            _write_cells(axes, loads)
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_xticks(np.array(spread(n_experts, 16)) + 0.5, [str(i) for i in spread(n_experts, 16)])
        axes.set_yticks(np.array(spread(n_layers, 16)) + 0.5, [str(i) for i in spread(n_layers, 16)])
        axes.invert_yaxis()
        axes.grid(False)
        _ratio_bar(figure, mesh, axes, "load (1 = even)")
        ranges = [f"layer {i} from {row.min():.2f} to {row.max():.2f}" for i, row in enumerate(loads)]
        return finish(
            figure,
            "load",
            "Expert load at the end",
            f"Load of {n_experts} experts in {n_layers} layers at step {arrays.step:,}: {'; '.join(ranges)}.",
            "Share of the held-out text's assignments that each expert gets, in units of the even share: 1 is even, 0 "
            "is unused. Colours are logarithmic and end at a quarter and at four times. All sources together, at the "
            "last evaluation.",
            Table(("layer", *(f"expert {e}" for e in range(n_experts))), [(i, *row) for i, row in enumerate(loads)]),
        )


def _shades(ratios: np.ndarray) -> np.ndarray:
    """Return ratios on the scale of ``_RATIO_MAP``: doublings, from a quarter to four times."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log2(ratios), -2, 2)


def _ratio_bar(figure: Figure, drawn: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(
        drawn, ax=axes, label=label, pad=0.01, extend="both", aspect=max(20, 8 * figure.get_figheight())
    )
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])


def _write_cells(axes: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "#000000" if 0.4 < value < 2.5 else "#ffffff"
        text = axes.text(column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", color=colour)
        text.set_fontsize(6.5)


def draw_load_over_training(run: RunRecords) -> Picture:
    """Draw each expert's load in the recorded steps' batches, a panel for each layer."""
    tokens, loads = run.routing_values("load")
    if not len(tokens):
        raise NotRecorded("no step has recorded expert loads")
    _, n_layers, n_experts = loads.shape
    shown, chosen = spread(n_layers, _MOST_LAYERS), spread(len(tokens), _MOST_COLUMNS)
    edges = _edges(tokens[chosen])
    n_rows = -(-len(shown) // 2)
    with drawing(n_rows, 2, width=WIDTH, height=0.9 + 1.35 * n_rows, squeeze=False, sharex=True, sharey=True) as (
        figure,
        grid,
    ):
        for axes, layer in zip(grid.flat, shown, strict=False):
            image = _shades(loads[chosen, layer].T)
            mesh = axes.pcolormesh(edges, np.arange(n_experts + 1) - 0.5, image, **_RATIO_MAP)
            axes.set_title(f"layer {layer}")
            axes.grid(False)
        _label_grid(grid, len(shown), "expert")
        _ratio_bar(figure, mesh, grid, "load (1 = even)")
        rows = [
            (layer, expert, *loads[[chosen[i] for i in spread(len(chosen), 6)], layer, expert])
            for layer in shown
            for expert in range(n_experts)
        ]
        times = [f"at {format_count(tokens[chosen[i]])} tokens" for i in spread(len(chosen), 6)]
        first, last = loads[0].max(axis=-1), loads[-1].max(axis=-1)
        told = [f"layer {i} {first[i]:.2f}, then {last[i]:.2f}" for i in shown]
        return finish(
            figure,
            "load-over-training",
            "Expert load over training",
            f"Load of the busiest expert in the first and the last recorded step: {'; '.join(told)} (1 is even).",
            "The load of each expert (row) in the batch of every recorded step. A row that turns dark violet and "
            f"stays so is an expert that has died. {_which_layers(n_layers, shown)}",
            Table(("layer", "expert", *times), rows),
        )


def draw_violation(run: RunRecords) -> Picture:
    """Draw how far the busiest expert is above the mean: in training batches and on held-out text."""
    tokens, batch = run.routing_values("max_violation")
    at = tokens_at_evaluations(run)
    arrays = [found for found in run.arrays if found.tokens_per_expert and found.step in at]
    if not len(tokens) and not arrays:
        raise NotRecorded("neither a step nor an evaluation has recorded the balance of experts")
    held_out = np.array([routing.max_violation(total_counts(found)) for found in arrays])
    times = np.array([at[found.step] for found in arrays], dtype=float)
    unit = "largest load - 1"
    panels = [_Panel("in training batches", unit, tokens, batch), _Panel("on held-out text", unit, times, held_out)]
    return _lines_by_layer(
        [panel for panel in panels if len(panel.tokens)],
        "violation",
        "Imbalance: how far the busiest expert is above the mean",
        "Largest load minus 1 (MaxVio) by layer: 0 is perfectly even, 1 means that the busiest expert has twice the "
        "mean load. A single batch scatters more than all held-out text, and a small batch more than a large one.",
    )


def draw_entropies(run: RunRecords) -> Picture:
    """Draw how sure the router is of single tokens, and how even its probabilities are over all of them."""
    unit = "fraction of the maximum"
    panels = [
        _Panel("of a token's probabilities", unit, *run.routing_values("token_entropy")),
        _Panel("of the mean probabilities", unit, *run.routing_values("mean_probability_entropy")),
    ]
    return _lines_by_layer(
        panels,
        "entropies",
        "Entropies of the router's probabilities",
        "Both as a fraction of the largest possible, ln(number of experts). Left: how unsure the router is of a single "
        "token; it falls as experts become distinct. Right: how even the router is over all tokens; it should stay "
        "near 1. Where both are equal, the router ignores its input.",
    )


def draw_router(run: RunRecords) -> Picture:
    """Draw first choice's weight, margin, largest logit and z loss."""
    panels = [
        _Panel("weight of the first choice", "mixing weight", *run.routing_values("first_weight")),
        _Panel("margin of the first choice", "probability", *run.routing_values("margin")),
        _Panel("largest logit", "logit", *run.routing_values("largest_logit")),
        _Panel("router z loss", "squared logarithm", *run.routing_values("router_z_loss")),
    ]
    return _lines_by_layer(
        panels,
        "router",
        "How decided the routers are",
        "Means over the tokens of a recorded step: the weight of the first choice; its probability minus the next "
        "expert's; the largest router logit of any token; and the router z loss, the mean squared logarithm of the "
        "softmax's denominator, before weighting. Logits that grow without end make training unstable.",
    )


def draw_gradients(run: RunRecords) -> Picture:
    """Draw the router's gradient from cross entropy alone, relative to the experts'."""
    at = tokens_at_evaluations(run)
    found = [(at[a.step], a.gradients) for a in run.arrays if a.gradients is not None and a.step in at]
    if not found:
        raise NotRecorded("no evaluation has recorded gradients")
    routers = np.array([gradients.routers for _, gradients in found], dtype=float)
    experts = np.array([gradients.experts for _, gradients in found], dtype=float)
    ratio = np.divide(routers, experts, out=np.full_like(routers, np.nan), where=experts > 0)
    tokens = np.array([seen for seen, _ in found], dtype=float)
    return _lines_by_layer(
        [_Panel("", "router / experts", tokens, ratio)],
        "router-gradient",
        "Do the routers learn from cross entropy?",
        "Norm of the router's gradient from cross entropy alone, without the auxiliary losses, divided by the norm of "
        "the same layer's experts' gradient, at every evaluation. Near 0 the router does not learn which expert "
        "predicts better.",
        log_scale=bool((np.nan_to_num(ratio) > 0).any()),
    )


def draw_dropped(run: RunRecords) -> Picture:
    """Draw the share of assignments that found their expert full."""
    tokens, dropped = run.routing_values("dropped_fraction")
    return _lines_by_layer(
        [_Panel("", "% of assignments", tokens, 100 * dropped)],
        "dropped",
        "Dropped assignments",
        "Share of a recorded step's assignments that found their expert full and were left out.",
    )


def draw_saturation(run: RunRecords) -> Picture:
    """Draw how much of the final routing each evaluation already has."""
    at = tokens_at_evaluations(run)
    arrays = [found for found in run.arrays if n_choices(found) and found.step in at]
    if len(arrays) < 2:
        raise NotRecorded(f"it takes two evaluations with kept routing, there is {'one' if arrays else 'none'}")
    final, n_experts = joined_choices(arrays[-1]), n_experts_of(run)
    same = [found for found in arrays if has_same_text(found, arrays[-1])]
    values = np.array([routing.saturation(joined_choices(found), final) for found in same])
    tokens = np.array([at[found.step] for found in same], dtype=float)
    chance = final.shape[-1] / n_experts
    return _lines_by_layer(
        [_Panel("", "share of the final experts", tokens, values)],
        "saturation",
        "Saturation: how early the routing was decided",
        "Share of the last evaluation's experts of a token that the router already chose earlier, over the kept slices "
        f"of all sources; the last value is 1 by definition. Dashed: chance with even loads, {chance:.3g}.",
        chance=chance,
    )


def draw_co_activation(run: RunRecords) -> Picture:
    """Draw which pairs of experts meet more or less often than their loads alone would give."""
    arrays = last_with_choices(run)
    choices, n_experts = joined_choices(arrays), n_experts_of(run)
    if choices.shape[-1] < 2:
        raise NotRecorded("every token goes to a single expert, so there are no pairs")
    lifts = np.array([_lift(layer, n_experts) for layer in choices])
    shown = spread(len(lifts), _MOST_LAYERS)
    n_columns, places = min(4, len(shown)), np.arange(n_experts + 1) - 0.5
    n_rows = -(-len(shown) // n_columns)
    with drawing(
        n_rows, n_columns, width=WIDTH, height=0.8 + 1.3 * n_rows, squeeze=False, sharex=True, sharey=True
    ) as (
        figure,
        grid,
    ):
        for axes, layer in zip(grid.flat, shown, strict=False):
            image = axes.pcolormesh(places, places, _shades(lifts[layer]), **_RATIO_MAP)
            axes.set_facecolor("#9a9a9a")
            axes.set(xlim=(-0.5, n_experts - 0.5), ylim=(n_experts - 0.5, -0.5))
            axes.set_title(f"layer {layer}")
            axes.grid(False)
        _label_grid(grid, len(shown), "expert", "with expert", is_count=False)
        _ratio_bar(figure, image, grid, "times chance")
        rows = [row for layer in shown for row in _strongest_pairs(layer, lifts[layer])]
        told = [f"layer {row[0]} experts {row[1]} ({row[2]:.3g} times)" for row in rows if row[3] == 1]
        return finish(
            figure,
            "co-activation",
            "Pairs of experts",
            f"Which experts are chosen together. Most above chance: {'; '.join(told)}.",
            "How often the expert of a row is chosen together with the expert of a column, divided by what their loads "
            "alone would give; the scale is logarithmic and ends at a quarter and at four times. Grey: an expert with "
            f"itself, or fewer than {_FEWEST_MEETINGS} meetings to expect. {_which_layers(len(lifts), shown)}",
            Table(("layer", "experts", "times as often as by chance", "rank within the layer"), rows),
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
    pairs = [(i, j) for i in range(len(lift)) for j in range(i) if np.isfinite(mean[i, j])]
    pairs = sorted(pairs, key=lambda pair: -mean[pair])[:5]
    return [(layer, f"{j} and {i}", float(mean[i, j]), rank) for rank, (i, j) in enumerate(pairs, 1)]


def draw_domains(run: RunRecords) -> Picture:
    """Draw each source's share of every expert, grouped bars by layer."""
    sources, counts = counts_by_source(run)
    shares = 100 * routing.domain_shares(counts)  # (S, L, E)
    n_layers, n_experts = counts.shape[1:]
    n_bars = n_experts * len(sources)
    shown = spread(n_layers, _MOST_LAYERS if n_bars <= 64 else _MOST_LAYERS // 2)
    n_columns = 2 if n_bars <= 64 else 1
    n_rows = -(-len(shown) // n_columns)
    width, places = 0.84 / len(sources), np.arange(n_experts)
    with drawing(
        n_rows, n_columns, width=WIDTH, height=0.6 + 1.45 * n_rows, squeeze=False, sharex=True, sharey=True
    ) as (
        figure,
        grid,
    ):
        for axes, layer in zip(grid.flat, shown, strict=False):
            for index, source in enumerate(sources):
                offset = (index - (len(sources) - 1) / 2) * width
                colour, label = COLOURS[index % len(COLOURS)], source if layer == shown[0] else None
                axes.bar(places + offset, shares[index, layer], width, color=colour, label=label)
            axes.axhline(100 / n_experts, color="#888888", linestyle="--", linewidth=1)
            axes.set_title(f"layer {layer}")
            axes.set_xticks(spread(n_experts, 6 if n_columns == 2 else 17))
            axes.grid(axis="x", visible=False)
        _label_grid(grid, len(shown), "% of the source", "expert", is_count=False)
        legend_below(figure)
        rows = [(layer, e, *shares[:, layer, e]) for layer in shown for e in range(n_experts)]
        spans = [
            f"layer {layer} expert {e}: " + ", ".join(f"{s} {shares[i, layer, e]:.1f} %" for i, s in enumerate(sources))
            for layer in shown
            for e in [int(np.argmax(np.ptp(shares[:, layer], axis=0)))]
        ]
        return finish(
            figure,
            "domains",
            "Which source goes to which expert",
            f"Share of each source's assignments by expert. Where sources differ most: {'; '.join(spans)}.",
            "Share of each source's assignments that an expert gets, over all held-out tokens at the last evaluation. "
            f"Dashed: the even share, {100 / n_experts:.3g} %. {_which_layers(n_layers, shown)}",
            Table(("layer", "expert", *(f"{source} (%)" for source in sources)), rows),
        )


class _Panel(NamedTuple):
    """Lines by layer over tokens."""

    title: str
    unit: str
    tokens: np.ndarray
    """(R,)"""
    values: np.ndarray
    """(R, L)"""


def _lines_by_layer(
    panels: list[_Panel],
    name: str,
    title: str,
    caption: str,
    chance: float | None = None,
    log_scale: bool = False,
) -> Picture:
    """Draw panels of values over tokens, with a line for each layer.

    Raises:
        NotRecorded: where a panel has no values.
    """
    lacking = [panel.title or panel.unit for panel in panels if not len(panel.tokens)]
    if lacking:
        raise NotRecorded(f"not recorded: {', '.join(lacking)}")
    n_layers = panels[0].values.shape[1]
    shown, n_columns = spread(n_layers, _MOST_LAYERS), min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    with drawing(n_rows, n_columns, width=WIDTH, height=0.6 + 1.75 * n_rows, squeeze=False, sharex=True) as (
        figure,
        grid,
    ):
        for axes, panel in zip(grid.flat, panels, strict=True):
            for index, layer in enumerate(shown):
                look = line_look(index) | ({"marker": "o", "markersize": 3} if len(panel.tokens) <= 20 else {})
                label = f"layer {layer}" if axes is grid.flat[0] else None
                axes.plot(*shorten(panel.tokens, panel.values[:, layer], 300), label=label, **look)
            if chance is not None:
                axes.axhline(chance, color="#888888", linestyle="--", linewidth=1, label="chance")
            if log_scale:
                log_axis(axes)
            axes.set_title(panel.title)
        _label_grid(grid, len(panels), [panel.unit for panel in panels])
        legend_below(figure)
        told = [_in_words(panel, shown) for panel in panels]
        table = _table_by_layer(panels, shown)
        return finish(figure, name, title, " ".join(told), f"{caption} {_which_layers(n_layers, shown)}".strip(), table)


def _in_words(panel: _Panel, shown: list[int]) -> str:
    values = panel.values
    ends = [f"layer {i} {format_number(values[0, i])} to {format_number(values[-1, i])}" for i in shown]
    name = f"{panel.title}, {panel.unit}" if panel.title else panel.unit
    return f"{name[:1].upper()}{name[1:]}, from the first to the last value: {'; '.join(ends)}."


def _table_by_layer(panels: list[_Panel], shown: list[int]) -> Table:
    rows = [
        (panel.title or panel.unit, panel.tokens[i], *panel.values[i, shown])
        for panel in panels
        for i in spread(len(panel.tokens), 12)
    ]
    return Table(("quantity", "tokens seen", *(f"layer {layer}" for layer in shown)), rows)


def _label_grid(
    grid: np.ndarray, n_used: int, y: str | list[str], x: str = "tokens seen", is_count: bool = True
) -> None:
    """Label a grid of panels, with one unit at its left or a unit for each; take away panels that are not used."""
    units = y if isinstance(y, list) else [y] * n_used
    n_rows, n_columns = grid.shape
    for index, axes in enumerate(grid.flat):
        row, column = divmod(index, n_columns)
        if index >= n_used:
            axes.set_visible(False)
            continue
        if not column or units[index] != units[index - column]:
            axes.set_ylabel(units[index])
        if row == n_rows - 1 or index + n_columns >= n_used:
            axes.tick_params(labelbottom=True)
            if is_count:
                count_axis(axes, x)
            else:
                axes.set_xlabel(x)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders half-way between neighbouring centres, for a map whose columns are not equally wide."""
    if len(centres) == 1:
        return np.array([0.0, 2 * centres[0] or 1.0])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]])


def _which_layers(n_layers: int, shown: list[int]) -> str:
    return "" if len(shown) == n_layers else f"Layers shown: {', '.join(map(str, shown))} of 0 to {n_layers - 1}."
