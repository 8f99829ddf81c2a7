"""Several processes on one machine's cores, against one with as many threads: ``moe-gpt bench devices``."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from moe_gpt.bench.contenders import Ours, Workload
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.config import ParallelConfig
from moe_gpt.errors import InputError


class _Arrangement(NamedTuple):
    """How many processes train, how many threads each has, and what they train."""

    workload: Workload
    processes: int
    threads: int
    parallel: ParallelConfig | None
    """How they work together; None if each trains alone."""

    @property
    def tokens(self) -> int:
        """Tokens that all processes together train in a step."""
        return self.workload.batch_tokens * (self.processes if self.parallel is None else 1)


def bench_devices(
    workload: Workload,
    parallel: ParallelConfig,
    n: int,
    rounds: int,
    steps: int,
    say: Callable[[str], None],
    warmup: int = 8,
) -> list[Result]:
    """Measure steps of the workload by one process of n threads and by n of one thread, in turns.

    *Strong* scaling shares the batch among the processes. *Weak* scaling gives each process the whole batch, and its
    baseline is one process of one thread. Processes *apart* do the work of strong scaling without each other: what
    they are faster is the time in collectives, waiting for each other included.
    """
    rows = -(-workload.n_sequences // n)
    share = dataclasses.replace(workload, n_sequences=rows, micro_batch_tokens=rows * workload.seq_len)
    larger = dataclasses.replace(workload, n_sequences=n * workload.n_sequences)
    arrangements = {
        "one": _Arrangement(workload, 1, n, None),
        "strong": _Arrangement(workload, n, 1, parallel),
        "apart": _Arrangement(share, n, 1, None),
        "one thread": _Arrangement(workload, 1, 1, None),
        "weak": _Arrangement(larger, n, 1, parallel),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arrangements}
    for number in range(1, rounds + 1):
        for name, arrangement in arrangements.items():
            seconds[name] += _run(arrangement, steps, warmup)
        say(f"round {number} of {rounds}")
    results = _results(arrangements, {name: statistics.median(found) for name, found in seconds.items()})
    columns = {
        "": "{name}",
        "processes x threads": "{processes} x {threads}",
        "tokens/s": "{tokens_per_second:count}",
        "efficiency": "{fraction:.2f} of {over}",
    }
    say(tabulate(results, columns))
    speed = {result["name"]: result["tokens_per_second"] for result in results}
    in_collectives = 1 - speed["devices/strong"] / speed["devices/apart"]
    say(f"{in_collectives:.1%} of the time of strong scaling is in collectives")
    return [*results, {"name": "devices/collectives", "fraction": in_collectives}]


def _results(arrangements: Mapping[str, _Arrangement], seconds: Mapping[str, float]) -> list[Result]:
    """Return the speed of each arrangement, and over that of its baseline for each thread."""
    speed = {name: a.tokens / seconds[name] for name, a in arrangements.items()}
    over = {"one": "one", "strong": "one", "apart": "one", "one thread": "one thread", "weak": "one thread"}
    return [
        {
            "name": f"devices/{name}",
            "processes": a.processes,
            "threads": a.threads,
            "tokens_per_second": speed[name],
            "over": over[name],
            "fraction": speed[name] / speed[over[name]] / (a.processes if name == "weak" else 1),
        }
        for name, a in arrangements.items()
    ]


def _run(arrangement: _Arrangement, steps: int, warmup: int) -> list[float]:
    """Return the seconds of each step, of the slowest process, after ``warmup`` steps; all processes are new.

    Raises:
        InputError: where a process fails.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(arrangement.processes)]
    try:
        futures = [pool.submit(_steps_of, rank, arrangement, steps, warmup, port) for rank, pool in enumerate(pools)]
        return [max(of_all) for of_all in zip(*(future.result() for future in futures), strict=True)]
    except BrokenProcessPool:
        raise InputError("a process of the measurement died") from None
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _steps_of(rank: int, arrangement: _Arrangement, steps: int, warmup: int, port: int) -> list[float]:
    """Train in this process, one of those of an arrangement, and return the seconds of each step."""
    import torch

    torch.set_num_threads(arrangement.threads)
    if arrangement.parallel is not None:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arrangement.processes}
        os.environ |= {name: str(value) for name, value in own.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trained = Ours(arrangement.workload, parallel=arrangement.parallel or ParallelConfig())
    for _ in range(warmup):
        trained.step()
    return [trained.step().total for _ in range(steps)]
