"""Floating-point operations of a forward and backward pass, and of a whole schedule."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from moe_gpt.config import ModelConfig, ScheduleConfig
from moe_gpt.errors import InputError
from moe_gpt.measure.parameters import ParameterCounts, count_parameters

_MOST_TOKENS = 1e20
"""More is a slip of the keyboard, and beyond what numbers of eight bytes add up exactly."""


class StageTokens(NamedTuple):
    """A stage of the schedule that is trained on."""

    seq_len: int
    tokens: int


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
    (seq_len + 1) / 2 positions that it sees on average: the causal half, where PaLM counts all. Norms, softmax, the
    embedding's look-up and what is computed twice to save memory do not count. ``counts`` saves counting again.
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


def stage_tokens(schedule: ScheduleConfig, tokens: float | None = None) -> list[StageTokens]:
    """Return the tokens of each stage; with ``tokens`` the run ends there, and its last stage is cut or prolonged.

    Raises:
        InputError: where the last stage ends with the data, whose size is not known here, and no tokens are given.
    """
    end = schedule.stages[-1].end
    if tokens is not None:
        if not 1 <= tokens <= _MOST_TOKENS:
            raise InputError(f"tokens must be from 1 to {_MOST_TOKENS:.0e}, got {tokens:g}")
        end = round(tokens)
    if end is None:
        key = f"schedule.stages.{len(schedule.stages) - 1}.until_tokens"
        raise InputError(f"{key} is null, one big epoch of the data; give the tokens to plan for (--tokens)")
    ends = [*(min(end, stage.end or end) for stage in schedule.stages[:-1]), end]
    parts = zip(schedule.stages, itertools.pairwise([0, *ends]), strict=True)
    return [StageTokens(stage.seq_len, stop - start) for stage, (start, stop) in parts if stop > start]


def training_flops(model: ModelConfig, stages: list[StageTokens], counts: ParameterCounts) -> int:
    """Return the FLOPs of all matrix products, forward and backward, summed exactly over the stages."""
    return sum(stage.tokens * count_flops(model, stage.seq_len, counts).training for stage in stages)


def multiplied_parameters(model: ModelConfig, counts: ParameterCounts) -> int:
    """Return N of 6 N D: the active parameters, without an embedding that is only looked up (a tied one counts)."""
    return counts.active - (0 if model.tie_embeddings else (model.vocab_size or 1) * model.d_model)
