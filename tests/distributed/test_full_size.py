"""What each rank of the reported cluster holds, counted on the meta device, against what the planner says."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_gpt.config import RunConfig
from moe_gpt.config.yaml import load_run_config
from moe_gpt.distributed.cut import local_part
from moe_gpt.distributed.layout import plan_layout
from moe_gpt.distributed.parallelize import parallelize
from moe_gpt.errors import InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.plan.hardware import Parallelism
from moe_gpt.plan.memory import FLOAT32, stage_parameters, zero_bytes
from moe_gpt.training.optimizer import build_optimizer

SIZES = {"pipeline=15": 120}
"""Ranks of layouts that need another number than 128."""


def n_ranks(layout: list[str]) -> int:
    """Return how many ranks a layout has."""
    return next((SIZES[setting] for setting in layout if setting in SIZES), 128)


def held_by(rank: int, config: RunConfig, n: int) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state that a rank keeps."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    try:
        with torch.device("meta"):
            model = MoEGPT(config.model)
        parallelize(model, config, plan_layout(config, n))
        optimizer = build_optimizer(model, config.optimizer)
        parts = {p: local_part(p) for p in model.parameters()}
        optimizer_state = 0
        for parameter, part in parts.items():
            names = [name for name, (shape, _) in optimizer.state_shapes(parameter).items() if shape]
            optimizer_state += len(names) * part.nbytes
        weights = sum(part.nbytes for part in parts.values())
        return {"weights": weights, "gradients": weights, "optimizer": optimizer_state}
    finally:
        dist.destroy_process_group()


def planned(config: RunConfig, stage: int, n: int) -> dict[str, float]:
    """Return what the planner says for every rank of a stage."""
    own = config.parallel
    spread = Parallelism(n, own.tensor, own.pipeline, own.expert, own.zero)
    held = stage_parameters(config.model, spread, stage)
    shared = zero_bytes(held.shared, spread.batch_ranks, spread.zero_level, FLOAT32)
    experts = zero_bytes(held.experts, spread.data_parallel, spread.zero_level, FLOAT32)
    return {key: getattr(shared, key) + getattr(experts, key) for key in shared._fields}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(
    "layout",
    [
        ["expert=16"],
        ["tensor=8"],
        ["tensor=8", "expert=16"],
        ["pipeline=8"],
        ["pipeline=4", "tensor=8"],
        ["pipeline=15", "tensor=8"],
    ],
    ids=" ".join,
)
def test_every_rank_of_the_reported_model_holds_what_the_plan_says(layout, place):
    """A gradient has the shape of its parameter's part."""
    config, n = load_run_config("gpt4.yaml", [f"parallel.{setting}" for setting in layout]), n_ranks(layout)
    rank = {"first": 0, "middle": n // 2, "last": n - 1}[place]
    wanted, found = planned(config, rank * config.parallel.pipeline // n, n), held_by(rank, config, n)
    for kind, n_bytes in found.items():
        assert n_bytes == pytest.approx(wanted[kind], rel=1e-3), kind


def test_ranks_that_do_not_divide_the_experts_are_refused():
    """120 data ranks of the reported layout would hold up to seven times their share."""
    config = load_run_config("gpt4.yaml")
    with pytest.raises(InputError, match="cannot be cut into 120 parts"):
        plan_layout(config, 120)
