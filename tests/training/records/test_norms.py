"""Norms by group: what the groups are, and updates worked out afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VARIANTS, random_tokens, tiny_model

from moe_gpt.config import OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.data.batches import MicroBatch
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.records.norms import group_of, parameter_norms, update_norms
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState, train_step


def take_steps(n_steps: int, spoil: bool = False, **changes) -> tuple[dict, dict]:
    """Train a tiny model; return the last step's norms, and parameters before it and after it."""
    model = tiny_model(**changes)
    schedule = ScheduleConfig(stages=(StageConfig(seq_len=16, batch_tokens=32, until_tokens=320),))
    optimizer = OptimizerConfig(weight_decay=0.3, max_grad_norm=0.05)
    config = RunConfig(model=model.config, optimizer=optimizer, schedule=schedule)
    state = TrainState(model, build_optimizer(model, config.optimizer))
    batch = MicroBatch(random_tokens(2, 16), random_tokens(2, 16, seed=2))
    for _ in range(n_steps):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if spoil:
            model.final_norm.weight.data[0] = math.inf
            before["final_norm.weight"][0] = math.inf
        result = train_step(state, [batch], StepPlan(16, 32, 0.02), config, "fp32", with_norms=True)
    return result.norms, {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_steps", [1, 3])
def test_update_norms_are_how_far_parameters_moved(variant, n_steps):
    """Each group has the norm of the difference that the step made, with weight decay and clipping."""
    norms, parameters = take_steps(n_steps, **VARIANTS[variant])
    moved: dict[str, float] = {}
    for name, (before, after) in parameters.items():
        moved[group_of(name)] = moved.get(group_of(name), 0.0) + float((after - before).double().square().sum())
    for group, square in moved.items():
        # differences of float32 parameters are rounded more than the norm
        assert float(norms[f"{group}/update_norm"]) == pytest.approx(math.sqrt(square), rel=2e-3), group


def test_skipped_step_moves_nothing():
    """Its update has norm 0, whatever the moments are."""
    norms, _ = take_steps(1, spoil=True)
    assert {float(norm) for name, norm in norms.items() if name.endswith("/update_norm")} == {0.0}


def test_groups_by_hand():
    """Every parameter is in the group that its name says, and the groups' squares add up to the whole."""
    model = tiny_model()
    assert {group_of(name) for name, _ in model.named_parameters()} == {
        "embedding", "attention", "routers", "experts", "norms", "output",
    }  # fmt: skip
    assert group_of("blocks.0.feed_forward.gate_up.weight") == "feed_forward"
    assert group_of("blocks.3.feed_forward_norm.weight") == "norms"
    assert group_of("adapter.weight") == "other"
    whole = torch.nn.utils.get_total_norm(list(model.parameters()))
    squares = sum(float(norm) ** 2 for norm in parameter_norms(model).values())
    assert math.sqrt(squares) == pytest.approx(float(whole), rel=1e-5)


def test_parameters_without_gradient_have_no_update():
    """Frozen parameters are in no group of gradients and updates."""
    model = tiny_model()
    assert update_norms(model, {}) == {}
