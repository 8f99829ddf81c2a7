"""What cannot be compared, and why, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from moe_gpt.measure.metric_names import MetricName
from moe_gpt.report.comparison.curves import BITS, NATS, Curves, Metric
from moe_gpt.report.comparison.groups import Group, differing_keys
from moe_gpt.report.comparison.runs import ComparedRun
from moe_gpt.terminal.numbers import format_digits

_SAYS_WHAT_IS_SCORED = re.compile(
    r"data\.(validation_\w+|document_masking|sources\.\d+\.(?!prompt|epochs|weight|streaming).*)"
)
"""Settings that decide which text is held out, and what of it a token sees."""


def note_costs(run: ComparedRun) -> Iterator[str]:
    """Note steps that are missing, and a model that is not known."""
    n_known, n_done = len(run.steps["tokens_seen"]), max((line["step"] for line in run.records.steps), default=0)
    if n_known < n_done:
        text = f"only {format_digits(n_known)} of {format_digits(n_done)} steps can be read from metrics.jsonl"
        yield f"{run.label}: {text}; compute and time count those alone and are too low"
    if isinstance(run.model, str):
        yield f"{run.label}: parameters and training compute are not known: {run.model}"


def choose_metric(runs: Sequence[ComparedRun]) -> tuple[Metric, list[str]]:
    """Return nats per token where all runs are known to have the same tokens, or else bits per byte and why."""
    by_digest: dict[str | None, list[str]] = {}
    for run in runs:
        by_digest.setdefault(run.records.tokenizer_digest, []).append(run.label)
    unknown = ", ".join(by_digest.pop(None, []))
    if len(by_digest) > 1:
        names = " against ".join(map(", ".join, by_digest.values()))
        return BITS, [f"{names}: tokenised differently, so that loss per token cannot be compared; bits per byte can"]
    if unknown and len(runs) > 1:
        text = f"how {unknown} was tokenised is not known"
        return BITS, [f"{text}; loss per token may not be comparable, bits per byte are"]
    return NATS, []


def note_group(group: Group) -> Iterator[str]:
    """Note what a group stands for, and runs of it that have stopped."""
    if len(group.runs) > 1:
        names = ", ".join(run.label for run in group.runs)
        yield f"{group.label} stands for {names}, which differ at most in the seed and in what was recorded"
    for run in filter(lambda run: run.is_stopped, group.runs):
        yield f"{run.label} {run.state}: its scores are not those of a finished run"


def note_scores(runs: Sequence[ComparedRun], sources: Sequence[str]) -> Iterator[str]:
    """Note runs without evaluations, and runs without a common source."""
    without = ", ".join(run.label for run in runs if run.scored_at is None)
    if without:
        yield f"no evaluations, so no curves: {without}"
    scored = [run.records.all_scores() for run in runs if run.scored_at is not None]
    if scored and not set(sources).intersection(*scored):
        yield "the runs have no source in common; a panel has the runs that were scored on its source"


def note_broken(run: ComparedRun) -> Iterator[str]:
    """Note losses of the last evaluation that are not finite."""
    keys = {str(MetricName(source, NATS.key)): source for source in run.records.all_scores()}
    last = run.records.evaluations[-1] if keys else {}
    broken = ", ".join(source for key, source in keys.items() if last.get(key, 0.0) is None)
    if broken:
        yield f"{run.label}: the last loss on {broken} is not finite; the one before is shown"


def note_other_text(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Note settings that make scores those of other text, or with another context."""
    keys = list(filter(_SAYS_WHAT_IS_SCORED.fullmatch, differing_keys(runs)))
    if len({_longest_seq_len(run) for run in runs if run.settings}) > 1:
        keys.append("the longest seq_len")
    if keys:
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        yield f"scores may be of other text or with other context, as the runs differ in {', '.join(keys[:5])}{more}"


def _longest_seq_len(run: ComparedRun) -> int:
    lengths = [value for key, value in run.settings.items() if key.endswith(".seq_len") and isinstance(value, int)]
    return max(lengths, default=0)


def note_left_out(found: Curves, runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Note runs with scores that are not in a picture."""
    missing = ", ".join(run.label for run in runs if run.scored_at is not None and run not in found.runs)
    if missing:
        yield f"not in the picture over {found.cost.label.lower()}, as it or the score is not known: {missing}"
