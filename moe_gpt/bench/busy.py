"""Training beside processes that want the same cores: ``moe-gpt bench busy``."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_gpt.bench.contenders import Ours, Workload
from moe_gpt.bench.processes import measure
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.data.encode import available_cores

_STEP_TOKENS = 2048
_RUNTIMES = ("libgomp", "libiomp5", "libomp")


def bench_busy(
    workload: Workload, n_others: int, seconds: int, rounds: int, say: Callable, others_train: bool = False
) -> list[Result]:
    """Count training steps alone and beside other processes, in turns; each turn is a process of its own.

    A step has at most 2,048 tokens, because threads wait most often where operations are small. The others spin, or
    train as well, in as many threads. The fair share is what a fair system leaves to as many threads as there are
    cores, beside those of the others.
    """
    n_sequences = min(workload.n_sequences, max(1, _STEP_TOKENS // workload.seq_len))
    n_tokens = n_sequences * workload.seq_len
    workload = dataclasses.replace(workload, n_sequences=n_sequences, micro_batch_tokens=n_tokens)
    steps: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(rounds):
        for name, found in steps.items():
            with _others(n_others * (name == "beside"), workload if others_train else None):
                n_steps, runtime = measure(_count_steps, workload, seconds).value
            found.append(n_steps / seconds)
            say(f"{name}: {n_steps} steps in {seconds} s")
    alone, beside = (statistics.median(found) for found in steps.values())
    cores = available_cores()
    fair = cores / (cores + n_others * (cores if others_train else 1))
    settings = ", ".join(f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith(("GOMP_", "KMP_")))
    kind = "training" if others_train else "spinning"
    say(f"{n_others} {kind} processes on {cores} cores; {runtime}; {settings or 'no bound on spinning'}")
    results: list[Result] = [
        {"name": "busy/alone", "steps_per_second": alone, "fraction": 1.0, "of_fair": 1.0},
        {
            "name": "busy/beside",
            "steps_per_second": beside,
            "fraction": beside / alone,
            "of_fair": beside / alone / fair,
        },
    ]
    columns = {
        "": "{name}",
        "steps/s": "{steps_per_second:.2f}",
        "of alone": "{fraction:.0%}",
        "of the fair share": "{of_fair:.0%}",
    }
    say(tabulate(results, columns))
    return results


def _count_steps(workload: Workload, seconds: int) -> tuple[int, str]:
    """Return how many steps fit into the seconds, and the runtime of threads that torch brought."""
    trained = Ours(workload)
    trained.step()
    n_steps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        trained.step()
        n_steps += 1
    return n_steps, loaded_runtime()


def loaded_runtime() -> str:
    """Return the name of the OpenMP runtime that this process has loaded, as far as Linux tells it."""
    with contextlib.suppress(OSError):
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        return ", ".join(name for name in _RUNTIMES if name in loaded) or "no OpenMP runtime"
    return "an OpenMP runtime that the system does not name"


@contextlib.contextmanager
def _others(n_processes: int, workload: Workload | None) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_want_cores, args=(workload,), daemon=True) for _ in range(n_processes)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _want_cores(workload: Workload | None) -> None:
    work = Ours(workload).step if workload else lambda: None
    while True:
        work()
