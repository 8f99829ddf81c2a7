"""The curriculum and the learning rate as pure functions of ``tokens_seen``.

``schedule.at(tokens_seen)`` is the plan of the step that starts there; a schedule has no state. Longer sequences and
larger batches later in the run are rows of the stage table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from moe_gpt.config import OptimizerConfig, ScheduleConfig, StageConfig
from moe_gpt.errors import InputError


class StepPlan(NamedTuple):
    """What one optimizer step does."""

    seq_len: int
    batch_tokens: int
    lr: float


class StepSchedule(Protocol):
    """A schedule of your own in place of the stage table. Only ``at`` is required.

    An optional attribute ``total_tokens`` says where the run ends; the default is the end of the stage table.
    """

    def at(self, tokens_seen: int) -> StepPlan:
        """Return the plan of the step that starts after ``tokens_seen`` tokens; equal arguments give equal plans."""


class Stage(NamedTuple):
    """A row of the stage table with its first and last token."""

    start: int
    end: int
    config: StageConfig


class Schedule:
    """The stage table in which every stage has an end.

    Args:
        config: the stages and the learning rate's shape.
        optimizer: peak and final learning rate.
        big_epoch_tokens: the end of a last stage that has none, rounded down to whole sequences.

    Raises:
        InputError: if the data is too small for the stages, or the warm-up is longer than the run.
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
        sequences. A step that would cross the stage's end is shortened to end on it. Sequences end on multiples of
        their length, so that none crosses a chunk of the stream; where a step starts between two multiples, it is one
        shorter sequence. The learning rate is that of the step's last token, so the first is above 0 and the last is
        exactly ``min_lr``. An only step is both, and has the peak where ``min_lr`` is 0.
        """
        if not 0 <= tokens_seen < self.total_tokens:
            raise ValueError(f"tokens_seen must be at least 0 and below {self.total_tokens}, got {tokens_seen}")
        stage = self.stages[bisect_right(self._ends, tokens_seen)]
        seq_len = stage.config.seq_len
        first, last = stage.config.batch_range
        ramped = first + (last - first) * (tokens_seen - stage.start) // (stage.end - stage.start)
        batch_tokens = min(stage.config.whole(ramped), stage.end - tokens_seen)
        if short := -tokens_seen % seq_len:
            seq_len = batch_tokens = short
        only = self._optimizer.lr * (batch_tokens == self.total_tokens)
        return StepPlan(seq_len, batch_tokens, self.lr_after(tokens_seen + batch_tokens) or only)

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


class OwnSchedule(Schedule):
    """A user's schedule in place of the stage table, with every plan checked.

    Args:
        given: makes the plans.
        table: the config's stage table; the data is laid out for its sequence lengths.
        max_seq_len: the model's longest context.
    """

    def __init__(self, given: StepSchedule, table: Schedule, max_seq_len: int) -> None:
        if isinstance(given, type) or not hasattr(given, "at"):
            raise InputError(f"a schedule must be an object with at(tokens_seen), got {given!r}")
        self.given, self.stages, self._max_seq_len = given, table.stages, max_seq_len
        self.total_tokens = getattr(given, "total_tokens", table.total_tokens)
        self._chunk_tokens = chunk_tokens([stage.config for stage in table.stages])

    def at(self, tokens_seen: int) -> StepPlan:
        """Return the given schedule's plan; the last step may go beyond ``total_tokens``."""
        plan: Any = self.given.at(tokens_seen)
        if not isinstance(plan, tuple) or len(plan) != len(StepPlan._fields):
            problem = "a plan must be a StepPlan(seq_len, batch_tokens, lr)"
        else:
            problem = self._problem_of_lengths(*plan[:2]) or _problem_of_lr(plan[2])
        if problem:
            name = type(self.given).__qualname__
            raise InputError(f"the schedule {name} gives {plan!r} after {tokens_seen:,} tokens, but {problem}")
        return StepPlan(*plan)

    def _problem_of_lengths(self, seq_len: Any, batch_tokens: Any) -> str:
        """Describe the problem of a plan's lengths; empty if there is none."""
        if not isinstance(seq_len, int) or not 1 <= seq_len <= self._max_seq_len:
            return f"seq_len must be a whole number from 1 to model.max_seq_len={self._max_seq_len}"
        if self._chunk_tokens % seq_len:
            return f"seq_len must divide {self._chunk_tokens}; add a stage with this seq_len to schedule.stages"
        if not isinstance(batch_tokens, int) or batch_tokens < 1 or batch_tokens % seq_len:
            return f"batch_tokens must be a positive multiple of seq_len={seq_len}"
        return ""


def _problem_of_lr(lr: float) -> str:
    return "" if 0 <= lr < math.inf else "lr must be a number of at least 0"


def chunk_tokens(stages: Sequence[StageConfig]) -> int:
    """Return how many tokens the stream takes from one source at a time: whole sequences of every stage."""
    return math.lcm(*(stage.seq_len for stage in stages))


