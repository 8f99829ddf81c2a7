"""Pictures of what one run's experts got: load, load over training, pairs of experts, sources of text.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs. The
quantities are those of ``moe_gpt.measure.routing``.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_gpt.measure import routing
from moe_gpt.report import pictures
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.recorded import RunRecords
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
_EXPERTS, _PARTNERS = (operator.methodcaller("set_xlabel", label) for label in ("expert", "with expert"))


def draw_load(run: RunRecords) -> Picture:
    """Draw each expert's load on held-out text at the last evaluation: layers by experts."""
    arrays = run.last_with_counts()
    loads = routing.load(arrays.total_counts())
    n_layers, n_experts = loads.shape
    with pictures.drawing(height=1.2 + min(0.28 * max(n_layers, 2), 4.5)) as (figure, axes):
        _draw_ratios(axes, np.arange(n_experts + 1), np.arange(n_layers + 1), loads)
        if loads.size <= 256 and n_experts <= 24:  # of more, the numbers would run into each other
            _write_cells(axes, loads)
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_xticks(np.array(spread(n_experts, 16)) + 0.5, map(str, spread(n_experts, 16)))
        axes.set_yticks(np.array(spread(n_layers, 16)) + 0.5, map(str, spread(n_layers, 16)))
        axes.invert_yaxis()
        _explain_colours(figure, [axes], "load (1 = even)")
        table = Table.of({"layer": range(n_layers)} | {f"expert {e}": loads[:, e] for e in range(n_experts)})
        return pictures.finish(figure, "load", table, step=arrays.step, loads=loads)


def _draw_ratios(axes: Axes, x: np.ndarray, y: np.ndarray, ratios: np.ndarray) -> None:
    """Draw a map of what is relative to an even share or to chance: 1 is white, more orange to brown, less violet.

    Args:
        axes: to draw in.
        x: borders of the columns.
        y: borders of the rows.
        ratios: (n_rows, n_columns), shown in doublings from a quarter to four times; nan is left out.
    """
    with np.errstate(divide="ignore"):
        shades = np.clip(np.log2(ratios), -2, 2)
    axes.pcolormesh(x, y, shades, cmap="PuOr_r", vmin=-2, vmax=2, rasterized=True)
    axes.grid(False)


def _explain_colours(figure: Figure, panels: Sequence[Axes], label: str) -> None:
    """Draw the bar that says which ratio a colour of ``_draw_ratios`` is."""
    aspect = max(20, 8 * figure.get_figheight())
    drawn = panels[-1].collections[0]
    bar = figure.colorbar(drawn, ax=list(panels), label=label, pad=0.01, extend="both", aspect=aspect)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])


def _write_cells(axes: Axes, values: np.ndarray) -> None:
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
    for (row, column), value in np.ndenumerate(values):
        colour = "#000000" if 0.4 < value < 2.5 else "#ffffff"
        axes.text(column + 0.5, row + 0.5, f"{value:.1f}", color=colour, **look)


def draw_load_over_training(run: RunRecords) -> Picture:
    """Draw each expert's load in the recorded steps' batches, a panel for each layer."""
    series = run.record_values("routing", "load")
    need(series.is_there, "no step has recorded expert loads")
    _, n_layers, n_experts = series.values.shape
    drawn, places = series.spread(_MOST_COLUMNS), np.arange(n_experts + 1) - 0.5
    layout = (n_layers, pictures.MOST_LAYERS, 2, (0.9, 1.35), "expert", pictures.count_axis)
    with pictures.by_layer(*layout) as (figure, panels, layers):
        for layer, axes in panels.items():
            _draw_ratios(axes, _edges(drawn.tokens), places, drawn.values[:, layer].T)
        _explain_colours(figure, list(panels.values()), "load (1 = even)")
        table = _table_by_expert(drawn.spread(6), panels)
        return pictures.finish(figure, "load-over-training", table, loads=series.values, **layers)


