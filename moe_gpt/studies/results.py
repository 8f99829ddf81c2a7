"""The runs of a study as they are on the disk: finished, stale, failed, running or missing, and what they came to."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from moe_gpt.config import RunConfig
from moe_gpt.errors import InputError
from moe_gpt.files.json_lines import read_json_lines
from moe_gpt.measure.metric_names import VALIDATION
from moe_gpt.post_training.starting import completed
from moe_gpt.report.comparison.runs import ComparedRun
from moe_gpt.report.run_records import is_training, read_run
from moe_gpt.studies.plan import Planned, Study
from moe_gpt.training.saving.changes import changed_settings, describe_environment, settings_that_matter
from moe_gpt.training.saving.checkpoint import read_config, read_state
from moe_gpt.training.saving.listing import find_good_checkpoint
from moe_gpt.training.saving.manifest import CONFIG, STATE

State = Literal["finished", "stale", "failed", "running", "missing"]
MACHINERY = ("code", "torch", "threads")
"""What may have changed since a run whose result still answers the study's question: such a row counts, marked."""


_LOSS = "/ce_loss"
_UNSCORED = "its last evaluation has no finite scores"


class Row(NamedTuple):
    """What is known of a run."""

    run: Planned
    state: State
    cause: str = ""
    """Why it is not finished, in words."""
    changed: tuple[str, ...] = ()
    """What is other than the study says now: settings, data.SOURCE, init_from, code, torch, threads."""
    fingerprint: str | None = None
    """Of settings, data, code, torch and threads."""
    data: Mapping[str, str] = {}
    """Digests of the tokens of each source."""
    machine: str = ""
    """Where it ran, and with which torch."""
    records: ComparedRun | None = None
    """Of a run that came to its end."""
    scores: Mapping[str, float | None] = {}
    """Its last evaluation by source and key, as prose/ce_loss; None: not finite."""

    @property
    def started_at(self) -> str:
        """Time of the last start from the beginning, empty where there is none."""
        events = self.run.folder / "events.jsonl"
        return _last_start(read_json_lines(events).lines) if events.is_file() else ""

    @property
    def counts(self) -> bool:
        """Whether comparisons take the row."""
        return self.state in ("finished", "stale") and bool(self.records) and self.is_as_planned

    @property
    def is_as_planned(self) -> bool:
        """Whether its settings, data and start are those of the study."""
        return set(self.changed) <= set(MACHINERY)

    @property
    def totals(self) -> dict[str, float]:
        """Tokens, FLOPs and CPU seconds of a run that came to its end, where recorded."""
        return self.records.totals if self.records else {}

    def scores_at(self, tokens: int | None) -> Mapping[str, float | None]:
        """Return the scores of the last evaluation up to so many tokens; at the end for None."""
        if tokens is None or not self.records:
            return self.scores
        evaluations = self.records.records.evaluations
        return _scores(evaluations[bisect.bisect(evaluations, tokens, key=_tokens_of) - 1])

    def plain(self) -> dict[str, Any]:
        """Return the row for table.json."""
        facts: dict[str, Any] = {"arm": self.run.arm, "seed": self.run.seed, "state": self.state, "cause": self.cause}
        costs = {key: self.totals.get(key) for key in ("tokens", "flops", "cpu_seconds")}
        facts |= {"counts": self.counts, "scores": dict(self.scores), **costs}
        return facts | {"machine": self.machine, "fingerprint": self.fingerprint}

    def but_changed(self, keys: Collection[str]) -> Row:
        """Return the row with something that has changed since: a run that ended or stopped is stale then."""
        changed = tuple(sorted({*self.changed, *keys}))
        if changed == self.changed:
            return self
        state: State = "stale" if self.state in ("finished", "missing") else self.state
        return self._replace(state=state, changed=changed, cause=f"changed: {', '.join(changed)}")


def locked_by(run: Planned) -> Path:
    """Return the folder whose lock the process holds that works on a run."""
    return run.folder.parent / ".locks" / run.name


def failure_of(run: Planned) -> Path:
    """Return the file that says why a run failed."""
    return run.folder.with_name(f"{run.name}.failed")


def names_of(rows: Sequence[Row], *states: str) -> list[str]:
    """Return the names of the runs in some states."""
    return [row.run.name for row in rows if row.state in states]


def of_arms(rows: Sequence[Row], *arms: str) -> list[Row]:
    """Return the rows of some arms."""
    return [row for row in rows if row.run.arm in arms]


