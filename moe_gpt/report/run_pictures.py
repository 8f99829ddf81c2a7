"""Pictures of one run's training: loss, schedule, loss by position, norms, speed.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_gpt.measure.positions import position_buckets
from moe_gpt.report import pictures
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.recorded_routing import in_order
from moe_gpt.report.run_records import EvaluationArrays, RunRecords
from moe_gpt.report.series import Series, spread
from moe_gpt.terminal.numbers import format_count, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NORM_COLUMNS = ("group", "tokens seen", "parameters", "gradient", "update / parameters")
_MOST_ROWS = 40
"""Rows of the table behind a line."""


def draw_losses(run: RunRecords) -> Picture:
    """Draw the training loss, raw and smoothed, and each source's validation loss."""
    training, scores = run.step_values("ce_loss"), run.all_scores()
    need(training.is_there or scores, "neither a training step nor an evaluation is recorded")
    window = max(1, len(training.values) // 60)
    smooth = training.smoothed(window)
    named = {"training": smooth, **scores} if training.is_there else scores
    with pictures.drawing(height=3.0) as (figure, axes):
        if training.is_there:
            axes.plot(*training.shortened(), color=pictures.COLOURS[6], alpha=0.35, linewidth=0.7)
            label = f"training, mean of {window} steps" if window > 1 else "training"
            axes.plot(*smooth.shortened(), color=pictures.COLOURS[6], label=label)
        for index, (source, score) in enumerate(scores.items()):
            axes.plot(*score, label=f"validation: {source}", marker="o", markersize=3, **pictures.line_look(index))
        axes.set_ylabel("cross entropy (nats per token)")
        pictures.count_axis(axes)
        _show_stages(axes, run)
        pictures.legend_below(figure, [axes])
        return pictures.finish(
            figure,
            "losses",
            _table_of_losses(smooth, scores),
            tokens=format_count(run.last("tokens_seen")),
            told=[f"{name} from {line.values[0]:.3f} to {line.values[-1]:.3f}" for name, line in named.items()],
            stages=describe_stages(run),
        )


def _table_of_losses(smooth: Series, scores: dict[str, Series]) -> Table:
    """Return the losses at the evaluations, or at some steps where there is none."""
    times = np.unique(np.concatenate([score.tokens for score in scores.values()] or [smooth.tokens]))
    times = times[spread(len(times), _MOST_ROWS)]
    places = np.searchsorted(smooth.tokens, times, side="right")
    training = [None, *smooth.values] if smooth.is_there else [None]
    columns = {"tokens seen": times.tolist(), "training (nats)": [training[place] for place in places]}
    for source, score in scores.items():
        by_time = dict(zip(*score, strict=True))
        columns[f"{source} (nats)"] = [by_time.get(time) for time in times]
    return Table.of(columns)


def draw_schedule(run: RunRecords) -> Picture:
    """Draw learning rate, tokens of a step and sequence length, one above the other."""
    rate, batch, length = (run.step_values(key) for key in ("lr", "batch_tokens", "seq_len"))
    need(rate.is_there and batch.is_there and length.is_there, "no training step is recorded")
    lines = {"learning rate": rate, "tokens per step": batch, "tokens per sequence": length}
    with pictures.drawing(3, 1, height=4.0, sharex=True) as (figure, rows):
        for axes, (name, line) in zip(rows, lines.items(), strict=True):
            axes.plot(*line.shortened(), drawstyle="steps-pre", color=pictures.COLOURS[0])
            axes.set_ylabel(name.replace(" seq", "\nseq"))
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: format_count(value) if value >= 1 else f"{value:g}")
            _show_stages(axes, run, with_numbers=axes is rows[0])
        pictures.count_axis(rows[-1])
        columns = {name: line.spread(_MOST_ROWS).values for name, line in lines.items()}
        return pictures.finish(
            figure,
            "schedule",
            Table.of({"tokens seen": rate.spread(_MOST_ROWS).tokens} | columns),
            peak=rate.values.max(),
            rate=rate.values[-1],
            batch=batch.values[[0, -1]],
            length=length.values[[0, -1]],
            stages=describe_stages(run),
        )


def mean_by_position(arrays: EvaluationArrays, source: str, buckets: Sequence[tuple[int, int]]) -> list[float]:
    """Return a source's mean loss in nats in each bucket [start, end); nan where nothing was scored."""
    both = np.stack([arrays.nats[source], arrays.counts[source]])
    sums = np.array([both[:, start:end].sum(axis=1) for start, end in buckets])
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0).tolist()


def draw_positions(run: RunRecords) -> Picture:
    """Draw the loss by place in the sequence, at the first evaluation after a step and at the last."""
    chosen = _first_and_last([arrays for arrays in run.arrays if arrays.nats and arrays.counts])
    need(chosen, "no evaluation has kept its losses by position")
    buckets = position_buckets(max(map(len, chosen[-1].nats.values())))
    columns: dict[str, list] = {"positions": [f"{start} to {end - 1}" for start, end in buckets]}
    with pictures.drawing(height=3.0) as (figure, axes):
        for arrays, style in zip(chosen, ("--", "-")[-len(chosen) :], strict=True):
            for index, source in enumerate(in_order(run, arrays.nats)):
                look = {"color": pictures.COLOURS[index % len(pictures.COLOURS)], "linestyle": style}
                axes.plot(*_by_place(arrays, source), label=f"{source} at step {arrays.step:,}", **look)
                columns[f"{source}, step {arrays.step:,} (nats)"] = mean_by_position(arrays, source, buckets)
        axes.set_ylabel("cross entropy (nats per token)")
        pictures.count_axis(axes, "place in the sequence (tokens before it)")
        pictures.legend_below(figure, [axes])
        steps, table = [f"{arrays.step:,}" for arrays in chosen], Table.of(columns)
        told = [f"{place}: {format_number(values[-1])}" for place, *values in table.rows]
        return pictures.finish(
            figure, "loss-by-position", table, steps=" and ".join(steps), last=table.columns[-1], told=told
        )


