"""Several runs side by side: validation curves over text, compute and time, where they end, how their settings differ.

Runs that differ in their seed alone are one group. Loss per token depends on what a token is, so runs that were
tokenised differently are compared in bits per byte only. What a run lacks is left out and named in the notes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from moe_gpt.config import ModelConfig
from moe_gpt.errors import ConfigError
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.report.pictures import Picture, Table, drawing, finish, line_look
from moe_gpt.report.run_records import RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAY_DIFFER_IN_GROUP = re.compile(
    r"train\.(seed|log_every_steps|eval_every_steps|record_\w+|sample_tokens)|tracking|checkpoint\..*"
    r"|data\.(cache_dir|verify_tokens|sources\.\d+\.prompt)"
)
"""The seed, where files are, and what is recorded."""
_SAYS_WHAT_IS_SCORED = re.compile(
    r"data\.(validation_\w+|document_masking|sources\.\d+\.(?!prompt|epochs|weight|streaming).*)"
)
"""Settings that decide which text is held out, and what of it a token sees."""
_NOT_THERE = object()
_LEGEND_CHARACTERS = 90


class _Units(NamedTuple):
    """Ascending units of a quantity: how much each is, and what it is called."""

    sizes: tuple[float, ...]
    names: tuple[str, ...]

    def fitting(self, largest: float) -> tuple[float, str]:
        """Return size and name of the largest unit of which there is at least one, or else of the smallest."""
        index = max(0, sum(size <= largest for size in self.sizes) - 1)
        return self.sizes[index], self.names[index]

    def shown(self, value: float) -> str:
        """Return a value with the unit that fits it."""
        size, name = self.fitting(value)
        return f"{_number(value / size)} {name}"


def _counted(what: str) -> _Units:
    return _Units(
        (1, 1e3, 1e6, 1e9, 1e12), (what, *(f"{n} {what}" for n in ("thousand", "million", "billion", "trillion")))
    )


_TOKENS, _PARAMETERS = _counted("tokens"), _counted("parameters")
_FLOPS = _Units((1, 1e9, 1e12, 1e15, 1e18, 1e21), ("FLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))
_TIME = _Units((1, 60, 3600, 86_400), ("seconds", "minutes", "hours", "days"))


class _Metric(NamedTuple):
    """The score that runs are compared by."""

    key: str
    unit: str


_NATS, _BITS = _Metric("ce_loss", "nats per token"), _Metric("bits_per_byte", "bits per byte")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a report shows of several runs together."""

    pictures: list[Picture]
    """Validation curves over text, training compute and training time; fewer where that is not known."""
    final: Table
    """Where every group of runs ended, and what that took."""
    differences: Table
    """The settings that differ, with a column for each run whose config can be read."""
    notes: list[str]
    """What cannot be compared, and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """A run with what follows from its records."""

    records: RunRecords
    label: str
    settings: dict[str, Any]
    """The config, flattened; empty where it cannot be read."""
    model: ModelConfig | None
    step_tokens: np.ndarray
    """Tokens seen after each step; the next two are sums over the steps until then."""
    flops: np.ndarray | None
    seconds: np.ndarray | None

    @property
    def tokens_seen(self) -> int:
        """Tokens at the last step or evaluation."""
        lines = (*self.records.steps, *self.records.evaluations)
        return int(max((line.get("tokens_seen") or 0 for line in lines), default=0))

    @property
    def total_tokens(self) -> int | None:
        """Tokens at the end of the schedule; None where the config does not say."""
        ends = [end for key, end in self.settings.items() if re.fullmatch(r"schedule\.stages\.\d+\.until_tokens", key)]
        return ends[-1] if ends and isinstance(ends[-1], int) else None

    @property
    def scored_at(self) -> int | None:
        """Tokens at the last scores; of the sources the one whose scores end first."""
        ends = [int(tokens[-1]) for tokens, _ in map(self.records.scores, self.records.sources) if len(tokens)]
        return min(ends, default=None)

    @property
    def is_stopped(self) -> bool:
        """Whether the schedule has more tokens than the run has seen."""
        return self.total_tokens is not None and self.tokens_seen < self.total_tokens

    def sum_at(self, sums: np.ndarray | None, tokens: np.ndarray) -> np.ndarray | None:
        """Return a sum over the steps that were done when so many tokens were seen."""
        if sums is None:
            return None
        return np.concatenate([[0.0], sums])[np.searchsorted(self.step_tokens, tokens, side="right")]


class _Cost(NamedTuple):
    """What curves are drawn over."""

    name: str
    label: str
    units: _Units
    at: Callable[[_Run, np.ndarray], np.ndarray | None]
    """What a run had cost when so many tokens were seen; None where that is not known."""
    caption: str


_COSTS = (
    _Cost(
        "compare-tokens", "Text seen", _TOKENS, lambda run, tokens: tokens,
        "Tokens seen in training, repeated ones each time: what runs learn from the same amount of text.",
    ),
    _Cost(
        "compare-flops", "Training compute", _FLOPS, lambda run, tokens: run.sum_at(run.flops, tokens),
        "Floating-point operations of the matrix products, forward and backward, at the sequence length of each step: "
        "what runs make of the same compute.",
    ),
    _Cost(
        "compare-time", "Training time", _TIME, lambda run, tokens: run.sum_at(run.seconds, tokens),
        "Wall time of the training steps; evaluation and saving are left out. It compares runs only where they had "
        "the same machine to themselves.",
    ),
)  # fmt: skip


def compare_runs(runs: Sequence[RunRecords]) -> Comparison:
    """Compare runs; one alone is allowed.

    Runs that differ only in the seed and in what is recorded are a group, with one colour. In ``final`` a group has a
    row for each place where its runs ended: no mean is over finished and stopped runs.

    Raises:
        ValueError: where there is no run.
    """
    if not runs:
        raise ValueError("compare_runs needs at least one run, got none")
    notes = list[str]()
    compared = [_derive(run, label, notes) for run, label in zip(runs, _labels(runs), strict=True)]
    groups = _group(compared)
    rows = [row for group in groups for row in _split_by_end(group)]
    sources = list(dict.fromkeys(s for run in compared for s in run.records.sources if _is_scored(run, s)))
    metric = _choose_metric(compared, notes)
    _note_groups(groups, notes)
    _note_scores(compared, sources, notes)
    _note_other_text(compared, notes)
    return Comparison(
        pictures=list(_pictures(metric, sources, groups, rows, notes)),
        final=_final(metric, sources, rows),
        differences=_differences(compared),
        notes=notes,
    )


def _labels(runs: Sequence[RunRecords]) -> list[str]:
    """Return each folder's name, with as many parents as it takes to differ; a folder given again gets a number."""
    paths = [(*run.run_dir.resolve().parent.parts, run.name) for run in runs]
    labels: list[str] = []
    for index, path in enumerate(paths):
        n_parts = 1
        while any(other != path and other[-n_parts:] == path[-n_parts:] for other in paths):
            n_parts += 1
        n_before = paths[:index].count(path)
        labels.append(str(PurePath(*path[-n_parts:])) + (f" #{n_before + 1}" if n_before else ""))
    return labels