def look(study: Study) -> list[Row]:
    """Return a row for each run, in the order of the study. Nothing is written."""
    found = {run.folder: look_at(run) for run in study.runs}
    newest = {_text_of(row): row.data for row in sorted(found.values(), key=_time_of) if row.data}
    return [_beside(run.folder, found, newest) for run in study.runs]


def _time_of(row: Row) -> str:
    return row.started_at


def _text_of(row: Row) -> str:
    """Return what runs with the same tokens have in common."""
    return json.dumps([dataclasses.asdict(row.run.config.data), row.run.start])


def _beside(folder: Path, found: Mapping[Path, Row], newest: Mapping[str, Mapping[str, str]]) -> Row:
    """Return a row with what changed since in the data, as newer runs have them, and in the run that it starts with."""
    row = found[folder]
    row = row.but_changed([f"data.{name}" for name in row.data if row.data[name] != newest[_text_of(row)].get(name)])
    if row.run.parent is None or not row.fingerprint:
        return row
    parent = _beside(row.run.parent, found, newest)
    is_other = parent.started_at > row.started_at or not parent.is_as_planned
    return row.but_changed(["init_from"] if is_other else parent.changed)


def look_at(run: Planned, is_mine: bool = False) -> Row:
    """Return the row of one run, without what depends on other runs.

    Args:
        run: as it is planned.
        is_mine: this process works on it, which is no reason to call it running.
    """
    row = _saved(run)
    if row.state in ("finished", "failed"):
        return row
    if not is_mine and any(map(is_training, (run.folder, locked_by(run)))):
        return row._replace(state="running")
    if failure_of(run).is_file():
        return row._replace(state="failed", cause=failure_of(run).read_text(encoding="utf-8"))
    return row


def _saved(run: Planned) -> Row:
    """Return the row of a run by its newest checkpoint."""
    checkpoint, _ = find_good_checkpoint(run.folder, (CONFIG, STATE))
    if not checkpoint:
        return Row(run, "missing")
    try:
        return _row_of(run, read_config(checkpoint), read_state(checkpoint))
    except InputError as error:
        return Row(run, "missing").but_changed([str(error)])


def _row_of(run: Planned, config: RunConfig, state: dict[str, Any]) -> Row:
    where = collections.defaultdict(lambda: "not known", state["environment"])
    facts = [settings_that_matter(config), state["data_fingerprint"], *map(where.get, MACHINERY)]
    row = Row(
        run,
        "missing",
        cause=f"stopped at step {state['step']}",
        fingerprint=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        data=state["data_fingerprint"],
        machine="{device} ({cpu}), torch {torch}, threads: {threads}".format_map(where),
    )
    if state["tokens_seen"] >= (config.schedule.stages[-1].end or math.inf):
        row = _ended(row)
    now = describe_environment(torch.device("cpu"), "") | {"threads": 1}
    others = [key for key in MACHINERY if where[key] != now[key]]
    return row.but_changed([*_other_settings(config, run.config), *others])


def _ended(row: Row) -> Row:
    """Return the row of a run that came to its end: without scores that are numbers, it failed."""
    records = read_run(row.run.folder)
    scores = _scores(records.evaluations[-1] if records.evaluations else {})
    row = row._replace(state="finished", cause="", records=ComparedRun(records), scores=scores)
    return row if scores and None not in scores.values() else row._replace(state="failed", cause=_UNSCORED)


def _scores(line: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name.removeprefix(VALIDATION): value for name, value in line.items() if name.startswith(VALIDATION)}


def losses_of(evaluation: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the losses of an evaluation's line by source."""
    return {name.removesuffix(_LOSS): value for name, value in _scores(evaluation).items() if name.endswith(_LOSS)}


def _tokens_of(evaluation: Mapping[str, Any]) -> int:
    return int(evaluation["tokens_seen"])


def _last_start(events: Sequence[Mapping[str, Any]]) -> str:
    return max((event["time"] for event in events if event["kind"] == "start"), default="")


def _other_settings(found: RunConfig, wanted: RunConfig) -> Iterator[str]:
    """Yield the settings of a run that are not those of the study; what follows from data or start may be there."""
    wanted = completed(wanted, found.model, found.data) if wanted.stage else wanted
    yield from (change.key for change in changed_settings(found, wanted) if change.new is not None)
