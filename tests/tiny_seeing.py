"""A tiny model that sees: random weights, its gates wide open, so that a wrong picture changes an answer."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from moe_gpt.config import ModelConfig
from moe_gpt.config.vision import PictureSourceConfig, SeeConfig
from moe_gpt.model.transformer import MoEGPT
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
