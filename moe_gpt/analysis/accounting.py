"""Counts of parameters, taken from the model built on the meta device, and of floating-point operations."""

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


class FlopsPerToken(NamedTuple):
    """Floating-point operations of a forward pass for one token; a multiplication and an addition are two."""

    attention_projections: int
    attention_scores: int
    """Products of queries with keys and of probabilities with values, over what a token sees on average."""
    feed_forward: int
    """The experts that a token is sent to."""
    router: int
    output: int

    @property
    def forward(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def training(self) -> int:
        """Forward and backward: a backward pass multiplies twice for each product of the forward pass."""
        return 3 * self.forward


def count_flops(config: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Count the matrix products of a forward pass over sequences of ``seq_len`` (as in PaLM, arXiv 2204.02311, app. B).

    Twice the parameters of each matrix that a token meets, and 2 · 2 · n_heads · head_dim for each of the
    (seq_len + 1) / 2 positions that it sees on average: the causal half, where PaLM counts all. Norms, softmax,
    the embedding's look-up and what is computed twice to save memory do not count.
    """
    counts = count_parameters(config)
    attention_of_a_layer = counts.attention * config.attention_sharing // config.n_layers
    vocab_size = config.vocab_size or 1
    return FlopsPerToken(
        attention_projections=2 * attention_of_a_layer * config.n_layers,
        attention_scores=2 * config.n_heads * config.head_dim * (seq_len + 1) * config.n_layers,
        feed_forward=2 * config.top_k * counts.per_expert,
        router=2 * counts.router,
        output=2 * vocab_size * config.d_model,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
