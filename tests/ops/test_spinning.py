"""Threads spin less while other programs want the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_gpt.ops import spinning
from moe_gpt.ops.spinning import IdleThreads, Reading, Watch, is_crowded

linux = pytest.mark.skipif(sys.platform != "linux", reason="libgomp on Linux")


@pytest.mark.parametrize(("seconds", "switches", "expected"), [(1, 300, True), (1, 5, False), (10, 300, False)])
def test_crowded_is_a_rate(seconds, switches, expected):
    """Not a number: a busy machine is one on which the core is taken often."""
    assert is_crowded(Reading(100.0, 7), Reading(100.0 + seconds, 7 + switches)) is expected


@linux
def test_idle_threads_exceed_the_cores(monkeypatch):
    """That is libgomp's condition. They end when they are removed, and can be added again."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    idle, before = IdleThreads(), threading.active_count()
    for _ in range(2):
        idle.add()
        assert len(idle) == threading.active_count() - before == 3  # with the process's own team 2 + 3 · 1 threads
        idle.remove()
        assert not idle
        assert threading.active_count() == before


def test_one_thread_needs_no_idle_ones(monkeypatch):
    """A process may come down to one thread after the watch began; it then has nobody to wait for."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    idle = IdleThreads()
    idle.add()
    assert not idle


@linux
def test_watch_adds_threads_when_it_is_crowded_and_removes_them_when_it_is_quiet(monkeypatch):
    """By what happened since the last look."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    readings = iter([Reading(t, n) for t, n in ((0, 0), (1, 2), (2, 500), (3, 20_000), (4, 20_001), (5, 20_002))])
    monkeypatch.setattr(spinning, "read", lambda: next(readings))
    watch, seen = Watch(), []
    for _ in range(5):
        watch.look()
        seen.append(bool(watch.idle))
    assert seen == [False, True, True, False, False]


@pytest.mark.slow
@linux
@pytest.mark.parametrize(("given", "expected"), [({}, "True"), ({"OMP_WAIT_POLICY": "passive"}, "False")])
def test_watch_starts_once_unless_the_user_says_how_threads_wait(given, expected):
    """A CPU's process has the thread after ``tune_process``."""
    code = """
import threading, torch
from moe_gpt.ops.device import tune_process
torch.set_num_threads(2)
for _ in range(2):
    tune_process(torch.device("cpu"))
names = [thread.name for thread in threading.enumerate()]
print(names.count("spinning") == 1, end="")
"""
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**clean, "PYTHONPATH": str(Path(__file__).parents[2]), **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == expected


@linux
def test_switches_are_counted():
    """By the system, in this process."""
    before = spinning.read()
    time.sleep(0.01)
    after = spinning.read()
    assert after.time > before.time
    assert after.switches >= before.switches
