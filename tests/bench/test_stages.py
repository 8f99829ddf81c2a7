"""Stages fail, hang, lack time or are interrupted, and what was measured is always written down."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_gpt.bench.stages import Stage, run_stages, tabulate_stages


def count(n: int, folder: Path):
    """Yield n results and use the folder."""
    for number in range(n):
        (folder / "used").write_text("x")
        yield {"name": f"number {number}", "value": number}


count_one, count_two = (functools.partial(count, n) for n in (1, 2))


def break_down(folder: Path):
    """Fail after a result."""
    yield {"name": "first", "value": 1}
    raise ValueError("no such thing\nat all")


def die(folder: Path):
    """End without a word."""
    yield {"name": "first", "value": 1}
    os._exit(3)


def hang(note: Path, folder: Path):
    """Start a process, write down its id, and wait for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note.write_text(json.dumps([child.pid, str(folder)]))
    yield {"name": "first", "value": 1}
    time.sleep(600)


def skip(folder: Path):
    """Have nothing to do here."""
    yield {"name": "nothing", "skipped": "needs CUDA"}


def find_fault(folder: Path):
    """Go on after something failed."""
    yield {"name": "first", "failed": "the runs differ"}
    yield {"name": "second", "value": 1}


def lack(folder: Path):
    """Need a package."""
    import no_such_package  # noqa: F401

    yield


def run(stages, seconds=60.0):
    """Return the rows, and copies of what was kept at each moment."""
    kept: list[list[dict]] = []
    rows = run_stages(stages, seconds, lambda rows: kept.append(copy.deepcopy(rows)), lambda text: None)
    return rows, kept


def is_gone(pid: int) -> bool:
    """Whether a process has ended or is a zombie, within a few seconds."""
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_others_go_on_after_failures():
    """Each failure is a row with its reason and what came before it, and what is skipped is no failure."""
    works = {"dies": die, "breaks": break_down, "finds": find_fault, "skips": skip, "lacks": lack, "counts": count_two}
    rows, kept = run([Stage(name, work, 10) for name, work in works.items()])
    assert {row["name"]: (row["status"], row["reason"], len(row["results"])) for row in rows} == {
        "dies": ("failed", "its process ended, with status 3", 1),
        "breaks": ("failed", "ValueError: no such thing", 1),
        "finds": ("failed", "the runs differ", 2),
        "skips": ("skipped", "needs CUDA", 1),
        "lacks": ("failed", "ModuleNotFoundError: No module named 'no_such_package'", 0),
        "counts": ("passed", "", 2),
    }
    assert [row["status"] for row in kept[0]] == ["unfinished", *["waiting"] * 5]
    assert kept[-1] == rows
    assert [len(rows[-1]["results"]) for rows in kept[-4:]] == [0, 1, 2, 2]
    assert rows[-1]["seconds"] > 0
    assert all(json.loads(json.dumps(rows)) == rows for rows in kept)


def test_table_has_stages_and_their_results():
    """With reasons, one below the other."""
    rows = [
        {"name": "a", "status": "passed", "reason": "", "seconds": 2.4, "results": [{"name": "x", "seconds": 0.5}]},
        {"name": "b", "status": "skipped", "reason": "needs CUDA", "seconds": 0.0, "results": []},
    ]
    lines = [line.split() for line in tabulate_stages(rows).splitlines()]
    assert lines[1:] == [
        ["a", "passed", "2", "s"],
        ["x,", "seconds", "0.5"],
        ["b", "skipped", "0", "s", "needs", "CUDA"],
    ]


@pytest.mark.slow
def test_stage_that_hangs_is_killed_with_what_it_started(tmp_path):
    """Its results and the later stages stay, its folder goes."""
    rows, _ = run([Stage("hangs", functools.partial(hang, tmp_path / "note"), 1.5), Stage("counts", count_one, 58.5)])
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("failed", "its time was over"),
        ("passed", ""),
    ]
    assert len(rows[0]["results"]) == 1
    pid, folder = json.loads((tmp_path / "note").read_text())
    assert is_gone(pid)
    assert not Path(folder).exists()


def test_stage_does_not_start_without_time():
    """The row says how much it needs."""
    rows, _ = run([Stage("counts", count_one, 100), Stage("again", count_one, 100)], 0.0)
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "no time is left: it may need 100 s")] * 2


@pytest.mark.parametrize(
    ("seconds", "taken", "limits"),
    [
        (30.0, 1.0, [14, 14, 10]),  # 4 are spare
        (100.0, 0.0, [84, 94, 100]),
        (12.0, 1.0, [10, 2, 0]),
    ],
)
def test_spare_time_goes_to_stages_without_taking_that_of_later_ones(monkeypatch, seconds, taken, limits):
    """Each has its own seconds at least, while there are any."""
    given, now = [], [0.0]

    def run_here(row, stage, limit, keep):
        given.append(limit)
        now[0] += min(limit, taken * stage.seconds)

    monkeypatch.setattr("moe_gpt.bench.stages._run", run_here)
    monkeypatch.setattr("moe_gpt.bench.stages.time.monotonic", lambda: now[0])
    run([Stage("a", count_one, 10), Stage("b", count_one, 10), Stage("c", count_one, 6)], seconds)
    assert given == limits


def test_interruption_is_written_down(tmp_path):
    """Ctrl-C ends the stage's processes and leaves a row that says so, with what was measured."""
    kept: list[list[dict]] = []

    def keep(rows):
        kept.append(copy.deepcopy(rows))
        if rows[0]["results"]:
            raise KeyboardInterrupt

    stages = [Stage("hangs", functools.partial(hang, tmp_path / "note"), 30), Stage("counts", count_one, 1)]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, 60, keep, lambda text: None)
    assert [row["status"] for row in kept[-1]] == ["unfinished", "waiting"]
    assert len(kept[-1][0]["results"]) == 1
    assert is_gone(json.loads((tmp_path / "note").read_text())[0])
