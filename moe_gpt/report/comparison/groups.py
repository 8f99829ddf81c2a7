"""Runs that belong together: the same training with other seeds. And what differs between runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yaml

from moe_gpt.report.comparison.runs import ComparedRun
from moe_gpt.report.pictures import Table

_MAY_DIFFER_IN_GROUP = re.compile(
    r"train\.(seed|log_every_steps|eval_every_steps|record_\w+|sample_tokens)|tracking|checkpoint\..*"
    r"|data\.(cache_dir|verify_tokens|sources\.\d+\.prompt)"
)
"""The seed, where files are, and what is recorded."""
_NOT_THERE = object()


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

    def by_end(self) -> list[Group]:
        """Return the group's runs that ended at the same place together."""
        return _together(self.runs, lambda run: (run.tokens_seen, run.scored_at))


def group_runs(runs: Sequence[ComparedRun]) -> list[Group]:
    """Put runs with equal settings and tokenizers together; one whose config cannot be read stays alone."""

    def identity(run: ComparedRun) -> Any:
        settings = {key: value for key, value in run.settings.items() if not _MAY_DIFFER_IN_GROUP.fullmatch(key)}
        return (settings, run.records.tokenizer_digest) if settings else object()

    return _together(runs, identity)


def _together(runs: Sequence[ComparedRun], identity: Callable[[ComparedRun], Any]) -> list[Group]:
    """Return the runs of equal identity as groups, in the order of their first runs; identities need no hash."""
    identities: list[Any] = []
    groups: list[Group] = []
    for run in runs:
        found = identity(run)
        if found not in identities:
            identities.append(found)
            groups.append(Group([]))
        groups[identities.index(found)].runs.append(run)
    return groups


def differing_keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the settings that differ between the runs whose config can be read, in the order of the configs."""
    settings = [run.settings for run in runs if run.settings]
    return [key for key in dict.fromkeys(itertools.chain(*settings)) if _differs(key, settings)]


def _differs(key: str, settings: Sequence[dict[str, Any]]) -> bool:
    first, *others = (found.get(key, _NOT_THERE) for found in settings)
    return any(value != first for value in others)


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
