"""Threads that wait for each other spin for a shorter time while other programs want the cores.

OpenMP's threads spin at the end of every operation until the last of them is done. Where two programs compute on the
same cores, each spins while the other's thread, which it waits for, has no core: training can fall to a fiftieth of its
speed. On a quiet machine, however, threads that do not spin take twice the time (docs/benchmarks.md).

libgomp reads its bound on spinning once, when it loads. But it has a second, short bound for a process with more
threads of OpenMP than cores, and this is checked in every wait. So a thread of this module watches how often the
system takes a core away, and adds idle threads of OpenMP while that happens often.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import NamedTuple

import torch

_SECONDS = 1.0
_SWITCHES_PER_SECOND = 130.0
"""Involuntary switches of a process: 220 to 330 beside other programs, 36 to 45 on a quiet machine of two cores."""


class IdleThreads:
    """More threads of OpenMP than cores, which do nothing."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self) -> None:
        """Start as many as it takes, in threads of Python, each of which has as many of OpenMP as torch uses.

        Where torch has come to use one thread, OpenMP has none that could spin.
        """
        self._end.clear()
        team, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        while team > 1 and team + len(self._threads) * (team - 1) <= cores:
            is_there = threading.Event()
            self._threads.append(threading.Thread(target=self._be_there, args=(is_there,), daemon=True))
            self._threads[-1].start()
            is_there.wait()

    def remove(self) -> None:
        """End them; OpenMP's threads end with those of Python."""
        self._end.set()
        while self._threads:
            self._threads.pop().join()

    def __len__(self) -> int:
        """Return how many threads of Python there are."""
        return len(self._threads)

    def _be_there(self, is_there: threading.Event) -> None:
        torch.zeros(1 << 20).add_(1)  # large enough for all threads to take part
        is_there.set()
        self._end.wait()


class Reading(NamedTuple):
    """How often the system took a core from this process, until a time in seconds."""

    time: float
    switches: int


def read() -> Reading:
    """Return the present count."""
    import resource

    return Reading(time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def is_crowded(before: Reading, now: Reading) -> bool:
    """Whether other programs wanted the cores between two readings."""
    return now.switches - before.switches > _SWITCHES_PER_SECOND * (now.time - before.time)


class Watch:
    """Keeps idle threads there while other programs want the cores."""

    def __init__(self) -> None:
        self.idle, self._before = IdleThreads(), read()

    def look(self) -> None:
        """Add or remove idle threads, by what happened since the last look."""
        now = read()
        if is_crowded(self._before, now) != bool(self.idle):
            (self.idle.remove if self.idle else self.idle.add)()
        self._before = now


def _watch(is_over: threading.Event) -> None:
    watch = Watch()
    while not is_over.wait(_SECONDS):
        watch.look()
    watch.idle.remove()


def _end(is_over: threading.Event, thread: threading.Thread) -> None:
    is_over.set()
    thread.join()  # the interpreter ends a thread inside torch by aborting the process


_started = threading.Lock()


def spin_less_when_crowded() -> None:
    """Start the watching thread, once a process; not where there is no libgomp, or where the user set how to wait."""
    is_ours = "GOMP_SPINCOUNT" in os.environ and "OMP_WAIT_POLICY" not in os.environ
    if sys.platform == "linux" and is_ours and torch.get_num_threads() > 1 and _started.acquire(blocking=False):
        is_over = threading.Event()
        thread = threading.Thread(target=_watch, args=(is_over,), name="spinning", daemon=True)
        thread.start()
        atexit.register(_end, is_over, thread)
