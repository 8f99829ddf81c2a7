"""The course of a run: sequence length, batch size, learning rate and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.section import (
    AtMostOne,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Problem,
    Section,
    unless,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """One row of the curriculum, in force until ``until_tokens`` tokens have been seen."""

    until_tokens: Count | None = None
    """Tokens seen when the stage ends, rounded down to whole sequences; null in the last row means one big epoch of the
    data."""
    seq_len: Count
    """Tokens per sequence."""
    batch_tokens: Count | tuple[Count, Count]
    """Tokens per optimizer step: a constant, or [first, last] of a linear ramp across the stage."""

    @property
    def end(self) -> int | None:
        """Tokens seen after the last whole sequence up to ``until_tokens``; None for one big epoch of the data."""
        return self.until_tokens and self.whole(self.until_tokens)

    def whole(self, tokens: int) -> int:
        """Return the tokens rounded down to whole sequences."""
        return tokens // self.seq_len * self.seq_len

    @property
    def batch_range(self) -> tuple[int, int]:
        """The batch size at the stage's start and at its end."""
        return self.batch_tokens if isinstance(self.batch_tokens, tuple) else (self.batch_tokens, self.batch_tokens)

    def problems(self) -> Iterator[Problem]:
        """Yield batch sizes that are not whole sequences."""
        for size in sorted(set(self.batch_range)):
            nearest = max(1, round(size / self.seq_len)) * self.seq_len
            text = f"batch_tokens must be a multiple of seq_len={self.seq_len}, got {size}; use {nearest}"
            yield from unless(size % self.seq_len == 0, text, "batch_tokens", "seq_len")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The curriculum of sequence length and batch size, and the shape of the learning rate."""

    stages: tuple[StageConfig, ...] = (StageConfig(seq_len=256, batch_tokens=16_384),)
    """The stage table."""
    warmup_tokens: CountOrZero = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "wsd", "none"] = "cosine"
    """How the learning rate falls to optimizer.min_lr after the warm-up. cosine: along a cosine. wsd (warm-up, stable,
    decay): linearly, over the last tokens only. none: the rate stays constant."""
    decay_fraction: AtMostOne = 0.2
    """Share of all tokens over which wsd decays."""

    def problems(self) -> Iterator[Problem]:
        """Yield stages out of order, and a warm-up that is longer than the run."""
        ends = [stage.end for stage in self.stages]
        for index, start in enumerate([0, *ends[:-1]]):
            yield from self._end_problems(index, start or 0)
        if ends[-1]:
            text = f"warmup_tokens must be below the run's {ends[-1]} tokens, got {self.warmup_tokens}"
            yield from unless(self.warmup_tokens < ends[-1], text, "warmup_tokens", "stages")

    def _end_problems(self, index: int, start: int) -> Iterator[Problem]:
        """Yield an end that is missing, or that leaves no room for a sequence after the previous stage's end."""
        stage, key = self.stages[index], f"stages.{index}.until_tokens"
        if stage.until_tokens is None:
            text = f"{key} may be null only in the last stage, got null in stage {index}"
            yield from unless(index == len(self.stages) - 1, text, key)
            return
        least = start + stage.seq_len
        after = f", one sequence of seq_len={stage.seq_len}" + f" after the previous stage's end {start}" * (index > 0)
        text = f"{key} must be at least {least}{after}, got {stage.until_tokens}"
        yield from unless(stage.until_tokens >= least, text, key, f"stages.{index}.seq_len")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101), or Muon for matrices."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters; or muon for the matrices of attention and experts, adamw for the rest."""
    state_type: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the running means are kept between steps: 4, 2 or about 1 byte a number. Fewer cost some loss."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    beta1: Fraction = 0.9
    """Decay of the running mean of gradients."""
    beta2: Fraction = 0.95
    """Decay of the running mean of squared gradients."""
    momentum: Fraction = 0.95
    """Decay of Muon's running mean of gradients."""
    eps: Positive = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms, embeddings and the balancing bias do not decay."""
    max_grad_norm: Positive = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""

    def problems(self) -> Iterator[Problem]:
        """Yield a learning rate that would rise at the end."""
        text = f"min_lr must be at most lr={self.lr}, got {self.min_lr}"
        yield from unless(self.min_lr <= self.lr, text, "min_lr", "lr")
