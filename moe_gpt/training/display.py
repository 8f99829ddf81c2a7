"""Who is told what happens while a run trains: a person at a terminal, or nobody."""

from __future__ import annotations

import datetime
import time
from typing import Any, Protocol

from moe_gpt.terminal.progress import ProgressBar
from moe_gpt.training.evaluation import Score, format_scores


class Display(Protocol):
    """Who is told what happens."""

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show the newest metrics."""

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show an evaluation."""

    def warn(self, text: str) -> None:
        """Show something that a person should know now."""


class Silent:
    """Shows nothing."""

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show nothing."""

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show nothing."""

    def warn(self, text: str) -> None:
        """Show nothing."""


class TerminalDisplay:
    """A progress bar over tokens where stderr is a terminal, otherwise a line now and then.

    Args:
        total_tokens: of the whole run.
        tokens_seen: when this process begins.
    """

    def __init__(self, total_tokens: int, tokens_seen: int) -> None:
        self._total = total_tokens
        self._bar = ProgressBar("training", total_tokens, tokens_seen)
        self._scores: dict[str, Score] = {}
        self._first: tuple[float, int] | None = None

    def progress(self, tokens_seen: int, line: dict[str, Any]) -> None:
        """Show loss and speed."""
        ce_loss = "skipped" if line["ce_loss"] is None else f"{line['ce_loss']:.3f}"
        note = f"ce_loss {ce_loss}, seq_len {line['seq_len']}"
        self._bar.update(tokens_seen, note, self._line(tokens_seen, ce_loss, line), self._total)

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Show an evaluation, after the newest metrics."""
        self._bar.flush()
        parts = [f"{name} {s.ce_loss:.3f} ({s.bits_per_byte:.3f} bits per byte)" for name, s in scores.items()]
        self._bar.say(f"validation at step {step}: " + ", ".join(parts))
        self._scores = scores

    def _line(self, tokens_seen: int, ce_loss: str, line: dict[str, Any]) -> str:
        now = time.monotonic()
        self._first = self._first or (now, tokens_seen)
        started_at, started_with = self._first
        speed = line["tokens_per_second"]
        if tokens_seen > started_with:  # the mean since the first line; that one knows only its own speed
            speed = (tokens_seen - started_with) / (now - started_at)
        left = datetime.timedelta(seconds=round((self._total - tokens_seen) / speed))
        return (
            f"step {line['step']}: {tokens_seen:,} tokens, ce_loss {ce_loss}, lr {line['lr']:.2e}, "
            f"{line['batch_tokens']:,} tokens a step in sequences of {line['seq_len']}, "
            f"{line['tokens_per_second']:,.0f} tokens/s, {left} left"
        )

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._bar.warn(text)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def summary(self) -> str:
        """Return the last evaluation as a table, nothing where there was none."""
        return "\n" + format_scores(self._scores) + "\n" if self._scores else ""
