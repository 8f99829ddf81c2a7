"""How a training step's time and memory grow: ``moe-gpt bench scaling``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe_gpt.bench.contenders import StepTimes, Workload, build
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.bench.rounds import Turns, take_turns
from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.ops.device import Precision

_BASE = ModelConfig(vocab_size=1024, d_model=128, n_layers=2, n_heads=4, head_dim=32, d_ff=256, max_seq_len=1 << 15)
_SEQUENCES, _SEQ_LEN = 32, 256
_COLUMNS = {
    "rows/expert": "{rows_per_expert:count}",
    "a token": "{seconds_per_token:seconds}",
    "optimizer": "{optimizer_seconds:seconds}",
    "memory": "{peak_memory_bytes:bytes}",
}


class Point(NamedTuple):
    """One measurement: the axis it is on, its value there, and what is run."""

    axis: str
    value: int
    workload: Workload


def points(device: str, precision: Precision) -> list[Point]:
    """Return the measurements: each axis varies one size of a small model, 8,192 tokens a step.

    *checkpointed* is the axis of sequence lengths with activation checkpointing; *one* has a single sequence a step.
    """

    def at(axis: str, value: int, n_sequences: int = _SEQUENCES, seq_len: int = _SEQ_LEN, **sizes: int) -> Point:
        model = dataclasses.replace(_BASE, **sizes)  # type: ignore[arg-type]
        work = Workload(model, n_sequences, seq_len, device, precision, n_sequences * seq_len)
        return Point(axis, value, dataclasses.replace(work, activation_checkpointing=axis == "checkpointed"))

    lengths = (128, 256, 512, 1024, 2048, 4096)
    total = _SEQUENCES * _SEQ_LEN
    return [
        *(at("experts", n, n_experts=n) for n in (4, 8, 16, 32, 64, 128, 256)),
        *(at("d_ff", n, d_ff=n) for n in (64, 128, 256, 512, 1024)),
        *(at("sequences", n, n_sequences=n) for n in (4, 8, 16, 32, 64)),
        *(at(axis, n, n_sequences=total // n, seq_len=n) for axis in ("seq_len", "checkpointed") for n in lengths),
        *(at("one", n, n_sequences=1, seq_len=n) for n in (4096, 8192, 16_384, 32_768)),
    ]


def bench_scaling(
    device: str,
    precision: Precision,
    rounds: int,
    steps: int,
    say: Callable[[str], None],
    axes: list[str] | None = None,
) -> list[Result]:
    """Measure every point of the axes (None: all), each in a process of its own, those of an axis in turns.

    A turn is of ``steps`` optimizer steps.
    """
    results: list[Result] = []
    of_axis: dict[str, dict[str, Workload]] = {}
    for point in points(device, precision):
        of_axis.setdefault(point.axis, {})[str(point.value)] = point.workload
    if unknown := set(axes or []) - of_axis.keys():
        raise InputError(f"axes must be among {', '.join(of_axis)}, got {', '.join(sorted(unknown))}")
    for axis in axes or of_axis:
        mine = of_axis[axis]
        make = functools.partial(_make_step, mine)
        turns = take_turns(list(mine), make, rounds, steps, warmup=2, at_once=device == "cpu", say=say)
        found = [_result(axis, value, mine[value], turns[value]) for value in mine if turns[value].values]
        say(tabulate(found, {axis: "{value:,}", **_COLUMNS}))
        results += found
    return results


def _result(axis: str, value: str, workload: Workload, turns: Turns) -> Result:
    return {
        "name": f"scaling/{axis}",
        "value": int(value),
        "seconds_per_token": turns.median("gradients") / workload.batch_tokens,
        "optimizer_seconds": turns.median("optimizer"),
        "rows_per_expert": workload.batch_tokens * workload.model.top_k / workload.model.n_experts,
        "peak_memory_bytes": turns.peak_memory_bytes,
    }


def _make_step(workloads: dict[str, Workload], name: str) -> Callable[[], StepTimes]:
    return build("moe_gpt", workloads[name]).step


def plot(results: list[Result], path: Path) -> None:
    """Draw time for each token and memory over every axis, as the file's suffix says (.svg, .png, .pdf)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(result["name"].partition("/")[2] for result in results))
    lines = (("seconds_per_token", 1e6, "us/token, forward and backward"), ("peak_memory_bytes", 1e-9, "GB"))
    figure, rows = pyplot.subplots(2, len(axes), figsize=(3.2 * len(axes), 5.5), squeeze=False, sharex="col")
    for (row, (key, scale, label)), (column, axis) in itertools.product(enumerate(lines), enumerate(axes)):
        mine = [result for result in results if result["name"] == f"scaling/{axis}"]
        place = rows[row][column]
        place.plot([result["value"] for result in mine], [scale * result[key] for result in mine], marker="o")
        place.set_xscale("log", base=2)
        place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        place.set(xlabel=axis if row else "", ylabel="" if column else label)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
