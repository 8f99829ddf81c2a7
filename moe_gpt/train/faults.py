"""Watching for numerical faults: steps that are not finite, loss spikes, experts that nobody uses.

A step whose loss or gradient is not finite moves nothing (``train_step``). After a series of them the run goes back to
its last good checkpoint and past all tokens since: the skipped steps moved nothing, so going back to any later point
would be no change at all. (PaLM, arXiv 2204.02311, section 5.1, does the same by hand: it restarts about 100 steps
before a spike and skips the data around it.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_gpt.config import FaultConfig, ModelConfig


class TrainingStopped(RuntimeError):
    """Training could not go on. The message says why, what is saved, and what to do. Scripts exit with status 3."""


class TooManySkips(Exception):  # noqa: N818 (a turn of events inside the loop, not an error)
    """So many steps in a row were not finite that the run must go back."""

    def __init__(self, step: int, tokens_seen: int, n_steps: int) -> None:
        super().__init__(step, tokens_seen, n_steps)
        self.step, self.tokens_seen, self.n_steps = step, tokens_seen, n_steps


class Finding(NamedTuple):
    """Something a person should know, for the terminal and for events.jsonl."""

    kind: str
    step: int
    text: str


def past_skipped(windows: Sequence[tuple[int, int]], tokens_seen: int) -> int:
    """Return the first place at or after ``tokens_seen`` that lies in none of the windows [start, end)."""
    for start, end in sorted(windows):
        if start <= tokens_seen < end:
            tokens_seen = end
    return tokens_seen


class SpikeDetector:
    """Compares each step's cross entropy with the mean and deviation of those before it."""

    def __init__(self, config: FaultConfig) -> None:
        self._window: deque[float] = deque(maxlen=config.spike_window)
        self._deviations = config.spike_deviations
        self._quiet = 0

    def read(self, line: dict[str, Any]) -> Iterator[Finding]:
        """Yield a warning where a step's loss is a spike; at most one per window."""
        loss, window = line["ce_loss"], self._window
        if loss is None or not math.isfinite(loss):
            return
        self._quiet = max(0, self._quiet - 1)
        if len(window) == window.maxlen and not self._quiet:
            mean = sum(window) / len(window)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / len(window))
            if loss > mean + self._deviations * deviation and loss > mean:
                self._quiet = len(window)
                step, deviations = line["step"], (loss - mean) / max(deviation, 1e-12)
                yield Finding(
                    "loss_spike",
                    step,
                    f"ce_loss {loss:.3f} at step {step} is {deviations:.0f} standard deviations above the mean "
                    f"{mean:.3f} of the {len(window)} steps before; if it does not come back, lower optimizer.lr or "
                    "optimizer.max_grad_norm",
                )
        window.append(loss)


class RoutingWatch:
    """Counts assignments on the device and judges them a window of steps at a time."""

    def __init__(self, config: FaultConfig, model: ModelConfig) -> None:
        self._config, self._model = config, model
        self._counts: Tensor | None = None
        self._steps = 0
        self._told: set[tuple[str, int]] = set()

    def add(self, tokens_per_expert: Tensor) -> None:
        """Add a step's assignments (L, E); nothing is fetched from the device."""
        if len(tokens_per_expert):
            self._counts = tokens_per_expert if self._counts is None else self._counts + tokens_per_expert
            self._steps += 1

    def read(self, step: int) -> Iterator[Finding]:
        """Yield a warning for each layer that has dead experts or has collapsed, when it begins to be so."""
        if self._counts is None or self._steps < self._config.routing_window:
            return
        shares = self._counts.double().cpu()
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1)
        self._counts, steps, self._steps = None, self._steps, 0
        found = set()
        for layer, loads in enumerate(shares):
            dead = torch.nonzero(loads * len(loads) < self._config.dead_expert_load).flatten().tolist()
            busiest = loads.topk(self._model.top_k).values.sum().item()
            if dead:
                found.add(("dead_experts", layer))
                text = f"layer {layer}: experts {', '.join(map(str, dead))} of {len(loads)} are nearly unused"
                yield from self._tell("dead_experts", layer, step, steps, text)
            if busiest > self._config.collapsed_share and self._model.n_experts > self._model.top_k:
                found.add(("routing_collapsed", layer))
                text = f"layer {layer}: {self._model.top_k} experts get {busiest:.0%} of all assignments"
                yield from self._tell("routing_collapsed", layer, step, steps, text)
        self._told = found

    def _tell(self, kind: str, layer: int, step: int, steps: int, text: str) -> Iterator[Finding]:
        if (kind, layer) not in self._told:
            advice = {
                "loss": "raise loss.load_balancing_loss_weight, or lower optimizer.lr",
                "bias": "raise model.bias_update_rate, or lower optimizer.lr",
                "none": "use model.balance=loss or model.balance=bias",
            }[self._model.balance]
            yield Finding(kind, step, f"{text} in the last {steps} steps, at step {step}; {advice}")