def _derive(records: RunRecords, label: str, notes: list[str]) -> _Run:
    """Sum a run's costs over its steps, noting what is missing."""
    steps = [line for line in records.steps if _is_complete(line)]
    n_done = max((line["step"] for line in records.steps), default=0)
    if len(steps) < n_done:
        text = f"{label}: only {_number(len(steps))} of {_number(n_done)} steps can be read from metrics.jsonl"
        notes.append(f"{text}; compute and time count those alone and are too low")
    step_tokens, batch_tokens, seq_lens, speeds = (
        np.array([line[key] for line in steps], dtype=float)
        for key in ("tokens_seen", "batch_tokens", "seq_len", "tokens_per_second")
    )
    model, flops = _read_model(records, label, notes), None
    if model and steps:
        flops_per_token = {n: float(count_flops(model, int(n)).training) for n in set(seq_lens)}
        flops = np.cumsum(batch_tokens * np.array([flops_per_token[n] for n in seq_lens]))
    seconds = np.cumsum(batch_tokens / speeds) if steps else None
    return _Run(records, label, _flatten(records.config), model, step_tokens, flops, seconds)


def _is_complete(line: dict[str, Any]) -> bool:
    values = [line.get(key) for key in ("tokens_seen", "batch_tokens", "seq_len", "tokens_per_second")]
    return all(isinstance(value, int | float) and value > 0 for value in values)


