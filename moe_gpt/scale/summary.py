"""What a preparation did: documents read, removed by each step, and stored."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

from moe_gpt.files.durable import replace_file
from moe_gpt.terminal.tables import format_table


@dataclasses.dataclass(frozen=True)
class Summary:
    """The counts of one source."""

    source: str
    n_tasks: int
    n_read: int
    """Documents that the tasks read."""
    removed: dict[str, int]
    """Documents that each step removed."""
    n_documents: int
    """Documents in the store."""
    train_tokens: int
    held_out_tokens: int
    task_seconds: float
    """The tasks' times for reading, filters and tokenising, added up."""
    versions: dict[str, str]
    """The versions of packages that decide what filters remove."""

    def save(self, file: Path) -> None:
        """Write the summary as JSON."""
        replace_file(file, json.dumps(dataclasses.asdict(self), indent=2))

    @classmethod
    def load(cls, file: Path) -> Summary | None:
        """Return what ``save`` wrote; None if there is no such file."""
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def table(self) -> str:
        """Return a table with a row for each step."""
        left, rows = self.n_read, [("read", "", f"{self.n_read:,}")]
        for step, n_removed in self.removed.items():
            left -= n_removed
            rows.append((step, f"{n_removed:,}", f"{left:,}"))
        table = format_table(("step", "removed", "documents left"), rows)
        tokens = f"{self.train_tokens:,} train tokens, {self.held_out_tokens:,} held out"
        return f"{self.source}: {self.n_tasks:,} tasks, {self.task_seconds:,.1f} seconds in all\n{table}\n{tokens}"


def dropped(stats_folder: Path, steps: dict[int, str]) -> tuple[int, dict[str, int]]:
    """Return how many documents were read, and dropped by each step, from the statistics that datatrove writes.

    Args:
        stats_folder: the folder with a JSON file for each task.
        steps: the place of each counted step in the pipeline, and its name. The first step of a pipeline reads.
    """
    n_read, counts = 0, Counter(dict.fromkeys(steps.values(), 0))
    for file in stats_folder.glob("*.json"):
        found = [entry["stats"] for entry in json.loads(file.read_text(encoding="utf-8"))]
        n_read += _total(found[0].get("total", 0))
        for place, name in steps.items():
            counts[name] += _total(found[place].get("dropped", 0))
    return n_read, dict(counts)


def _total(value: int | dict[str, int]) -> int:
    return value["total"] if isinstance(value, dict) else value
