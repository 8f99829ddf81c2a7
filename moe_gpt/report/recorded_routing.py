"""What a run's evaluations kept of its routing, in the form that pictures, tables and summaries need.

Each function reads ``RunRecords`` alone, and raises ``NotRecorded`` where the run lacks what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe_gpt.measure.health import Gradients
from moe_gpt.report.missing import need
from moe_gpt.report.run_records import EvaluationArrays, RunRecords


def in_order(run: RunRecords, sources: Iterable[str]) -> list[str]:
    """Return sources in the run's order, so that each has the same colour everywhere; unknown ones last."""
    places = {source: place for place, source in enumerate(run.sources)}
    return sorted(sources, key=lambda source: places.get(source, len(places)))


def over_training(run: RunRecords, has: Callable[[EvaluationArrays], Any]) -> tuple[np.ndarray, list[EvaluationArrays]]:
    """Return the evaluations that have something, and how many tokens had been seen at each."""
    tokens = {line["step"]: line.get("tokens_seen") for line in run.evaluations}
    found = [arrays for arrays in filter(has, run.arrays) if arrays.step in tokens]
    return np.array([tokens[arrays.step] for arrays in found], dtype=float), found


def n_experts_of(run: RunRecords) -> int:
    """Return the number of experts: that of the counts, or else the config's."""
    counted = [counts.shape[-1] for arrays in run.arrays for counts in arrays.tokens_per_expert.values()]
    n_experts = counted[-1] if counted else run.section("model").get("n_experts")
    need(isinstance(n_experts, int), "the number of experts is not recorded")
    return int(n_experts or 0)


def last_with_counts(run: RunRecords) -> EvaluationArrays:
    """Return the newest evaluation that has counted assignments."""
    return _last(run, lambda arrays: arrays.tokens_per_expert, "how many tokens each expert gets")


def last_with_choices(run: RunRecords) -> EvaluationArrays:
    """Return the newest evaluation that has kept which experts a slice of text went to."""
    return _last(run, n_choices, "which experts a slice of text went to (train.record_tokens)")


def _last(run: RunRecords, has: Callable[[EvaluationArrays], Any], what: str) -> EvaluationArrays:
    found = list(filter(has, run.arrays))
    need(found, f"no evaluation has kept {what}")
    return found[-1]


def newest_gradients(run: RunRecords) -> Gradients | None:
    """Return the gradients of the newest evaluation after a step that has them."""
    return next(filter(None, (arrays.gradients for arrays in reversed(run.arrays) if arrays.step)), None)


def total_counts(arrays: EvaluationArrays) -> np.ndarray:
    """Return the assignments of all sources together (L, E)."""
    return np.sum([np.asarray(counts, dtype=np.float64) for counts in arrays.tokens_per_expert.values()], axis=0)


def counts_by_source(run: RunRecords) -> tuple[list[str], np.ndarray]:
    """Return the sources with assignments in every layer at the last evaluation, and their counts (n_sources, L, E)."""
    found = last_with_counts(run).tokens_per_expert
    sources = [source for source in in_order(run, found) if (found[source].sum(axis=-1) > 0).all()]
    need(sources, "no source has an assignment")
    return sources, np.stack([found[source] for source in sources])


def joined_choices(arrays: EvaluationArrays) -> np.ndarray:
    """Return the choices of all sources' slices, one after the other (L, N, K)."""
    parts = [part.choices.reshape(len(part.choices), -1, part.choices.shape[-1]) for part in arrays.slices.values()]
    return np.concatenate(parts, axis=1)


def joined_tokens(arrays: EvaluationArrays) -> np.ndarray:
    """Return the token ids that belong to ``joined_choices`` (N,)."""
    return np.concatenate([part.tokens.ravel() for part in arrays.slices.values()])


def n_choices(arrays: EvaluationArrays) -> int:
    """Return how many choices an evaluation has kept, of all sources and layers."""
    return sum(part.choices.size for part in arrays.slices.values())


def has_same_text(arrays: EvaluationArrays, other: EvaluationArrays) -> bool:
    """Return whether two evaluations kept the routing of the same tokens."""
    return arrays.slices.keys() == other.slices.keys() and all(
        np.array_equal(part.tokens, other.slices[source].tokens) for source, part in arrays.slices.items()
    )