def _read_model(records: RunRecords, label: str, notes: list[str]) -> ModelConfig | None:
    """Return the shape of the run's model, or note why it is not known."""
    values, problem = records.config.get("model"), "its config has no model with a vocab_size"
    if isinstance(values, dict) and values.get("vocab_size"):
        try:
            return ModelConfig.from_mapping(values)
        except ConfigError as error:
            problem = error.problems[0]
    notes.append(f"{label}: parameters and training compute are not known: {problem}")
    return None


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values; an empty list or section is a value."""
    if not isinstance(value, dict | list | tuple) or not value:
        return {prefix: value} if prefix else {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in _flatten(part, f"{prefix}.{key}".lstrip(".")).items()}


def _group(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Put runs with equal settings and tokenizers together; one whose config cannot be read stays alone."""
    groups: list[tuple[Any, list[_Run]]] = []
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if not _MAY_DIFFER_IN_GROUP.fullmatch(key)}
        identity = (settings, run.records.tokenizer_digest) if settings else object()
        members = next((members for other, members in groups if other == identity), None)
        if members is None:
            groups.append((identity, [run]))
        else:
            members.append(run)
    return [members for _, members in groups]


def _split_by_end(group: list[_Run]) -> list[list[_Run]]:
    ends: dict[Any, list[_Run]] = {}
    for run in group:
        ends.setdefault((run.tokens_seen, run.scored_at), []).append(run)
    return list(ends.values())


def _n_seeds(group: list[_Run]) -> int:
    return len({run.settings.get("train.seed") for run in group})


def _label(group: list[_Run]) -> str:
    """Name a group after its first run."""
    if len(group) == 1:
        return group[0].label
    return f"{group[0].label} ({len(group)} {'seeds' if _n_seeds(group) == len(group) else 'runs'})"


def _state(run: _Run) -> str:
    """Say how far a run came."""
    if run.total_tokens is None:
        text = "end of schedule not known"
    elif run.is_stopped:
        text = (
            f"stopped at {_TOKENS.shown(run.tokens_seen).removesuffix(' tokens')} of {_TOKENS.shown(run.total_tokens)}"
        )
    else:
        text = "finished"
    is_behind = run.scored_at is not None and run.scored_at < run.tokens_seen
    return text + (f", last scored at {_TOKENS.shown(run.scored_at or 0)}" if is_behind else "")


def _is_scored(run: _Run, source: str) -> bool:
    return len(run.records.scores(source)[0]) > 0


def _choose_metric(runs: Sequence[_Run], notes: list[str]) -> _Metric:
    """Return nats per token where all runs are known to have the same tokens."""
    unknown = ", ".join(run.label for run in runs if run.records.tokenizer_digest is None)
    digests = {run.records.tokenizer_digest for run in runs} - {None}
    if len(digests) > 1:
        groups: dict[str | None, list[str]] = {}
        for run in runs:
            groups.setdefault(run.records.tokenizer_digest, []).append(run.label)
        names = " against ".join(", ".join(labels) for digest, labels in groups.items() if digest)
        notes.append(f"{names}: tokenised differently, so that loss per token cannot be compared; bits per byte can")
        return _BITS
    if unknown and len(runs) > 1:
        text = f"how {unknown} was tokenised is not known"
        notes.append(f"{text}; loss per token may not be comparable, bits per byte are")
        return _BITS
    return _NATS


def _note_groups(groups: Sequence[list[_Run]], notes: list[str]) -> None:
    for group in groups:
        if len(group) > 1:
            names = ", ".join(run.label for run in group)
            notes.append(
                f"{_label(group)} stands for {names}, which differ at most in the seed and in what was recorded"
            )
        for run in group:
            if run.is_stopped:
                notes.append(f"{run.label} {_state(run)}: its scores are not those of a finished run")


def _note_scores(runs: Sequence[_Run], sources: Sequence[str], notes: list[str]) -> None:
    """Note runs without evaluations, runs without a common source, and losses that are not finite."""
    scored = [run for run in runs if run.scored_at is not None]
    without = ", ".join(run.label for run in runs if run not in scored)
    if without:
        notes.append(f"no evaluations, so no curves: {without}")
    if sources and not any(all(_is_scored(run, source) for run in scored) for source in sources):
        notes.append("the runs have no source in common; a panel has the runs that were scored on its source")
    for run in scored:
        last = run.records.evaluations[-1]
        broken = ", ".join(s for s in sources if last.get(f"val/{s}/ce_loss", 0.0) is None)
        if broken:
            notes.append(f"{run.label}: the last loss on {broken} is not finite; the one before is shown")


def _note_other_text(runs: Sequence[_Run], notes: list[str]) -> None:
    """Note settings that make scores those of other text, or with another context."""
    keys = [key for key in _differing_keys(runs) if _SAYS_WHAT_IS_SCORED.fullmatch(key)]
    contexts = {max(_seq_lens(run), default=0) for run in runs if run.settings}
    keys += ["the longest seq_len"] if len(contexts) > 1 else []
    if keys:
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        notes.append(f"scores may be of other text or with other context, as the runs differ in {shown}")


