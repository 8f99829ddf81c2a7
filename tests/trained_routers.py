"""Small training runs whose routers are healthy, or broken on purpose, each in its way.

``tests/fixtures/routers.json`` has what a run of each kind recorded. ``python tests/trained_routers.py`` trains them
again (a minute on one core) and writes that file anew.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_gpt.config import FaultConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from moe_gpt.data.batches import MicroBatch
from moe_gpt.measure.health import Gradients, RouterProblem, find_problems
from moe_gpt.measure.observation import cross_entropy_gradients, observe_routing
from moe_gpt.model.router import Router
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.records.lines import describe_routing
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState, train_step

FIXTURE = Path(__file__).parent / "fixtures" / "routers.json"
EVERY, SEQ_LEN, N_SEQUENCES, LR = 5, 32, 16, 4e-3
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
LOOKED_AT = ("load", "max_violation", "router_z_loss", "mean_probability_entropy", "token_entropy")


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


HEALTHY: dict[str, dict[str, Any]] = {
    "balanced by a loss": {},
    "balanced by a bias": {"balance": "bias", "bias_update_rate": 0.01},
    "one expert a token": {"n_experts": 4, "top_k": 1, "normalize_topk": False},
}
_BRIEFLY = {"n_steps": 120, "window": 20}
BROKEN: dict[str, dict[str, Any]] = {
    "routing_collapsed": {"router": Favourites, **_BRIEFLY},
    "dead_experts": {"router": Shunned, **_BRIEFLY},
    "router_not_learning": {"router": Frozen, **_BRIEFLY},
    "routing_ignores_input": {"router": Blind, **_BRIEFLY},
    "imbalance_growing": {"router": Drifting, **_BRIEFLY},
    "z_growing": {"after_step": grow_logits, **_BRIEFLY},
}
"""By the problem that each has."""


class RecordedRun(NamedTuple):
    """What the check of routers looks at."""

    model: ModelConfig
    window: int
    """Steps that are looked at together (``faults.routing_window``)."""
    records: list[dict[str, Any]]
    """Of every fifth step."""
    gradients: Gradients
    """At the end."""

    def problems(self) -> Iterator[RouterProblem]:
        """Yield what is found on the way, after each record, and at the end."""
        faults = FaultConfig(routing_window=self.window)
        for n_records in range(1, len(self.records) + 1):
            yield from find_problems(self.records[:n_records], None, self.model, faults, EVERY)
        yield from find_problems(self.records, self.gradients, self.model, faults, EVERY)


def train(router=Router, after_step=lambda model: None, seed=0, n_steps=240, window=40, **changes) -> RecordedRun:
    """Train on text as bytes."""
    torch.manual_seed(seed)
    model = MoEGPT(dataclasses.replace(MODEL, **changes), make_router=router)
    stage = StageConfig(seq_len=SEQ_LEN, batch_tokens=N_SEQUENCES * SEQ_LEN, until_tokens=10**6)
    config = RunConfig(model=model.config, schedule=ScheduleConfig(stages=(stage,)), loss=LossConfig())
    state = TrainState(model, build_optimizer(model, OptimizerConfig(lr=LR)))
    topics = importlib.import_module("pydoc_data.topics").topics
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    records = []
    for step in range(1, n_steps + 1):
        starts = torch.randint(len(text) - SEQ_LEN - 1, (N_SEQUENCES,))
        tokens = text[starts[:, None] + torch.arange(SEQ_LEN + 1)]
        plan = StepPlan(SEQ_LEN, N_SEQUENCES * SEQ_LEN, LR * min(1, step / 20))
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:])
        sample = observe_routing(model, batch, "fp32") if step % EVERY == 0 else None
        result = train_step(state, [batch], plan, config, "fp32")
        after_step(model)
        if sample is not None:
            records.append(describe_routing(result.router_stats, sample))
    gradients = cross_entropy_gradients(model, tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), "fp32")
    return RecordedRun(model.config, window, records, gradients)


def read_recorded() -> dict[str, RecordedRun]:
    """Return the recorded runs by name."""
    runs = {}
    for name, found in json.loads(FIXTURE.read_text()).items():
        records = [dict(zip(LOOKED_AT, values, strict=True)) for values in found["records"]]
        model = dataclasses.replace(MODEL, **found["model"])
        runs[name] = RecordedRun(model, found["window"], records, Gradients(*map(np.array, found["gradients"])))
    return runs


def write_recorded() -> None:
    """Train each kind once and write what it recorded."""
    runs = {}
    for name, case in (HEALTHY | BROKEN).items():
        run = train(**case)
        runs[name] = {
            "model": {key: value for key, value in case.items() if hasattr(MODEL, key)},
            "window": run.window,
            "records": [[np.round(record[key], 4).tolist() for key in LOOKED_AT] for record in run.records],
            "gradients": [norms.tolist() for norms in run.gradients],
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run, separators=(',', ':'))}" for name, run in runs.items())
    FIXTURE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    write_recorded()
