"""Pictures of one run's training: loss, schedule, loss by position, norms, speed.

Each function draws from ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_gpt.measure.positions import position_buckets
from moe_gpt.report import pictures
from moe_gpt.report.missing import need
from moe_gpt.report.pictures import COLOURS, Panel, Picture, Table
from moe_gpt.report.recorded import EvaluationArrays, RunRecords
from moe_gpt.report.series import Series, spread
from moe_gpt.report.words import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 40
"""Rows of the table behind a line."""


def draw_losses(run: RunRecords) -> Picture:
    """Draw the training loss, raw and smoothed, and each source's validation loss."""
    is_of_tokens = run.stage in (None, "sft", "see")  # else the loss of a step is another quantity
    training, scores = run.step_values("ce_loss" if is_of_tokens else ""), run.all_scores()
    need(training.is_there or scores, "neither a training step nor an evaluation is recorded")
    window = max(1, len(training.values) // 60)
    smooth = training.smoothed(window)
    with pictures.drawing(height=3.0) as (figure, axes):
        if training.is_there:
            axes.plot(*training.shortened(), color=COLOURS[6], alpha=0.35, linewidth=0.7)
            label = f"training, mean of {window} steps" if window > 1 else "training"
            axes.plot(*smooth.shortened(), color=COLOURS[6], label=label)
        lines = {f"validation: {source}": score for source, score in scores.items()}
        pictures.draw_lines(axes, lines, limit=1200)
        axes.set_ylabel("cross entropy (nats per token)")
        pictures.count_axis(axes)
        _mark_stages(axes, run)
        pictures.legend_below(figure, pictures.labelled(axes))
        lines = {"training": smooth, **scores} if training.is_there else scores
        return pictures.finish(figure, "losses", _table_of_losses(smooth, scores), run=run, lines=lines)


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
    return _draw_steps(run, "schedule")


def draw_speed(run: RunRecords) -> Picture:
    """Draw tokens per second."""
    return _draw_steps(run, "speed")


def _draw_steps(run: RunRecords, name: str) -> Picture:
    """Draw values of every step, as picture_words.yaml lists them: stairs from 0 on, with the curriculum's stages."""

    def adjust(axes: Axes) -> None:
        axes.lines[0].set_drawstyle("steps-pre")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(pictures.count_tick)
        _mark_stages(axes, run)

    lines = {label: run.step_values(key) for label, key in words()["pictures"][name]["lines"].items()}
    tokens, values = zip(*lines.values(), strict=True)
    need(all(map(len, tokens)), f"no training step has recorded its {', '.join(lines)}")
    drawn = [Panel("", label, {"": line}) for label, line in lines.items()]
    rows = np.stack([tokens[0], *values], axis=1)[spread(len(tokens[0]), _MOST_ROWS)]
    table, facts = (
        Table(("tokens seen", *lines), rows.tolist()),
        {"values": values, "medians": list(map(np.median, values))},
    )
    return pictures.draw_panels(name, drawn, 1, (0.9, 1.3), adjust, table, run=run, **facts)


def mean_by_position(arrays: EvaluationArrays, source: str, buckets: Sequence[tuple[int, int]]) -> list[float]:
    """Return a source's mean loss in nats in each bucket [start, end); nan where nothing was scored."""
    both = np.stack([arrays.nats[source], arrays.counts[source]])
    sums = np.array([both[:, start:end].sum(axis=1) for start, end in buckets])
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0).tolist()


def draw_positions(run: RunRecords) -> Picture:
    """Draw the loss by place in the sequence, at the first evaluation after a step and at the last."""
    chosen = _first_and_last([arrays for arrays in run.arrays if arrays.nats and arrays.counts])
    need(chosen, "no evaluation has recorded its losses by position")
    buckets = position_buckets(max(map(len, chosen[-1].nats.values())))
    columns: dict[str, list] = {"positions": [f"{start} to {end - 1}" for start, end in buckets]}
    with pictures.drawing(height=3.0) as (figure, axes):
        for arrays, style in zip(chosen, ("--", "-")[-len(chosen) :], strict=True):
            for index, source in enumerate(run.in_order(arrays.nats)):
                label, look = f"{source} at step {arrays.step:,}", {"color": COLOURS[index % len(COLOURS)]}
                axes.plot(*_by_place(arrays, source), label=label, linestyle=style, **look)
                columns[f"{source}, step {arrays.step:,} (nats)"] = mean_by_position(arrays, source, buckets)
        axes.set_ylabel("cross entropy (nats per token)")
        pictures.count_axis(axes, "place in the sequence (tokens before it)")
        pictures.legend_below(figure, pictures.labelled(axes))
        steps, table = [f"{arrays.step:,}" for arrays in chosen], Table.of(columns)
        facts = {"steps": steps, "last": table.columns[-1], "rows": table.rows}
        return pictures.finish(figure, "loss-by-position", table, **facts)


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
    size, gradient, update = (_norms(run, groups, kind) for kind in ("parameter_norm", "gradient_norm", "update_norm"))
    ratio = {group: _relative(update[group], size[group]) for group in groups}
    norms = [Panel("parameters", "Euclidean norm", size), Panel("gradients", "Euclidean norm", gradient)]
    drawn = [*norms, Panel("update / param.", "ratio of norms", ratio)]
    return pictures.draw_panels("norms", drawn, 3, (0.4, 2.0), pictures.log_axis, ratios=ratio)


def _norms(run: RunRecords, groups: Sequence[str], kind: str) -> dict[str, Series]:
    return {group: run.record_values("groups", group, kind) for group in groups}


def _relative(update: Series, size: Series) -> Series:
    """Return one norm divided by the other; empty where they were not recorded together."""
    if len(update.values) != len(size.values):
        return Series(update.tokens[:0], update.values[:0])
    ratio = np.divide(update.values, size.values, out=np.full_like(size.values, np.nan), where=size.values > 0)
    return Series(update.tokens, ratio)


def _begun_stages(run: RunRecords) -> list[tuple[int, int]]:
    """Return where the stages that were begun start and end."""
    last = run.last("tokens_seen")
    ends = [min(stage.get("until_tokens") or last, last) for stage in run.stages]
    return [(start, end) for start, end in itertools.pairwise([0, *ends]) if start < last]


def _mark_stages(axes: Axes, run: RunRecords) -> None:
    """Draw a line between the stages that were begun, and number above it those that are wide enough for it."""
    stages = _begun_stages(run)
    look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8.5}
    for start, _ in stages[1:]:
        axes.axvline(start, color=pictures.INK, linewidth=0.7, linestyle=":")
    for number, (start, end) in enumerate(stages, 1):
        if len(stages) > 1 and end - start > 0.02 * stages[-1][1]:
            middle = ((start + end) / 2, 1.0)
            axes.annotate(str(number), middle, xycoords=("data", "axes fraction"), xytext=(0, 2), **look)
