"""Counts of parameters, taken from the model built on the meta device rather than from a formula."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from moe_gpt.config import ModelConfig
from moe_gpt.model.experts import Experts, FeedForward
from moe_gpt.model.transformer import MoEGPT


class ParameterCounts(NamedTuple):
    """Parameters of a model, shared ones counted once."""

    total: int
    active: int
    """Used for one token: all but the experts it is not sent to."""
    attention: int
    per_expert: int
    """One expert of every layer together; the feed-forward networks of a dense model."""
    router: int
    embedding: int
    """Embedding and, where it is not tied, output matrix."""


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Build the model on the meta device and count; takes no memory for weights, whatever the size."""
    with torch.device("meta"):
        model = MoEGPT(config if config.vocab_size else dataclasses.replace(config, vocab_size=1))
    experts = sum(_size(module) for module in model.modules() if isinstance(module, Experts | FeedForward))
    per_expert = experts // config.n_experts
    total = _size(model)
    return ParameterCounts(
        total=total,
        active=total - (config.n_experts - config.top_k) * per_expert,
        attention=sum(p.numel() for name, p in model.named_parameters() if ".attention." in name),
        per_expert=per_expert,
        router=sum(p.numel() for name, p in model.named_parameters() if ".router." in name),
        embedding=_size(nn.ModuleList([model.embedding, model.output])),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
