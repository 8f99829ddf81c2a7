"""Counts of parameters, taken from the model built on the meta device, and of floating-point operations."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import nn

from moe_gpt.analysis.quantities import PlanSection, Quantity
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
    def backward(self) -> int:
        """Two products for each of the forward pass: the gradients of its input and of its weights or other input."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def count_flops(config: ModelConfig, seq_len: int, counts: ParameterCounts | None = None) -> FlopsPerToken:
    """Count the matrix products of a forward pass over sequences of ``seq_len`` (as in PaLM, arXiv 2204.02311, app. B).

    Twice the parameters of each matrix that a token meets, and 2 · 2 · n_heads · head_dim for each of the
    (seq_len + 1) / 2 positions that it sees on average: the causal half, where PaLM counts all. Norms, softmax,
    the embedding's look-up and what is computed twice to save memory do not count.

    Args:
        config: the shape.
        seq_len: positions.
        counts: of the same config, where they are known already.
    """
    counts = counts or count_parameters(config)
    attention_of_a_layer = counts.attention * config.attention_sharing // config.n_layers
    vocab_size = config.vocab_size or 1
    return FlopsPerToken(
        attention_projections=2 * attention_of_a_layer * config.n_layers,
        attention_scores=2 * config.n_heads * config.head_dim * (seq_len + 1) * config.n_layers,
        feed_forward=2 * config.top_k * counts.per_expert,
        router=2 * counts.router,
        output=2 * vocab_size * config.d_model,
    )


def parameters_section(config: ModelConfig, counts: ParameterCounts | None = None) -> PlanSection:
    """Say what the parameters are, and which dense models have as many.

    Args:
        config: the shape.
        counts: of the same config, where they are known already.
    """
    counts = counts or count_parameters(config)
    experts = config.n_experts * counts.per_expert
    norms = counts.total - counts.attention - experts - counts.router - counts.embedding
    layers = counts.total - counts.embedding - config.d_model
    dense_d_ff = config.top_k * config.d_ff

    def counted(name: str, value: int, label: str, formula: str = "read off the model built on meta") -> Quantity:
        return Quantity(name, value, "parameters", label, formula, "counted")

    return PlanSection(
        "parameters",
        "Parameters",
        [
            counted("total", counts.total, "Total"),
            counted("active", counts.active, "Active per token", "total - (n_experts - top_k) per_expert"),
            counted("attention", counts.attention, "Attention, shared by all experts"),
            counted("per_expert", counts.per_expert, "One expert, all layers together"),
            counted("experts", experts, "All experts", "n_experts per_expert"),
            counted("router", counts.router, "Routers"),
            counted("embedding", counts.embedding, "Embedding, and output matrix where it is not tied"),
            counted("norms", norms, "Norms", "total - attention - experts - router - embedding"),
            counted("per_layer", layers // config.n_layers, "One layer", "(total - embedding - d_model) / n_layers"),
            counted(
                "per_layer_active",
                (layers - (config.n_experts - config.top_k) * counts.per_expert) // config.n_layers,
                "One layer, active per token",
                "per_layer - (n_experts - top_k) per_expert / n_layers",
            ),
            counted(
                "dense_of_same_active",
                counts.active - counts.router,
                f"Dense model that computes as much for a token (d_ff {dense_d_ff:,})",
                "active - router: one feed-forward network of d_ff top_k in each layer",
            ),
            counted(
                "dense_of_same_total",
                counts.total - counts.router,
                f"Dense model that stores as much (d_ff {config.n_experts * config.d_ff:,})",
                "total - router: one feed-forward network of d_ff n_experts in each layer",
            ),
            Quantity(
                "active_fraction",
                counts.active / counts.total,
                "fraction",
                "Active of all",
                "active / total",
                "counted",
            ),
        ],
        notes=[] if config.attention_sharing == 1 else ["Layers that share attention share its parameters, too."],
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
