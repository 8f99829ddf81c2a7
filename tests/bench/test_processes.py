"""Time and memory of work in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from moe_gpt.bench.processes import measure, memory_of_tree
from moe_gpt.errors import InputError

on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from /proc")


def hold(n_bytes: int, seconds: float) -> int:
    """Hold memory for a while in a process of this process."""
    code = f"import time; x = b'x' * {n_bytes}; time.sleep({seconds})"
    subprocess.run([sys.executable, "-c", code], check=True)
    return os.getpid()


def fail() -> None:
    """Fail as work does."""
    raise ValueError("no such thing\nat all")


def end() -> None:
    """End without a word."""
    os._exit(3)


@pytest.mark.slow
@on_linux
def test_memory_of_what_the_work_starts_counts():
    """The peak is at least what a grandchild held, and it ran elsewhere for as long as it says."""
    small, large = measure(hold, 1, 0.3), measure(hold, 300_000_000, 0.3)
    assert large.value != os.getpid()
    assert large.seconds >= 0.3
    assert large.peak_memory_bytes - small.peak_memory_bytes == pytest.approx(300e6, rel=0.1)


@pytest.mark.parametrize(("work", "message"), [(fail, "ValueError: no such thing"), (end, "its process died")])
def test_failure_is_one_line(work, message):
    """With the name of the work."""
    with pytest.raises(InputError, match=f"{work.__name__} failed: {message}$"):
        measure(work)


@on_linux
def test_process_that_has_ended_holds_nothing():
    """No error where it ends while it is looked at."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    time.sleep(0.5)
    assert memory_of_tree(process.pid) == 0  # a zombie
    process.wait()
    assert memory_of_tree(process.pid) == 0
