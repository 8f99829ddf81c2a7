"""What a run recorded, as values: lines of its metrics, and the arrays of its evaluations.

What a picture or an answer needs is asked of these two classes. They raise ``NotRecorded`` where the run lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from moe_gpt.config.run import STAGES
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.measure.health import Gradients
from moe_gpt.measure.metric_names import MetricName, scored_sources
from moe_gpt.report.missing import need
from moe_gpt.report.series import Series


@dataclass(frozen=True)
class Slice:
    """Held-out text of one source with the experts that every token went to."""

    tokens: np.ndarray
    """Token ids (B, T)."""
    choices: np.ndarray
    """Experts, best first (L, B, T, K); no layers for a dense model."""


@dataclass(frozen=True)
class EvaluationArrays:
    """What one evaluation kept besides its scores; each dictionary has the sources that are there."""

    step: int
    nats: dict[str, np.ndarray]
    """Summed cross entropy at each position (T,)."""
    counts: dict[str, np.ndarray]
    """Scored tokens at each position (T,)."""
    tokens_per_expert: dict[str, np.ndarray]
    """Assignments over all held-out tokens (L, E)."""
    slices: dict[str, Slice]
    gradients: Gradients | None

    def total_counts(self) -> np.ndarray:
        """Return the assignments of all sources together (L, E)."""
        return np.sum([np.asarray(counts, np.float64) for counts in self.tokens_per_expert.values()], axis=0)

    def tokens(self) -> np.ndarray:
        """Return the token ids of all slices, one after the other (N,)."""
        return np.concatenate([part.tokens.ravel() for part in self.slices.values()])

    def choices(self) -> np.ndarray:
        """Return the choices of these tokens (L, N, K)."""
        parts = [part.choices for part in self.slices.values()]
        return np.concatenate([part.reshape(len(part), -1, part.shape[-1]) for part in parts], axis=1)

    def n_choices(self) -> int:
        """Return how many choices there are, of all sources and layers."""
        return sum(part.choices.size for part in self.slices.values())

    def has_same_text(self, other: EvaluationArrays) -> bool:
        """Return whether two evaluations kept the routing of the same tokens."""
        are_equal = (np.array_equal(part.tokens, other.slices[name].tokens) for name, part in self.slices.items())
        return self.slices.keys() == other.slices.keys() and all(are_equal)


@dataclass(frozen=True)
class RunRecords:
    """A run as it was recorded."""

    name: str
    run_dir: Path
    config: dict[str, Any]
    """The resolved config as plain values; empty where it cannot be read."""
    steps: list[dict[str, Any]]
    """The line of every optimizer step."""
    records: list[dict[str, Any]]
    """Lines with ``groups``, and ``routing`` unless the model is dense."""
    evaluations: list[dict[str, Any]]
    """Lines with ``val/...``."""
    events: list[dict[str, Any]]
    """Lines of events.jsonl."""
    arrays: list[EvaluationArrays]
    """Of the evaluations that have them, oldest first."""
    tokenizer: Tokenizer | None
    tokenizer_digest: str | None
    """SHA-256 of the tokenizer: runs with different ones cannot be compared by loss."""
    notes: list[str]
    """What is missing or could not be read, in words."""
    is_training: bool = False
    """Whether a process was training it when it was read."""
    stage_scores: dict[str, Any] = field(default_factory=dict)
    """What scores.json has, of a stage after pre-training."""
    stage_routing: dict[str, Slice] = field(default_factory=dict)
    """The experts of the same held-out prompts and answers, ``before`` and ``after`` the stage."""

    def section(self, key: str) -> dict[str, Any]:
        """Return a section of the config."""
        return section_of(self.config, key)

    @property
    def stage(self) -> str | None:
        """The stage after pre-training that the run is; None for pre-training."""
        return next((name for name in STAGES if self.section(name)), None)

    @property
    def is_dense(self) -> bool:
        """Whether the config has a single feed-forward network in each layer."""
        return self.section("model").get("n_experts") == 1

    @property
    def shows_experts(self) -> bool:
        """Whether evaluations count what experts get: a reward model, which predicts no tokens, has no evaluations."""
        return not self.is_dense and self.stage != "reward"

    @property
    def records_steps(self) -> bool:
        """Whether steps record norms and routing: those that learn from rewards or pairs do not."""
        return self.stage in (None, "sft")

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages of the curriculum as the config has them, as far as they can be read."""
        stages = self.section("schedule").get("stages")
        return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, Iterable) else []

    @property
    def planned_tokens(self) -> int | None:
        """Tokens at the end of the schedule; None where neither the run nor its config says."""
        recorded = [event["total_tokens"] for event in self.events if isinstance(event.get("total_tokens"), int)]
        if recorded:  # a schedule of one's own may end elsewhere than the config's
            return recorded[-1]
        end: Any = [None, *(stage.get("until_tokens") for stage in self.stages)][-1]
        return end if isinstance(end, int) else None

    @property
    def is_short(self) -> bool:
        """Whether the schedule has more tokens than the run has seen."""
        return self.planned_tokens is not None and self.last("tokens_seen") < self.planned_tokens

    @property
    def sources(self) -> list[str]:
        """The names of the sources, as in the config, or else as evaluated."""
        sources = self.section("data").get("sources") or ()
        return [source["name"] for source in sources if source.get("name")] or scored_sources(self.evaluations)

    @property
    def routings(self) -> list[dict[str, Any]]:
        """The ``routing`` of the recorded steps that have it."""
        return [line["routing"] for line in self.records if "routing" in line]

    @property
    def gradients(self) -> Gradients | None:
        """Those of the newest evaluation after a step that has them."""
        return next(filter(None, (arrays.gradients for arrays in reversed(self.arrays) if arrays.step)), None)

    @property
    def n_experts(self) -> int:
        """The number of experts: that of the counts, or else the config's."""
        counted = [counts.shape[-1] for arrays in self.arrays for counts in arrays.tokens_per_expert.values()]
        n_experts: Any = [self.section("model").get("n_experts"), *counted][-1]
        need(isinstance(n_experts, int), "the number of experts is not recorded")
        return n_experts

    def last(self, key: str) -> int:
        """Return the largest ``step`` or ``tokens_seen`` of all steps and evaluations, 0 where there is none."""
        return max((line.get(key) or 0 for line in (*self.steps, *self.evaluations)), default=0)

    def in_order(self, sources: Iterable[str]) -> list[str]:
        """Return sources in the run's order, so that each has the same colour everywhere; unknown ones last."""
        places = {source: place for place, source in enumerate(self.sources)}
        return sorted(sources, key=lambda source: places.get(source, len(places)))

    def scores(self, source: str, key: str = "ce_loss") -> Series:
        """Return a value of one source at every evaluation that has it."""
        return _series(self.evaluations, str(MetricName(source, key)))

    def all_scores(self, key: str = "ce_loss") -> dict[str, Series]:
        """Return ``scores`` of every source that has any."""
        scores = {source: self.scores(source, key) for source in self.sources}
        return {source: series for source, series in scores.items() if series.is_there}

    def step_values(self, key: str) -> Series:
        """Return a value of every step that has it; steps that were skipped have no loss."""
        return _series(self.steps, key)

    def record_values(self, *path: str) -> Series:
        """Return what is at a path of keys in every recorded step.

        That is ``groups``, the group and the norm: a number; or ``routing`` and a key: values by layer (n_records, L),
        or by layer and expert (n_records, L, E).
        """
        return _series(self.records, *path)

    def over_training(self, has: Callable[[EvaluationArrays], Any]) -> tuple[np.ndarray, list[EvaluationArrays]]:
        """Return the evaluations that have something, and how many tokens had been seen at each."""
        tokens = {line["step"]: line.get("tokens_seen") for line in self.evaluations}
        found = [arrays for arrays in filter(has, self.arrays) if arrays.step in tokens]
        return np.array([tokens[arrays.step] for arrays in found], dtype=float), found

    def last_with_counts(self) -> EvaluationArrays:
        """Return the newest evaluation that has counted assignments."""
        found = [arrays for arrays in self.arrays if arrays.tokens_per_expert]
        need(found, "no evaluation has recorded how many tokens each expert gets")
        return found[-1]

    def last_with_choices(self) -> EvaluationArrays:
        """Return the newest evaluation that has kept which experts a slice of text went to."""
        found = list(filter(EvaluationArrays.n_choices, self.arrays))
        need(found, "no evaluation has recorded the experts of single tokens (train.record_tokens)")
        return found[-1]

    def counts_by_source(self) -> tuple[list[str], np.ndarray]:
        """Return the sources with assignments in every layer at the last evaluation, and their counts (n, L, E)."""
        found = self.last_with_counts().tokens_per_expert
        sources = [source for source in self.in_order(found) if (found[source].sum(axis=-1) > 0).all()]
        need(sources, "no source has a token that was assigned to an expert in every layer")
        return sources, np.stack([found[source] for source in sources])


