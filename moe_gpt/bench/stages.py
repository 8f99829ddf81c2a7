"""Stages one after another, each in a process of its own: what fails, hangs or takes too long costs no other stage."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_gpt.bench.processes import Worker
from moe_gpt.bench.results import Result
from moe_gpt.terminal.numbers import format_number
from moe_gpt.terminal.tables import format_table


class Stage(NamedTuple):
    """Work, which another process can import, and the seconds it may take; more if the later stages keep theirs.

    It yields results as they come. The key ``failed`` or ``skipped``, with the reason, makes the stage's status. The
    work may write into the folder, which is then deleted.
    """

    name: str
    work: Callable[[Path], Iterable[Result]]
    seconds: float


def run_stages(
    stages: Sequence[Stage], seconds: float, keep: Callable[[list[Result]], None], say: Callable[[str], None]
) -> list[Result]:
    """Run the stages in their order for at most these seconds in all, and return a row for each.

    ``keep`` gets all rows whenever one has changed. A status is waiting, unfinished, passed, failed or skipped.
    """
    empty = {"status": "waiting", "reason": "", "seconds": 0.0}
    rows: list[Result] = [{"name": stage.name, **empty, "results": []} for stage in stages]
    end = time.monotonic() + seconds
    for index, (stage, row) in enumerate(zip(stages, rows, strict=True)):
        left = end - time.monotonic()
        spare = left - sum(later.seconds for later in stages[index + 1 :])
        _run(row, stage, min(left, max(stage.seconds, spare)), functools.partial(keep, rows))
        say(f"{stage.name}: {row['status']} after {row['seconds']:.0f} s {row['reason']}".rstrip())
    return rows


def _run(row: Result, stage: Stage, limit: float, keep: Callable[[], None]) -> None:
    """Run a stage and write into its row what comes of it; the row is kept at every change."""
    started, failure = time.monotonic(), f"no time is left: it may need {stage.seconds:.0f} s"
    row["status"] = "unfinished"  # stays where it is interrupted
    keep()
    if limit >= stage.seconds / 4:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            worker = Worker(folder, functools.partial(_start, stage.work))
            with contextlib.closing(worker):
                while any(answer := worker.ask(1, max(0.0, started + limit - time.monotonic()))):
                    row["results"] += answer
                    keep()
            failure = worker.failure
    row |= {"status": "failed" if failure else "passed", "reason": failure, "seconds": time.monotonic() - started}
    found = ChainMap(*row["results"])
    for status in found.keys() & {"failed", "skipped"}:
        row |= {"status": status, "reason": found[status]}
    keep()


def _start(work: Callable[[Path], Iterable[Result]], folder: str) -> Callable[[], Result | None]:
    """Return what gives the next result, and None after the last."""
    return functools.partial(next, iter(work(Path(folder))), None)


def tabulate_stages(rows: Iterable[Result]) -> str:
    """Return a line for each stage, and below it a line for each of its results."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        lines.append((row["name"], row["status"], f"{row['seconds']:.0f} s", row["reason"]))
        for result in row["results"]:
            words = [f"{key} {format_number(value)}" for key, value in result.items()]
            lines.append(("", "", "", ", ".join(words).removeprefix("name ")))
    return format_table(["stage", "", "time", ""], lines, left=4)
