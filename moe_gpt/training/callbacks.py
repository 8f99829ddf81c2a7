"""Callbacks: told of steps, evaluations, saves and the end of a run while it trains; they may stop it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_gpt.training.evaluation import Score

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run
    from moe_gpt.training.step import StepResult


class Callback:
    """Told what happens; override what you need. Returning True stops the run after this step, saved.

    A callback must not change the run: what it changes is not there after a resume.
    """

    def on_step(self, run: Run, result: StepResult) -> bool | None:
        """Take note of a step; its metrics are still on the device, and reading one waits for it."""

    def on_evaluation(self, run: Run, scores: dict[str, Score]) -> bool | None:
        """Take note of an evaluation: the score of each source's held-out text."""

    def on_save(self, run: Run, checkpoint: Path) -> bool | None:
        """Take note of a checkpoint that is on the disk; saving happens in the background, so it may be of earlier."""

    def on_end(self, run: Run, outcome: str) -> None:
        """Take note of the end, after the last checkpoint."""


@dataclasses.dataclass
class EarlyStopping(Callback):
    """Stop when the mean validation loss has not become better for some evaluations.

    It counts the evaluations of this process: after a resume it starts anew.
    """

    patience: int = 3
    """Evaluations in a row that may be no better than the best one."""
    min_improvement: float = 0.0
    """Nats per token that count as better."""
    best: float = dataclasses.field(default=math.inf, init=False)
    n_worse: int = dataclasses.field(default=0, init=False)

    def on_evaluation(self, run: Run, scores: dict[str, Score]) -> bool:
        """Return whether it is time to stop."""
        loss = statistics.fmean(score.ce_loss for score in scores.values())
        is_better = loss < self.best - self.min_improvement
        self.best, self.n_worse = (loss, 0) if is_better else (self.best, self.n_worse + 1)
        return self.n_worse >= self.patience


class Callbacks:
    """Tells several callbacks, and remembers whether one of them asked to stop."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks, self.wants_stop = run, callbacks, False

    def tell(self, event: str, *details: Any) -> None:
        """Call a method of each callback that has it."""
        for callback in self.callbacks:
            answer = getattr(callback, event, _nothing)(self.run, *details)
            self.wants_stop = self.wants_stop or answer is True


def _nothing(*details: Any) -> None:
    """Stand for a method that a callback does not have."""
