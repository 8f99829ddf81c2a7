"""Several processes against one."""

import dataclasses

import pytest

from moe_gpt.bench.contenders import SHAPES, Workload
from moe_gpt.bench.devices import bench_devices
from moe_gpt.config import ParallelConfig


@pytest.mark.slow
def test_processes_are_measured_together_and_apart():
    """Each arrangement trains, and efficiencies are those of the speeds."""
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "head_dim": 16, "d_ff": 32, "n_experts": 4, "vocab_size": 64}
    model = dataclasses.replace(SHAPES["S"][0], **sizes)
    said: list[str] = []
    results = bench_devices(
        Workload(model, 4, 16, "cpu", "fp32", 64), ParallelConfig(zero=1), 2, 1, 2, said.append, warmup=1
    )
    speed = {result["name"]: result.get("tokens_per_second") for result in results}
    by_name = {result["name"]: result["fraction"] for result in results}
    assert by_name["devices/strong"] == speed["devices/strong"] / speed["devices/one"]
    assert by_name["devices/weak"] == speed["devices/weak"] / speed["devices/one thread"] / 2
    assert by_name["devices/collectives"] == 1 - speed["devices/strong"] / speed["devices/apart"]
    assert "of the time of strong scaling is in collectives" in said[-1]