def step_ends(schedule: Schedule, tokens_seen: int = 0) -> Iterator[int]:
    """Yield the tokens seen after each remaining step of a schedule."""
    while tokens_seen < schedule.total_tokens:
        tokens_seen += schedule.at(tokens_seen).batch_tokens
        yield tokens_seen


def tokens_after(schedule: Schedule, n_steps: int, tokens_seen: int = 0) -> int:
    """Return the tokens seen after ``n_steps`` more steps, or at the end of the schedule if that comes first.

    Where both are more than 10 million steps away, the end is returned: nobody waits until such steps are counted.
    """
    if min(n_steps, estimate_steps(schedule)) > _MOST_COUNTED:
        return schedule.total_tokens
    return max((tokens_seen, *itertools.islice(step_ends(schedule, tokens_seen), max(0, n_steps))))


_MOST_COUNTED = 10_000_000


def estimate_steps(schedule: Schedule) -> float:
    """Return about how many optimizer steps a stage table has: each stage's tokens over its mean batch."""
    ranges = [(stage.end - stage.start, *stage.config.batch_range) for stage in schedule.stages]
    # the mean of a batch that grows linearly, by steps, is its logarithmic mean
    return sum(
        n * (math.log(last / first) / (last - first) if last > first else 1 / first) for n, first, last in ranges
    )


def count_steps(schedule: Schedule) -> int:
    """Return the optimizer steps of a whole schedule; an estimate above 10 million."""
    if (estimate := estimate_steps(schedule)) > _MOST_COUNTED:
        return round(estimate)
    return sum(1 for _ in step_ends(schedule))


def rounded_ends(schedule: Schedule) -> Iterator[str]:
    """Say which stages end before their ``until_tokens``, and which begin with a shorter sequence because of that."""
    for index, (start, end, config) in enumerate(schedule.stages):
        seq_len, until = config.seq_len, config.until_tokens
        if short := -start % seq_len:
            yield f"stage {index} begins with one sequence of {short:,} tokens, up to the next multiple of {seq_len:,}"
        if until not in (None, end):
            last = f"the last whole sequence of {seq_len:,} before until_tokens={until:,}"
            yield f"stage {index} ends at {end:,} tokens, {last}"


_HALVINGS = 12
"""To find the share of a schedule that has a given number of steps."""


def fit_schedule(
    config: ScheduleConfig, optimizer: OptimizerConfig, schedule: Schedule, n_steps: int
) -> ScheduleConfig:
    """Return the stage table shrunk to at most ``n_steps`` optimizer steps, and close to that many.

    Every stage's end and the warm-up shrink by the same factor; sequence lengths and batch sizes stay.

    Args:
        schedule: made of ``config`` and ``optimizer``.
    """
    share = min(1.0, n_steps / count_steps(schedule))
    low, high = 0.5 * share, min(1.0, 1.2 * share)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = count_steps(Schedule(_shrunk(config, schedule, middle, n_steps), optimizer, 0)) <= n_steps
        low, high = (middle, high) if fits else (low, middle)
    fitted = _shrunk(config, schedule, 1.0 if high == share == 1.0 else low, n_steps)
    if count_steps(Schedule(fitted, optimizer, 0)) > n_steps:
        raise InputError(
            f"schedule.stages cannot end in {n_steps} steps, because each stage needs one; raise --max-steps"
        )
    return fitted


def _shrunk(config: ScheduleConfig, schedule: Schedule, share: float, n_steps: int) -> ScheduleConfig:
    stages, start = [], 0
    for index, stage in enumerate(schedule.stages):
        seq_len, common = stage.config.seq_len, chunk_tokens([s.config for s in schedule.stages[index : index + 2]])
        unit = seq_len if stage.end % common else common  # so that the next stage, too, begins with a whole sequence
        end = round(stage.end * share / unit) * unit
        if end < start + seq_len:
            raise InputError(f"schedule.stages.{index} would have no step in {n_steps} steps; raise --max-steps")
        stages.append(dataclasses.replace(stage.config, until_tokens=end))
        start = end
    warmup_tokens = min(int(config.warmup_tokens * share), start - 1)
    return dataclasses.replace(config, stages=tuple(stages), warmup_tokens=warmup_tokens)


def _with_ends(config: ScheduleConfig, big_epoch_tokens: int) -> Iterator[Stage]:
    start = 0
    for index, stage in enumerate(config.stages):
        if stage.until_tokens is None and big_epoch_tokens < start + stage.seq_len:
            raise InputError(
                f"schedule.stages.{index} starts at {start} tokens and needs seq_len={stage.seq_len} more, but one "
                f"big epoch has {big_epoch_tokens}; give until_tokens, or end the previous stage earlier"
            )
        end = stage.end or stage.whole(big_epoch_tokens)
        yield Stage(start, end, stage)
        start = end
