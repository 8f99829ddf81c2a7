"""A tiny model that sees: random weights, its gates wide open, so that a wrong picture changes an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from made_up_checkpoint import save_checkpoint
from torch import Tensor

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.config.vision import PictureSourceConfig, SeeConfig
from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.saving.checkpoint import RunIdentity
from moe_gpt.training.step import TrainState
from moe_gpt.vision.seeing import SeeingModel, seeing_class

SIZE = 16
SEE = SeeConfig(sources=(PictureSourceConfig(builtin="scenes"),), size=SIZE, width=16)


def give_eyes(model: MoEGPT, see: SeeConfig = SEE) -> SeeingModel:
    """Return a model with the same text weights that looks hard at pictures."""
    torch.manual_seed(3)
    seeing = seeing_class(see).from_model(model)
    with torch.no_grad():
        for name, parameter in seeing.cross.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
            if name.endswith("gate"):
                parameter.fill_(0.7 if "attention" in name else -0.4)
    return seeing.eval()


def tiny_text_model(vocab_size: int, **changes: object) -> MoEGPT:
    """Return an untrained text model that varies its answers."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "head_dim": 16, "d_ff": 32, "n_experts": 8, "max_seq_len": 160}
    torch.manual_seed(0)
    return MoEGPT(ModelConfig(vocab_size=vocab_size, init_std=0.15, **(shape | changes))).eval()


def noise(seed: int, size: int = SIZE) -> UInt8[Tensor, "3 size size"]:
    """Return a picture of coloured noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)


def save_seeing_run(run_dir: Path, special_tokens: Sequence[str] = (), see: SeeConfig = SEE, **changes: object) -> Path:
    """Save a checkpoint of such a model, as if a stage had trained it; return the run folder."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog.\n"] * 20, 280)
    tokenizer = tokenizer.with_special_tokens(special_tokens) if special_tokens else tokenizer
    model = give_eyes(tiny_text_model(tokenizer.vocab_size, **changes), see)
    config = RunConfig(model=model.config, see=see)
    state = TrainState(model, build_optimizer(model, config.optimizer))
    save_checkpoint(run_dir, state, RunIdentity(config, tokenizer, {"prose": "abc"}, {"device": "cpu"}))
    return run_dir
