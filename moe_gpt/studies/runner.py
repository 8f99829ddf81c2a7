"""Trains the runs of a study: one thread each, several at once, the longest first.

What is done is what the run folders say, so a runner may die at any instant, and two may work at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, cast

import psutil
import torch

import moe_gpt
from moe_gpt.data.encode import available_cores
from moe_gpt.studies.plan import Planned, Study
from moe_gpt.studies.results import failure_of, look, names_of

_WORKER = [sys.executable, "-m", "moe_gpt.studies.worker"]
_SECONDS_UNTIL_BUSY_AGAIN, _SECONDS_A_TURN, _MOST_DEATHS = 2.0, 0.5, 2


class _Worker:
    """A process that trains one run at a time."""

    def __init__(self, events: Events, gpu: str | None) -> None:
        self.run: Planned | None = None
        self.gpu = gpu
        package = str(Path(moe_gpt.__file__).parents[1])
        paths = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        self.process = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own},
            start_new_session=True,  # Ctrl-C is for the parent, which lets the runs save
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: Events) -> None:
        for line in cast(IO[str], self.process.stdout):
            events.put((self, json.loads(line)))
        events.put((self, "died"))

    def start(self, run: Planned, rerun: Collection[str]) -> None:
        """Hand over a run."""
        from moe_gpt.studies.worker import task_of

        self.run = run
        with contextlib.suppress(BrokenPipeError):  # it died, which it also says
            print(task_of(run, rerun), file=self.process.stdin, flush=True)

    def stop(self) -> None:
        """Let the process save its run and end."""
        with contextlib.suppress(BrokenPipeError):
            cast(IO[str], self.process.stdin).close()


Events = queue.SimpleQueue[tuple[_Worker, str]]


def _gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES is for each GPU that this process may use."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return told.split(",")[: torch.cuda.device_count()]


def _cores() -> int:
    return min(available_cores(), psutil.cpu_count(logical=False) or 1)


class Runner:
    """The runs of a study, and the processes that train them.

    Args:
        study: as it is planned.
        jobs: runs at once; one for each GPU, or else for each core, by default.
        minutes: after which no run is started.
        rerun: states (stale, failed) whose runs are trained again.
    """

    def __init__(
        self, study: Study, jobs: int | None = None, minutes: float | None = None, rerun: Collection[str] = ()
    ) -> None:
        rows = look(study)
        self.study, self.rerun, self.gpus = study, rerun, _gpus()
        self.states: dict[str, str] = {row.run.name: row.state for row in rows}
        """Of each run by its name: one of a row, or waiting."""
        self.states |= dict.fromkeys(names_of(rows, "missing", "running", *rerun), "waiting")
        self.by_length = sorted(study.runs, key=lambda run: -run.flops)
        self.jobs = min(jobs or len(self.gpus) or _cores(), len(self.those("waiting")))
        self.workers: list[_Worker] = []
        self.events = Events()
        self.deaths, self.pauses, self.flops_done = Counter[str](), dict[str, float](), 0
        self.started_at = time.monotonic()
        self.ends_at = self.started_at + 60 * (minutes or math.inf)

    def those(self, state: str) -> list[Planned]:
        """Return the runs in a state, longest first."""
        return [run for run in self.by_length if self.states[run.name] == state]

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes at the speed so far; None before a run is done."""
        left = sum(run.flops for run in (*self.those("waiting"), *self.those("running")))
        return (time.monotonic() - self.started_at) * left / self.flops_done if self.flops_done else None

    def train(self, tell: Callable[[Planned | None], None]) -> None:
        """Train until nothing is left that can be trained. At Ctrl-C, runs are saved and stop.

        Args:
            tell: called twice a second, and with each run that ends.
        """
        self.study.out.mkdir(parents=True, exist_ok=True)
        try:
            while self._start_runs() or self.those("running"):
                tell(None)
                with contextlib.suppress(queue.Empty):
                    tell(self._take(*self.events.get(timeout=_SECONDS_A_TURN)))
        finally:
            self._stop()

    def _stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        try:
            for worker in self.workers:
                worker.process.wait()
        except KeyboardInterrupt:
            for worker in self.workers:
                worker.process.kill()
            raise

    def _start_runs(self) -> bool:
        """Give runs to idle workers; return whether there are runs that can start now or later."""
        possible = list(filter(self._may_start, self.those("waiting")))
        if time.monotonic() > self.ends_at:
            return False
        for run in filter(self._is_ready, possible):
            if len(self.those("running")) < self.jobs:
                self.states[run.name] = "running"
                self._idle().start(run, self.rerun)
        return bool(possible)

    def _state_of_start(self, run: Planned) -> str:
        return self.states[run.parent.name] if run.parent else "finished"

    def _may_start(self, run: Planned) -> bool:
        """Tell whether a run can start now or later: a held-out one needs its prediction, others their parent."""
        is_held_out = self.study.config.law and run.arm == self.study.config.law.held_out
        has_start = self._state_of_start(run) in ("finished", "waiting", "running")
        return has_start and (not is_held_out or self.study.prediction.is_file())

    def _is_ready(self, run: Planned) -> bool:
        return self._state_of_start(run) == "finished" and self.pauses.get(run.name, 0) < time.monotonic()

    def _idle(self) -> _Worker:
        for worker in self.workers:
            if not worker.run:
                return worker
        taken = [worker.gpu for worker in self.workers]
        gpu = min(self.gpus, key=taken.count, default=None)  # that of a worker that died is free again
        self.workers.append(_Worker(self.events, gpu))
        return self.workers[-1]

    def _take(self, worker: _Worker, state: str) -> Planned | None:
        """Take an answer of a worker; return the run if it ended."""
        run, worker.run = worker.run, None
        if state == "died":
            self.workers.remove(worker)
        if run is None:
            return None
        self.states[run.name] = self._bury(run, worker.process.wait()) if state == "died" else state
        if state == "busy":
            self.states[run.name] = "waiting"
            self.pauses[run.name] = time.monotonic() + _SECONDS_UNTIL_BUSY_AGAIN
        if self.states[run.name] == "waiting":
            return None
        self.flops_done += run.flops
        return run

    def _bury(self, run: Planned, status: int) -> str:
        """Return the state of a run whose process died: it gets another try."""
        self.deaths[run.name] += 1
        if self.deaths[run.name] < _MOST_DEATHS:
            return "waiting"
        failure_of(run).write_text(f"its process died twice, with exit status {status}", encoding="utf-8")
        return "failed"
