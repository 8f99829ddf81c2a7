"""How a run goes along its tokens: the curricula, the learning rate, the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from moe_gpt.config.section import AtMostOne, Count, CountOrZero, Fraction, NonNegative, Positive, Problem, Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """One row of the curriculum: holds until that many tokens have been seen."""

    until_tokens: Count | None = None
    """tokens_seen at which the stage ends; null in the last row means one big epoch of the data."""
    seq_len: Count
    """Tokens per sequence."""
    batch_tokens: Count | tuple[Count, Count]
    """Tokens per optimizer step: a constant, or [first, last] of a linear ramp across the stage."""

    @property
    def batch_range(self) -> tuple[int, int]:
        """The batch size at the stage's start and at its end."""
        return self.batch_tokens if isinstance(self.batch_tokens, tuple) else (self.batch_tokens, self.batch_tokens)

    def problems(self) -> Iterator[Problem]:
        """Yield batch sizes that are not whole sequences."""
        for size in sorted(set(self.batch_range)):
            if size % self.seq_len:
                nearest = max(1, round(size / self.seq_len)) * self.seq_len
                text = f"batch_tokens must be a multiple of seq_len={self.seq_len}, got {size}; use {nearest}"
                yield Problem(("batch_tokens", "seq_len"), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The curriculum of sequence length and batch size, and the shape of the learning rate."""

    stages: tuple[StageConfig, ...] = (StageConfig(seq_len=256, batch_tokens=16_384),)
    """The stage table."""
    warmup_tokens: CountOrZero = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "wsd", "none"] = "cosine"
    """How it falls to optimizer.min_lr: by a cosine, linearly at the end (warm-up, stable, decay), or never."""
    decay_fraction: AtMostOne = 0.2
    """Share of all tokens that the linear decay of wsd takes."""

    def problems(self) -> Iterator[Problem]:
        """Yield stages out of order and ends that whole sequences do not reach."""
        start = 0
        for index, stage in enumerate(self.stages):
            key, end = f"stages.{index}.until_tokens", stage.until_tokens
            if end is None:
                if index < len(self.stages) - 1:
                    yield Problem((key,), f"{key} may be null only in the last stage, got null in stage {index}")
                break
            if end <= start:
                yield Problem((key,), f"{key} must be greater than the previous stage's end {start}, got {end}")
            else:
                yield from self._unaligned_end(index, key, end)
            start = end
        total = self.stages[-1].until_tokens
        if total is not None and self.warmup_tokens >= total:
            text = f"warmup_tokens must be below the run's {total} tokens, got {self.warmup_tokens}"
            yield Problem(("warmup_tokens", "stages"), text)

    def _unaligned_end(self, index: int, key: str, end: int) -> Iterator[Problem]:
        """Yield a stage end that would leave part of a sequence, of its own length or of the next stage's."""
        seq_lens = [stage.seq_len for stage in self.stages[index : index + 2]]
        unit = math.lcm(*seq_lens)
        if end % unit:
            whose = " and of the next stage's ".join(f"seq_len={seq_len}" for seq_len in seq_lens)
            text = f"{key} must be a multiple of {whose}, got {end}; use {max(1, round(end / unit)) * unit}"
            yield Problem((key, f"stages.{index}.seq_len"), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101)."""

    lr: Positive = 3e-3
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    beta1: Fraction = 0.9
    """Decay of the running mean of gradients."""
    beta2: Fraction = 0.95
    """Decay of the running mean of squared gradients."""
    eps: Positive = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms, embeddings and the balancing bias do not decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""

    def problems(self) -> Iterator[Problem]:
        """Yield a learning rate that would rise at the end."""
        if self.min_lr > self.lr:
            yield Problem(("min_lr", "lr"), f"min_lr must be at most lr={self.lr}, got {self.min_lr}")