def _seq_lens(run: _Run) -> list[int]:
    return [n for key, n in run.settings.items() if key.endswith(".seq_len") and isinstance(n, int)]


class _Curve(NamedTuple):
    """A run's scores on one source."""

    run: _Run
    look: dict[str, Any]
    source: str
    costs: np.ndarray
    scores: np.ndarray


def _pictures(
    metric: _Metric, sources: Sequence[str], groups: Sequence[list[_Run]], rows: Sequence[list[_Run]], notes: list[str]
) -> Iterator[Picture]:
    """Draw the curves over each cost, noting runs of which it is not known."""
    for cost in _COSTS:
        curves = list(_curves(cost, metric, sources, groups))
        drawn = [curve.run for curve in curves]
        missing = ", ".join(run.label for g in groups for run in g if run.scored_at is not None and run not in drawn)
        if missing:
            notes.append(f"not in the picture over {cost.label.lower()}, as it or the score is not known: {missing}")
        if curves:
            legend = {_label(group): line_look(i) for i, group in enumerate(groups) if set(group) & set(drawn)}
            yield _draw(cost, metric, curves, legend, _alt(cost, metric, curves, rows))


def _curves(cost: _Cost, metric: _Metric, sources: Sequence[str], groups: Sequence[list[_Run]]) -> Iterator[_Curve]:
    members = [(run, line_look(index)) for index, group in enumerate(groups) for run in group]
    for source, (run, look) in itertools.product(sources, members):
        tokens, scores = run.records.scores(source, metric.key)
        costs = cost.at(run, tokens)
        if len(tokens) and costs is not None:
            yield _Curve(run, look, source, costs, scores)


