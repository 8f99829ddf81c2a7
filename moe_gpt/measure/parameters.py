"""Counts of parameters, taken from the model built on the meta device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import nn

from moe_gpt.config import ModelConfig, RunConfig
from moe_gpt.measure.shapes import shapes_only


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
    """Build one layer on the meta device and count; takes no memory for weights and no time for layers."""
    model = shapes_only(dataclasses.replace(config, n_layers=1, attention_sharing=1))
    experts, attention, router = (_size(model, part) for part in (".experts.", ".attention.", ".router."))
    experts = experts or _size(model, ".feed_forward.")  # of a dense model
    n_layers, n_attentions = config.n_layers, config.n_layers // config.attention_sharing
    per_expert = n_layers * experts // config.n_experts
    layers = n_layers * (_size(model, "blocks.") - attention) + n_attentions * attention
    total = layers + _size(model) - _size(model, "blocks.")
    return ParameterCounts(
        total=total,
        active=total - (config.n_experts - config.top_k) * per_expert,
        attention=n_attentions * attention,
        per_expert=per_expert,
        router=n_layers * router,
        embedding=_size(model, "embedding.") + _size(model, "output."),
    )


def _size(model: nn.Module, part: str = "") -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if part in name)
