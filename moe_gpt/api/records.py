"""The records of a run, as tables."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_gpt.config.flat import flatten
from moe_gpt.report import run_records

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run folder, finished or not; ``moe_gpt.read_run`` makes one."""

    path: Path
    config: dict[str, Any] = dataclasses.field(repr=False)
    """The settings of config.yaml."""
    steps: list[dict[str, Any]] = dataclasses.field(repr=False)
    """The lines of metrics.jsonl about steps; ``metrics`` is their table."""
    evaluation_lines: list[dict[str, Any]] = dataclasses.field(repr=False)
    """The lines about evaluations; ``evaluations`` is their table."""
    notes: list[str]
    """The files that are missing or cannot be read."""

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """A row for each optimizer step, with the columns of metrics.jsonl (docs/runs.md)."""
        return _table(self.steps)

    @cached_property
    def evaluations(self) -> pandas.DataFrame:
        """A row for each evaluation: ``step``, ``tokens_seen``, ``val/<source>/ce_loss`` and so on."""
        return _table(self.evaluation_lines)


def _table(lines: list[dict[str, Any]]) -> pandas.DataFrame:
    """Return a row for each step, from its last line if a step was repeated; sections become dotted column names."""
    import pandas

    by_step = {line["step"]: flatten(line) for line in lines}
    return pandas.DataFrame(list(by_step.values()))


def read_run(run_dir: str | Path) -> RecordedRun:
    """Read the records of a run; ``notes`` names the files that are damaged or missing.

    Raises:
        InputError: where the folder is missing, or is not a run folder.
    """
    found = run_records.read_run(run_dir)
    return RecordedRun(found.run_dir, found.config, found.steps, found.evaluations, found.notes)
