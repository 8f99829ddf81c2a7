"""What follows from a run's records for a comparison: its settings, what it cost, how far it came."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from moe_gpt.config import ModelConfig
from moe_gpt.config.flat import flatten
from moe_gpt.errors import ConfigError
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.metric_names import MetricName
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.report.recorded import RunRecords
from moe_gpt.report.words import say, words

_COLUMNS = ("tokens_seen", "batch_tokens", "seq_len", "tokens_per_second")


@dataclasses.dataclass(frozen=True, eq=False)
class ComparedRun:
    """A run beside others."""

    records: RunRecords
    label: str

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The config, flattened; empty where it cannot be read."""
        return flatten(self.records.config)

    @functools.cached_property
    def model(self) -> ModelConfig | str:
        """The shape of the model, or why it is not known."""
        values = self.records.section("model")
        if not values.get("vocab_size"):
            return "its config has no model with a vocab_size"
        try:
            return ModelConfig.from_mapping(values)
        except ConfigError as error:
            return error.problems[0]

    @functools.cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """The columns of the steps that have all of them."""
        rows = [[line.get(key) for key in _COLUMNS] for line in self.records.steps]
        complete = [row for row in rows if all(map(_is_positive, row))]
        return dict(zip(_COLUMNS, np.array(complete, dtype=float).reshape(-1, len(_COLUMNS)).T, strict=True))

    @functools.cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """What the steps until each one cost together: ``seconds``, and ``flops`` where the model is known."""
        tokens, lengths = self.steps["batch_tokens"], self.steps["seq_len"]
        if not len(tokens):
            return {}
        sums = {"seconds": np.cumsum(tokens / self.steps["tokens_per_second"])}
        if isinstance(self.model, ModelConfig):
            different, places = np.unique(lengths, return_inverse=True)
            per_token = np.array([count_flops(self.model, int(length)).training for length in different], dtype=float)
            sums["flops"] = np.cumsum(tokens * per_token[places])
        return sums

    @functools.cached_property
    def totals(self) -> dict[str, float]:
        """Everything that is known of the run's size and cost, by quantity."""
        totals = {"tokens": float(self.tokens_seen)} | {name: float(sums[-1]) for name, sums in self.sums.items()}
        counts = count_parameters(self.model)._asdict() if isinstance(self.model, ModelConfig) else {}
        return totals | {name: float(counts[name]) for name in ("active", "total") if name in counts}

    def spent(self, quantity: str, tokens: np.ndarray) -> np.ndarray | None:
        """Return what a run had cost when so many tokens were seen; None where that is not known."""
        if quantity == "tokens":
            return tokens
        if quantity not in self.sums:
            return None
        n_steps = np.searchsorted(self.steps["tokens_seen"], tokens, side="right")
        return np.concatenate([[0.0], self.sums[quantity]])[n_steps]

    @property
    def tokens_seen(self) -> int:
        """Tokens at the last step or evaluation."""
        return self.records.last("tokens_seen")

    @property
    def total_tokens(self) -> int | None:
        """Tokens at the end of the schedule; None where the config does not say."""
        ends = [stage.get("until_tokens") for stage in self.records.stages]
        return ends[-1] if ends and isinstance(ends[-1], int) else None

    @property
    def scored_at(self) -> int | None:
        """Tokens at the last scores; of the sources the one whose scores end first."""
        return min((int(scores.tokens[-1]) for scores in self.records.all_scores().values()), default=None)

    @property
    def is_stopped(self) -> bool:
        """Whether the schedule has more tokens than the run has seen."""
        return self.total_tokens is not None and self.tokens_seen < self.total_tokens

    @property
    def state(self) -> str:
        """How far the run came, in words."""
        return say(words()["comparison"]["state"], run=self)

    @property
    def n_known(self) -> int:
        """Steps whose cost is known."""
        return len(self.steps["tokens_seen"])

    @property
    def n_done(self) -> int:
        """Steps that were taken."""
        return max((line["step"] for line in self.records.steps), default=0)

    @property
    def broken(self) -> list[str]:
        """The sources whose loss at the last evaluation is not finite."""
        sources = list(self.records.all_scores())
        last = self.records.evaluations[-1] if sources else {}
        return [source for source in sources if last.get(str(MetricName(source, "ce_loss")), 0.0) is None]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences; 0 where the config does not say."""
        lengths = [value for key, value in self.settings.items() if key.endswith(".seq_len") and isinstance(value, int)]
        return max(lengths, default=0)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def compared_runs(runs: Sequence[RunRecords]) -> list[ComparedRun]:
    """Name each run after its folder, with as many parents as it takes; a folder given again gets a number."""
    paths = [(*run.run_dir.resolve().parent.parts, run.name) for run in runs]
    earlier = [paths[:index].count(path) for index, path in enumerate(paths)]
    suffixes = [f" #{number + 1}" if number else "" for number in earlier]
    labels = [f"{_shortest(path, set(paths))}{suffix}" for path, suffix in zip(paths, suffixes, strict=True)]
    return [ComparedRun(run, label) for run, label in zip(runs, labels, strict=True)]


def _shortest(path: tuple[str, ...], paths: set[tuple[str, ...]]) -> PurePath:
    """Return the shortest end of a path that no other path has."""
    ends = (path[-n_parts:] for n_parts in range(1, len(path) + 1))
    return PurePath(*next(end for end in ends if sum(other[-len(end) :] == end for other in paths) == 1))
