"""Compare the speed of this checkout with another one's, step by step in turns, so that a busy machine slows both.

python .ci/compare_versions.py OTHER "train S fp32:40,layer balanced:80,generate 1:40,scaling 16:16"
python .ci/compare_versions.py . "train tiny:60" GOMP_SPINCOUNT=300000

The second form compares settings of the environment: those that are given are for the other process.
Each measurement runs in two processes, one a checkout, that take turns; what counts is the median of the ratios of
neighbouring turns, with its standard error. The names are those of ``scripts/bench.py``; the number is of turns.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def make(task: str) -> Callable[[], Any]:
    """Return what measures once, by the functions of the bench that both checkouts have."""
    from moe_gpt.bench import generate, layer, scaling, train
    from moe_gpt.bench.contenders import SHAPES, Workload
    from moe_gpt.config.yaml import load_run_config

    kind, size, *rest = task.split()
    if size == "tiny":
        model, seq_len = load_run_config("tiny").model, 256
        work = Workload(dataclasses.replace(model, vocab_size=4096), 8, seq_len, "cpu", "fp32", 8 * seq_len)
        return train._make_step(work, "moe_gpt")
    if kind == "scaling":
        points = scaling.points("cpu", "fp32")
        (work,) = (point.workload for point in points if point.axis == "experts" and str(point.value) == size)
        return train._make_step(work, "moe_gpt")
    model, n_sequences, seq_len = SHAPES[size if kind == "train" else "S"]
    precision = rest[0] if rest else "fp32"
    work = Workload(model, n_sequences, seq_len, "cpu", precision, n_sequences * seq_len)  # type: ignore[arg-type]
    if kind == "train":
        return train._make_step(work, "moe_gpt")
    if kind == "layer":
        return layer._make_pass(work, f"moe_gpt/{size}")
    return generate._make_decoder(work, int(size), 64, "moe_gpt")


def work() -> None:
    """Answer every line of stdin with the seconds of one measurement."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the bench prints is no answer
    measure = make(sys.argv[2])
    for _ in sys.stdin:
        found = measure()
        seconds = found if isinstance(found, float) else getattr(found, "total", None) or sum(found)
        print(seconds, file=answers, flush=True)


def start(checkout: Path, task: str, settings: dict[str, str]) -> subprocess.Popen:
    """Start a process that measures with a checkout's code."""
    command = [sys.executable, __file__, "--work", task]
    env = {**os.environ, "PYTHONPATH": str(checkout), **settings}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, cwd=checkout, text=True)


def ask(process: subprocess.Popen) -> float:
    """Return the seconds of one measurement."""
    assert process.stdin, "it was started with pipes"
    assert process.stdout, "it was started with pipes"
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    """Print a line for each measurement."""
    other = Path(sys.argv[1]).resolve()
    settings = dict(word.split("=", 1) for word in sys.argv[3:])
    for entry in sys.argv[2].split(","):
        task, _, n_turns = entry.rpartition(":")
        processes = [start(other, task, settings), start(HERE, task, {})]
        for process in processes:
            [ask(process) for _ in range(3)]  # warm-up
        turns = []
        for number in range(int(n_turns)):
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {place: ask(processes[place]) for place in order}
            turns.append((seconds[0], seconds[1]))
        for process in processes:
            process.kill()
        ratios = [here / there for there, here in turns]
        before, after = (1000 * statistics.median(times) for times in zip(*turns, strict=True))
        error = 1.25 * statistics.stdev(ratios) / math.sqrt(len(ratios))
        ratio = statistics.median(ratios)
        print(f"{task:<18}{before:>10.2f} ms{after:>10.2f} ms  ratio {ratio:.3f} +- {error:.3f}", flush=True)


if __name__ == "__main__":
    work() if sys.argv[1] == "--work" else main()
