"""Whole training steps against peers: ``moe-gpt bench train``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import torch

from moe_gpt.bench.contenders import CONTENDERS, StepTimes, Workload, build, dense_twin
from moe_gpt.bench.results import Result, tabulate
from moe_gpt.bench.rounds import Turns, require, take_turns, timed
from moe_gpt.config import ModelConfig
from moe_gpt.errors import InputError
from moe_gpt.measure.flops import count_flops
from moe_gpt.ops.device import Precision, tune_process

PEERS = {
    "dense": ["dense"],
    "transformers": ["transformers/eager", "transformers/grouped_mm", "transformers/mistral"],
}
NOT_COMPARED = {"transformers/batched_mm": "copies the weights of its experts for every token"}
_GEMM = "gemm"
_COLUMNS = {
    "": "{name}",
    "tokens/s": "{tokens_per_second:count}",
    "quartiles": "{lower_quartile:count} to {upper_quartile:count}",
    "step": "{seconds_per_step:seconds}",
    "optimizer": "{optimizer_seconds:seconds}",
    "memory": "{peak_memory_bytes:bytes}",
    "a token": "{flops_per_token:FLOPs}",
    "of peak": "{mfu:.1%}",
    "moe_gpt is": "{ratio:.2f} x",
}


def bench_train(
    workload: Workload, against: Sequence[str], rounds: int, steps: int, say: Callable[[str], None], warmup: int = 5
) -> list[Result]:
    """Measure moe_gpt and its peers, which are keys of ``PEERS`` or names of contenders; return a result for each.

    A turn is of ``steps`` optimizer steps, after ``warmup`` steps.
    """
    names = _contenders(against)
    at_once = torch.device(workload.device).type == "cpu"
    make = functools.partial(make_step, workload)
    turns = take_turns([_GEMM, *names], make, rounds, steps, warmup=warmup, at_once=at_once, say=say)
    require(turns, "moe_gpt")
    peak = statistics.median(turns.pop(_GEMM).values)
    say(describe(workload))
    say(f"GEMM peak of this run {peak / 1e9:,.0f} GFLOP/s")
    results = [result_of(name, turns[name], workload, peak) for name in names if turns[name].values]
    say(tabulate(results, _COLUMNS, first_over="tokens_per_second"))
    if "transformers" in against:
        for name, reason in NOT_COMPARED.items():
            say(f"{name} is left out: it {reason}")
    return results


def _contenders(against: Sequence[str]) -> list[str]:
    names = ["moe_gpt", *(name for group in against for name in PEERS.get(group, [group]))]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise InputError(f"--against must be among {', '.join([*PEERS, *CONTENDERS])}, got {', '.join(unknown)}")
    return names


def make_step(workload: Workload, name: str) -> Callable[[], StepTimes] | Callable[[], float]:
    """Return what takes a contender's step, or measures the GEMM peak."""
    if name == _GEMM:
        return functools.partial(gemm_speed, torch.device(workload.device), workload.precision)
    return build(name, workload).step


def gemm_speed(device: torch.device, precision: Precision, size: int | None = None) -> float:
    """Return the FLOP/s of the fastest of three square matrix products, as the device's peak."""
    tune_process(device)
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(device, lambda: torch.mm(a, b)) for _ in range(3))


def describe(workload: Workload) -> str:
    """Return shape, batch and precision in a line."""
    m = workload.model
    return (
        f"vocabulary {m.vocab_size}, d_model {m.d_model}, {m.n_layers} layers, {m.n_heads} x {m.head_dim} heads on "
        f"{m.n_kv_heads}, {m.n_experts} experts top-{m.top_k}, d_ff {m.d_ff}; {workload.n_sequences} x "
        f"{workload.seq_len} tokens a step; {workload.device}, {workload.precision}"
        + (", compiled" if workload.compile else "")
    )


def model_of(workload: Workload, name: str) -> ModelConfig:
    """Return the shape that a contender has: the workload's, or its dense twin."""
    return dense_twin(workload.model) if name == "dense" or name.endswith("/mistral") else workload.model


def result_of(name: str, turns: Turns, workload: Workload, peak: float) -> Result:
    """Return speed, memory and share of the peak (FLOP/s) of a contender."""
    model = model_of(workload, name)
    totals = [step.total for step in turns.values]
    low, _, high = statistics.quantiles(totals, n=4) if len(totals) > 1 else (totals[0],) * 3
    seconds = turns.median("total")
    flops = count_flops(model, workload.seq_len).training
    tokens_per_second = workload.batch_tokens / seconds
    return {
        "name": name,
        "tokens_per_second": tokens_per_second,
        "lower_quartile": workload.batch_tokens / high,
        "upper_quartile": workload.batch_tokens / low,
        "seconds_per_step": seconds,
        "optimizer_seconds": turns.median("optimizer"),
        "peak_memory_bytes": turns.peak_memory_bytes,
        "flops_per_token": flops,
        "mfu": tokens_per_second * flops / peak,
    }
