"""The curriculum and the learning rate as pure functions of ``tokens_seen``.

Nothing is advanced and nothing is mutated: ``schedule.at(tokens_seen)`` is the plan of the step that starts there.
The reports raise the sequence length step by step and the batch size over days; both are rows of the stage table.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from moe_gpt.config import OptimizerConfig, ScheduleConfig, StageConfig
from moe_gpt.errors import InputError


class StepPlan(NamedTuple):
    """What one optimizer step does."""

    seq_len: int
    batch_tokens: int
    lr: float


class Stage(NamedTuple):
    """A row of the stage table with both of its ends."""

    start: int
    end: int
    config: StageConfig


class Schedule:
    """The stage table with its ends known.

    Args:
        config: the stages and the learning rate's shape.
        optimizer: peak and final learning rate.
        big_epoch_tokens: what a last stage without an end runs to, rounded down to whole sequences.

    Raises:
        InputError: where the data is too small for the stages, or the warm-up longer than the run.
    """

    def __init__(self, config: ScheduleConfig, optimizer: OptimizerConfig, big_epoch_tokens: int) -> None:
        self._config, self._optimizer = config, optimizer
        self.stages = tuple(_with_ends(config, big_epoch_tokens))
        self.total_tokens = self.stages[-1].end
        self._ends = [stage.end for stage in self.stages]
        if config.warmup_tokens >= self.total_tokens:
            raise InputError(
                f"schedule.warmup_tokens must be below the run's {self.total_tokens} tokens, got {config.warmup_tokens}"
            )

    def at(self, tokens_seen: int) -> StepPlan:
        """Return the plan of the step that starts after ``tokens_seen`` tokens.

        A ramped batch grows linearly with tokens_seen from the stage's start to its end, rounded down to whole
        sequences. A step that would cross the stage's end is shortened to end on it. The learning rate is that of
        the step's last token, so the first is above 0 and the last is exactly ``min_lr``.

        Raises:
            ValueError: where ``tokens_seen`` is not inside the run.
        """
        if not 0 <= tokens_seen < self.total_tokens:
            raise ValueError(f"tokens_seen must be at least 0 and below {self.total_tokens}, got {tokens_seen}")
        stage = self.stages[bisect_right(self._ends, tokens_seen)]
        seq_len = stage.config.seq_len
        first, last = stage.config.batch_range
        ramped = first + (last - first) * (tokens_seen - stage.start) // (stage.end - stage.start)
        batch_tokens = min(ramped // seq_len * seq_len, stage.end - tokens_seen)
        return StepPlan(seq_len, batch_tokens, self.lr_after(tokens_seen + batch_tokens))

    def lr_after(self, tokens: int) -> float:
        """Return the learning rate of a step that ends after ``tokens`` tokens."""
        warmup, peak, low = self._config.warmup_tokens, self._optimizer.lr, self._optimizer.min_lr
        if tokens < warmup:
            return peak * tokens / warmup
        if self._config.decay == "none":
            return peak
        if self._config.decay == "cosine":
            progress = (tokens - warmup) / (self.total_tokens - warmup)
            return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
        decay_tokens = min(self._config.decay_fraction * self.total_tokens, self.total_tokens - warmup)
        return low + (peak - low) * min(1.0, (self.total_tokens - tokens) / decay_tokens)


def _with_ends(config: ScheduleConfig, big_epoch_tokens: int) -> Iterator[Stage]:
    start = 0
    for index, stage in enumerate(config.stages):
        end = stage.until_tokens
        if end is None:
            end = start + (big_epoch_tokens - start) // stage.seq_len * stage.seq_len
            if end <= start:
                raise InputError(
                    f"schedule.stages.{index} starts at {start} tokens and needs seq_len={stage.seq_len} more, but one "
                    f"big epoch of the data has {big_epoch_tokens}; give until_tokens, or end the one before earlier"
                )
        yield Stage(start, end, stage)
        start = end
