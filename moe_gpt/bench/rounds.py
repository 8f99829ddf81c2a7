"""Contenders in processes of their own that take turns, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from moe_gpt.bench.processes import Worker
from moe_gpt.errors import InputError
from moe_gpt.ops.device import synchronize


class Turns(NamedTuple):
    """What one contender's turns gave."""

    values: list[Any]
    """What each call of the contender's ``turn`` returned, warm-up left out."""
    peak_memory_bytes: int
    """The most it held beyond what its process held before it was built; on a GPU, the most allocated there."""
    failure: str = ""
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
            workers = {name: stack.enter_context(contextlib.closing(Worker(name, build))) for name in group}
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
