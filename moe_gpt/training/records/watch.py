"""Warnings of loss spikes and unhealthy routers; each is shown once, when the problem begins."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from moe_gpt.config import FaultConfig, RunConfig
from moe_gpt.measure.health import Gradients, find_problems


class Finding(NamedTuple):
    """A warning for the terminal and for events.jsonl."""

    kind: str
    step: int
    text: str


class SpikeDetector:
    """Compares each step's cross entropy with the mean and standard deviation of the steps before it."""

    def __init__(self, config: FaultConfig) -> None:
        self._window: deque[float] = deque(maxlen=config.spike_window)
        self._deviations = config.spike_deviations
        self._quiet = 0

    def read(self, line: dict[str, Any]) -> Iterator[Finding]:
        """Yield a warning if a step's loss is a spike; at most one per window."""
        loss = line["ce_loss"]
        if loss is None or not math.isfinite(loss):
            return
        self._quiet = max(0, self._quiet - 1)
        if len(self._window) == self._window.maxlen and not self._quiet:
            yield from self._judge(loss, line["step"])
        self._window.append(loss)

    def _judge(self, loss: float, step: int) -> Iterator[Finding]:
        """Compare a loss with a full window."""
        size = len(self._window)
        mean = sum(self._window) / size
        deviation = math.sqrt(sum((x - mean) ** 2 for x in self._window) / size)
        if loss > mean + self._deviations * deviation and loss > mean:
            self._quiet = size
            deviations = (loss - mean) / max(deviation, 1e-12)
            text = (
                f"ce_loss {loss:.3f} at step {step} is {deviations:.0f} standard deviations above the mean {mean:.3f} "
                f"of the {size} steps before; if the loss stays high, lower optimizer.lr or "
                "optimizer.max_grad_norm"
            )
            yield Finding("loss_spike", step, text)


class HealthWatch:
    """Finds unhealthy routers in the newest records, and warns when a problem begins."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._window = config, 3 * config.faults.routing_window // max(1, config.train.record_every_steps)
        self._records: deque[dict[str, Any]] = deque(maxlen=max(3, self._window))
        self._gradients: Gradients | None = None
        self._told: set[tuple[str, int]] = set()

    def read(self, records: Iterable[dict[str, Any]]) -> Iterator[Finding]:
        """Add recorded steps; yield a warning for each new problem."""
        for record in records:
            if "routing" in record:
                self._records.append(record["routing"])
                yield from self._judge(record["step"])

    def read_evaluation(self, gradients: Gradients | None, step: int) -> Iterator[Finding]:
        """Add the gradients of an evaluation after the first step; yield a warning for each new problem."""
        if step and gradients is not None:
            self._gradients = gradients
            yield from self._judge(step)

    def _judge(self, step: int) -> Iterator[Finding]:
        config = self._config
        every = config.train.record_every_steps
        problems = find_problems(list(self._records), self._gradients, config.model, config.faults, every)
        for problem in problems:
            if (problem.kind, problem.layer) not in self._told:
                text = f"layer {problem.layer}: {problem.text}, at step {step}; {problem.advice}"
                yield Finding(problem.kind, step, text)
        self._told = {(problem.kind, problem.layer) for problem in problems}
