"""Stages one after another, each in a process of its own: what fails, hangs or takes too long costs no other stage."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.bench.processes import in_a_line
from moe_gpt.bench.results import Result
from moe_gpt.terminal.tables import format_table

Row = dict[str, Any]
"""What is known of a stage: ``name``, ``status``, ``reason``, ``seconds`` and ``results``.

The status is waiting, running, passed, failed, skipped (there is nothing to measure here) or interrupted.
"""
_LEAST_SHARE = 0.25
"""A stage does not start with less of its time than this."""


class Stage(NamedTuple):
    """A piece of work with a limit."""

    name: str
    work: Callable[[Path], Iterable[Result]]
    """Yields results as they come, each with a ``name`` and a ``text``. It must be importable in another process (a
    function of a module, or a ``functools.partial`` of one), and may write into the folder, which is then deleted."""
    seconds: float
    """What it may take at least; more if that leaves the later stages theirs."""


class Skip(Exception):
    """Raised by a stage that has nothing to measure here, which is no failure."""


class _Ended(Exception):
    def __init__(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


def run_stages(
    stages: Sequence[Stage], seconds: float, keep: Callable[[list[Row]], None], say: Callable[[str], None]
) -> list[Row]:
    """Run the stages in their order for at most these seconds in all, and return a row for each.

    Args:
        stages: the most important first, because the last ones do not start where time is short.
        seconds: for all of them.
        keep: is given all rows whenever one changed, to write them down.
        say: is told of each stage.
    """
    rows: list[Row] = [
        {"name": stage.name, "status": "waiting", "reason": "", "seconds": 0.0, "results": []} for stage in stages
    ]
    end = time.monotonic() + seconds
    for index, (stage, row) in enumerate(zip(stages, rows, strict=True)):
        left = end - time.monotonic()
        spare = left - sum(later.seconds for later in stages[index + 1 :])
        say(f"{stage.name} ...")
        _fill(row, stage, min(left, max(stage.seconds, spare)), functools.partial(keep, rows))
        say(f"{stage.name}: {row['status']} after {row['seconds']:.0f} s {row['reason']}".rstrip())
    return rows


def failures(rows: Iterable[Row]) -> list[str]:
    """Return the names of the stages that were to run and did not pass."""
    return [row["name"] for row in rows if row["status"] not in ("passed", "skipped")]


def tabulate_stages(rows: Iterable[Row]) -> str:
    """Return a line for each stage, and below it a line for each of its results."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        lines.append((row["name"], row["status"], f"{row['seconds']:.0f} s", row["reason"]))
        lines += [("", "", "", f"{result['name']}: {result['text']}") for result in row["results"]]
    return format_table(["stage", "", "time", ""], lines, left=4)


def _fill(row: Row, stage: Stage, limit: float, keep: Callable[[], None]) -> None:
    """Run a stage and write into its row what came out; the row is kept at every change."""
    started = time.monotonic()
    row["status"] = "running"
    try:
        keep()
        if limit < _LEAST_SHARE * stage.seconds:
            raise _Ended("failed", f"no time is left: it may need {stage.seconds:.0f} s")
        for result in _results_of(stage, limit):
            row["results"].append(result)
            keep()
        row["status"] = "passed"
    except _Ended as ended:
        row |= {"status": ended.status, "reason": ended.reason}
    except BaseException:  # a person's Ctrl-C, a full disk
        row["status"] = "interrupted"
        raise
    finally:
        row["seconds"] = time.monotonic() - started
        keep()


def _results_of(stage: Stage, limit: float) -> Iterator[Result]:
    """Yield the results of a stage in a process of its own, which ends with all that it started.

    Raises:
        _Ended: where it does not pass, with the status and the reason.
    """
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = context.Process(target=_serve, args=(other, stage.work, folder))
        process.start()
        try:
            other.close()
            while connection.poll(max(0.0, end - time.monotonic())):
                status, value = connection.recv()
                if status == "passed":
                    return
                if status != "result":
                    raise _Ended(status, value)
                yield value
            raise _Ended("failed", f"stopped at its limit of {limit:.0f} s")
        except EOFError:
            process.join(timeout=10)
            raise _Ended("failed", f"its process ended with status {process.exitcode}") from None
        finally:
            _end_group(process.pid or 0)
            process.kill()
            process.join(timeout=10)


def _end_group(pid: int) -> None:
    """Kill a process and what it started, where it leads a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _serve(connection: Connection, work: Callable[[Path], Iterable[Result]], folder: str) -> None:
    """Send what a stage yields, and then how it ended."""
    os.setsid()  # a group of its own, so that all it starts ends with it
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        for result in work(Path(folder)):
            connection.send(("result", result))
        end = ("passed", "")
    except (Skip, ModuleNotFoundError) as missing:
        end = ("skipped", str(missing))
    except Exception as error:
        traceback.print_exc()
        end = ("failed", in_a_line(error))
    connection.send(end)


def _end_with_parent(connection: Connection) -> None:
    """Wait until the parent is gone, however it went, and end this process and what it started."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os.killpg(0, signal.SIGKILL)
