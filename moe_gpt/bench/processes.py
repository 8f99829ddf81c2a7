"""Time and memory of work in a process of its own."""

from __future__ import annotations

import multiprocessing
import platform
import threading
import time
import traceback
from collections.abc import Callable
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
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, arguments))
    process.start()
    sender.close()
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, memory_of_tree(process.pid or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        error, seconds, value = receiver.recv()
    except EOFError:
        error, seconds, value = "its process died", 0.0, None
    done.set()
    watcher.join()
    process.join()
    if error:
        raise InputError(f"{work.__name__} failed: {error}")
    return Measured(seconds, peak or None, value)


def _work(sender: Connection, work: Callable[..., Any], arguments: tuple) -> None:
    started = time.perf_counter()
    try:
        value = work(*arguments)
        sender.send(("", time.perf_counter() - started, value))
    except Exception as error:
        traceback.print_exc()
        sender.send((f"{type(error).__name__}: {error}".splitlines()[0], 0.0, None))


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
