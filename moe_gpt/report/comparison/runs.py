"""Runs beside others: what one cost and how far it came, which belong together, and how their settings differ."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from moe_gpt.config import ModelConfig
from moe_gpt.config.flat import flatten
from moe_gpt.errors import ConfigError
from moe_gpt.measure.flops import count_flops
from moe_gpt.measure.metric_names import MetricName
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.report.pictures import Table
from moe_gpt.report.recorded import RunRecords
from moe_gpt.report.words import say, words

_COLUMNS = ("tokens_seen", "batch_tokens", "seq_len", "tokens_per_second")
_CPU = "cpu_seconds"
"""Another column, which older runs lack."""
_MAY_DIFFER_IN_GROUP = re.compile(
    r"train\.(seed|log_every_steps|eval_every_steps|record_\w+|sample_tokens)|tracking|checkpoint\..*"
    r"|data\.(cache_dir|verify_tokens|sources\.\d+\.prompt)"
)
"""The seed, where files are, and what is recorded."""
_ABOUT_EQUAL = 0.02
"""Share by which the tokens of a group's runs may differ."""
_NOT_THERE = object()


@dataclasses.dataclass(frozen=True, eq=False)
class ComparedRun:
    """A run beside others; of ``tell_apart``'s records, so that its label is its own."""

    records: RunRecords

    @property
    def label(self) -> str:
        """The name of the run."""
        return self.records.name

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
        values = [[line.get(key) for key in (*_COLUMNS, _CPU)] for line in self.records.steps]
        rows = np.array(values, dtype=float).reshape(-1, len(_COLUMNS) + 1)  # what is not there becomes nan
        return dict(zip((*_COLUMNS, _CPU), rows[(rows[:, :-1] > 0).all(axis=1)].T, strict=True))

    @functools.cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """What the steps until each one cost together: ``seconds``, ``cpu_seconds`` and ``flops``, where known."""
        tokens, lengths = self.steps["batch_tokens"], self.steps["seq_len"]
        if not len(tokens):
            return {}
        sums = {"seconds": np.cumsum(tokens / self.steps["tokens_per_second"])}
        if not np.isnan(self.steps[_CPU]).any():
            sums[_CPU] = np.cumsum(self.steps[_CPU])
        if isinstance(self.model, ModelConfig):
            different, places = np.unique(lengths, return_inverse=True)
            per_token = np.array([count_flops(self.model, int(length)).training for length in different], dtype=float)
            sums["flops"] = np.cumsum(tokens * per_token[places])
        return sums

    @functools.cached_property
    def totals(self) -> dict[str, float]:
        """Everything that is known of the run's size and cost, by quantity."""
        totals = {name: float(sums[-1]) for name, sums in self.sums.items()}
        if isinstance(self.model, ModelConfig):
            counts = count_parameters(self.model)
            totals |= {"active": float(counts.active), "total": float(counts.total)}
        return totals | {"tokens": float(self.records.last("tokens_seen"))}

    def spent(self, quantity: str, tokens: np.ndarray) -> np.ndarray | None:
        """Return what a run had cost when so many tokens were seen; None where that is not known."""
        if quantity == "tokens":
            return tokens
        if quantity not in self.sums:
            return None
        n_steps = np.searchsorted(self.steps["tokens_seen"], tokens, side="right")
        return np.concatenate([[0.0], self.sums[quantity]])[n_steps]

    @property
    def scored_at(self) -> int | None:
        """Tokens at the last scores; of the sources the one whose scores end first."""
        return min((int(scores.tokens[-1]) for scores in self.records.all_scores().values()), default=None)

    @property
    def is_stopped(self) -> bool:
        """Whether the schedule has more tokens than the run has seen, and nothing trains it any more."""
        return self.records.is_short and not self.records.is_training

    @functools.cached_property
    def identity(self) -> Any:
        """What runs of one group have in common: settings, tokenizer, and whether they stopped early."""
        settings = {key: value for key, value in self.settings.items() if not _MAY_DIFFER_IN_GROUP.fullmatch(key)}
        return settings, self.records.tokenizer_digest, self.is_stopped, self.records.is_training

    @property
    def state(self) -> str:
        """How far the run came, in words."""
        return say(words()["comparison"]["state"], run=self)

    @property
    def broken(self) -> list[str]:
        """The sources whose loss at the last evaluation is not finite."""
        sources = list(self.records.all_scores())
        last = self.records.evaluations[-1] if sources else {}
        return [source for source in sources if last.get(str(MetricName(source, "ce_loss")), 0.0) is None]


class Group(NamedTuple):
    """Runs that one label, one colour and one row stand for."""

    runs: list[ComparedRun]

    @property
    def n_seeds(self) -> int:
        """How many different seeds there are."""
        return len({run.settings.get("train.seed") for run in self.runs})

    @property
    def label(self) -> str:
        """The name of the first run, with how many there are."""
        n_runs, first = len(self.runs), self.runs[0].label
        kind = "seeds" if self.n_seeds == n_runs else "runs"
        return f"{first} ({n_runs} {kind})" if n_runs > 1 else first

    def last_scores(self, source: str, key: str) -> list[float]:
        """Return the last score of each run that has one."""
        return [score for run in self.runs for score in run.records.scores(source, key).values[-1:]]

    def totals(self, quantity: str) -> list[float]:
        """Return what each run has of a quantity, where that is known."""
        return [run.totals[quantity] for run in self.runs if quantity in run.totals]


def group_runs(runs: Sequence[ComparedRun]) -> list[Group]:
    """Put runs together that are equal but for the seed and what is recorded, and that came about equally far."""
    groups: list[Group] = []
    for run in runs:
        group = next((group for group in groups if _belong_together(group.runs[0], run)), None)
        if group:
            group.runs.append(run)
        else:
            groups.append(Group([run]))
    return groups


def _belong_together(one: ComparedRun, other: ComparedRun) -> bool:
    """Tell whether a mean over two runs has a sense; not where a config cannot be read."""
    ends, others = ((run.records.last("tokens_seen"), run.scored_at or 0) for run in (one, other))
    return bool(one.settings) and one.identity == other.identity and np.allclose(ends, others, _ABOUT_EQUAL, 0)


def differing_keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the settings that differ between the runs whose config can be read, in the order of the configs."""
    settings = [run.settings for run in runs if run.settings]

    def differs(key: str) -> bool:
        return any(found.get(key, _NOT_THERE) != settings[0].get(key, _NOT_THERE) for found in settings)

    return list(filter(differs, dict.fromkeys(itertools.chain(*settings))))


def table_of_differences(runs: Sequence[ComparedRun]) -> Table:
    """Return the settings that differ, with a column for each run whose config can be read."""
    readable = [run for run in runs if run.settings]
    rows = [[key, *(_setting(run.settings, key) for run in readable)] for key in differing_keys(runs)]
    columns = ["Setting", *(run.label for run in readable)]
    return Table(columns, rows or [["(nothing)", *[""] * len(readable)]], "Settings that differ")


def _setting(settings: dict[str, Any], key: str) -> str:
    """Return a value as YAML spells it, in full: two that differ must not look the same."""
    if key not in settings:
        return "not there"
    text = yaml.safe_dump(settings[key], default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
