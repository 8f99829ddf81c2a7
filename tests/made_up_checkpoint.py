"""A training state after one step, and a checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_gpt.config import CheckpointConfig, ModelConfig, RunConfig
from moe_gpt.data.batches import MicroBatch
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.saving.checkpoint import RunIdentity
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.store import CheckpointSaver
from moe_gpt.training.schedule import StepPlan
from moe_gpt.training.step import TrainState, train_step


def make_run(seed: int = 0, **settings) -> tuple[TrainState, RunIdentity]:
    """Return a state and what is saved beside it."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 2, "head_dim": 16, "d_ff": 32, "n_experts": 4, **settings}
    tokenizer = train_tokenizer(["some text to learn from"], 300)
    config = RunConfig(model=ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    torch.manual_seed(seed)
    model = MoEGPT(config.model)
    state = TrainState(model, build_optimizer(model, config.optimizer))
    tokens = torch.randint(200, (2, 17))
    plan = StepPlan(16, 32, 1e-3)
    train_step(state, [MicroBatch(tokens[:, :-1], tokens[:, 1:])], plan, config, "fp32")
    return state, RunIdentity(config, tokenizer, {"prose": "abc"}, {"device": "cpu"})


def save_checkpoint(run_dir: Path, state: TrainState, identity: RunIdentity, **policy) -> Path:
    """Save it; return where."""
    CheckpointSaver(run_dir, identity, CheckpointConfig(**policy)).save(state, wait=True)
    return list_checkpoints(run_dir)[-1]