def tell_apart(runs: Sequence[RunRecords]) -> list[RunRecords]:
    """Name each run after its folder, with as many parents as it takes; a folder given again gets a number."""
    parts = [(*run.run_dir.resolve().parent.parts, run.name) for run in runs]
    paths = [tuple(part.encode("utf-8", "backslashreplace").decode() for part in path) for path in parts]  # any bytes
    again = [paths[:index].count(path) for index, path in enumerate(paths)]
    names = [f"{_shortest(path, set(paths))}{f' #{n + 1}' * (n > 0)}" for path, n in zip(paths, again, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _shortest(path: tuple[str, ...], paths: set[tuple[str, ...]]) -> PurePath:
    """Return the shortest end of a path that no other path has."""
    ends = (path[-n_parts:] for n_parts in range(1, len(path) + 1))
    return PurePath(*next(end for end in ends if sum(other[-len(end) :] == end for other in paths) == 1))


def section_of(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return the section at a path of keys, empty where it is none: a stranger's config may hold anything."""
    section = _at(keys, values)
    return section if isinstance(section, dict) else {}


def _series(lines: Sequence[dict[str, Any]], *path: str) -> Series:
    """Return the values at a path of keys over tokens seen, of the lines that have one."""
    found = [(line.get("tokens_seen"), value) for line in lines if (value := _at(path, line)) is not None]
    tokens, values = zip(*found, strict=True) if found else ((), ())
    return Series(np.array(tokens, dtype=float), np.array(values, dtype=float))


def _at(path: Sequence[str], values: dict[str, Any]) -> Any:
    """Return what is at a path of keys; None where the path leads nowhere."""
    value: Any = values
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