def _table_by_expert(loads: Series, layers: Iterable[int]) -> Table:
    times = [f"at {format_count(tokens)} tokens" for tokens in loads.tokens]
    cells = itertools.product(layers, range(loads.values.shape[2]))
    return Table(("layer", "expert", *times), [(layer, e, *loads.values[:, layer, e]) for layer, e in cells])


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders half-way between neighbouring centres, for a map whose columns are not equally wide."""
    if len(centres) == 1:
        return np.array([0.0, 2 * centres[0] or 1.0])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]])


def draw_co_activation(run: RunRecords) -> Picture:
    """Draw which pairs of experts meet more or less often than their loads alone would give."""
    choices, n_experts = run.last_with_choices().choices(), run.n_experts
    need(choices.shape[-1] >= 2, "every token goes to a single expert, so there are no pairs")
    n_layers, places, pairs = len(choices), np.arange(n_experts + 1) - 0.5, []
    layout = (n_layers, pictures.MOST_LAYERS, min(4, n_layers), (0.8, 1.3), "expert", _PARTNERS)
    with pictures.by_layer(*layout) as (figure, panels, layers):
        for layer, axes in panels.items():
            lift = _lift(choices[layer], n_experts)
            pairs.append(_strongest_pairs(layer, lift))
            _draw_ratios(axes, places, places, lift)
            axes.set_facecolor("#9a9a9a")
            axes.set(xlim=(-0.5, n_experts - 0.5), ylim=(n_experts - 0.5, -0.5))
        _explain_colours(figure, list(panels.values()), "times chance")
        table = Table(_PAIR_COLUMNS, list(itertools.chain(*pairs)))
        most = [rows[0] for rows in pairs if rows]
        return pictures.finish(figure, "co-activation", table, fewest=_FEWEST_MEETINGS, most=most, **layers)


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
    return draw_shares("domains", *run.counts_by_source(), unit="% of the source")


def draw_shares(name: str, sources: Sequence[str], counts: np.ndarray, unit: str, **facts: Any) -> Picture:
    """Draw what share of its assignments each expert gets, grouped bars by layer.

    Args:
        name: of the picture, in picture_words.yaml.
        sources: what the bars of a group are called.
        counts: assignments of each (n_sources, L, E).
        unit: of the vertical axes.
        facts: what the picture's words are about, besides the shares.
    """
    shares = 100 * routing.domain_shares(counts)  # (n_sources, L, E)
    n_sources, n_layers, n_experts = shares.shape
    is_small = n_experts * n_sources <= 64
    most, n_columns, n_ticks = (pictures.MOST_LAYERS, 2, 6) if is_small else (pictures.MOST_LAYERS // 2, 1, 17)
    layout = (n_layers, most, n_columns, (0.6, 1.45), unit, _EXPERTS)
    with pictures.by_layer(*layout) as (figure, panels, layers):
        rows, differences = [], []
        for layer, axes in panels.items():
            _draw_bars(axes, dict(zip(sources, shares[:, layer], strict=True)))
            axes.set_xticks(spread(n_experts, n_ticks))
            axes.grid(axis="x", visible=False)
            rows += [(layer, expert, *of) for expert, of in enumerate(shares[:, layer].T)]
            expert = int(np.argmax(np.ptp(shares[:, layer], axis=0)))
            differences.append((layer, expert, list(zip(sources, shares[:, layer, expert], strict=True))))
        pictures.legend_below(figure, pictures.labelled(panels[0]))
        table = Table(("layer", "expert", *(f"{source} (%)" for source in sources)), rows)
        facts |= {"differences": differences, "n_experts": n_experts, **layers}
        return pictures.finish(figure, name, table, **facts)


def _draw_bars(axes: Axes, shares: dict[str, np.ndarray]) -> None:
    """Draw a bar for each expert and source, those of an expert side by side, and a line at the even share."""
    width = 0.84 / len(shares)
    for index, (source, values) in enumerate(shares.items()):
        places = np.arange(len(values)) + (index - (len(shares) - 1) / 2) * width
        axes.bar(places, values, width, color=pictures.COLOURS[index % len(pictures.COLOURS)], label=source)
    axes.axhline(100 / len(values), color="#888888", linestyle="--", linewidth=1)
