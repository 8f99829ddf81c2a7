"""Time and memory of work in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil

from moe_gpt.data.encode import available_cores
from moe_gpt.errors import InputError


class Measured(NamedTuple):
    """What a piece of work took."""

    seconds: float
    peak_memory_bytes: int | None
    """Of the process and all it started, sampled; on Linux memory that they share counts once."""
    value: Any
    """What it returned."""


def measure(work: Callable[..., Any], *arguments: Any) -> Measured:
    """Run ``work(*arguments)`` in a new process, and its time and the most memory it held.

    Raises:
        InputError: with the error's first line where the work fails.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak = 0
        try:
            pid = pool.submit(os.getpid).result()
            future = pool.submit(_timed, work, arguments)
            while not wait([future], timeout=0.1).done:
                peak = max(peak, memory_of_tree(pid))
            seconds, value = future.result()
        except BrokenProcessPool:
            raise InputError(f"{work.__name__} failed: its process died") from None
        except Exception as error:
            traceback.print_exception(error)
            raise InputError(f"{work.__name__} failed: {in_a_line(error)}") from None
    return Measured(seconds, peak or None, value)


def _timed(work: Callable[..., Any], arguments: tuple) -> tuple[float, Any]:
    started = time.perf_counter()
    value = work(*arguments)
    return time.perf_counter() - started, value


def in_a_line(error: Exception) -> str:
    """Return an error's kind and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def memory_of_tree(pid: int) -> int:
    """Return the memory of a process and all below it in bytes: proportional set size where the system tells it."""
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.Error:  # it has ended
        return 0
    return sum(_memory_of(process) for process in tree)


def _memory_of(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except (psutil.Error, OSError):  # it has ended meanwhile
        return 0
    return getattr(memory, "pss", memory.rss)


def describe_machine() -> str:
    """Return processor, cores, system and versions, for a figure's caption."""
    import torch

    processor = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{available_cores()} cores of {processor}, {platform.system()}, {versions}"


class Worker:
    """A function in a process of its own, which is called on request."""

    def __init__(self, name: str, build: Callable[[str], Callable[[], Any]]) -> None:
        self.values: list[Any] = []
        self.failure = ""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, build), daemon=True)
        self._process.start()
        other.close()

    def ask(self, request: int, seconds: float | None = None) -> list[Any]:
        """Return what ``request`` calls gave, or for 0 the most memory it held; nothing once it failed or was late."""
        if self.failure:
            return []
        try:
            self._connection.send(request)
            failure, answer = self._connection.recv() if self._connection.poll(seconds) else ("its time was over", [])
        except (EOFError, OSError):
            self._process.join(timeout=10)
            failure, answer = f"its process ended, with status {self._process.exitcode}", []
        self.failure = failure
        return answer

    def close(self) -> None:
        """End the process, whatever it does, and all that it has started."""
        self._connection.close()
        with contextlib.suppress(psutil.Error):  # what has ended meanwhile
            started = psutil.Process(self._process.pid).children(recursive=True)
            self._process.join(timeout=1)  # one that waits for a request ends by itself
            self._process.kill()
            for process in started:
                process.kill()
        self._process.join()


def _serve(connection: Connection, name: str, build: Callable[[str], Callable[[], Any]]) -> None:
    if name.startswith("transformers"):  # its own size is no part of what training takes
        with contextlib.suppress(ImportError):
            importlib.import_module("transformers")
    before = psutil.Process().memory_info().rss
    contender = None
    with contextlib.suppress(EOFError):
        for request in iter(connection.recv, None):
            try:
                contender = contender or build(name)
                answer = [contender() for _ in range(request)] if request else [_peak_memory_beyond(before)]
                connection.send(("", answer))
            except InputError as error:
                connection.send((str(error), []))
            except Exception as error:
                traceback.print_exc()
                connection.send((in_a_line(error), []))


def _peak_memory_beyond(before: int) -> int:
    """Return the most that was allocated on a GPU, or the most that this process held beyond what it held before."""
    import torch

    if on_gpu := torch.cuda.max_memory_allocated():
        return on_gpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) - before
