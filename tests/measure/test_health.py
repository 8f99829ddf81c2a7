"""Health: silent on healthy routers, and right about routers that are broken on purpose, each in its way."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch

from moe_gpt.config import FaultConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.data.batches import MicroBatch
from moe_gpt.measure.health import Gradients, find_problems
from moe_gpt.measure.observation import cross_entropy_gradients, observe_routing
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.records.lines import describe_routing
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState, train_step

EVERY, SEQ_LEN, N_SEQUENCES = 5, 32, 16
MODEL = ModelConfig(
    vocab_size=256,
    n_layers=2,
    d_model=32,
    n_heads=2,
    head_dim=16,
    d_ff=32,
    n_experts=8,
    max_seq_len=SEQ_LEN,
    init_std=0.05,
)


HEALTHY = [
    {},
    {"balance": "bias", "bias_update_rate": 0.01},
    {"n_experts": 4, "top_k": 1, "normalize_topk": False},
]


class Favourites(Router):
    """Chooses two experts whatever the token is."""

    def scores(self, x, router_probs):
        """Put them far above the others."""
        return router_probs + torch.tensor([9.0, 0, 0, 9, 0, 0, 0, 0])


class Shunned(Router):
    """Never chooses expert 5."""

    def scores(self, x, router_probs):
        """Put it far below the others."""
        return router_probs - 9 * (torch.arange(8) == 5)


class Frozen(Router):
    """Learns nothing."""

    def logits(self, x):
        """Cut the gradient."""
        return super().logits(x).detach()


class Blind(Router):
    """Sees the same in every token."""

    def logits(self, x):
        """Route the batch's mean."""
        return super().logits(x.mean(dim=0, keepdim=True).expand_as(x)) + 0.01 * super().logits(x)


class Drifting(Router):
    """Prefers expert 2 more from call to call."""

    n_calls = 0

    def scores(self, x, router_probs):
        """Add a little more each time."""
        self.n_calls += 1
        return router_probs + 0.001 * self.n_calls * (torch.arange(8) == 2)


def grow_logits(model: MoEGPT) -> None:
    """Let the router's weights grow by themselves."""
    for block in model.blocks:
        block.feed_forward.router.weight.data *= 1.04


def train_and_judge(router=Router, after_step=lambda model: None, seed=0, n_steps=240, **changes) -> dict[str, str]:
    """Train on text as bytes; return the problems found on the way and at the end, by kind."""
    lr, faults = 4e-3, FaultConfig(routing_window=n_steps // 6)
    torch.manual_seed(seed)
    model = MoEGPT(dataclasses.replace(MODEL, **changes), make_router=router)
    stage = StageConfig(seq_len=SEQ_LEN, batch_tokens=N_SEQUENCES * SEQ_LEN, until_tokens=10**6)
    config = RunConfig(model=model.config, schedule=ScheduleConfig(stages=(stage,)), loss=LossConfig())
    state = TrainState(model, build_optimizer(model, OptimizerConfig(lr=lr)))
    topics = importlib.import_module("pydoc_data.topics").topics
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    records, found = [], {}
    for step in range(1, n_steps + 1):
        starts = torch.randint(len(text) - SEQ_LEN - 1, (N_SEQUENCES,))
        window = text[starts[:, None] + torch.arange(SEQ_LEN + 1)]
        plan = StepPlan(SEQ_LEN, N_SEQUENCES * SEQ_LEN, lr * min(1, step / 20))
        batch = MicroBatch(window[:, :-1], window[:, 1:])
        sample = observe_routing(model, batch, "fp32") if step % EVERY == 0 else None
        result = train_step(state, [batch], plan, config, "fp32")
        after_step(model)
        if sample is not None:
            records.append(describe_routing(result.router_stats, sample))
            found |= {p.kind: p.text for p in find_problems(records, None, model.config, faults, EVERY)}
    gradients = cross_entropy_gradients(model, window[:, :-1].numpy(), window[:, 1:].numpy(), "fp32")
    return found | {p.kind: p.text for p in find_problems(records, gradients, model.config, faults, EVERY)}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("changes", HEALTHY, ids=str)
def test_healthy_routers_have_no_problems(seed, changes):
    """At no time of a run, whatever the seed."""
    assert train_and_judge(seed=seed, **changes) == {}


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("routing_collapsed", {"router": Favourites}),
        ("dead_experts", {"router": Shunned}),
        ("router_not_learning", {"router": Frozen}),
        ("routing_ignores_input", {"router": Blind}),
        ("imbalance_growing", {"router": Drifting}),
        ("z_growing", {"after_step": grow_logits}),
    ],
)
def test_broken_routers_are_found_out(kind, broken):
    """Each by the problem that it has."""
    assert kind in train_and_judge(n_steps=120, **broken)


def record(**changes) -> dict:
    """Return a recorded step of a healthy router with two layers of four experts."""
    values = {
        "load": [[1.1, 0.9, 1.2, 0.8]] * 2,
        "max_violation": [0.2, 0.2],
        "router_z_loss": [7.0, 7.0],
        "mean_probability_entropy": [0.99, 0.99],
        "token_entropy": [0.9, 0.9],
    }
    return values | changes


def judge(records, gradients=None, every=50, **model):
    """Judge with windows of four records."""
    return find_problems(records, gradients, ModelConfig(n_experts=4, **model), FaultConfig(), every)


def test_problems_by_hand():
    """Each threshold on either side; layers are named; texts have the numbers."""
    growing = [record(max_violation=[0.2, v], router_z_loss=[z, 7.0]) for v, z in ((0.8, 20), (1.0, 25), (1.3, 31))]
    found = judge([r for r in growing for _ in range(4)])
    assert [(p.kind, p.layer) for p in found] == [("z_growing", 0), ("imbalance_growing", 1)]
    assert "had 1.8 times the mean load, now 2.3" in found[1].text
    assert judge([r for r in growing for _ in range(4)][:-1]) == []  # less than three windows
    (blind,) = judge([record(token_entropy=[0.9, 0.986])] * 12)
    assert (blind.kind, blind.layer) == ("routing_ignores_input", 1)
    assert "0.40% of what they could" in blind.text
    (frozen,) = judge([record()], Gradients(np.array([1e-5, 0.1]), np.array([0.1, 0.1])), top_k=1, normalize_topk=False)
    assert (frozen.kind, frozen.layer) == ("router_not_learning", 0)
    assert "model.normalize_topk=false" in frozen.advice


def test_nothing_is_said_of_dense_models_and_of_nothing():
    """No experts, no records."""
    assert judge([]) == []
    assert find_problems([record()] * 12, None, ModelConfig(n_experts=1, top_k=1), FaultConfig(), 50) == []


def test_steps_that_were_not_finite_are_no_problem_of_the_router():
    """Their values are unknown (null in the file), and unknown is not small."""
    unknown = record(token_entropy=[None, None], router_z_loss=[None, None])
    assert judge([record()] * 8 + [unknown] + [record()] * 3) == []
