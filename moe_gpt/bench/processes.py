"""Time and memory of work in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
