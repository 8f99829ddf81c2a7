"""Running the stages of a preparation with datatrove's executors: on this machine, on a Ray cluster, or with Slurm.

Each executor marks the tasks that it has finished, and runs only the others when it is called again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import loguru
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from moe_gpt.config.section import Count, Positive, require
from moe_gpt.config.yaml import parse_yaml
from moe_gpt.data.encode import available_cores, end_with_parent, refuse_in_starting_process
from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file

_ATTEMPTS = 3
_OURS = {"pipeline", "tasks", "logging_dir", "depends", "skip_completed"}

loguru.logger.remove()  # datatrove reports every step; its files of each task have the reports too


class ProcessExecutor(LocalPipelineExecutor):
    """datatrove's local executor with a new process for each task, which is run again if its process was killed.

    The pool of its own ``run`` waits for ever for a task whose process was killed.
    """

    def run(self) -> None:
        """Run the tasks that are not finished, at most ``workers`` at once."""
        refuse_in_starting_process()
        stopped = threading.Event()
        with ThreadPoolExecutor(self.workers) as threads, _stopping_on_error(stopped):
            list(threads.map(functools.partial(self._run_process, stopped), self.get_incomplete_ranks()))

    def _run_process(self, stopped: threading.Event, task: int) -> None:
        for _ in range(_ATTEMPTS):
            if stopped.is_set():
                return
            process = multiprocessing.get_context("spawn").Process(target=self._run_task, args=(task,))
            process.start()
            process.join()
            if (process.exitcode or 0) >= 0:  # not killed by a signal
                return

    def _run_task(self, task: int) -> None:
        end_with_parent()
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (datatrove's reports are in its log files)
        self._run_for_rank(task)


@contextlib.contextmanager
def _stopping_on_error(stopped: threading.Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stopped.set()
        for process in multiprocessing.active_children():
            process.terminate()
        raise


class RayExecutor(RayPipelineExecutor):
    """datatrove's executor for Ray with a task of Ray for each task, which Ray runs again if its process was killed.

    The actors of its own ``run`` wait for ever, too, for a process that was killed inside them.
    """

    def run(self) -> None:
        """Run the tasks that are not finished: on the cluster of RAY_ADDRESS or of this machine, or on a new one."""
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        memory = int(self.mem_per_cpu_gb * self.cpus_per_task * 2**30)
        options = {"num_cpus": self.cpus_per_task, "memory": memory, "max_retries": _ATTEMPTS - 1}
        run = ray.remote(_run_on_ray).options(**options, **(self.ray_remote_kwargs or {}))
        executor = ray.put(self)
        for result in [run.remote(executor, task) for task in self.get_incomplete_ranks()]:
            with contextlib.suppress(ray.exceptions.RayError):  # the task has no mark then
                ray.get(result)


def _run_on_ray(executor: RayExecutor, task: int) -> None:
    executor._run_for_rank(task)


_EXECUTORS = {"local": ProcessExecutor, "ray": RayExecutor, "slurm": SlurmPipelineExecutor}
_KINDS: dict[str, dict[str, Any]] = {
    "local": {"workers": Count},
    "ray": {"cpus_per_task": Positive, "mem_per_cpu_gb": Positive, "ray_remote_kwargs": dict[str, Any]},
    "slurm": {key: Any for key in inspect.signature(SlurmPipelineExecutor).parameters if key not in _OURS},
}
"""The options of each engine. Slurm has all of datatrove's executor, and checks their values."""


class Stage(NamedTuple):
    """A pipeline that some tasks run, each for its part; it starts when the stage before it is complete."""

    name: str
    steps: list[PipelineStep]
    n_tasks: int


class Engine(NamedTuple):
    """Who runs the tasks, and the arguments of datatrove's executor."""

    name: str
    options: dict[str, Any]

    def executor(self, stage: Stage, folder: Path, **more: Any) -> PipelineExecutor:
        """Return datatrove's executor of a stage, which keeps its marks and logs in ``folder``."""
        arguments = {"pipeline": stage.steps, "tasks": stage.n_tasks, "logging_dir": str(folder / stage.name)}
        return _EXECUTORS[self.name](**arguments, **self.options, **more)


def make_engine(name: str, options: tuple[str, ...]) -> Engine:
    """Return an engine from options such as ``partition=cpu``.

    Raises:
        InputError: naming an option that datatrove's executor does not have, or lacks; or if there is no ``sbatch``.
    """
    known, values = _KINDS[name], {"workers": available_cores()} if name == "local" else {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in known:
            keys = ", ".join(known)
            raise InputError(f"--engine-option must be KEY=VALUE with a key of {name}: {keys}; got {option!r}")
        values[key] = parse_yaml(text, f"--engine-option {key}")
        require(known[key], **{f"--engine-option {key}": values[key]})
    return Engine(name, _slurm_options(values) if name == "slurm" else values)


def _slurm_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options with those that differ from datatrove's own, unless they are given."""
    for key in ("partition", "time"):
        if key not in values:
            raise InputError(f"--engine slurm needs --engine-option {key}=...")
    if not shutil.which("sbatch"):
        raise InputError("--engine slurm needs sbatch on the PATH; run the command on a machine of the Slurm cluster")
    return {
        "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",  # this Python and its programs
        "qos": None,  # not every cluster has one that is called normal
        "sbatch_args": {"kill-on-invalid-dep": "yes"},  # a stage whose predecessor failed would wait for ever
        **values,
    }


def run_stage(engine: Engine, stage: Stage, folder: Path, failures: Path) -> None:
    """Run those tasks of a stage that are not finished, and wait for them.

    Raises:
        InputError: if tasks did not finish, with what the first of them said.
    """
    executor = engine.executor(stage, folder)
    unfinished = executor.get_incomplete_ranks()
    if unfinished:
        shutil.rmtree(failures, ignore_errors=True)
        executor.run()
        unfinished = executor.get_incomplete_ranks()
    if unfinished:
        raise InputError(_what_failed(stage, folder, failures, unfinished))


def _what_failed(stage: Stage, folder: Path, failures: Path, unfinished: list[int]) -> str:
    said = sorted(failures.glob("*.txt"), key=lambda file: (len(file.name), file.name))
    if said:
        return said[0].read_text(encoding="utf-8")
    log = folder / stage.name / "logs" / f"task_{unfinished[0]:05d}.log"
    return (
        f"{len(unfinished)} of {stage.n_tasks} tasks did not finish; the log of the first, {log}, says why, unless it "
        "was killed, for lack of memory perhaps; the same command runs only these again"
    )


def submit(engine: Engine, stages: list[Stage], folder: Path) -> list[str]:
    """Submit all stages to Slurm, each after the one before it, and return the ids of the last job of each."""
    executors: list[Any] = []
    for stage in stages:
        executors.append(engine.executor(stage, folder, depends=executors[-1] if executors else None))
    try:
        executors[-1].run()  # submits those that it depends on first
    except subprocess.CalledProcessError as error:
        raise InputError(f"sbatch refused a job (status {error.returncode}); its message is above") from None
    jobs = [str(executor.job_id) for executor in executors if executor.job_id != -1]
    replace_file(folder / "jobs.json", json.dumps(jobs))
    return jobs


def running_jobs(folder: Path) -> list[str]:
    """Return those of the jobs that ``submit`` noted that Slurm has not finished."""
    file = folder / "jobs.json"
    jobs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if not jobs:
        return []
    words = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(jobs)}"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    return sorted(set(answer.stdout.split()) & set(jobs))  # Slurm forgets finished jobs and then reports an error
