"""Contenders in processes of their own that take turns, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
import torch

from moe_gpt.bench.processes import in_a_line
from moe_gpt.errors import InputError
from moe_gpt.ops.device import synchronize


class Turns(NamedTuple):
    """What one contender's turns gave."""

    values: list[Any]
    """What each call of the contender's ``turn`` returned, warm-up left out."""
    peak_memory_bytes: int
    """The most it held beyond what its process held before it was built; on a GPU, the most allocated there."""
    failure: str | None = None
    """Why there are no values."""

    def median(self, value: str) -> float:
        """Return the median of what the turns gave under a name."""
        return statistics.median(getattr(turn, value) for turn in self.values)


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds that a piece of work takes, on a GPU until it is done."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def require(turns: dict[str, Turns], name: str) -> None:
    """Refuse to compare with a contender that gave nothing.

    Raises:
        InputError: with the reason why it does not run.
    """
    if not turns[name].values:
        raise InputError(f"{name} does not run here, so there is nothing to compare: {turns[name].failure}")


def take_turns(
    names: Sequence[str],
    build: Callable[[str], Callable[[], Any]],
    rounds: int,
    turns: int,
    warmup: int,
    at_once: bool,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Turns]:
    """Let each contender do ``rounds`` times ``turns`` calls after ``warmup`` calls, round-robin.

    Args:
        names: of the contenders.
        build: makes a contender from its name in its own process: a function to call again and again. Must be
            importable there (a function of a module, or a ``functools.partial`` of one).
        rounds: passes over the contenders.
        turns: calls in a row.
        warmup: calls before the first round.
        at_once: all processes exist at the same time and take turns; otherwise one after another, as a GPU's memory
            demands.
        say: told who fails, and why.
    """
    results: dict[str, Turns] = {}
    for group in [list(names)] if at_once else [[name] for name in names]:
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(_Worker(name, build)) for name in group}
            for worker in workers.values():
                worker.ask(warmup)
            for _ in range(rounds):
                for worker in workers.values():
                    worker.values += worker.ask(turns)
            for name, worker in workers.items():
                results[name] = Turns(worker.values, sum(worker.ask(0)), worker.failure)
                if worker.failure:
                    say(f"{name} does not run here: {worker.failure}")
    return results


class _Worker:
    def __init__(self, name: str, build: Callable[[str], Callable[[], Any]]) -> None:
        self.values: list[Any] = []
        self.failure: str | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, build), daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join()

    def ask(self, request: int) -> list[Any]:
        """Return what ``request`` calls gave, or for 0 the most memory it held; nothing once it has failed."""
        if self.failure:
            return []
        try:
            self._connection.send(request)
            failure, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            failure, answer = f"its process ended, with status {self._process.exitcode}", []
        self.failure = failure or None
        return answer


def _serve(connection: Connection, name: str, build: Callable[[str], Callable[[], Any]]) -> None:
    if name.startswith("transformers"):  # its own size is no part of what training takes
        with contextlib.suppress(ImportError):
            importlib.import_module("transformers")
    before = psutil.Process().memory_info().rss
    contender = None
    with contextlib.suppress(EOFError):
        while (request := connection.recv()) is not None:
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
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) - before