def _first_and_last(arrays: Sequence[EvaluationArrays]) -> list[EvaluationArrays]:
    """Return the first after a step and the last, or the only one."""
    after_steps = [found for found in arrays if found.step > 0] or arrays
    return [after_steps[place] for place in spread(len(after_steps), 2)]


def _by_place(arrays: EvaluationArrays, source: str) -> tuple[list[float], list[float]]:
    """Return the middles of some 64 parts of the sequence, and the mean loss in each."""
    length = len(arrays.nats[source])
    parts = list(itertools.pairwise([*range(0, length, max(1, length // 64)), length]))
    return [(start + end - 1) / 2 for start, end in parts], mean_by_position(arrays, source, parts)


def draw_norms(run: RunRecords) -> Picture:
    """Draw each group's parameter norm, gradient norm, and update relative to its parameters."""
    groups = list(dict.fromkeys(group for line in run.records for group in line["groups"]))
    need(groups, "no step has recorded norms")
    rows, last = [], []
    with pictures.drawing(1, 3, height=2.4, sharex=True) as (figure, columns):
        for index, group in enumerate(groups):
            size, gradient = run.norms(group, "parameter_norm"), run.norms(group, "gradient_norm")
            ratio = _relative(run.norms(group, "update_norm"), size)
            for axes, series in zip(columns, (size, gradient, ratio), strict=True):
                axes.plot(*series.shortened(300), label=group, **pictures.line_look(index))
            kept = (ratio.spread(6).tokens, *(series.spread(6).values for series in (size, gradient, ratio)))
            rows += [(group, *row) for row in zip(*kept, strict=False)]
            last += [f"{group} {format_number(float(value))}" for value in ratio.values[-1:]]
        for axes, label in zip(columns, ("parameters", "gradients", "update / param."), strict=True):
            axes.set_title(label, fontsize=9.5)
            pictures.log_axis(axes)
            pictures.count_axis(axes)
        columns[0].set_ylabel("Euclidean norm")
        columns[2].set_ylabel("ratio of norms")
        pictures.legend_below(figure, columns[:1])
        return pictures.finish(figure, "norms", Table(_NORM_COLUMNS, rows), n_groups=len(groups), told=", ".join(last))


def _relative(update: Series, size: Series) -> Series:
    """Return one norm divided by the other; empty where they were not recorded together."""
    if len(update.values) != len(size.values):
        return Series(update.tokens[:0], update.values[:0])
    ratio = np.divide(update.values, size.values, out=np.full_like(size.values, np.nan), where=size.values > 0)
    return Series(update.tokens, ratio)


def draw_speed(run: RunRecords) -> Picture:
    """Draw tokens per second."""
    speed = run.step_values("tokens_per_second")
    need(speed.is_there, "no step has recorded its speed")
    with pictures.drawing(height=2.4) as (figure, axes):
        axes.plot(*speed.shortened(), color=pictures.COLOURS[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
        pictures.count_axis(axes)
        _show_stages(axes, run)
        table = Table.of(dict(zip(("tokens seen", "tokens per second"), speed.spread(_MOST_ROWS), strict=True)))
        middle, least, greatest = (format_count(float(f(speed.values))) for f in (np.median, np.min, np.max))
        return pictures.finish(
            figure, "speed", table, middle=middle, least=least, greatest=greatest, stages=describe_stages(run)
        )


def describe_stages(run: RunRecords) -> str:
    """Return the stages in words, numbered as in the pictures; nothing for a single one."""
    texts = []
    for number, stage in enumerate(run.stages, 1):
        sizes = np.ravel(stage.get("batch_tokens") or [None]).tolist()
        size = " to ".join(dict.fromkeys(map(format_number, sizes)))
        end = f" until {format_count(stage['until_tokens'])}" if stage.get("until_tokens") else ""
        texts.append(f"{number}{end}: sequences of {stage.get('seq_len')} tokens, {size} tokens a step")
    return f"Stages of the curriculum: {'; '.join(texts)}." if len(texts) > 1 else ""


def _show_stages(axes: Axes, run: RunRecords, with_numbers: bool = True) -> None:
    """Mark the ends of the stages that were begun, and number those that are wide enough for it."""
    last = run.last("tokens_seen")
    ends = np.array([min(stage.get("until_tokens") or last, last) for stage in run.stages], dtype=int)
    starts = np.concatenate([[0], ends])[:-1]
    lengths = (ends - starts)[starts < last]
    if len(lengths) > 1:
        is_wide = with_numbers & (lengths > 0.02 * last)
        numbers = [str(i) if wide else "" for i, wide in enumerate(is_wide, 1)]
        pictures.mark_stages(axes, ends[: len(lengths)].tolist(), numbers)
