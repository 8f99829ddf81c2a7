"""Pictures of one run's training: loss, schedule, loss by position, norms, speed.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_gpt.report.pictures import (
    COLOURS,
    Picture,
    Table,
    count_axis,
    drawing,
    finish,
    line_look,
    log_axis,
    mark_stages,
)
from moe_gpt.report.recorded_routing import NotRecorded, in_order
from moe_gpt.report.run_records import EvaluationArrays, RunRecords
from moe_gpt.terminal.numbers import format_count, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.6
"""Inches of a picture: between a phone, where its text shrinks to two thirds, and a page, where it grows by a fifth."""
_MOST_POINTS = 1200
"""Points of a line; a longer series is averaged in equal parts."""
_MOST_ROWS = 40
"""Rows of the table behind a line."""


def draw_losses(run: RunRecords) -> Picture:
    """Draw the training loss, raw and smoothed, and each source's validation loss."""
    tokens, losses = run.step_values("ce_loss")
    scores = {source: run.scores(source) for source in run.sources}
    scores = {source: score for source, score in scores.items() if len(score[0])}
    if not len(losses) and not scores:
        raise NotRecorded("neither a training step nor an evaluation is recorded")
    window = max(1, len(losses) // 60)
    smooth = moving_mean(losses, window)
    with drawing(width=WIDTH, height=3.0) as (figure, axes):
        if len(losses):
            axes.plot(*shorten(tokens, losses), color=COLOURS[6], alpha=0.35, linewidth=0.7)
            label = f"training, mean of {window} steps" if window > 1 else "training"
            axes.plot(*shorten(tokens, smooth), color=COLOURS[6], label=label)
        for index, (source, (seen, values)) in enumerate(scores.items()):
            axes.plot(seen, values, label=f"validation: {source}", marker="o", markersize=3, **line_look(index))
        axes.set_ylabel("cross entropy (nats per token)")
        count_axis(axes)
        _show_stages(axes, run)
        legend_below(figure)
        told = [f"{source} from {values[0]:.3f} to {values[-1]:.3f}" for source, (_, values) in scores.items()]
        if len(smooth):
            told.insert(0, f"training from {smooth[0]:.3f} to {smooth[-1]:.3f}")
        return finish(
            figure,
            "losses",
            "Loss",
            f"Cross entropy over {format_count(_last_tokens(run))} tokens: {'; '.join(told)} nats per token.",
            "Cross entropy in nats per token, lower is better: of the training batches (the faint line is every step) "
            f"and of each source's held-out text, at every evaluation. {describe_stages(run)}",
            _table_of_losses(run, tokens, smooth, scores),
        )


def _table_of_losses(
    run: RunRecords, tokens: np.ndarray, smooth: np.ndarray, scores: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Table:
    """Return the losses at the evaluations, or at some steps where there is none."""
    if not scores:
        chosen = spread(len(tokens), _MOST_ROWS)
        return Table(("tokens seen", "training (nats)"), [(tokens[i], smooth[i]) for i in chosen])
    by_source = {source: dict(zip(*score, strict=True)) for source, score in scores.items()}
    times = sorted({seen for values in by_source.values() for seen in values})
    rows = []
    for seen in (times[i] for i in spread(len(times), _MOST_ROWS)):
        before = np.searchsorted(tokens, seen, side="right") - 1
        training = smooth[before] if 0 <= before < len(smooth) else None
        rows.append((seen, training, *(values.get(seen) for values in by_source.values())))
    return Table(("tokens seen", "training (nats)", *(f"{source} (nats)" for source in by_source)), rows)


def draw_schedule(run: RunRecords) -> Picture:
    """Draw learning rate, tokens of a step and sequence length, one above the other."""
    panels = [
        ("lr", "learning rate"),
        ("batch_tokens", "tokens per step"),
        ("seq_len", "tokens per\nsequence"),
    ]
    series = [(label, *run.step_values(key)) for key, label in panels]
    if not all(len(tokens) for _, tokens, _ in series):
        raise NotRecorded("no training step is recorded")
    with drawing(3, 1, width=WIDTH, height=4.0, sharex=True) as (figure, rows):
        for axes, (label, tokens, values) in zip(rows, series, strict=True):
            axes.plot(*shorten(tokens, values), drawstyle="steps-pre", color=COLOURS[0])
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: format_count(value) if value >= 1 else f"{value:g}")
            _show_stages(axes, run, with_numbers=axes is rows[0])
        count_axis(rows[-1])
        chosen = spread(len(series[0][1]), _MOST_ROWS)
        rate, batch, length = (values for _, _, values in series)
        return finish(
            figure,
            "schedule",
            "Learning rate, batch size and sequence length",
            f"The learning rate rises to {rate.max():.2e} and ends at {rate[-1]:.2e}; a step has {batch[0]:,.0f} "
            f"tokens at the start and {batch[-1]:,.0f} at the end; sequences grow from {length[0]:.0f} to "
            f"{length[-1]:.0f}.",
            f"What every optimizer step used. {describe_stages(run)}",
            Table(
                ("tokens seen", "learning rate", "tokens per step", "tokens per sequence"),
                [(series[0][1][i], *(values[i] for _, _, values in series)) for i in chosen],
            ),
        )


def position_edges(length: int) -> list[int]:
    """Return the bounds of positions 0 to 63, 64 to 127, 128 to 255 and so on."""
    return [0, *(64 << i for i in range(40) if 64 << i < length), length]


def mean_by_position(arrays: EvaluationArrays, source: str, edges: Sequence[int]) -> list[float]:
    """Return a source's mean loss in nats between each two edges; nan where nothing was scored."""
    nats, counts = arrays.nats[source], arrays.counts[source]
    sums = [(nats[start:end].sum(), counts[start:end].sum()) for start, end in itertools.pairwise(edges)]
    return [float(total / count) if count else math.nan for total, count in sums]


def draw_positions(run: RunRecords) -> Picture:
    """Draw the loss by place in the sequence, at the first evaluation after a step and at the last."""
    arrays = [found for found in run.arrays if found.nats and found.counts]
    if not arrays:
        raise NotRecorded("no evaluation has kept its losses by position")
    last = arrays[-1]
    first = next((found for found in arrays if found.step > 0), last)
    chosen = {found.step: found for found in (first, last)}
    rows: dict[tuple[int, int], list[float]] = {}
    headings: list[str] = []
    with drawing(width=WIDTH, height=3.0) as (figure, axes):
        for step, found in sorted(chosen.items()):
            sources = [source for source in in_order(run, found.nats) if source in found.counts]
            for index, source in enumerate(sources):
                length = len(found.nats[source])
                fine = list(range(0, length, max(1, length // 64))) + [length]
                look = {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if step == last.step else "--"}
                middles = [(start + end - 1) / 2 for start, end in itertools.pairwise(fine)]
                axes.plot(middles, mean_by_position(found, source, fine), label=f"{source} at step {step:,}", **look)
                edges = position_edges(length)
                for pair, value in zip(itertools.pairwise(edges), mean_by_position(found, source, edges), strict=True):
                    rows.setdefault(pair, []).append(value)
                headings.append(f"{source}, step {step:,} (nats)")
        axes.set_ylabel("cross entropy (nats per token)")
        count_axis(axes, "place in the sequence (tokens before it)")
        legend_below(figure)
        table = Table(
            ("positions", *headings), [(f"{start} to {end - 1}", *values) for (start, end), values in rows.items()]
        )
        told = [f"{start} to {end - 1}: {format_number(values[-1])}" for (start, end), values in rows.items()]
        return finish(
            figure,
            "loss-by-position",
            "Loss by position",
            f"Loss by place in the sequence at steps {' and '.join(f'{step:,}' for step in sorted(chosen))}. "
            f"{headings[-1]}, by positions: {'; '.join(told)}.",
            "Held-out loss by the number of tokens that the model saw before. A model that uses its context predicts "
            "later tokens better, so its line falls; a line that rises at the end says that the context is too long.",
            table,
        )


def draw_norms(run: RunRecords) -> Picture:
    """Draw each group's parameter norm, gradient norm, and update relative to its parameters."""
    groups = list(dict.fromkeys(group for line in run.records for group in line["groups"]))
    if not groups:
        raise NotRecorded("no step has recorded norms")
    kinds = ("parameter_norm", "gradient_norm", "update_norm")
    norms = {(group, kind): run.norms(group, kind) for group in groups for kind in kinds}
    rows = []
    with drawing(1, 3, width=WIDTH, height=2.4, sharex=True) as (figure, columns):
        for index, group in enumerate(groups):
            (tokens, size), (gradient_tokens, gradient), (update_tokens, update) = (
                norms[group, kind] for kind in kinds
            )
            columns[0].plot(*shorten(tokens, size, 300), label=group, **line_look(index))
            columns[1].plot(*shorten(gradient_tokens, gradient, 300), **line_look(index))
            if len(update) == len(size):
                ratio = np.divide(update, size, out=np.full_like(size, np.nan), where=size > 0)
                columns[2].plot(*shorten(update_tokens, ratio, 300), **line_look(index))
                rows += [(group, tokens[i], size[i], gradient[i], ratio[i]) for i in spread(len(size), 6)]
        for axes, label in zip(columns, ("parameters", "gradients", "update / param."), strict=True):
            axes.set_title(label, fontsize=9.5)
            log_axis(axes)
            count_axis(axes)
        columns[0].set_ylabel("Euclidean norm")
        columns[2].set_ylabel("ratio of norms")
        legend_below(figure)
        last = {row[0]: f"{row[0]} {format_number(float(row[4]))}" for row in rows}
        return finish(
            figure,
            "norms",
            "Size of weights, gradients and updates",
            f"Norms of {len(groups)} groups of parameters over training. Last update relative to the parameters: "
            f"{', '.join(last.values())}.",
            "Euclidean norms over a group's parameters, at recorded steps, on logarithmic axes: of the parameters, "
            "of the gradient before clipping, and of the last update divided by the parameters. An update of about a "
            "thousandth is usual while the learning rate is high.",
            Table(("group", "tokens seen", "parameters", "gradient", "update / parameters"), rows),
        )


def draw_speed(run: RunRecords) -> Picture:
    """Draw tokens per second."""
    tokens, speed = run.step_values("tokens_per_second")
    if not len(tokens):
        raise NotRecorded("no step has recorded its speed")
    with drawing(width=WIDTH, height=2.4) as (figure, axes):
        axes.plot(*shorten(tokens, speed), color=COLOURS[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
        count_axis(axes)
        _show_stages(axes, run)
        return finish(
            figure,
            "speed",
            "Speed",
            f"Tokens per second: median {format_count(float(np.median(speed)))}, from "
            f"{format_count(speed.min())} to {format_count(speed.max())}.",
            "Tokens trained on per second, as a mean over the steps that were logged together; evaluations and saving "
            f"do not count. {describe_stages(run)}",
            Table(
                ("tokens seen", "tokens per second"), [(tokens[i], speed[i]) for i in spread(len(tokens), _MOST_ROWS)]
            ),
        )


def legend_below(figure: Figure) -> None:
    """Name all labelled lines below the axes, which keep their height; long names are cut."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = [handle for handles, _ in found for handle in handles]
    labels = [label if len(label) <= 48 else f"{label[:47]}…" for _, labels in found for label in labels]
    n_columns = max(1, min(len(labels), 72 // (max(map(len, labels), default=0) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // n_columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns)


def spread(n: int, limit: int) -> list[int]:
    """Return at most ``limit`` indices below ``n``, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, limit))}) if n else []


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the newest ``window`` values at each place, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def shorten(x: np.ndarray, y: np.ndarray, limit: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return a line of at most ``limit`` points: means of equal parts, with the last x of each."""
    parts = -(-len(x) // limit) if len(x) else 1
    if parts == 1:
        return x, y
    starts = np.arange(0, len(x), parts)
    lengths = np.diff([*starts, len(x)])
    return x[starts + lengths - 1], np.add.reduceat(y, starts) / lengths


def stages_of(run: RunRecords) -> list[dict[str, Any]]:
    """Return the stages of the curriculum as the config has them, as far as they can be read."""
    stages = (run.config.get("schedule") or {}).get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, Iterable) else []


def describe_stages(run: RunRecords) -> str:
    """Return the stages in words, numbered as in the pictures; nothing for a single one."""
    texts = []
    for number, stage in enumerate(stages_of(run), 1):
        batch = stage.get("batch_tokens")
        sizes = batch if isinstance(batch, list) else [batch]
        size = " to ".join(dict.fromkeys(format_number(value) for value in sizes))
        until = stage.get("until_tokens")
        end = f" until {format_count(until)}" if until else ""
        texts.append(f"{number}{end}: sequences of {stage.get('seq_len')} tokens, {size} tokens a step")
    return f"Stages of the curriculum: {'; '.join(texts)}." if len(texts) > 1 else ""


def _show_stages(axes: Axes, run: RunRecords, with_numbers: bool = True) -> None:
    last, stages = _last_tokens(run), stages_of(run)
    ends = [min(stage.get("until_tokens") or last, last) for stage in stages]
    n_reached = sum(start < last for start in [0, *ends[:-1]]) if ends else 0
    if n_reached > 1:
        lengths = np.diff([0, *ends[:n_reached]])
        is_wide = with_numbers & (lengths > 0.02 * last)
        mark_stages(axes, ends[:n_reached], [str(i) if wide else "" for i, wide in enumerate(is_wide, 1)])


def _last_tokens(run: RunRecords) -> int:
    return max((line.get("tokens_seen") or 0 for line in [*run.steps[-1:], *run.evaluations[-1:]]), default=0)
