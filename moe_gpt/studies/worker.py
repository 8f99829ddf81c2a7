"""A process that trains runs of a study, one after another: ``python -m moe_gpt.studies.worker``.

It reads a run from each line of stdin and answers on stdout. When stdin ends, also by the death of who writes it, the
run that is being trained is saved and stops.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import filelock
import torch

from moe_gpt.api.training import train
from moe_gpt.config.yaml import load_run_config
from moe_gpt.report.run_records import is_training
from moe_gpt.studies.plan import Planned
from moe_gpt.studies.results import failure_of, locked_by, look_at


def main() -> None:
    """Train runs until stdin ends."""
    answers, tasks = os.fdopen(os.dup(1), "w"), queue.SimpleQueue[dict[str, Any] | None]()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    torch.set_num_threads(1)
    while task := tasks.get():
        print(json.dumps(work(read_task(task), task["rerun"])), file=answers, flush=True)


def _listen(tasks: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    tasks.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def task_of(run: Planned, rerun: Collection[str]) -> str:
    """Return a run as a line of stdin."""
    return json.dumps(run._asdict() | {"config": None, "rerun": list(rerun)}, default=str)


def read_task(task: dict[str, Any]) -> Planned:
    """Return the run of a line of stdin."""
    base, parent = Path(task["base"]), Path(task["parent"]) if task["parent"] else None
    config = load_run_config(base, task["overrides"])
    return Planned(task["arm"], task["seed"], base, tuple(task["overrides"]), config, Path(task["folder"]), parent)


def work(run: Planned, rerun: Collection[str]) -> str:
    """Train a run unless another process does; return its state, or ``busy``."""
    locked_by(run).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(locked_by(run) / ".lock", timeout=0):
            row = look_at(run, is_mine=True)
            if row.state in {"finished", "stale", "failed"}.difference(rerun):
                return row.state
            if row.changed or row.records:
                _set_aside(run.folder)
            return _train(run)
    except filelock.Timeout:
        return "busy"


def _set_aside(folder: Path) -> None:
    """Move a run to where nothing looks for it; nothing is deleted."""
    places = folder.parent / "replaced"
    places.mkdir(exist_ok=True)
    folder.rename(places / f"{folder.name}.{len(list(places.glob(f'{folder.name}.*'))) + 1}")


def _train(run: Planned) -> str:
    """Train as ``moe-gpt train --resume`` does; what it says goes to a file beside the run's folder."""
    with open(run.folder.with_name(f"{run.name}.log"), "a", encoding="utf-8") as log:
        say_into(log.fileno())
    try:
        start = str(run.parent) if run.parent else None
        done = train(run.base, run.overrides, run.folder, resume=True, init_from=start)
    except Exception as error:
        if is_training(run.folder):
            return "busy"
        text = "; ".join(f"{type(error).__name__}: {error}".splitlines())
        failure_of(run).write_text(text, encoding="utf-8")
        return "failed"
    failure_of(run).unlink(missing_ok=True)
    return look_at(run, is_mine=True).state if done.is_finished else "stopped"


def say_into(descriptor: int) -> None:
    """Send what this process prints to a file."""
    for stream in (1, 2):
        os.dup2(descriptor, stream)


if __name__ == "__main__":
    main()