def _draw(cost: _Cost, metric: _Metric, curves: list[_Curve], legend: dict[str, dict[str, Any]], alt: str) -> Picture:
    """Draw a panel for each source."""
    sources = list(dict.fromkeys(curve.source for curve in curves))
    size, unit = cost.units.fitting(max(curve.costs.max() for curve in curves))
    n_columns = min(3, len(sources))
    n_rows = math.ceil(len(sources) / n_columns)
    labels = [textwrap.fill(label, _LEGEND_CHARACTERS) for label in legend]
    n_legend_columns = max(1, _LEGEND_CHARACTERS // (max(map(len, labels)) + 8))
    height = 2.9 * n_rows + 0.2 * math.ceil(sum(label.count("\n") + 1 for label in labels) / n_legend_columns)
    with drawing(n_rows, n_columns, height=height, squeeze=False) as (figure, axes):
        for index, axis in enumerate(axes.flat):
            axis.set_visible(index < len(sources))
        for source, axis in zip(sources, axes.flat, strict=False):
            _draw_panel(axis, [curve for curve in curves if curve.source == source], size)
            axis.set(title=source, xlabel=f"{cost.label} ({unit})", ylabel=f"Validation loss ({metric.unit})")
        handles = [axes.flat[0].plot([], [], **look)[0] for look in legend.values()]
        figure.legend(handles, labels, loc="outside lower center", ncols=n_legend_columns)
        return finish(
            figure,
            cost.name,
            title=f"Validation loss over {cost.label.lower()}",
            alt=alt,
            caption=f"{cost.caption} Lower is better. A dot ends each curve; its first tenth may lie above the panel.",
            table=_table(cost, metric, curves),
        )


def _draw_panel(axis: Axes, curves: Sequence[_Curve], size: float) -> None:
    """Draw curves, with the axis for what comes after each one's first tenth: it would press the rest together."""
    for curve in curves:
        axis.plot(curve.costs / size, curve.scores, **curve.look)
        axis.plot(curve.costs[-1:] / size, curve.scores[-1:], "o", markersize=4, color=curve.look["color"])
    shown = np.concatenate([curve.scores[curve.costs >= curve.costs[-1] / 10] for curve in curves])
    margin = 0.05 * (shown.max() - shown.min())
    if margin:
        axis.set_ylim(shown.min() - margin, shown.max() + margin)


def _alt(cost: _Cost, metric: _Metric, curves: Sequence[_Curve], rows: Sequence[list[_Run]]) -> str:
    """Say for each source where the runs end, the lowest first, and how far apart."""
    sentences = [f"Validation loss in {metric.unit} over {cost.label.lower()}, a panel for each source."]
    for source in dict.fromkeys(curve.source for curve in curves):
        ends = []
        for row in rows:
            found = [curve for curve in curves if curve.source == source and curve.run in row]
            if found:
                score, spent = np.mean([(curve.scores[-1], curve.costs[-1]) for curve in found], axis=0)
                ends.append(
                    (
                        float(score),
                        cost.units.shown(float(spent)),
                        f"{_label(row)}{' on average' if len(row) > 1 else ''}",
                    )
                )
        lowest, *others = sorted(ends)
        parts = [f"{lowest[2]} ends {'lowest, ' if others else ''}at {_number(lowest[0])} after {lowest[1]}"]
        parts += [
            f"{_number(score - lowest[0])} below {label} ({_number(score)} after {spent})"
            for score, spent, label in others[:4]
        ]
        sentences.append(f"{source}: {', '.join(parts)}{', then others' if len(others) > 4 else ''}.")
    return " ".join(sentences)


def _table(cost: _Cost, metric: _Metric, curves: Sequence[_Curve]) -> Table:
    size, unit = cost.units.fitting(max(curve.costs.max() for curve in curves))
    rows = [
        (curve.source, curve.run.label, _number(spent / size), _number(score))
        for curve in curves
        for spent, score in zip(curve.costs, curve.scores, strict=True)
    ]
    return Table(("Source", "Run", f"{cost.label} ({unit})", f"Validation loss ({metric.unit})"), rows)


def _final(metric: _Metric, sources: Sequence[str], rows: Sequence[list[_Run]]) -> Table:
    """Tell where runs ended: the mean of a row's runs and, where they differ, the lowest and the highest."""
    metrics = [_NATS, _BITS] if metric is _NATS else [_BITS]
    scored = list(itertools.product(sources, metrics))
    counts = [count_parameters(row[0].model) if row[0].model else None for row in rows]
    quantities: list[tuple[str, _Units, list[list[float]]]] = [
        ("Text seen", _TOKENS, [[run.tokens_seen for run in row] for row in rows]),
        ("Active", _PARAMETERS, [[found.active] if found else [] for found in counts]),
        ("Total", _PARAMETERS, [[found.total] if found else [] for found in counts]),
        ("Training compute", _FLOPS, [[run.flops[-1] for run in row if run.flops is not None] for row in rows]),
        ("Training time", _TIME, [[run.seconds[-1] for run in row if run.seconds is not None] for row in rows]),
    ]
    columns = ["Run", "Seeds", "State", *(f"{source} ({metric.unit})" for source, metric in scored)]
    cells: list[list[str]] = [
        [
            _label(row),
            str(_n_seeds(row)) if row[0].settings else "?",
            _state(row[0]),
            *(_spread([s for run in row for s in run.records.scores(source, m.key)[1][-1:]]) for source, m in scored),
        ]
        for row in rows
    ]
    for name, units, values in quantities:
        alike = [numbers for _, other, found in quantities if other is units for numbers in found]
        size, unit = units.fitting(max(itertools.chain(*alike), default=1))
        columns.append(f"{name} ({unit})")
        for cell, numbers in zip(cells, values, strict=True):
            cell.append(_spread([number / size for number in numbers]))
    return Table(columns, cells)


def _spread(values: Sequence[float]) -> str:
    """Return the mean, with the least and the greatest where they differ; a question mark for no values."""
    if not len(values):
        return "?"
    mean, least, greatest = (_number(float(f(values))) for f in (np.mean, np.min, np.max))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def _differing_keys(runs: Sequence[_Run]) -> list[str]:
    """Return the settings that differ between the runs whose config can be read, in the order of the configs."""
    settings = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if any(v.get(key, _NOT_THERE) != settings[0].get(key, _NOT_THERE) for v in settings)]


def _differences(runs: Sequence[_Run]) -> Table:
    readable = [run for run in runs if run.settings]
    rows = [[key, *(_setting(run.settings, key) for run in readable)] for key in _differing_keys(runs)]
    return Table(["Setting", *(run.label for run in readable)], rows or [["(nothing)", *("" for _ in readable)]])


def _setting(settings: dict[str, Any], key: str) -> str:
    """Return a value as YAML spells it, in full: two that differ must not look the same."""
    if key not in settings:
        return "not there"
    text = yaml.safe_dump(settings[key], default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _number(value: float) -> str:
    """Return a number with at most four significant digits, never with an exponent."""
    return np.format_float_positional(value, precision=4, unique=False, fractional=False, trim="-")
