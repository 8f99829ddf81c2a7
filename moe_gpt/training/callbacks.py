"""Callbacks, which a run calls after steps, evaluations and saves and at its end. They may stop the run."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_gpt.config.section import Count, NonNegative, require
from moe_gpt.errors import InputError
from moe_gpt.training.evaluation import Score

if TYPE_CHECKING:
    from moe_gpt.training.setup import Run
    from moe_gpt.training.step import StepResult


class Callback:
    """Override the methods that you need. If a method other than on_end returns True, the run saves and stops.

    A callback must not change the run, because a resume would not repeat the change.
    """

    def on_step(self, run: Run, result: StepResult) -> bool | None:
        """Called after a step. The metrics are still on the device; reading a metric waits for the device."""

    def on_evaluation(self, run: Run, scores: dict[str, Score]) -> bool | None:
        """Called after an evaluation, with the score of each source's held-out text."""

    def on_save(self, run: Run, checkpoint: Path) -> bool | None:
        """Called after a checkpoint is on disk. Saves run in the background, so its step may be earlier."""

    def on_end(self, run: Run, outcome: str) -> None:
        """Called at the end of training, after the last checkpoint."""


@dataclasses.dataclass
class EarlyStopping(Callback):
    """Stop when the mean validation loss has not improved for ``patience`` evaluations.

    Only evaluations of this process count. A resumed run starts the count at zero.
    """

    patience: int = 3
    """Evaluations in a row without improvement after which the run stops."""
    min_improvement: float = 0.0
    """Smallest improvement that counts, in nats per token."""
    best: float = dataclasses.field(default=math.inf, init=False)
    n_worse: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        require(Count, patience=self.patience)
        require(NonNegative, min_improvement=self.min_improvement)

    def on_evaluation(self, run: Run, scores: dict[str, Score]) -> bool:
        """Return True if the run should stop."""
        loss = statistics.fmean(score.ce_loss for score in scores.values())
        is_better = loss < self.best - self.min_improvement
        self.best, self.n_worse = (loss, 0) if is_better else (self.best, self.n_worse + 1)
        return self.n_worse >= self.patience


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise ``InputError`` unless every callback is an object with a method of ``Callback``."""
    if not isinstance(callbacks, list | tuple):
        raise InputError(f"callbacks must be a list, got {callbacks!r}; write callbacks=[...]")
    for callback in callbacks:
        if isinstance(callback, type) or not any(
            hasattr(callback, name) for name in vars(Callback) if name[:3] == "on_"
        ):
            raise InputError(
                f"a callback must be an object with on_step, on_evaluation, on_save or on_end, got {callback}"
            )


class Callbacks:
    """Calls several callbacks, and remembers whether any of them returned True."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks, self.wants_stop = run, callbacks, False

    def tell(self, event: str, *details: Any) -> None:
        """Call this method of each callback that has it."""
        methods = [getattr(callback, event) for callback in self.callbacks if hasattr(callback, event)]
        answers = [method(self.run, *details) for method in methods]
        self.wants_stop |= any(answer is True for answer in answers)
