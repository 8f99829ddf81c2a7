"""Counts of parameters, taken from the model built on the meta device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import nn

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.model.experts import Experts, FeedForward
from moe_gpt.model.shapes import shapes_only


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


def model_of(config: RunConfig) -> ModelConfig:
    """Return a run's model with the vocabulary it will have: its own, or the tokenizer's."""
    vocab_size = config.model.vocab_size or config.data.tokenizer.vocab_size
    return dataclasses.replace(config.model, vocab_size=vocab_size)


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Build the model on the meta device and count; takes no memory for weights, whatever the size."""
    model = shapes_only(config)
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
