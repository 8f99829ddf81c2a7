"""How a run shows its progress: at a terminal, or not at all."""

from __future__ import annotations

import datetime
import math
import time
from typing import Any

from moe_gpt.terminal.numbers import format_count
from moe_gpt.terminal.progress import ProgressBar
from moe_gpt.terminal.wrapping import wrap
from moe_gpt.training.evaluation import Score, format_scores


class Display:
    """Shows the progress of a run: override the methods. These show nothing."""

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show the newest metrics."""

    def evaluating(self, step: int) -> None:
        """Show that an evaluation begins."""

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show an evaluation."""

    def warn(self, text: str) -> None:
        """Show a warning at once."""

    def close(self) -> None:
        """End the display."""

    def summary(self) -> str:
        """Return what is left to show at the end."""
        return ""


class Silent(Display):
    """Shows nothing."""


class TerminalDisplay(Display):
    """A progress bar over tokens if stderr is a terminal, else a line now and then.

    Args:
        end: tokens seen when this process stops, unless ``max_minutes`` stops it earlier.
        tokens_seen: tokens seen when this process starts.
        max_minutes: the longest time that this process trains.
    """

    def __init__(self, end: int, tokens_seen: int, max_minutes: float | None = None) -> None:
        self._end, self._last = end, tokens_seen
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._bar = ProgressBar("training", end, tokens_seen)
        self._scores: dict[str, Score] = {}
        self._tokens = self._seconds = 0.0

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show loss and speed. The speed is the mean of all steps so far, without evaluations and saves."""
        is_first, new = not self._seconds, max(0, tokens_seen - self._last)
        self._last = tokens_seen
        self._tokens, self._seconds = self._tokens + new, self._seconds + new / line["tokens_per_second"]
        speed = self._tokens / self._seconds if self._seconds else line["tokens_per_second"]
        end = round(min(self._end, tokens_seen + speed * max(0.0, self._deadline - time.monotonic())))
        left = datetime.timedelta(seconds=round((end - tokens_seen) / speed))
        learned = _learned(line)
        note = f"{format_count(speed)} tokens/s, {left} left, {learned}"
        text = (
            f"step {line['step']}: {format_count(tokens_seen)} of {format_count(end)} tokens, {speed:,.0f} tokens/s, "
            f"{left} left\n    {learned}, lr {line['lr']:.2e}, {line['batch_tokens']:,} tokens a step in "
            f"sequences of {line['seq_len']}"
        )
        self._bar.update(tokens_seen, note, text, end)
        if is_first:
            self._bar.flush()

    def evaluating(self, step: int) -> None:
        """Show that an evaluation begins."""
        self._bar.flush()
        self._bar.describe("evaluating", f"evaluating at step {step}")

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show an evaluation, after the newest metrics."""
        self._bar.describe("training")
        parts = [f"{name} {s.ce_loss:.3f} ({s.bits_per_byte:.3f} bits per byte)" for name, s in scores.items()]
        if parts:
            self._bar.say(wrap(f"validation at step {step}: " + ", ".join(parts)))
        self._scores = scores

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._bar.warn(text)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def summary(self) -> str:
        """Return the last evaluation as a table; empty if there was none."""
        return "\n" + format_scores(self._scores) + "\n" if self._scores else ""


_MEASURES = (("reward", "kl"), ("pair_accuracy",), ("ce_loss",))
"""What tells people how a stage gets on; the first of them that its lines have."""


def _learned(line: dict[str, Any]) -> str:
    keys = next(keys for keys in _MEASURES if keys[0] in line)
    return ", ".join(f"{key} {'skipped' if line[key] is None else format(line[key], '.3f')}" for key in keys)
