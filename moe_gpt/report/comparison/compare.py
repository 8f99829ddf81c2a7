"""The comparison as a whole: what is compared by which score, the pictures, the tables, the notes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_gpt.report.comparison.curves import BITS, NATS, QUANTITIES, Metric, curves_over, draw_curves
from moe_gpt.report.comparison.runs import (
    ComparedRun,
    Group,
    differing_keys,
    group_runs,
    table_of_differences,
)
from moe_gpt.report.pictures import Picture, Table
from moe_gpt.report.recorded import RunRecords
from moe_gpt.report.words import paragraphs, words
from moe_gpt.terminal.numbers import Units, format_digits

_SAYS_WHAT_IS_SCORED = re.compile(
    r"data\.(validation_\w+|document_masking|sources\.\d+\.(?!prompt|epochs|weight|streaming).*)"
)
"""Settings that decide which text is held out, and what of it a token sees."""


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


def compare_runs(records: Sequence[RunRecords]) -> Comparison:
    """Compare runs that ``tell_apart`` has named; one alone is allowed.

    Runs that differ only in the seed and in what is recorded, and that came about equally far, are a group: it has one
    colour, and one row in ``final``. No mean is over finished and stopped runs.

    Raises:
        ValueError: where there is no run.
    """
    if not records:
        raise ValueError("compare_runs needs at least one run, got none")
    runs = list(map(ComparedRun, records))
    groups = group_runs(runs)
    sources = list(dict.fromkeys(itertools.chain(*(run.records.all_scores() for run in runs))))
    tokenised, unknown = _tokenisers(runs)
    metric = NATS if len(tokenised) + bool(unknown) < 2 else BITS
    curves = [curves_over(cost, metric, sources, groups) for cost in QUANTITIES if cost.picture]
    facts = {"runs": runs, "groups": groups, "curves": curves, "tokenised": tokenised, "unknown": unknown}
    return Comparison(
        pictures=[draw_curves(found, groups) for found in curves if found.curves],
        final=_final(metric, sources, groups),
        differences=table_of_differences(runs),
        notes=paragraphs(words()["comparison"]["notes"], **facts, **_comparability(runs, sources)),
    )


def _tokenisers(runs: Sequence[ComparedRun]) -> tuple[list[str], str]:
    """Return the names of the runs of each tokenizer, and of those whose tokenizer is not known."""
    by_digest: dict[str | None, list[str]] = {}
    for run in runs:
        by_digest.setdefault(run.records.tokenizer_digest, []).append(run.label)
    unknown = ", ".join(by_digest.pop(None, []))
    return list(map(", ".join, by_digest.values())), unknown


def _comparability(runs: Sequence[ComparedRun], sources: Sequence[str]) -> dict[str, Any]:
    """Return which runs have scores, whether of the same sources, and what makes them scores of other text."""
    scored = [run for run in runs if run.scored_at is not None]
    other_text = list(filter(_SAYS_WHAT_IS_SCORED.fullmatch, differing_keys(runs)))
    if len({_longest(run.settings) for run in runs if run.settings}) > 1:
        other_text.append("the longest seq_len")
    common = set(sources).intersection(*(run.records.all_scores() for run in scored))
    return {"scored": scored, "has_common_source": bool(common), "other_text": other_text}


def _longest(settings: dict[str, Any]) -> int:
    lengths = [value for key, value in settings.items() if key.endswith(".seq_len") and isinstance(value, int)]
    return max(lengths, default=0)


def _final(metric: Metric, sources: Sequence[str], groups: Sequence[Group]) -> Table:
    """Tell where runs ended: the mean of a group's runs and, where they differ, the lowest and the highest."""
    columns = {
        "Run": [group.label for group in groups],
        "Seeds": [str(group.n_seeds) if group.runs[0].settings else "?" for group in groups],
        "State": [group.runs[0].state for group in groups],
    }
    return Table.of(columns | _columns_of_scores(metric, sources, groups) | _columns_of_costs(groups), "At the end")


def _columns_of_scores(metric: Metric, sources: Sequence[str], groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return the scores on each source, and by how much they are above the lowest one."""
    columns = {}
    for source, shown in itertools.product(sources, [NATS, BITS] if metric is NATS else [BITS]):
        scores = [group.last_scores(source, shown.key) for group in groups]
        columns[f"{source} ({shown.unit})"] = list(map(_spread, scores))
        if shown is metric and len(groups) > 1:
            columns[f"{source}: above the lowest ({shown.unit})"] = _above_the_lowest(scores)
    return columns


def _above_the_lowest(scores: Sequence[list[float]]) -> list[str]:
    means = np.array([np.mean(found or [np.nan]) for found in scores])
    above = means - np.fmin.reduce(means)  # which passes over nan
    return ["?" if np.isnan(value) else format_digits(value) if value else "lowest" for value in above]


def _columns_of_costs(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return a column for each quantity; those of a kind share the unit that fits the largest."""
    columns, largest = {}, collections.defaultdict[Units, float](float)
    totals = {quantity: [np.array(group.totals(quantity.key)) for group in groups] for quantity in QUANTITIES}
    for quantity, found in totals.items():
        largest[quantity.units] = max(largest[quantity.units], np.concatenate(found).max(initial=0.0))
    for quantity, found in totals.items():
        size, unit = quantity.units.fitting(largest[quantity.units] or 1.0)
        columns[f"{quantity.label} ({unit})"] = [_spread(values / size) for values in found]
    return columns


def _spread(values: Sequence[float] | np.ndarray) -> str:
    """Return the mean, with the least and the greatest where they differ; a question mark for no values."""
    if not len(values):
        return "?"
    mean, least, greatest = (format_digits(float(f(values))) for f in (np.mean, min, max))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"
